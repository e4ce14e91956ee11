"""The chat in the terminal, and how answers are printed."""

import argparse
import cmd
import contextlib
import json
import math
import os
import random
import re
import readline
import select
import shlex
import signal
import sys
import termios
from collections.abc import Iterator
from typing import TextIO

from runtime.chat import encode_chat, image_url, opening, user_turn
from runtime.files import UserError, read_lines, require, within, writing
from runtime.images import grid, load_image
from runtime.launch import Postponed, gather_objects, together
from runtime.requests import NUMBERS, check_utf8, read_number, read_requests, read_tools

DUMB = os.environ.get("TERM") == "dumb"  # a terminal that knows no escape codes
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but the tab and the end of a line


def count(number: int, name: str) -> str:
    return f"{number} {name}" + "s" * (number != 1)


def note(text: str, end: str = "\n") -> None:
    """A line beside the conversation, dimmed."""
    plain = os.environ.get("NO_COLOR") or DUMB or not sys.stderr.isatty()
    text = printable(text, sys.stderr)
    print(text if plain else f"\x1b[2m{text}\x1b[0m", end=end, file=sys.stderr, flush=True)


def printable(text: str, stream: TextIO) -> str:
    """In a terminal, control characters, which might steer it, are shown as escapes."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text) if stream.isatty() else text


def speed_of(stats: dict, what: str = "tokens/s") -> str:
    per_step = f", {stats['tokens_per_step']:g} a step" if "tokens_per_step" in stats else ""
    return f"{stats['decode_tokens_per_s']:g} {what}{per_step}"


def stream(session, spec: dict, stop=None) -> dict:
    """The answer to one request, printed as it comes: reasoning dimmed on stderr, text on stdout. `stop`: as the
    engine's."""
    thinks = False

    def show(i: int, kind: str, text: str) -> None:
        nonlocal thinks
        if thinks and kind == "text":
            note("")  # ends the line of what was thought
        thinks = kind == "reasoning"
        if thinks:
            note(text, end="")
        else:
            print(printable(text, sys.stdout), end="", flush=True)

    (result,) = session.answer([spec], show, stop=stop)
    if session.place.rank == 0:
        if thinks:
            note("")
        print_calls(result)
    return result


def print_calls(result: dict) -> None:
    print()
    for call in result["tool_calls"]:
        print(printable(json.dumps(call, ensure_ascii=False), sys.stdout))
    sys.stdout.flush()


HISTORY = "~/.mistral_history"  # what was typed into the chat, a JSON string a line


def expand(path: str) -> str:
    """A file's name, with ~ for the home folder. Raises UserError for one that no file can have."""
    try:
        require(b"\0" not in os.fsencode(path), f"{path}: no file can be called this: it holds a zero byte")
    except UnicodeEncodeError:
        raise UserError(f"{path}: cannot be written in this locale's encoding; choose another name") from None
    return os.path.expanduser(path)


def private(path: str, flags: int) -> int:
    """For `open`: a file for its owner alone. A pipe that nobody reads is an error at once, instead of a wait."""
    return os.open(path, flags | os.O_NONBLOCK, 0o600)


def files_of(path: str) -> list[str]:
    """The files whose names begin like this."""
    folder, begin = os.path.split(path)
    try:
        names = sorted(os.listdir(os.path.expanduser(folder) or "."))
    except (OSError, ValueError):
        return []
    hidden = begin.startswith(".")
    paths = [os.path.join(folder, name) for name in names if name.startswith(begin) and name.startswith(".") == hidden]
    return [f"{path}/" if os.path.isdir(os.path.expanduser(path)) else path for path in paths]


def picture_name(part: dict) -> str:
    """Of a message's part that is an image: without the data of one that has no file."""
    url = str(image_url(part))
    return "picture" if url[:5].lower() == "data:" else f"picture {url}"


class Keyboard:
    """What a person types or pastes, on rank 0; or lines from a pipe.

    In the chat the terminal sends Ctrl-C as a character, not as a signal. The signal would go to everything in the
    foreground: under torchrun that is not the ranks but torchrun, which then ends them all.
    """

    def __init__(self, rank: int):
        self.terminal, self.interrupted = rank == 0 and sys.stdin.isatty(), False
        self.signals = Postponed()  # SIGINT in the chat, where a launcher sends it to the ranks
        self.edits = self.terminal and sys.stdout.isatty()  # without stdout in the terminal too, `input` edits nothing
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # see check_utf8
        if not self.edits:
            return
        # Ctrl-C leaves the line with just this character in it: end of line, clear, the character quoted, return.
        readline.parse_and_bind(r'"\C-c": "\C-e\C-u\C-v\C-c\C-m"')
        paste = "off" if DUMB else "on"  # on: a pasted block is one message
        readline.parse_and_bind(f"set enable-bracketed-paste {paste}")
        readline.parse_and_bind("set bell-style none")
        readline.set_auto_history(False)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        with contextlib.suppress(UserError):
            for _, line in read_lines(os.path.expanduser(HISTORY))[-1000:]:
                self.recall(line)

    @contextlib.contextmanager
    def mode(self, canonical: bool) -> Iterator[None]:
        """Ctrl-C is a character in the block; unless `canonical`, every key is there at once, and not shown."""
        if not self.terminal:
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        mode = termios.tcgetattr(sys.stdin)
        mode[6][termios.VINTR] = os.fpathconf(sys.stdin.fileno(), "PC_VDISABLE").to_bytes(1, "little")
        mode[3] &= ~(0 if canonical else termios.ICANON | termios.ECHO)
        try:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def stop(self) -> bool:
        """Whether Ctrl-C was pressed while the answer came. Other keys are dropped."""
        with contextlib.suppress(OSError):  # the terminal is gone
            if self.terminal and select.select([sys.stdin], [], [], 0)[0]:
                self.interrupted |= b"\x03" in os.read(sys.stdin.fileno(), 4096)
        self.interrupted |= self.signals.number > 0
        return self.interrupted

    def read(self, prompt: str = "\n> ") -> str | None:
        """A line, or a pasted block; "\\x03" for Ctrl-C, None at the end."""
        self.interrupted, self.signals.number = False, 0
        if self.terminal and not self.edits:
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            self.signals.waiting = True
            return input(prompt if self.edits else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            return "\x03" if self.terminal else None
        finally:
            self.signals.waiting = False

    def recall(self, line: bytes | str) -> None:
        """Let Up bring back a text, given as JSON. What is none, or what the locale cannot write, is passed over."""
        if self.edits:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                readline.add_history(json.loads(line))

    def remember(self, text: str) -> None:
        if self.edits and text.strip():
            self.recall(json.dumps(text))
            with contextlib.suppress(OSError):
                with open(os.path.expanduser(HISTORY), "a", encoding="utf-8", opener=private) as file:
                    print(json.dumps(text), file=file)


SAME = {"quit": "exit", "bye": "exit", "?": "help"}  # other names of commands
WITH_FILE = "image", "tools", "save", "load"  # commands that take one

# Of a setting: how it is called in the chat, and what is said where it is not set.
SETTINGS = {
    "system": ("system prompt:", "none"),
    "tools": ("tools:", "none"),
    "reasoning_effort": ("reasoning effort", "as the checkpoint has it"),
    **{name: (name.replace("_", "-"), "by default") for name in (*NUMBERS, "stop")},
}


def setting(name: str, value) -> str:
    title, unset = SETTINGS[name]
    if name == "tools" and value:
        value = ", ".join(tool["function"]["name"] for tool in value)
    return f"{title} {unset if value in (None, []) else value}"


class Chat(cmd.Cmd):
    """A conversation, on rank 0: messages, what was set for it, and the commands that change them.

    `onecmd` of the library calls `do_NAME(rest)` for the line "/NAME rest"; what returns True ends the chat. The first
    lines of these methods are what /help prints.
    """

    def __init__(self, session, keyboard: Keyboard):
        super().__init__()
        self.session, self.keyboard, self.messages = session, keyboard, []
        self.images: list[str] = []  # for the next message
        # Of the request, by the names of SETTINGS; None: what is the default. What /load brought counts first.
        self.given = {name: getattr(session.args, name) for name in ("reasoning_effort", *NUMBERS)}
        self.given |= {"system": session.args.system or None, "tools": None}
        self.chosen, self.loaded = dict(self.given), {}
        if session.args.tools:
            self.do_tools(session.args.tools)
            self.given["tools"] = self.chosen["tools"]
        for path in session.args.image:
            self.do_image(path)

    @property
    def options(self) -> dict:
        return self.chosen | self.loaded

    def request(self, messages: list[dict]) -> dict:
        options = self.options
        return {"messages": [*opening(options.pop("system")), *messages], **options}

    def run(self) -> None:
        if self.keyboard.edits:
            readline.set_completer(self.complete)
        note("/help lists the commands, /exit ends")
        pressed = ended = False
        while not ended and (text := self.keyboard.read()) is not None:
            before, pressed = pressed, "\x03" in text
            if pressed:
                ended = before or note("Ctrl-C again ends the chat")
            elif text.strip():
                ended = self.turn(text)

    def turn(self, typed: str) -> bool | None:
        """A message, or a command. Up recalls it, also one that is refused."""
        text = typed
        if typed.strip().startswith('"""'):
            typed = typed.strip()
            while not typed[3:].endswith('"""'):
                line = self.keyboard.read("... ")
                if line is None or "\x03" in line:
                    return note("dropped: it was not closed")
                typed += "\n" + line
            text = typed[3:-3].strip("\n")
        self.keyboard.remember(typed)
        try:
            check_utf8(text, "this turn")
            return self.onecmd(text) if typed.startswith("/") and "\n" not in text else self.say(text)
        except UserError as error:
            note(f"error: {error}")

    def parseline(self, line: str) -> tuple[str, str, str]:
        name, rest = (*line[1:].split(maxsplit=1), "", "")[:2]
        return SAME.get(name, name), rest.strip(), line

    def default(self, line: str) -> None:
        name = line.split()[0]
        raise UserError(f"no such command: {name}; /help lists them, and after a space it is text")

    # --- what is said

    def ask(self, messages: list[dict], **options) -> None:
        """Let the model answer `messages`. They become the conversation once it has: a mistake changes nothing."""
        spec = {**self.request(messages), **options, "where": "this turn"}
        gather_objects(spec)
        with self.keyboard.mode(canonical=False):
            result = stream(self.session, spec, stop=self.keyboard.stop)
        # One cut off in its thoughts is none, and the next message continues the one that it should have answered.
        answer = {"role": "assistant", "content": result["text"], "tool_calls": result["tool_calls"]}
        answers = [answer] if result["text"] or result["tool_calls"] else []
        self.messages = [*messages, *answers]
        used, most = len(result["prompt_tokens"]) + len(result["tokens"]), self.session.max_context
        cut = "where the context ends (/undo and /clear make room)" if used >= most else "by max-new-tokens (/set)"
        ended = {"cancelled": "stopped, ", "length": f"cut off {cut}, ", "stop": ""}[result["finish_reason"]]
        ended += "" if answers else "no answer, "
        speed = f"{count(len(result['tokens']), 'token')}, {speed_of(result['stats'])}"
        note(f"{ended}{speed}, context {used:,} of {most:,}")
        if calls := len(self.waiting()):
            more = f"{calls} calls wait: /tool RESULT answers them, one after the other"
            note(more if calls > 1 else "1 call waits: /tool RESULT answers it")

    def say(self, text: str) -> None:
        messages = self.messages
        if self.waiting():  # a chat with calls that have no result could not go on
            note("the tool calls had no result and are left out")
            messages = messages[: self.last("assistant")]
        self.ask([*messages, user_turn(self.images, text)])
        self.images = []

    def do_tool(self, text: str) -> None:
        """/tool RESULT: what a tool call of the answer returned"""
        waiting = self.waiting()
        require(waiting, "no tool call waits for a result")
        id = waiting[0].get("id")  # the model's own calls have none but their places
        messages = [*self.messages, {"role": "tool", "content": text, "tool_call_id": id}]
        if len(waiting) == 1:
            self.ask(messages)
        else:
            self.messages = messages

    def do_retry(self, rest: str) -> None:
        """/retry: answer again"""
        messages = self.messages[: self.last("user", "tool") + 1]
        require(messages, "nothing was said yet")
        seed = self.options["seed"]
        self.ask(messages, seed=random.getrandbits(32) if seed is None else seed)

    def do_undo(self, rest: str) -> None:
        """/undo: take back the last message

        Its pictures go back to those that wait for the next one.
        """
        at = self.last("user")
        require(at >= 0, "nothing was said yet")
        content, self.messages = self.messages[at]["content"], self.messages[:at]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        self.keyboard.recall(json.dumps(f'"""{text}"""' if text.startswith("/") else text))
        self.images = [url for url in map(image_url, parts) if url]
        note(f"taken back; Up recalls it: {text[:60]}")

    def do_clear(self, rest: str) -> None:
        """/clear: forget the conversation, and what /load set"""
        self.messages, self.images = [], []
        note("forgotten" + self.reload({}))

    def last(self, *roles: str) -> int:
        """Where the last message of one of these roles stands; -1: nowhere."""
        return max((i for i, message in enumerate(self.messages) if message["role"] in roles), default=-1)

    def waiting(self) -> list[dict]:
        """The calls of the last answer that have no result yet."""
        at = self.last("user", "assistant")
        calls = self.messages[at].get("tool_calls") if at >= 0 else None
        return (calls or [])[len(self.messages) - 1 - at :]

    # --- what is set

    def do_image(self, path: str) -> None:
        """/image PATH: a picture for the next message; without PATH: none"""
        if not path:
            self.images = []
            return note("no picture goes with the next message")
        vision = self.session.config.vision
        require(vision, "this checkpoint takes no images")
        with contextlib.suppress(ValueError):  # as a shell reads it: quotes, and spaces after a backslash
            path = path if os.path.exists(path) else " ".join(shlex.split(path))
        file = expand(path)
        size = load_image(file).size
        self.images.append(os.path.abspath(file))
        note("{}: {} × {} pixels, {} tokens, for the next message".format(path, *size, math.prod(grid(*size, vision))))

    def choose(self, name: str, value) -> None:
        self.chosen[name] = value
        self.loaded.pop(name, None)
        note(setting(name, value))

    def try_turn(self, tools: list | None = None, effort: str | None = None) -> None:
        """Refuses what the checkpoint's chat format does not take."""
        encode_chat(self.session.tokenizer, [{"role": "user", "content": "?"}], tools, effort)

    def do_effort(self, rest: str) -> None:
        """/effort none|high: whether to reason; alone: the checkpoint's default"""
        self.try_turn(effort=rest or None)
        self.choose("reasoning_effort", rest or None)

    def do_system(self, rest: str) -> None:
        """/system TEXT: the system prompt; alone: none"""
        self.choose("system", rest or None)

    def do_tools(self, path: str) -> None:
        """/tools FILE: a JSON list of what the model may call; alone: none"""
        tools = read_tools(expand(path)) if path else None
        with within(path):
            self.try_turn(tools)
        self.choose("tools", tools)

    def do_set(self, rest: str) -> None:
        """/set NAME [VALUE]: temperature, top-p, max-new-tokens or seed; alone: shows them"""
        name, _, value = rest.partition(" ")
        key = name.replace("-", "_")
        if not rest:
            return note(", ".join(self.numbers()) or "nothing is set")
        require(key in NUMBERS, f"no such setting: {name}; there are temperature, top-p, max-new-tokens and seed")
        self.choose(key, read_number(name, value) if value else None)

    def numbers(self) -> list[str]:
        """Those that were set."""
        return [setting(name, value) for name, value in self.options.items() if name in NUMBERS and value is not None]

    def do_show(self, rest: str) -> None:
        """/show: the settings, pictures that wait, and the conversation"""
        others = [setting(name, value) for name, value in self.options.items() if name not in NUMBERS]
        note("\n".join([*others, *self.numbers(), *(f"picture for the next message: {path}" for path in self.images)]))
        for message in self.messages:
            content = message.get("content") or ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            said = [f"[{picture_name(part)}]" if image_url(part) else part.get(part["type"]) for part in parts]
            calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or []]
            note(f"{message['role']}: " + "\n".join(map(str, (*said, *calls))))

    # --- files

    def do_save(self, path: str) -> None:
        """/save FILE: the conversation as a line for --requests

        The last answer stands apart, since a request ends with its question.
        """
        spec = self.request(self.messages)
        if self.messages and self.messages[-1]["role"] == "assistant":
            spec["answer"] = spec["messages"].pop()
        require(self.messages and path, "give /save the name of a new file, once something was said")
        line = json.dumps(spec, ensure_ascii=False)
        path = expand(path)
        with writing(path), open(path, "x", encoding="utf-8", errors="backslashreplace") as file:  # JSON, see launch
            file.write(f"{line}\n")
        note(f"{path}: {count(len(self.messages), 'message')}")

    def do_load(self, path: str) -> None:
        """/load FILE: go on with a conversation that /save wrote"""
        spec, *more = read_requests(argparse.Namespace(requests=expand(path) or "/load"))
        require("messages" in spec and not more, f"{path}: should hold one line, with 'messages'")
        self.session.requests.read({**spec})  # refuses what could not be answered
        answer, base, _ = spec.pop("answer", None), spec.pop("base"), spec.pop("where")
        messages = [*spec.pop("messages"), *([answer] if answer else [])]
        for message in messages:
            for part in message["content"] if isinstance(message.get("content"), list) else []:
                if (url := image_url(part)) and url[:5].lower() != "data:":
                    part["image_url"] = {"url": os.path.abspath(os.path.join(base, url))}
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        changed = self.reload({**self.given, **spec, "system": system})
        self.messages, self.images = messages, []
        note(f"{path}: {count(len(messages), 'message')}" + ("" if answer else "; /retry answers the last") + changed)

    def reload(self, loaded: dict) -> str:
        """Let `loaded` be what /load brought. Returns what that changes, for a note."""
        before, self.loaded = self.options, loaded
        now = self.options
        changed = [setting(name, now.get(name)) for name in before | now if now.get(name) != before.get(name)]
        return "".join(f"\n{line}" for line in changed)

    def complete(self, text: str, state: int) -> str | None:
        """What Tab makes of the last word of the line, for `readline`."""
        line, start = readline.get_line_buffer()[: readline.get_endidx()], readline.get_begidx()
        name, space, path = line.partition(" ")
        if space:
            found = files_of(path) if name[1:] in WITH_FILE else []
            found = [f"{name} {each}" for each in found]
        else:
            names = [method.removeprefix("do_") for method in vars(Chat) if method.startswith("do_")]
            found = [f"/{each} " for each in (*names, *SAME) if f"/{each}".startswith(line or "/")]
        return found[state][start:] if state < len(found) else None

    def do_help(self, rest: str) -> None:
        """/help: this"""
        for name, method in vars(Chat).items():
            if name.startswith("do_"):
                usage, _, what = method.__doc__.splitlines()[0].partition(": ")
                note(f"{usage:18} {what}")
        note('Ctrl-C ends an answer. A pasted block is one message; by hand, """ opens and')
        note("closes one of several lines.")

    def do_exit(self, rest: str) -> bool:
        """/exit: or /quit, /bye, Ctrl-D, Ctrl-C twice"""
        return True


def interact(session) -> None:
    """A chat. Rank 0 has the person; the others wait for what they are to answer with it."""
    keyboard = Keyboard(session.place.rank)
    with keyboard.mode(canonical=True), Postponed(signal.SIGINT) as keyboard.signals:
        if chat := together(lambda: Chat(session, keyboard) if session.place.rank == 0 else None):
            chat.run()
            gather_objects(None)
        else:
            while (spec := gather_objects(None)[0]) is not None:
                with contextlib.suppress(UserError):  # rank 0 has it too, and says so
                    session.answer([spec], stop=keyboard.stop)  # which rank 0 alone will call
        keyboard.signals.number = 0  # it was about an answer
