"""What a person meets: command-line arguments, progress, streamed answers, and the chat in the terminal."""

import argparse
import json
import math
import select
import sys
import time

import torch.distributed as dist

from checkpoint import Checkpoint
from config import UserError
from parallel import Place

HEARTBEAT = 60.0  # seconds
STILL_THERE = 0  # what rank 0 says then, instead of a line


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one line, like all others."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


def number(kind: type, low: float, high: float, above: bool = False):
    """An argparse type: a finite number between `low` (itself allowed unless `above`) and `high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value or (value == low and not above)) or value > high:
            raise argparse.ArgumentTypeError(
                f"{text!r} should be a number {'above' if above else 'from'} {low} to {high}"
            )
        return value

    return parse


COUNT, SIZE = number(int, 0, 1 << 40), number(int, 1, 1 << 40)


def check_utf8(text: str, where: str) -> None:
    """Bytes that are not UTF-8 come from the command line and the terminal as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not UTF-8 text; check the encoding of the terminal or script") from None


class Progress:
    """A line on stderr, once a second, while a large checkpoint loads."""

    def __init__(self, checkpoint: Checkpoint, place: Place):
        self.checkpoint, self.shown = checkpoint, place.rank == 0
        self.started = self.last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.shown and (now - self.last > 1 or (done == total and self.last > self.started)):
            self.last, read = now, self.checkpoint.bytes_read / 1e9
            rate = read / (now - self.started)
            print(f"loading: {100 * done // total} %, {read:.1f} GB read, {rate:.2f} GB/s", file=sys.stderr)


class Printer:
    """Streams an answer: reasoning dimmed on stderr, text on stdout; tool calls and control tokens are not shown."""

    def __init__(self, tokenizer, stop: list[str]):
        special = tokenizer.special
        self.modes = {
            special.get("[THINK]"): "think",
            special.get("[/THINK]"): "text",
            special.get("[TOOL_CALLS]"): "call",
        }
        self.mode, self.stop, self.held = "text", stop, ""

    def __call__(self, i: int, token: int, text: str) -> None:
        if token in self.modes:
            if self.mode == "think":
                print(file=sys.stderr)
            self.dim(False)
            self.mode = self.modes[token]
            self.dim(self.mode == "think")
        if self.mode == "think":
            print(text, end="", file=sys.stderr, flush=True)
        elif self.mode == "text":
            self.held += text
            self.flush(keep=max(map(len, self.stop), default=1) - 1)

    def dim(self, on: bool) -> None:
        if sys.stderr.isatty():
            print("\x1b[2m" if on else "\x1b[0m", end="", file=sys.stderr, flush=True)

    def flush(self, keep: int = 0) -> None:
        """Print what cannot be part of a stop string any more."""
        for stop in self.stop:
            if stop in self.held:
                self.held, self.mode = self.held.split(stop)[0], "stopped"
                keep = 0
        cut = len(self.held) - keep
        if cut > 0:
            print(self.held[:cut], end="", flush=True)
            self.held = self.held[cut:]


def interact(session) -> None:
    """A chat with history and the commands that it prints first. Ctrl-C cuts an answer short."""
    place, messages, system, images = session.place, [], session.args.system, []
    effort = session.args.reasoning_effort
    if place.rank == 0:
        sys.stdin.reconfigure(errors="surrogateescape")  # see check_utf8
        print("/exit ends, /clear forgets, /system TEXT, /effort none|high, /image PATH", file=sys.stderr)
    while True:
        line = read_line(place)
        if line is None or line.strip() == "/exit":
            return
        command, _, rest = line.strip().partition(" ")
        if command == "/clear":
            messages, images = [], []
        elif command == "/system":
            system = rest or None
        elif command == "/effort":
            effort = rest or None
        elif command == "/image":
            images.append({"type": "image_url", "image_url": {"url": rest}})
        elif command.startswith("/") or not command:
            if command and place.rank == 0:
                print(f"no such command: {command}", file=sys.stderr)
        else:
            turn = {"role": "user", "content": [*images, {"type": "text", "text": line}] if images else line}
            opening = [{"role": "system", "content": system}] if system else []
            spec = {"messages": [*opening, *messages, turn], "reasoning_effort": effort, "where": "this turn"}
            printer = Printer(session.tokenizer, [])
            try:
                check_utf8((system or "") + line, "this turn")
                (result,) = session.answer([spec], on_text=printer if place.rank == 0 else lambda *_: None)
            except UserError as error:
                images = []
                if place.rank == 0:
                    print(f"error: {error}", file=sys.stderr)
                continue
            except KeyboardInterrupt:  # Ctrl-C ends the answer; with several ranks it ends them all
                if dist.is_initialized():
                    raise
                print()
                continue
            if place.rank == 0:
                printer.flush()
                print_calls(result)
            answer = {"role": "assistant", "content": result["text"]}
            if result["tool_calls"]:
                answer["tool_calls"] = [
                    {"id": f"call{i:05d}", "function": c} for i, c in enumerate(result["tool_calls"])
                ]
            messages, images = [*messages, turn, answer], []


def read_line(place: Place) -> str | None:
    """A line from the terminal of rank 0, on every rank; None at its end.

    While nobody types, rank 0 says so every HEARTBEAT seconds: ranks that heard nothing for long would give up.
    """
    line: list = [None]
    prompt = "\n> " if sys.stdin.isatty() else ""
    if place.rank == 0:
        try:
            if prompt and dist.is_initialized():
                print(prompt, end="", flush=True)
                prompt = ""
                while not select.select([sys.stdin], [], [], HEARTBEAT)[0]:
                    dist.broadcast_object_list([STILL_THERE], src=0)
            line = [input(prompt)]
        except (EOFError, KeyboardInterrupt):
            pass
    if dist.is_initialized():
        dist.broadcast_object_list(line, src=0)
        while line[0] == STILL_THERE:
            dist.broadcast_object_list(line, src=0)
    return line[0]


def print_calls(result: dict) -> None:
    print()
    for call in result["tool_calls"]:
        print(json.dumps(call, ensure_ascii=False))
