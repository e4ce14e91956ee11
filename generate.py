"""Generate from a checkpoint: one prompt, a file of requests, or a chat in the terminal.

    python generate.py --ckpt DIR --prompt "…"
    torchrun --nproc-per-node 8 generate.py --ckpt DIR --tp 8 --requests FILE.jsonl --json

Human-readable text and progress go to stderr, answers to stdout; with --json stdout carries JSON lines only.

What is asked becomes a JSON request, which a `Session` answers (`session.py`).
"""

import argparse
import json
import os
import sys

import torch.distributed as dist

from config import UserError, parse_line, read_lines
from launch import COUNT, SIZE, Parser, find_place, number, run_program, together
from parallel import Place
from session import KEYS, SEED, TEMPERATURE, TOP_P, Session


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="checkpoint, any layout; default: the small one in the repository")
    add("--prompt", metavar="TEXT", help="one user turn")
    add("--image", metavar="PATH", action="append", default=[], help="image before the prompt's text; repeatable")
    add("--system", metavar="TEXT", help="system prompt")
    add("--raw", action="store_true", help="no chat template: <s> + the text, continued")
    add("--requests", metavar="FILE", help="one JSON request a line")
    add("--interactive", action="store_true", help="chat in the terminal")
    add("--reasoning-effort", choices=["none", "high"])
    add("--max-new-tokens", type=COUNT, default=1024, metavar="N", help="0 only scores the prompt")
    add("--temperature", type=TEMPERATURE, metavar="F", help="0 is greedy; default 0, 0.7 with --reasoning-effort high")
    add("--top-p", type=TOP_P, metavar="F", help="default 1, 0.95 with --reasoning-effort high")
    add("--seed", type=SEED, metavar="N", help="default: a new one each time")
    add("--batch-size", type=SIZE, default=16, metavar="N", help="requests answered together")
    add("--max-context", type=SIZE, metavar="N", help="longest prompt and answer together; default: the model's")
    add("--tp", type=SIZE, metavar="N", help="tensor-parallel size; default: all processes")
    add("--pp", type=SIZE, metavar="N", help="pipeline-parallel size; default 1")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--weights", choices=["auto", "fp8", "dequantized"], default="auto", help="keep FP8 weights FP8 in memory?")
    add("--logprobs", action="store_true", help="with --json: log-probabilities too")
    add("--json", action="store_true", help="one JSON object a request on stdout")
    add("--timeout", type=number(float, 5, 1e9), default=300, metavar="S", help="a rank silent for so long is gone")
    args = parser.parse_args(argv)
    if args.requests and (args.prompt is not None or args.image or args.system or args.interactive):
        raise UserError("--requests already says what to ask; leave out --prompt, --image, --system and --interactive")
    if args.raw and (args.image or args.system is not None):
        raise UserError("--raw continues plain text; leave out --image and --system")
    if args.interactive and (args.prompt is not None or args.json or args.raw or args.image):
        raise UserError("--interactive reads turns from the terminal; leave out --prompt, --image, --raw and --json")
    if not args.requests and args.prompt is None and not args.interactive:
        if args.json or args.image or args.raw or not sys.stdin.isatty():
            raise UserError("nothing to do: give --prompt TEXT or --requests FILE (or chat in a terminal)")
        args.interactive = True
    return args


# ------------------------------------------------------------------------------------------------------- requests


def read_requests(args: argparse.Namespace) -> tuple[list[dict], str]:
    """The requests as JSON objects, each with a `where` for error messages; and the folder of their image paths."""
    if not args.requests:
        return [command_line_request(args)], ""
    specs = []
    for i, line in read_lines(args.requests):
        where = f"{args.requests} line {i}"
        spec = parse_line(line, where, KEYS)
        if ("messages" in spec) == ("raw" in spec):
            raise UserError(f"{where}: should hold either 'messages' or 'raw'")
        specs.append({**spec, "where": where})
    if not specs:
        raise UserError(f"{args.requests}: holds no request")
    return specs, os.path.dirname(args.requests)


def command_line_request(args: argparse.Namespace) -> dict:
    check_utf8(args.prompt, "--prompt")
    check_utf8(args.system or "", "--system")
    if args.raw:
        return {"raw": args.prompt, "where": "--prompt"}
    return {"messages": [*opening(args.system), user_turn(args.image, args.prompt)], "where": "--prompt"}


def opening(system: str | None) -> list[dict]:
    return [] if system is None else [{"role": "system", "content": system}]


def user_turn(images: list[str], text: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": path}} for path in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def check_utf8(text: str, where: str) -> None:
    """Bytes that are not UTF-8 come from the command line and the terminal as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not UTF-8 text; check the encoding of the terminal or script") from None


# ---------------------------------------------------------------------------------------------------- the terminal


def interact(session: Session) -> None:
    """A chat with history and the commands that it prints first. Ctrl-C cuts an answer short."""
    place, history, images = session.place, [], []
    system, effort = session.args.system or None, session.args.reasoning_effort

    def note(text: str) -> None:
        if place.rank == 0:
            print(text, file=sys.stderr)

    note("/exit ends, /clear forgets, /system TEXT, /effort none|high, /image PATH")
    if place.rank == 0:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # see check_utf8
    while (line := read_line(place)) is not None and line.strip() != "/exit":
        command, _, rest = line.strip().partition(" ")
        if command == "/clear":
            history, images = [], []
        elif command == "/system":
            system = rest or None
        elif command == "/effort":
            effort = rest or None
        elif command == "/image":
            images.append(rest)
        elif command.startswith("/"):
            note(f"no such command: {command}")
        elif command:
            turn = user_turn(images, line)
            messages = [*opening(system), *history, turn]
            try:
                check_utf8((system or "") + line, "this turn")
                result = stream(session, {"messages": messages, "reasoning_effort": effort, "where": "this turn"})
            except UserError as error:
                images = []  # one of them may be what is wrong
                note(f"error: {error}")
            except KeyboardInterrupt:  # Ctrl-C ends the answer; several ranks it ends (see launch.py)
                print()
            else:
                answer = {"role": "assistant", "content": result["text"], "tool_calls": result["tool_calls"]}
                history, images = [*history, turn, answer], []


def read_line(place: Place) -> str | None:
    """A line from the terminal of rank 0, on every rank; None at its end."""
    line: list = [None]
    if place.rank == 0:
        try:
            line = [input("\n> " if sys.stdin.isatty() else "")]
        except (EOFError, KeyboardInterrupt):
            pass
    if dist.is_initialized():
        dist.broadcast_object_list(line, src=0)
    return line[0]


def stream(session: Session, spec: dict, base: str = "") -> dict:
    """The answer to one request, printed as it comes."""
    printer = Printer()
    (result,) = session.answer([spec], base, printer)
    if session.place.rank == 0:
        printer.close()
        print_calls(result)
    return result


def print_calls(result: dict) -> None:
    print()
    for call in result["tool_calls"]:
        print(json.dumps(call, ensure_ascii=False))


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


class Numbered:
    """Prints the answers to many requests, as JSON lines or numbered."""

    def __init__(self, as_json: bool):
        self.as_json, self.count = as_json, 0

    def __call__(self, result: dict) -> None:
        self.count += 1
        if self.as_json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            print(f"[{self.count}] {result['text']}", end="")
            print_calls(result)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    place = find_place(args.tp, args.pp)
    if place.dp_size > 1:
        sizes = f"--tp {place.tp_size} × --pp {place.pp_size}"
        raise UserError(f"{sizes} should be the number of processes, {place.world_size}; start so many with torchrun")
    specs, base = ([], "") if args.interactive else together(lambda: read_requests(args))
    session = Session(args, place)
    if args.interactive:
        return interact(session)
    if len(specs) == 1 and not args.json:
        results = [stream(session, specs[0], base)]
    else:
        results = session.answer(specs, base, on_result=Numbered(args.json))
    if place.rank == 0 and not args.json:
        stats = results[-1]["stats"]
        speeds = f"{stats['prefill_tokens_per_s']} prompt tokens/s, {stats['decode_tokens_per_s']} new tokens/s"
        print(f"loaded in {stats['load_s']} s, {speeds}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
