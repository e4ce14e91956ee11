"""A chat to token ids, and the model's answer back to text, reasoning and tool calls.

Mistral's chat format changed with every tokenizer version; `FORMATS` lists all that differs. With control tokens in
brackets, this model's (v15) is

    <s>[SYSTEM_PROMPT]…[/SYSTEM_PROMPT]
    [AVAILABLE_TOOLS]json[/AVAILABLE_TOOLS][MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS]
    [INST]question[/INST] [THINK]…[/THINK]answer</s>
    [INST]question[/INST] [TOOL_CALLS]name[ARGS]json</s> [TOOL_RESULTS]…[/TOOL_RESULTS] answer</s>

without the line breaks and spaces between the parts. Tools and settings stand before the first user turn.

Texts between control tokens are encoded one by one, so that no text can spell or merge into a control token. The ids
are those of mistral-common's `encode_chat_completion`; where it would accept a conversation that makes no sense (a tool
result that answers no call), this file raises UserError instead.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

from config import UserError
from tokenizer import SentencePiece, Tekken


@dataclass(frozen=True)
class Format:
    """What distinguishes the chat format of one tokenizer version."""

    system_turn: bool  # a system message is a turn of its own; else it opens the last user turn
    tools_first: bool  # tools stand before the first user turn; else before the last
    text_with_calls: bool  # one assistant turn may hold both text and tool calls
    calls: str  # "list": [TOOL_CALLS][{…}, …]; "id" and "plain": [TOOL_CALLS]name([CALL_ID]id)[ARGS]{…} for each call
    results: str  # "json": {"content": …, "call_id": …}; "id": id[TOOL_CONTENT]content; "content": just the content
    sort_results: bool  # tool results follow the order of the calls
    free_ids: bool  # any call id; else nine letters or digits
    thinking: tuple[str, ...]  # roles that may think
    result_images: bool  # tool results may hold images
    text_join: str  # between the text parts of one message


# fmt: off
FORMATS = {
    #             system tools  text and                   sort    free                           result  text
    #             turn   first  calls    calls    results  results ids    thinking                images  join
    "v3":  Format(False, False, False,  "list",  "json",    False, False, (),                      False, "\n\n"),
    "v7":  Format(True,  False, True,   "list",  "id",      False, False, (),                      False, "\n\n"),
    "v11": Format(True,  False, True,   "id",    "id",      True,  False, (),                      False, "\n\n"),
    "v13": Format(True,  True,  True,   "plain", "content", True,  True,  ("assistant", "system"), False, "\n\n"),
    "v15": Format(True,  True,  True,   "plain", "content", True,  True,  ("assistant",),          True,  ""),
}
# fmt: on

MAY_FOLLOW = {
    "system": ("system", "user", "assistant"),
    "user": ("user", "assistant", "system"),
    "assistant": ("assistant", "user", "tool"),
    "tool": ("tool", "assistant", "user"),
}


@dataclass
class Encoded:
    """A conversation as the model reads it."""

    ids: list[int] = field(default_factory=list)
    targets: list[bool] = field(default_factory=list)  # one an id: did an assistant write it? (the loss mask)
    images: list[str] = field(default_factory=list)  # image urls, in the order of their tokens


@dataclass
class Answer:
    text: str  # without reasoning and special tokens
    reasoning: str | None  # what stood between [THINK] and [/THINK]
    tool_calls: list[dict]  # {"name": …, "arguments": parsed JSON, or the raw text if it is not JSON}


@dataclass
class Part:
    kind: str  # "text", "image_url" or "thinking"
    value: str
    closed: bool = True  # thinking that has ended


@dataclass
class Message:
    index: int
    role: str
    content: list[Part]
    calls: list[dict] = field(default_factory=list)  # {"name", "arguments": any JSON value, "id" if it has one}
    call_id: str | None = None
    prefix: bool = False


def encode_chat(
    tokenizer: Tekken | SentencePiece,
    messages: list[dict],
    tools: list[dict] | None = None,
    reasoning_effort: str | None = None,
    image_grid: Callable[[str], tuple[int, int]] | None = None,
    training: bool = False,
) -> Encoded:
    """The ids of a chat in OpenAI's chat-completions form.

    For generation the chat ends with a user or tool message, or with an assistant message that has `"prefix": true` and
    is to be continued; for training it ends with an assistant message. `image_grid` gives an image's size in (rows,
    columns) of [IMG] tokens; without it images are refused. Raises UserError, which names the message.
    """
    if tokenizer.version not in FORMATS:
        raise UserError(f"tokenizer version {tokenizer.version} has no supported chat format ({', '.join(FORMATS)})")
    form = FORMATS[tokenizer.version]
    writer = _Writer(tokenizer, image_grid)
    preamble = [("AVAILABLE_TOOLS", _read_tools(tools)), ("MODEL_SETTINGS", _settings(tokenizer, reasoning_effort))]

    turns, system_prompt = _turns(_read_messages(messages, form, training), form)
    users = [turn for turn in turns if turn.role == "user"]
    writer.control("<s>")
    for turn in turns:
        if turn.role == "system":
            writer.control("[SYSTEM_PROMPT]")
            writer.parts(turn)
            writer.control("[/SYSTEM_PROMPT]")
        elif turn.role == "user":
            if turn is users[0 if form.tools_first else -1]:
                for name, value in preamble:
                    if value:
                        writer.control(f"[{name}]")
                        writer.json(value)
                        writer.control(f"[/{name}]")
            if [part.kind for part in turn.content] == ["text", "image_url"]:
                turn.content.reverse()  # an image after a text moves before it; other mixtures stay as they are
            if system_prompt and turn is users[-1]:
                turn.content.insert(0, Part("text", system_prompt + "\n\n"))
                if len(turn.content) == 2 and turn.content[1].kind == "text":
                    turn.content = [Part("text", turn.content[0].value + turn.content[1].value)]
            writer.control("[INST]")
            writer.parts(turn)
            writer.control("[/INST]")
        elif turn.role == "tool":
            _write_result(writer, turn, form)
        else:
            writer.assistant = True
            _write_answer(writer, turn, form)
            writer.assistant = False
    return writer.encoded


class _Writer:
    """Collects ids and marks those that an assistant wrote."""

    def __init__(self, tokenizer: Tekken | SentencePiece, image_grid: Callable[[str], tuple[int, int]] | None):
        self.tokenizer, self.image_grid = tokenizer, image_grid
        self.encoded, self.assistant = Encoded(), False

    def _extend(self, ids: list[int]) -> None:
        self.encoded.ids += ids
        self.encoded.targets += [self.assistant] * len(ids)

    def _id(self, name: str) -> int:
        if name not in self.tokenizer.special:
            raise UserError(f"this checkpoint's tokenizer has no {name} token, which this chat needs")
        return self.tokenizer.special[name]

    def control(self, name: str) -> None:
        self._extend([self._id(name)])

    def text(self, text: str) -> None:
        self._extend(self.tokenizer.encode(text))

    def json(self, value: object) -> None:
        self.text(json.dumps(value, ensure_ascii=False))

    def parts(self, message: Message) -> None:
        for part in message.content:
            if part.kind == "text":
                self.text(part.value)
            elif part.kind == "thinking":
                self.control("[THINK]")
                self.text(part.value)
                if part.closed:
                    self.control("[/THINK]")
            elif self.image_grid is None:
                raise UserError(f"messages[{message.index}] has an image, but this checkpoint takes no images")
            else:
                rows, columns = self.image_grid(part.value)
                row = [self._id("[IMG]")] * columns + [self._id("[IMG_BREAK]")]
                self._extend((row * rows)[:-1] + [self._id("[IMG_END]")])
                self.encoded.images.append(part.value)


def _write_answer(writer: _Writer, turn: Message, form: Format) -> None:
    if not turn.content and not turn.calls:
        raise UserError(f"messages[{turn.index}] has neither content nor tool_calls")
    if turn.content and turn.calls and not form.text_with_calls:
        raise UserError(f"messages[{turn.index}] has content and tool_calls; this checkpoint's format takes just one")
    if [part.kind for part in turn.content] == ["text"]:
        turn.content[0].value = turn.content[0].value.rstrip(" ")
    writer.parts(turn)
    if turn.calls and form.calls == "list":
        writer.control("[TOOL_CALLS]")
        writer.json(turn.calls)
    elif turn.calls:
        for call in turn.calls:
            writer.control("[TOOL_CALLS]")
            writer.text(call["name"])
            if form.calls == "id" and "id" in call:
                writer.control("[CALL_ID]")
                writer.text(call["id"])
            writer.control("[ARGS]")
            writer.json(call["arguments"])
    if not turn.prefix:
        writer.control("</s>")


def _write_result(writer: _Writer, turn: Message, form: Format) -> None:
    writer.control("[TOOL_RESULTS]")
    if form.results == "json":
        text = turn.content[0].value if turn.content else "{}"
        writer.json({"content": _json_or_text(text), "call_id": turn.call_id})
    else:
        if form.results == "id":
            writer.text(turn.call_id)
            writer.control("[TOOL_CONTENT]")
        writer.parts(turn)
    writer.control("[/TOOL_RESULTS]")


# ---- from messages to turns


def _turns(messages: list[Message], form: Format) -> tuple[list[Message], str]:
    """Neighbouring messages of one role become one turn, except system messages and tool results. The second value is
    the system prompt for the formats that know no system turn."""
    turns, system_prompt, call_ids = [], [], []
    for role, group in groupby(messages, key=lambda message: message.role):
        group = list(group)
        if role == "system" and not form.system_turn:
            texts = [_join([message.content], form.text_join) for message in group if message.content]
            system_prompt += [parts[0].value if parts else "" for parts in texts]
        elif role in ("system", "tool"):
            for message in group:
                message.content = _join([message.content], form.text_join)
            if role == "tool" and form.sort_results:
                group.sort(key=lambda message: call_ids.index(message.call_id))
            turns += group
        else:
            content = _join([message.content for message in group], form.text_join)
            calls = [call for message in group for call in message.calls]
            turns.append(Message(group[0].index, role, content, calls, prefix=group[-1].prefix))
            call_ids = [call.get("id") for call in calls]
    if not form.system_turn and turns[0].role != "user":
        turns.insert(0, Message(0, "user", []))
    return turns, "\n\n".join(system_prompt)


def _join(contents: list[list[Part]], text_join: str) -> list[Part]:
    """One content out of several: neighbouring texts are joined, by a blank line if they come from different messages,
    by `text_join` within a message; empty texts vanish."""
    parts = []
    for content in contents:
        separator = "\n\n"  # until the first text of this message
        for part in content:
            if part.kind == "text" and not part.value:
                continue
            if part.kind == "text" and parts and parts[-1].kind == "text":
                parts[-1] = Part("text", parts[-1].value + separator + part.value)
            else:
                parts.append(part)
            if part.kind == "text":
                separator = text_join
    return parts


# ---- reading what the user wrote


def _read_messages(messages: list[dict], form: Format, training: bool) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list with at least one message")
    read, pending, answered = [], [], set()
    for index, raw in enumerate(messages):
        where = f"messages[{index}]"
        message = _read_message(where, index, raw, form)
        last = index == len(messages) - 1
        if read and message.role not in MAY_FOLLOW[read[-1].role]:
            raise UserError(f"{where}: a {message.role} message cannot follow a {read[-1].role} message")
        if message.prefix and (training or not last):
            raise UserError(f'{where}: only the last message may have "prefix": true, and not in training')
        if message.role == "assistant":
            if len(answered) < len(pending):
                raise UserError(f"{where}: the tool calls before it have {len(answered)} results of {len(pending)}")
            pending, answered = [call["id"] for call in message.calls if "id" in call], set()
            may_lack = training and last and not form.free_ids
            if len(set(pending)) < len(pending) or (len(pending) < len(message.calls) and not may_lack):
                raise UserError(f"{where}: each tool call needs an id of its own")
        elif message.role == "tool":
            if message.call_id not in pending:
                raise UserError(f"{where}: tool_call_id {message.call_id!r} is not that of a tool call before it")
            if message.call_id in answered:
                raise UserError(f"{where}: tool call {message.call_id!r} has a result already")
            answered.add(message.call_id)
        read.append(message)
    if training and read[-1].role != "assistant":
        raise UserError(f"messages end with role {read[-1].role}; for training they must end with an assistant message")
    if not training and read[-1].role not in ("user", "tool") and not read[-1].prefix:
        end = 'to be answered they must end with a user or tool message (or an assistant\'s with "prefix": true)'
        raise UserError(f"messages end with role {read[-1].role}; {end}")
    return read


def _read_message(where: str, index: int, raw: dict, form: Format) -> Message:
    if not isinstance(raw, dict):
        raise UserError(f"{where} must be an object with role and content")
    role = raw.get("role")
    if not isinstance(role, str) or role not in MAY_FOLLOW:
        raise UserError(f"{where}: unknown role {role!r}; use system, user, assistant or tool")
    content = raw.get("content")
    if isinstance(content, str) or (content is None and role == "assistant"):
        content = [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise UserError(f"{where}: content must be a string or a list of parts")
    parts = [_read_part(f"{where}.content[{i}]", part, role, form) for i, part in enumerate(content)]
    message = Message(index, role, parts)
    if role == "assistant":
        for key in ("reasoning", "reasoning_content"):  # how vLLM and SGLang hand out thinking
            if raw.get(key) is not None:
                thought = _read_part(f"{where}.{key}", {"type": "thinking", "thinking": raw[key]}, role, form)
                message.content.insert(0, thought)
                break
        calls = raw.get("tool_calls") or []
        if not isinstance(calls, list):
            raise UserError(f"{where}: tool_calls must be a list")
        message.calls = [_read_call(f"{where}.tool_calls[{i}]", call, form) for i, call in enumerate(calls)]
        message.prefix = raw.get("prefix") is True
    elif role == "tool":
        if "tool_call_id" not in raw:
            raise UserError(f"{where}: a tool message needs the tool_call_id of the call that it answers")
        message.call_id = _read_id(where, raw["tool_call_id"], form)
        if raw.get("name") is not None:
            _read_name(where, raw["name"])
    return message


def _read_part(where: str, part: dict, role: str, form: Format) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        value = part.get("text")
    elif kind == "image_url" and (role == "user" or (role == "tool" and form.result_images)):
        value = part.get("image_url")
        value = value.get("url") if isinstance(value, dict) else value
    elif kind == "thinking" and role in form.thinking:
        value = part.get("thinking")
    elif kind in ("image_url", "thinking"):
        raise UserError(f"{where}: with this tokenizer, {role} messages hold no parts of type {kind}")
    else:
        raise UserError(f"{where}: a part must have the type text, image_url or thinking, not {kind!r}")
    if not isinstance(value, str):
        raise UserError(f"{where}: a part of type {kind!r} needs a string under {kind!r}")
    return Part(kind, value, closed=part.get("closed") is not False)


def _read_call(where: str, raw: dict, form: Format) -> dict:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(function, dict) or "name" not in function or "arguments" not in function:
        raise UserError(f'{where} must look like {{"id": …, "function": {{"name": …, "arguments": …}}}}')
    arguments = function["arguments"]
    if arguments is None or isinstance(arguments, str):
        arguments = _json_or_text(arguments or "{}")
    elif not isinstance(arguments, dict):
        raise UserError(f"{where}: arguments must be an object or a JSON string")
    call = {"name": _read_name(where, function["name"]), "arguments": arguments}
    if raw.get("id") not in (None, "null"):
        call["id"] = _read_id(where, raw["id"], form)
    return call


def _read_name(where: str, name: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name):
        raise UserError(f"{where}: the function name {name!r} must be 1 to 64 letters, digits, underscores or dashes")
    return name


def _read_id(where: str, call_id: str, form: Format) -> str:
    if not isinstance(call_id, str) or not call_id:
        raise UserError(f"{where}: the tool call id must be a string that is not empty, not {call_id!r}")
    if not form.free_ids and not re.fullmatch("[a-zA-Z0-9]{9}", call_id):
        raise UserError(f"{where}: this tokenizer's tool call ids are nine letters or digits, not {call_id!r}")
    return call_id


def _read_tools(tools: list[dict] | None) -> list[dict]:
    """The tools with just the keys, in the order, that the model was trained on."""
    if tools is not None and not isinstance(tools, list):
        raise UserError("tools must be a list")
    read = []
    for i, tool in enumerate(tools or []):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise UserError(f'tools[{i}] must look like {{"type": "function", "function": {{"name": …, …}}}}')
        name = _read_name(f"tools[{i}]", function.get("name"))
        description, parameters = function.get("description") or "", function.get("parameters") or {}
        if not isinstance(description, str) or not isinstance(parameters, dict):
            raise UserError(f"tools[{i}]: description must be a string and parameters an object")
        function = {"name": name, "description": description, "parameters": parameters}
        read.append({"type": "function", "function": function})
    return read


def _settings(tokenizer: Tekken | SentencePiece, effort: str | None) -> dict:
    setting = (tokenizer.model_settings or {}).get("reasoning_effort")
    if setting is None:
        if effort not in (None, "none"):
            raise UserError(f"reasoning effort {effort!r}: this checkpoint has no such setting")
        return {}
    effort = setting["default"] if effort is None else effort
    if effort not in setting["values"]:
        raise UserError(f"reasoning effort {effort!r}: this checkpoint knows {', '.join(setting['values'])}")
    return {"reasoning_effort": effort}


def _json_or_text(text: str, number: Callable[[str], float] | None = None) -> object:
    """The value of a JSON text, or a text that is not JSON itself. `number` reads fractions, NaN and Infinity."""
    try:
        return json.loads(text, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError):
        return text


# ---- from the model's ids to its answer


def parse_answer(tokenizer: Tekken | SentencePiece, ids: list[int]) -> Answer:
    """What the model generated after a prompt, with or without the end token. Never raises, whatever the ids."""
    marks = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    marks = {tokenizer.special[name]: name for name in marks if name in tokenizer.special}
    text, reasoning, calls = [], None, []
    current = text  # the list of ids that is being filled
    for id in ids:
        if id == tokenizer.eos_id:
            break
        mark = marks.get(id)
        if mark == "[THINK]":
            current = reasoning = reasoning or []
        elif mark == "[/THINK]":
            if reasoning is None and not calls:  # the prompt itself opened the thinking
                text, reasoning = [], text
            current = text
        elif mark == "[TOOL_CALLS]":
            calls.append({"name": [], "[CALL_ID]": [], "[ARGS]": []})
            current = calls[-1]["name"]
        elif mark and calls:
            current = calls[-1][mark] = []
        else:
            current.append(id)
    tool_calls = []
    for call in calls:
        name = tokenizer.decode(call["name"])
        if call["[ARGS]"]:
            arguments = _json_or_text(tokenizer.decode(call["[ARGS]"]), _finite)
            tool_calls.append({"name": name, "arguments": arguments})
        else:
            tool_calls += _parse_call_list(name)
    return Answer(tokenizer.decode(text), None if reasoning is None else tokenizer.decode(reasoning), tool_calls)


def _parse_call_list(text: str) -> list[dict]:
    """The older form, `[{"name": …, "arguments": …}, …]`; or a name whose [ARGS] have not come."""
    calls = _json_or_text(text, _finite)
    if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
        return [{"name": str(call.get("name", "")), "arguments": call.get("arguments", {})} for call in calls]
    return [{"name": "", "arguments": text}] if text.startswith("[") else [{"name": text, "arguments": ""}]


def _finite(number: str) -> float:
    """Python's JSON reader lets NaN, Infinity and 1e999 through, but they cannot be written as JSON again."""
    if not math.isfinite(float(number)):
        raise ValueError
    return float(number)
