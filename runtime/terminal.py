"""The chat in the terminal, and how answers are printed."""

import argparse
import contextlib
import itertools
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

from runtime.chat import encode_chat, image_url, opening, user_turn
from runtime.files import UserError, writing
from runtime.images import grid, load_image
from runtime.launch import Postponed, gather_objects, postponed, together
from runtime.requests import NUMBERS, check_utf8, read_requests


def note(text: str) -> None:
    """A line beside the conversation, dimmed."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def stream(session, spec: dict, base: str = "", stop=None) -> dict:
    """The answer to one request, printed as it comes. `stop`: as the engine's."""
    printer = Printer()
    (result,) = session.answer([spec], base, printer, stop=stop)
    if session.place.rank == 0:
        printer.close()
        print_calls(result)
    return result


def print_calls(result: dict) -> None:
    print()
    for call in result["tool_calls"]:
        print(json.dumps(call, ensure_ascii=False))
    sys.stdout.flush()


class Printer:
    """Prints an answer as it comes: reasoning dimmed on stderr, text on stdout."""

    def __init__(self):
        self.kind = "text"

    def __call__(self, i: int, kind: str, text: str) -> None:
        if kind != self.kind:
            self.close()
            if kind == "reasoning" and sys.stderr.isatty():
                print("\x1b[2m", end="", file=sys.stderr)
        self.kind = kind
        print(text, end="", file=sys.stderr if kind == "reasoning" else sys.stdout, flush=True)

    def close(self) -> None:
        """End what is dimmed, and its line."""
        if self.kind == "reasoning":
            print("\x1b[0m" if sys.stderr.isatty() else "", file=sys.stderr, flush=True)
        self.kind = "text"


HISTORY = "~/.mistral_history"  # what was typed into the chat, a JSON string a line


class Keyboard:
    """What a person types or pastes, on rank 0; or lines from a pipe.

    In the chat the terminal sends Ctrl-C as a character, not as a signal. The signal would go to everything in the
    foreground: under torchrun that is not the ranks but torchrun, which then ends them all.
    """

    def __init__(self, rank: int):
        self.terminal, self.interrupted = rank == 0 and sys.stdin.isatty(), False
        self.signals = Postponed()  # SIGINT in the chat, where a launcher sends it to the ranks
        self.draft = ""  # stands in the line when the next turn is read
        self.ahead = b""  # was typed while an answer came
        # Without stdout in the terminal too, `input` edits nothing.
        self.readline = readline if self.terminal and sys.stdout.isatty() else None
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # see check_utf8
        if not self.readline:
            return
        self.brackets = "libedit" not in (readline.__doc__ or "")  # GNU's readline knows where a paste ends
        # Ctrl-C leaves the line with just this character in it: end of line, clear, the character quoted, return.
        keys = r'"\C-c": "\C-e\C-u\C-v\C-c\C-m"' if self.brackets else 'bind -s "^C" "^E^U^V^C^M"'
        readline.parse_and_bind(keys)
        for setting in ("set enable-bracketed-paste on", "set bell-style none"):
            readline.parse_and_bind(setting)
        readline.set_auto_history(False)
        with contextlib.suppress(OSError, ValueError), open(os.path.expanduser(HISTORY), encoding="utf-8") as file:
            for line in list(file)[-1000:]:
                readline.add_history(json.loads(line))

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
        """Whether Ctrl-C was pressed while the answer came. Whatever else was typed is kept for the next turn."""
        with contextlib.suppress(OSError):  # the terminal is gone
            while self.terminal and select.select([sys.stdin], [], [], 0)[0]:
                self.ahead += os.read(sys.stdin.fileno(), 4096)
        if b"\x03" in self.ahead:
            self.interrupted, self.ahead = True, b""
        self.interrupted |= self.signals.number > 0
        return self.interrupted

    def read(self, prompt: str = "\n> ") -> str | None:
        """A line, or a pasted block; "\x03" for Ctrl-C, None at the end."""
        ahead = edited(self.ahead.decode(errors="surrogateescape"))
        draft, self.draft, self.ahead, self.interrupted = self.draft + ahead, "", b"", False
        self.signals.number = 0
        if draft == ahead and ahead.find("\n") == len(ahead) - 1 >= 0:  # a line; several are a paste, to be seen first
            print(f"{prompt}{ahead}", end="", flush=True)
            return ahead[:-1]
        if self.readline:
            readline.set_startup_hook(lambda: readline.insert_text(draft.rstrip("\n")))
        elif self.terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            self.signals.waiting = True
            line = input(prompt if self.readline else "")
            while self.readline and not self.brackets and select.select([sys.stdin], [], [], 0.05)[0]:
                line += f"\n{input()}"  # lines that are there already were pasted
        except EOFError:
            return None
        except KeyboardInterrupt:
            return "\x03" if self.terminal else None
        finally:
            self.signals.waiting = False
        return line

    def remember(self, text: str) -> None:
        if self.readline and text.strip():
            readline.add_history(text)
            with contextlib.suppress(OSError):
                path = os.open(os.path.expanduser(HISTORY), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with open(path, "w", encoding="utf-8") as file:
                    file.write(json.dumps(text) + "\n")


# What these keys erase at the end of what was typed: a character, a word with the spaces after it, a line.
ERASED = {"\b": r".\Z", "\x7f": r".\Z", "\x17": r"\S*[^\S\n]*\Z", "\x15": r".*\Z"}


def edited(keys: str) -> str:
    """The text that a terminal makes of `keys`, of which those that print nothing and erase nothing are left out."""
    text = ""
    for part in re.split("([\b\x15\x17\x7f])", re.sub(r"\x1b\[[\d;]*[A-Za-z~]|[^\n\b\x15\x17 -\U0010ffff]", "", keys)):
        text = re.sub(ERASED[part], "", text) if part in ERASED else text + part
    return text


HELP = '''\
/image PATH        a picture for the next message; without PATH: none
/effort none|high  whether to reason; alone: the checkpoint's default
/system TEXT       the system prompt; alone: none
/set NAME VALUE    temperature, top-p, max-new-tokens, seed; without VALUE: the
                   default; /set alone shows them
/retry             answer again
/undo              take back the last message
/clear             forget the conversation
/tool RESULT       what a tool call of the answer returned
/save FILE         the conversation as a line for --requests; /load FILE reads it
/exit              or Ctrl-D, or Ctrl-C twice
Ctrl-C ends an answer. A pasted block is one message; by hand, """ opens and
closes one of several lines.'''


class Chat:
    """A conversation, on rank 0: messages, what was set for it, and the commands that change them."""

    def __init__(self, session, keyboard: Keyboard):
        self.session, self.keyboard, self.messages = session, keyboard, []
        self.prompt, self.images = session.args.system or None, []
        self.typed = ""  # the last turn, as it would be typed again
        self.options: dict = {}  # of the request: what was set here, instead of on the command line
        for path in session.args.image:
            self.image(path)

    def run(self) -> None:
        names = "image effort system set retry undo clear tool save load".split()
        commands = {f"/{name}": getattr(self, name) for name in names} | {"/help": lambda rest: note(HELP)}
        note("/help lists the commands, /exit ends")
        pressed = False
        while (text := self.keyboard.read()) is not None and text.strip() != "/exit":
            before, pressed = pressed, "\x03" in text
            if pressed and before:
                break
            if pressed:
                note("Ctrl-C again ends the chat")
            elif text.strip():
                try:
                    self.turn(text, commands)
                except UserError as error:
                    note(f"error: {error}")
                    self.keyboard.draft = self.typed

    def turn(self, text: str, commands: dict) -> None:
        """A message, or a command."""
        block = text.strip().startswith('"""')
        if block:
            text = text.strip()[3:]
            while not text.endswith('"""'):
                line = self.keyboard.read("... ")
                if line is None or "\x03" in line:
                    return note("dropped: it was not closed")
                text += "\n" + line
            text = text[:-3].strip("\n")
        self.typed = f'"""{text}"""' if block else text
        self.keyboard.remember(self.typed)
        check_utf8(text, "this turn")
        command, _, rest = text.strip().partition(" ")
        if block or "\n" in text or not text.startswith("/"):
            self.say(text)
        elif command in commands:
            commands[command](rest.strip())
        else:
            raise UserError(f"no such command: {command}; /help lists them, and after a space it is text")

    # --- what is said

    def ask(self, messages: list[dict], **options) -> None:
        """Let the model answer `messages`. They become the conversation once it has: a mistake changes nothing."""
        spec = {"messages": [*opening(self.prompt), *messages], **self.options, **options, "where": "this turn"}
        gather_objects(spec)
        with self.keyboard.mode(canonical=False):
            result = stream(self.session, spec, stop=self.keyboard.stop)
        # One cut off in its thoughts is none, and the next message continues the one that it should have answered.
        answer = {"role": "assistant", "content": result["text"], "tool_calls": result["tool_calls"]}
        self.messages = [*messages, *([answer] if result["text"] or result["tool_calls"] else [])]
        used, most = len(result["prompt_tokens"]) + len(result["tokens"]), self.session.max_context
        why = {"cancelled": "stopped", "length": "cut off where the context ends" if used >= most else "cut off"}
        words = [why.get(result["finish_reason"], ""), "" if answer in self.messages else "no answer"]
        if words[0] == "cut off":
            words[0] += " by max-new-tokens (/set)"
        words += [f"{len(result['tokens'])} tokens", f"{result['stats']['decode_tokens_per_s']:g} tokens/s"]
        note(", ".join(filter(None, [*words, f"context {used:,} of {most:,}"])))
        if calls := self.waiting():
            note(f"/tool RESULT answers {'the call' if calls == 1 else f'the {calls} calls, one after the other'}")

    def say(self, text: str) -> None:
        messages = self.messages
        if self.waiting():  # a chat with calls that have no result could not go on
            note("the tool calls had no result and are left out")
            messages = messages[: self.last("assistant")]
        self.ask([*messages, user_turn(self.images, text)])
        self.images = []

    def tool(self, text: str) -> None:
        if not self.waiting():
            raise UserError("no tool call waits for a result")
        call = self.messages[self.last("assistant")]["tool_calls"][-self.waiting()]
        id = {"tool_call_id": call["id"]} if call.get("id") else {}  # the model's own calls have none but their places
        messages = [*self.messages, {"role": "tool", "content": text, **id}]
        if self.waiting() == 1:
            self.ask(messages)
        else:
            self.messages = messages

    def retry(self, rest: str) -> None:
        messages = self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self.messages
        if not messages:
            raise UserError("nothing was said yet")
        chosen = "seed" in self.options or self.session.args.seed is not None
        self.ask(messages, **({} if chosen else {"seed": random.getrandbits(32)}))

    def undo(self, rest: str) -> None:
        """The last message goes back into the line, and its pictures to those that wait for the next one."""
        if (at := self.last("user")) < 0:
            raise UserError("nothing was said yet")
        content, self.messages = self.messages[at]["content"], self.messages[:at]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        self.keyboard.draft = "\n".join(part["text"] for part in parts if part["type"] == "text")
        self.images = [url for url in map(image_url, parts) if url]
        note(f"taken back: {self.keyboard.draft[:60]}")

    def clear(self, rest: str) -> None:
        self.messages, self.images = [], []
        note("forgotten")

    def last(self, role: str) -> int:
        """Where the last message of `role` stands; -1: nowhere."""
        return max((i for i, message in enumerate(self.messages) if message["role"] == role), default=-1)

    def waiting(self) -> int:
        """How many calls of the last answer have no result yet."""
        at = self.last("assistant")
        if at < 0 or self.last("user") > at:
            return 0
        return max(0, len(self.messages[at].get("tool_calls") or []) - (len(self.messages) - 1 - at))

    # --- what is set

    def image(self, path: str) -> None:
        if not path:
            self.images = []
            return note("no picture goes with the next message")
        if (vision := self.session.config.vision) is None:
            raise UserError("this checkpoint takes no images")
        with contextlib.suppress(ValueError):  # as a shell reads it: quotes, and spaces after a backslash
            path = path if os.path.exists(path) else " ".join(shlex.split(path))
        path = os.path.abspath(os.path.expanduser(path))
        size = load_image(path).size
        self.images.append(path)
        note("{}: {} × {} pixels, {} tokens, for the next message".format(path, *size, math.prod(grid(*size, vision))))

    def effort(self, rest: str) -> None:
        encode_chat(self.session.tokenizer, [{"role": "user", "content": "?"}], None, rest or None)  # refuses others
        self.options["reasoning_effort"] = rest or None
        note(f"reasoning effort {rest or 'as the checkpoint has it'}")

    def system(self, rest: str) -> None:
        self.prompt = rest or None
        note(f"system prompt: {rest or 'none'}")

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        key = name.replace("-", "_")
        if rest and key not in NUMBERS:
            raise UserError(f"no such setting: {name}; there are temperature, top-p, max-new-tokens and seed")
        try:
            self.options |= {key: NUMBERS[key](value)} if value else {}
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name}: {error}") from None
        if not value:
            self.options.pop(key, None)
        thinks = self.options.get("reasoning_effort", self.session.args.reasoning_effort) == "high"
        now = self.session.numbers({**self.options, "where": ""}, thinks)
        note(", ".join(f"{name.replace('_', '-')} {value}" for name, value in now.items() if value is not None))

    # --- files

    def save(self, path: str) -> None:
        """The last answer stands apart, since a request ends with its question."""
        args, messages, spec = self.session.args, [*opening(self.prompt), *self.messages], {}
        if messages and messages[-1]["role"] == "assistant":
            spec["answer"] = messages.pop()
        if not messages or not path:
            raise UserError("give /save the name of a new file, once something was said")
        names = ("reasoning_effort", *NUMBERS)
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        line = json.dumps({"messages": messages, **given, **self.options, **spec}, ensure_ascii=False)
        path = os.path.expanduser(path)
        with writing(path), open(path, "x", encoding="utf-8", errors="backslashreplace") as file:  # JSON, see launch
            file.write(f"{line}\n")
        note(f"{path}: {len(messages) + len(spec)} messages")

    def load(self, path: str) -> None:
        (spec, *more), base = read_requests(argparse.Namespace(requests=os.path.expanduser(path) or "/load"))
        if "messages" not in spec or more:
            raise UserError(f"{path}: should hold one line, with 'messages'")
        self.session.request({**spec}, base)  # refuses what could not be answered
        answer, _ = spec.pop("answer", None), spec.pop("where")
        messages = [*spec.pop("messages"), *([answer] if answer else [])]
        lists = [message["content"] for message in messages if isinstance(message.get("content"), list)]
        for part in itertools.chain(*lists):
            if (url := image_url(part)) and url[:5].lower() != "data:":
                part["image_url"] = {"url": os.path.abspath(os.path.join(base, url))}
        self.prompt = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        self.messages, self.options, self.images = messages, spec, []
        note(f"{path}: {len(messages)} messages" + ("" if answer else "; /retry answers the last"))


def interact(session) -> None:
    """A chat. Rank 0 has the person; the others wait for what they are to answer with it."""
    keyboard = Keyboard(session.place.rank)
    with keyboard.mode(canonical=True), postponed(signal.SIGINT) as keyboard.signals:
        if chat := together(lambda: Chat(session, keyboard) if session.place.rank == 0 else None):
            chat.run()
            gather_objects(None)
        else:
            while (spec := gather_objects(None)[0]) is not None:
                with contextlib.suppress(UserError):  # rank 0 has it too, and says so
                    session.answer([spec], stop=keyboard.stop)  # which rank 0 alone will call
        keyboard.signals.number = 0  # it was about an answer
