"""The chat format both ways: messages to token ids (`encode_chat`), and ids to a reply (`ReplyParser`).

Mistral's chat format changed with every tokenizer version; `FORMATS` lists all that differs. This model's is v15:

    <s>[SYSTEM_PROMPT]…[/SYSTEM_PROMPT]
    [AVAILABLE_TOOLS]json[/AVAILABLE_TOOLS][MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS]
    [INST]question[/INST] [THINK]…[/THINK]answer</s>
    [INST]question[/INST] [TOOL_CALLS]name[ARGS]json</s> [TOOL_RESULTS]…[/TOOL_RESULTS] answer</s>

(control tokens in brackets; the line breaks and spaces between the parts are not there). A chat passes through three
forms: messages, the user's JSON, are checked; turns are messages with neighbours of one role merged; pieces are what a
turn is written with, control tokens and texts.

Each text is encoded on its own, never as part of one long string that spells out the control tokens. This way nothing
that a user types can become a control token (a literal "[/INST]" is encoded as ordinary characters), BPE cannot merge
the end of one text with the start of the next (so every text has the ids that the model saw in training), and the loss
mask falls exactly between tokens.

The ids are those of mistral-common's `encode_chat_completion`. The two differ in what they accept:

                                                               mistral-common              here
    a tool result that answers no call, or one twice           accepted                    refused
    a message key that neither knows                           ignored                     refused unless empty
    thinking as a list of texts (the API's form)               refused                     accepted
    tool calls in the form that `generate.py --json` prints    refused                     accepted
    "weight": 0 on an assistant's message                      kept for a trainer to read  not trained on
    images at web addresses; audio; tokenizers v1 and v2       accepted                    refused
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

from runtime.files import Fields, require, within
from runtime.tokenizer import StreamDecoder, Tokenizer

FUNCTION = re.compile("[a-zA-Z0-9_-]{1,64}")

# What a text is called, how it looks, and how that is said.
NAME = "the function name", FUNCTION, "1 to 64 letters, digits, underscores or dashes"
ID = "the tool call id", re.compile("[a-zA-Z0-9]{9}"), "nine letters or digits with this tokenizer"
FREE_ID = "the tool call id", re.compile(".+", re.DOTALL), "a string that is not empty"


@dataclass(frozen=True)
class Format:
    """What distinguishes the chat format of one tokenizer version."""

    system_turn: bool  # a system message is a turn of its own; else it opens the last user turn
    tools_first: bool  # tools stand before the first user turn; else before the last
    text_with_calls: bool  # one assistant turn may hold both text and tool calls
    calls: str  # "list": [TOOL_CALLS][{…}, …]; "id" and "plain": [TOOL_CALLS]name([CALL_ID]id)[ARGS]{…} for each call
    results: str  # "json": {"content": …, "call_id": …}; "id": id[TOOL_CONTENT]content; "content": only the content
    sort_results: bool  # tool results are put into the order of their calls
    ids: tuple  # what a call id looks like, ID or FREE_ID
    text_join: str  # what joins the text parts of one message
    thinking: tuple[str, ...]  # roles whose messages may hold thinking
    images: tuple[str, ...]  # roles whose messages may hold images


# v3, the first with tools, writes calls and results as JSON and puts system prompt and tools next to the last question.
# v7 gives the system prompt control tokens of its own and writes results without JSON. v11 writes calls singly, only
# their arguments as JSON, and results in the order of the calls. v13 adds thinking, moves the tools to the front, so
# that a growing chat keeps its beginning, and drops the call ids: the order says what answers what. v15 adds settings
# such as the reasoning effort, allows images in results and joins text parts without a blank line.
# fmt: off
FORMATS = {
    #             system tools  text and                   sort    call   text    roles that may have
    #             turn   first  calls    calls    results  results ids    join    thinking, images
    "v3":  Format(False, False, False,  "list",  "json",    False, ID, "\n\n", (), ("user",)),
    "v7":  Format(True,  False, True,   "list",  "id",      False, ID, "\n\n", (), ("user",)),
    "v11": Format(True,  False, True,   "id",    "id",      True,  ID, "\n\n", (), ("user",)),
    "v13": Format(True,  True,  True,   "plain", "content", True,  FREE_ID, "\n\n", ("assistant", "system"), ("user",)),
    "v15": Format(True,  True,  True,   "plain", "content", True,  FREE_ID, "",     ("assistant",), ("user", "tool")),
}
# fmt: on

KEYS = {  # role -> the keys that its messages may hold; others only if they are empty, as clients send them
    "system": {"role", "content", "name"},  # `name` says nothing to the model
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "prefix", "weight", "reasoning", "reasoning_content"},
    "tool": {"role", "content", "name", "tool_call_id"},
}

EMPTY = (None, "", [], {})

ENDS = {  # training? -> roles that the last message may have
    False: (("user", "tool"), 'to be answered they must end with a user or tool message, or a "prefix": true'),
    True: (("assistant",), "for training they must end with an assistant message"),
}

PLACES = [f"call{i:05d}" for i in range(100)]  # ids for calls in the form of generate.py's output, which has none

BRACKETS = {  # role -> what its turns begin and end with
    "system": (["[SYSTEM_PROMPT]"], ["[/SYSTEM_PROMPT]"]),
    "user": (["[INST]"], ["[/INST]"]),
    "assistant": ([], ["</s>"]),
    "tool": (["[TOOL_RESULTS]"], ["[/TOOL_RESULTS]"]),
}


@dataclass
class Encoded:
    """A chat as the model reads it."""

    ids: list[int]
    targets: list[bool]  # for each id: did an assistant write it, and is it trained on? (the loss mask)
    images: list[str]  # image URLs, in the order of their tokens
    thinks: bool = False  # the reply continues a thought that the last message began


@dataclass
class Part:
    """A piece of a message's content."""

    value: str  # for an image its URL
    kind: str = "text"  # or "thinking" or "image_url"
    closed: bool = True  # False: thinking that the model is to continue


@dataclass(eq=False)
class Message:
    """One message that was checked; after merging, one turn."""

    role: str
    content: list[Part]
    where: str = ""  # "messages[3]"; a merged turn has that of its first message
    calls: list[dict] = field(default_factory=list)  # {"name", "arguments": any JSON value, "id" if it has one}
    call_id: str | None = None  # of the call that a tool message answers
    place: int = 0  # of that call among its answer's calls
    prefix: bool = False  # the model is to continue this message
    weight: float | None = None  # 0: not trained on


def encode_chat(
    tokenizer: Tokenizer,
    messages: list[dict],
    tools: list[dict] | None = None,
    reasoning_effort: str | None = None,
    image_grid: Callable[[str], tuple[int, int]] | None = None,
    training: bool = False,
) -> Encoded:
    """The ids of a chat in OpenAI's chat-completions form.

    For generation the chat ends with a user or tool message, or with an assistant message that has `"prefix": true` and
    is to be continued; for training it ends with an assistant message. `image_grid` maps an image's URL to its size in
    (rows, columns) of [IMG] tokens; without it images are refused. Raises UserError, which names the message.
    """
    form = FORMATS.get(tokenizer.version)
    require(form, f"tokenizer version {tokenizer.version} has no supported chat format ({', '.join(FORMATS)})")
    preamble = [
        *_wrapped("AVAILABLE_TOOLS", _each("tools", [] if tools is None else tools, _read_tool)),
        *_wrapped("MODEL_SETTINGS", _read_settings(tokenizer, reasoning_effort)),
    ]
    require(messages, "messages should be a list with at least one message")
    read = _each("messages", messages, _read_message, form)
    _check_order(read, training)
    _match_results(read, form, training)
    turns = _merge(read, form)
    users = [turn for turn in turns if turn.role == "user"]
    after_preamble = users[:1] if form.tools_first else users[-1:]

    ids, targets = [tokenizer.bos_id], [False]
    for turn in turns:
        pieces = _pieces(turn, form, image_grid)
        ids += _encode(tokenizer, preamble + pieces if turn in after_preamble else pieces)
        targets += [turn.role == "assistant" and turn.weight != 0] * (len(ids) - len(targets))
    images = [part.value for turn in turns for part in turn.content if part.kind == "image_url"]
    return Encoded(ids, targets, images, thinks=turn.prefix and not all(part.closed for part in turn.content))


# ---- messages: the user's JSON, checked


def _each(name: str, values: list, read: Callable, *more) -> list:
    """`read(value, *more)` for each of the values; an error names its place."""
    require(isinstance(values, list), f"{name} should be a list")
    done = []
    for i, value in enumerate(values):
        with within(f"{name}[{i}]"):
            done.append(read(value, *more))
    return done


def _read_message(raw: dict, form: Format) -> Message:
    require(isinstance(raw, dict), "should be an object with role and content")
    role = "system" if raw.get("role") == "developer" else raw.get("role")  # OpenAI's newer name
    require(role in list(KEYS), f"unknown role {role!r}; use system, user, assistant or tool")
    strange = [key for key, value in raw.items() if key not in KEYS[role] and value not in EMPTY]
    require(not strange, f"unknown key {', '.join(map(repr, strange))} in a message of role {role}")
    raw = {key: raw.get(key) for key in KEYS[role]}
    weight, call_id = raw.get("weight"), raw.get("tool_call_id")
    good = weight in (None, 0, 1) and not isinstance(weight, bool)
    require(good, f"weight should be 0 (do not train on this message) or 1, not {weight!r}")
    if role == "tool" and raw["name"] is not None:
        _check(raw["name"], NAME)
    return Message(
        role,
        content=_read_reasoning(raw, form) + _read_content(raw["content"], role, form),
        calls=_each("tool_calls", _given(raw, "tool_calls", []), _read_call, iter(PLACES), form),
        call_id=None if call_id is None else _check(call_id, form.ids),
        prefix=_switch(raw, "prefix", False),
        weight=weight,
    )


def _given(raw: dict, name: str, default: object) -> object:
    """What is falsy was given, too; only null counts as absent."""
    return default if raw.get(name) is None else raw[name]


def _switch(raw: dict, name: str, default: bool) -> bool:
    on = _given(raw, name, default)
    require(isinstance(on, bool), f"{name} should be true or false, not {on!r}")
    return on


def _read_reasoning(raw: dict, form: Format) -> list[Part]:
    """vLLM and SGLang return thinking under a key of its own."""
    thoughts = [raw[key] for key in ("reasoning", "reasoning_content") if raw.get(key) is not None]
    return [_read_part({"type": "thinking", "thinking": thought}, "assistant", form) for thought in thoughts[:1]]


def _read_content(content: str | list[dict] | None, role: str, form: Format) -> list[Part]:
    if content == "" or (content is None and role == "assistant"):
        return []
    if isinstance(content, str):
        return [Part(content)]
    require(isinstance(content, list), "content should be a string or a list of parts")
    return _each("content", content, _read_part, role, form)


def _read_part(part: dict, role: str, form: Format) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    holders = {"text": [role], "image_url": form.images, "thinking": form.thinking}
    require(kind in list(holders), f"a part must have the type text, image_url or thinking, not {kind!r}")
    require(role in holders[kind], f"with this tokenizer, {role} messages hold no parts of type {kind}")
    value = image_url(part) if kind == "image_url" else part.get(kind)
    if kind == "thinking" and isinstance(value, list):  # the API's own form
        value = "".join(text.value for text in _each(kind, value, _read_part, kind, form))
    require(isinstance(value, str), f"a part of type {kind!r} needs a string under {kind!r}")
    return Part(value, kind, _switch(part, "closed", True))


def _read_call(raw: dict, places: Iterator[str], form: Format) -> dict:
    raw, place = Fields(raw, "a call").values, next(places, None)
    function, id = raw.get("function"), raw.get("id")
    if function is None and "name" in raw:  # as generate.py writes them
        function, id = raw, place if id is None else id
    function = Fields(function, "function").values
    require("arguments" in function, "function: the field 'arguments' is missing; add it")
    call = {"name": _check(function.get("name"), NAME), "arguments": _read_arguments(function["arguments"])}
    return call if id in (None, "null") else {**call, "id": _check(id, form.ids)}


def _read_arguments(arguments: dict | str | None) -> object:
    if arguments in (None, ""):
        return {}
    require(isinstance(arguments, dict | str), "arguments should be an object or a JSON string")
    return arguments if isinstance(arguments, dict) else _json_or_text(arguments)


def _check(text: str, kind: tuple[str, re.Pattern, str]) -> str:
    what, pattern, rule = kind
    require(isinstance(text, str) and pattern.fullmatch(text), f"{what} {text!r} should be {rule}")
    return text


def _check_order(messages: list[Message], training: bool) -> None:
    """See that the messages may stand in this order, and say where each one stands."""
    before = None
    for i, message in enumerate(messages):
        message.where, role = f"messages[{i}]", message.role
        with within(message.where):
            good = role != "system" or before not in ("assistant", "tool")
            require(good, f"a system message cannot follow one of role {before}")
            good = not message.prefix or (message is messages[-1] and not training)
            require(good, 'only the last message may have "prefix": true, and not in training')
        before = role
    roles, advice = ENDS[training]
    require(message.prefix or role in roles, f"messages end with role {role}; {advice}")


def _match_results(messages: list[Message], form: Format, training: bool) -> None:
    """See that each tool call has one result before any other message, and write its place into the result."""
    ids, waiting = [], []  # of the latest answer's calls; those that have no result yet
    for message in messages:
        with within(message.where):
            if message.role == "tool":
                unnamed = (id for id in waiting if id in PLACES)  # calls that have no ids but their places
                message.call_id = message.call_id or next(unnamed, None)
                require(message.call_id, "a tool message needs the tool_call_id of the call that it answers")
                good = message.call_id in waiting
                require(good, f"tool_call_id {message.call_id!r} is not that of a tool call that waits for a result")
                waiting.remove(message.call_id)
                message.place = ids.index(message.call_id)
                continue
            require(not waiting, f"{len(waiting)} of the tool calls before it have no result")
            ids = [call["id"] for call in message.calls if "id" in call]
            waiting = list(dict.fromkeys(ids))
            may_lack = training and message is messages[-1] and form.ids is ID  # no result will refer to them
            good = len(waiting) == len(ids if may_lack else message.calls)
            require(good, "each tool call needs an id of its own")
    require(training or not waiting, f"{message.where}: {len(waiting)} of the latest tool calls have no result yet")


def _read_tool(tool: dict) -> dict:
    """The tool with only the keys, in the order, that the model was trained on."""
    tool = Fields(tool, "a tool")
    tool.only(type=("function",))
    function = Fields(tool.get("function", dict), "function")
    name, description = _check(function.get("name", str), NAME), function.get("description", str, "")
    parameters = function.get("parameters", dict, {})
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _read_settings(tokenizer: Tokenizer, effort: str | None) -> dict:
    setting = (tokenizer.model_settings or {}).get("reasoning_effort")
    if setting is None:
        require(effort in (None, "none"), f"reasoning effort {effort!r}: this checkpoint has no such setting")
        return {}
    effort, known = setting["default"] if effort is None else effort, setting["values"]
    require(effort in known, f"reasoning effort {effort!r}: this checkpoint knows {', '.join(known)}")
    return {"reasoning_effort": effort}


# ---- turns


def _merge(messages: list[Message], form: Format) -> list[Message]:
    """The turns: neighbouring messages of one role and weight become one, except for system messages and tool results.
    In a format without system turns, the system prompt goes into the last user turn."""
    turns, prompts = [], []
    for (role, _), group in groupby(messages, key=lambda message: (message.role, message.weight)):
        group = list(group)
        if role == "system" and not form.system_turn:
            prompts += group
        elif role in ("user", "assistant"):
            turns.append(_one_turn(group, form))
        else:
            group.sort(key=lambda message: message.place if form.sort_results else 0)
            turns += [_one_turn([message], form) for message in group]
    if not form.system_turn:
        if turns[0].role != "user":
            turns.insert(0, Message("user", [], turns[0].where))  # the older formats always begin with one
        _put_prompts(prompts, turns, form)
    return turns


def _one_turn(group: list[Message], form: Format) -> Message:
    where, content = group[0].where, _join([message.content for message in group], form.text_join)
    turn = replace(group[-1], where=where, content=content, calls=[call for message in group for call in message.calls])
    kinds = [part.kind for part in content]
    if turn.role == "user" and kinds == ["text", "image_url"]:
        content.reverse()  # mistral-common puts a single image before its text; other mixtures stay
    elif turn.role == "assistant":
        require(kinds or turn.calls, f"{where} has neither content nor tool_calls")
        both = kinds and turn.calls and not form.text_with_calls
        require(not both, f"{where} has content and tool_calls; this checkpoint takes only one")
        if kinds == ["text"]:
            content[0].value = content[0].value.rstrip(" ")
    return turn


def _put_prompts(prompts: list[Message], turns: list[Message], form: Format) -> None:
    """The system messages open the last user turn."""
    contents = [[part.value for part in prompt.content if part.value] for prompt in prompts if prompt.content]
    if prompt := "\n\n".join(map(form.text_join.join, contents)):
        last = [turn for turn in turns if turn.role == "user"][-1]
        last.content.insert(0, Part(f"{prompt}\n\n"))
        if [part.kind for part in last.content] == ["text", "text"]:  # only a lone text becomes one with the prompt
            last.content = [Part("".join(part.value for part in last.content))]


def _join(contents: list[list[Part]], text_join: str) -> list[Part]:
    """One content out of several. Neighbouring texts are joined, with a blank line if they come from different
    messages, with `text_join` within a message; empty texts vanish."""
    parts = []
    for content in contents:
        separator = "\n\n"  # until the first text of this message
        for part in content:
            if part.kind != "text":
                parts.append(part)
            elif part.value:
                if parts and parts[-1].kind == "text":
                    parts[-1] = Part(parts[-1].value + separator + part.value)
                else:
                    parts.append(part)
                separator = text_join
    return parts


# ---- pieces: a str is the name of a control token, a Part is text, whatever it may look like


def _pieces(turn: Message, form: Format, image_grid: Callable[[str], tuple[int, int]] | None) -> list[str | Part]:
    content = []
    for part in turn.content:
        if part.kind == "text":
            content.append(part)
        elif part.kind == "thinking":
            content += ["[THINK]", Part(part.value), *(["[/THINK]"] if part.closed else [])]
        else:  # each row of an image ends with [IMG_BREAK], except that the last ends with [IMG_END]
            require(image_grid, f"{turn.where} has an image, but this checkpoint takes no images")
            rows, columns = image_grid(part.value)
            content += ((["[IMG]"] * columns + ["[IMG_BREAK]"]) * rows)[:-1] + ["[IMG_END]"]
    if turn.role == "tool" and form.results == "json":
        text = content[0].value if content else "{}"
        content = [_json({"content": _json_or_text(text), "call_id": turn.call_id})]
    elif turn.role == "tool" and form.results == "id":
        content = [Part(turn.call_id), "[TOOL_CONTENT]", *content]
    opening, closing = BRACKETS[turn.role]
    return [*opening, *content, *_call_pieces(turn.calls, form), *([] if turn.prefix else closing)]


def _call_pieces(calls: list[dict], form: Format) -> list[str | Part]:
    if form.calls == "list":
        return ["[TOOL_CALLS]", _json(calls)] if calls else []
    pieces = []
    for call in calls:
        call_id = ["[CALL_ID]", Part(call["id"])] if form.calls == "id" and "id" in call else []
        pieces += ["[TOOL_CALLS]", Part(call["name"]), *call_id, "[ARGS]", _json(call["arguments"])]
    return pieces


def _wrapped(name: str, value: list | dict) -> list[str | Part]:
    return [f"[{name}]", _json(value), f"[/{name}]"] if value else []


def _encode(tokenizer: Tokenizer, pieces: list[str | Part]) -> list[int]:
    ids = []
    for piece in pieces:
        if isinstance(piece, Part):
            ids += tokenizer.encode(piece.value)
        else:
            require(piece in tokenizer.special, f"the tokenizer has no {piece} token, which this chat needs")
            ids.append(tokenizer.special[piece])
    return ids


def _json(value: object) -> Part:
    return Part(json.dumps(value, ensure_ascii=False))


def _json_or_text(text: str, nan: bool = True) -> object:
    """The value of a JSON text, or the text itself if it is not JSON (cut off, for example). Python reads NaN and 1e999
    too; unless `nan`, these are not JSON."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=nan)
        return value
    except (ValueError, RecursionError):
        return text


# ---- messages, as programs write them


def opening(system: str | None) -> list[dict]:
    return [] if system is None else [{"role": "system", "content": system}]


def user_turn(images: list[str], text: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": path}} for path in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def image_url(part: dict) -> str | None:
    """Of a message's part that is an image."""
    url = part.get("image_url")
    return url.get("url") if isinstance(url, dict) else url


# ---- the way back


@dataclass
class Reply:
    text: str = ""  # without reasoning and special tokens
    reasoning: str | None = None  # what stood between [THINK] and [/THINK]
    tool_calls: list[dict] = field(default_factory=list)  # {"name", "arguments": parsed JSON, or text that is none}


class ReplyParser:
    """Reads a reply token by token. What is streamed, what JSON carries and what a chat remembers all come from here.

    `add` and `finish` return pieces (kind, text), kind "text" or "reasoning", as soon as they are certain; joined, they
    are the texts of `reply`. A stop string counts in the answer's text alone. Of several, the one that is complete
    first ends the text where it begins; of two complete at the same character, the one listed first. Text that may
    still turn out to be the beginning of one is held back. Never raises, whatever the tokens.

    `thinks`: the reply begins inside a thought that the prompt opened. `raw`: no chat, only text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str] = (), thinks=False, raw=False):
        self.reply, self.stop, self.stopped = Reply(), list(stop), False
        self._tokenizer, special = tokenizer, tokenizer.special
        marks = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
        self._marks = {} if raw else {special[name]: name for name in marks if name in special}
        self._text, self._thought = StreamDecoder(tokenizer), StreamDecoder(tokenizer)
        self._held = ""  # text that may be the beginning of a stop string
        self._calls: list[dict[str, list[int]]] = []  # for each, the ids of its "name", "[CALL_ID]" and "[ARGS]"
        self._into = "reasoning" if thinks else "text"  # or "calls"
        self.reply.reasoning = "" if thinks else None

    def add(self, id: int) -> list[tuple[str, str]]:
        mark = self._marks.get(id)
        if self.stopped:
            return []
        if mark == "[THINK]":
            self._into, self.reply.reasoning = "reasoning", self.reply.reasoning or ""
        elif mark == "[/THINK]":
            self._into = "text" if self._into == "reasoning" else self._into  # one that nothing opened closes nothing
        elif mark == "[TOOL_CALLS]":
            self._calls.append({"name": []})
            self._into, self._part = "calls", self._calls[-1]["name"]
        elif mark and self._into == "calls":
            self._part = self._calls[-1][mark] = []
        elif self._into == "calls":
            self._part.append(id)
        elif self._into == "reasoning":
            return self._emit("reasoning", self._thought.add(id))
        else:
            return self._say(self._text.add(id))
        return []

    def finish(self) -> list[tuple[str, str]]:
        """The rest: halves of characters, text held back, and what stood where a call should be and is none."""
        pieces = self._emit("reasoning", self._thought.flush())
        if not self.stopped:
            rest, self._held = self._held + self._text.flush(), ""
            for call in self._calls:
                rest += self._read_call(call)
            pieces += self._emit("text", rest)
        return pieces

    def _say(self, new: str) -> list[tuple[str, str]]:
        said = ""
        for character in new:
            text = self._held + character
            if stop := next(filter(text.endswith, self.stop), None):
                self.stopped, self._held = True, ""
                return self._emit("text", said + text.removesuffix(stop))
            begun = (text[i:] for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in self.stop))
            self._held = next(begun, "")
            said += text.removesuffix(self._held)
        return self._emit("text", said)

    def _emit(self, kind: str, text: str) -> list[tuple[str, str]]:
        if not text:
            return []
        setattr(self.reply, kind, (getattr(self.reply, kind) or "") + text)
        return [(kind, text)]

    def _read_call(self, ids: dict[str, list[int]]) -> str:
        """Add what one [TOOL_CALLS] introduces to the reply's calls; returns the text in it that is no call."""
        name = self._tokenizer.decode(ids["name"])
        if "[ARGS]" in ids:
            if not FUNCTION.fullmatch(name.strip()):
                return name + self._tokenizer.decode(ids["[ARGS]"])
            arguments = _json_or_text(self._tokenizer.decode(ids["[ARGS]"]), nan=False)
            self.reply.tool_calls.append({"name": name.strip(), "arguments": arguments})
            return ""
        # The older form: [{"name": …, "arguments": …}, …]
        start = match.start() if (match := re.search(r"\[\s*\{", name)) else 0
        try:
            calls, end = json.JSONDecoder().raw_decode(name, start)
            json.dumps(calls, allow_nan=False)
            calls = [
                {"name": FUNCTION.fullmatch(call["name"].strip())[0], "arguments": call.get("arguments", {})}
                for call in calls
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # it is no list of calls
            return name
        self.reply.tool_calls += calls
        return name[:start] + name[end:]
