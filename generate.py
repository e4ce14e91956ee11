"""Generate from a checkpoint: one prompt, a file of requests, or a chat in the terminal.

    python generate.py --ckpt DIR --prompt "…"
    torchrun --nproc-per-node 8 generate.py --ckpt DIR --tp 8 --requests FILE.jsonl --json

Human-readable text and progress go to stderr, answers to stdout; with --json stdout carries JSON lines only.

Whatever a user asks becomes a *spec*, the JSON object of a line in --requests, be it read from the file, made from the
command line or from a turn in the terminal. A `Session` turns specs into requests of token ids and pixels, lets the
engine answer them, and turns the answers' ids into text. Every rank does all of this alike; only rank 0 prints.
"""

import argparse
import json
import os
import random
import sys
import time

import torch
import torch.distributed as dist

from chat import encode_chat
from checkpoint import Checkpoint, fill, weight_bytes
from config import UserError, parse_line, read_config, read_lines
from engine import Answer, Engine, Request
from launch import COUNT, SIZE, Parser, Progress, find_place, gather_objects, number, peak_memory, run_program, together
from model import MistralMedium
from parallel import Place
from plan import check_memory
from tokenizer import load_tokenizer
from vision import grid, grid_of, load_image, pixels

TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "examples", "tiny")

TEMPERATURE, TOP_P, SEED = number(float, 0, 100), number(float, 0, 1, above=True), number(int, 0, (1 << 63) - 1)
NUMBERS = {"max_new_tokens": COUNT, "temperature": TEMPERATURE, "top_p": TOP_P, "seed": SEED}
KEYS = {"messages", "tools", "raw", "reasoning_effort", "stop", *NUMBERS}  # of a request


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


# -------------------------------------------------------------------------------------------------------- session


class Session:
    """A loaded checkpoint that answers JSON requests."""

    def __init__(self, args: argparse.Namespace, place: Place):
        self.args, self.place = args, place
        started = time.perf_counter()
        checkpoint = together(self.read)
        check_memory(self.config, place, args, self.keep_fp8)
        dtype = getattr(torch, args.dtype)
        self.model = together(lambda: MistralMedium(self.config, place, dtype, self.keep_fp8))
        # All ranks sample the same tokens, so they need the same seed: rank 0's, where none was given.
        self.seed = gather_objects(random.getrandbits(32) if args.seed is None else args.seed)[0]
        together(lambda: fill(self.model, checkpoint, Progress(checkpoint, place)))
        self.model.eval()
        self.weight_bytes = weight_bytes(self.model)
        self.model.lay_out_weights()
        self.load_s, self.bytes_read = time.perf_counter() - started, checkpoint.bytes_read

    def read(self) -> Checkpoint:
        """Everything but the model: config, tokenizer, and which tensors there are."""
        args = self.args
        directory = args.ckpt or TINY
        if not args.ckpt and not os.path.isdir(TINY):
            raise UserError("this repository holds no checkpoint of its own; name one with --ckpt DIR")
        checkpoint = Checkpoint(directory)
        self.config = checkpoint.fit(read_config(directory))
        self.tokenizer = load_tokenizer(directory, self.config)
        longest = self.config.max_position_embeddings
        self.max_context = min(args.max_context or longest, longest)
        stored_fp8 = checkpoint.is_fp8()
        if args.weights == "fp8" and not stored_fp8:
            raise UserError(f"{directory}: its weights are not FP8; leave out --weights fp8")
        on_gpu = self.place.device.type == "cuda"  # a CPU has no fast FP8 arithmetic
        self.keep_fp8 = args.weights == "fp8" or (args.weights == "auto" and on_gpu and stored_fp8)
        return checkpoint

    def answer(self, specs: list[dict], base: str = "", on_piece=None) -> list[dict]:
        """The requests' answers as the JSON objects that --json prints. `on_piece`: as the engine's, on rank 0 only."""
        requests = together(lambda: [self.request(spec, base) for spec in specs])
        engine = Engine(self.model, self.tokenizer, self.max_context)
        answers = engine.generate(requests, on_piece if self.place.rank == 0 else None)
        stats = {"load_s": round(self.load_s, 3)}
        for phase in ("prefill", "decode"):
            seconds = engine.seconds[phase]
            stats[f"{phase}_tokens_per_s"] = round(engine.tokens[phase] / seconds, 2) if seconds else 0.0
        mine = (peak_memory(self.place), self.weight_bytes, self.bytes_read)
        every = map(list, zip(*gather_objects(mine)))
        stats |= dict(zip(("peak_memory_bytes", "weight_bytes", "bytes_read"), every))
        return [{**self.result(*each), "stats": stats} for each in zip(requests, answers)]

    def request(self, spec: dict, base: str = "") -> Request:
        """A JSON request -> token ids, pixels and settings. Raises UserError that begins with `spec["where"]`."""
        where, vision = spec["where"], self.config.vision
        effort = spec.get("reasoning_effort", self.args.reasoning_effort)
        images: list[torch.Tensor] = []

        def see(url: str) -> tuple[int, int]:
            """The chat asks for an image's size in tokens. The first stage, which has the tower, takes it at once."""
            if not self.place.first_stage:
                return grid_of(url, base, vision)
            image = load_image(url, base)
            images.append(pixels(image, vision))
            return grid(*image.size, vision)

        if isinstance(raw := spec.get("raw"), str):
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(raw)]
        elif "raw" in spec:
            raise UserError(f"{where}: raw should be a string")
        else:
            try:
                messages, tools = spec["messages"], spec.get("tools")
                prompt = encode_chat(self.tokenizer, messages, tools, effort, see if vision else None).ids
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        if len(prompt) > self.max_context:
            raise UserError(
                f"{where}: {len(prompt)} tokens are more than the context of {self.max_context}; "
                "shorten it or raise --max-context as far as the model goes"
            )
        stop = spec.get("stop") or []
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
            raise UserError(f"{where}: stop should be a string or a list of strings")
        numbers = self.numbers(spec, thinks=effort == "high")
        scored = self.args.logprobs or numbers["max_new_tokens"] == 0
        return Request(prompt, images, **numbers, stop=stop, raw="raw" in spec, logprobs=scored)

    def numbers(self, spec: dict, thinks: bool) -> dict:
        """max_new_tokens, temperature, top_p and seed: the request's, else the command line's, else the defaults."""
        found = {"temperature": 0.7 if thinks else 0.0, "top_p": 0.95 if thinks else 1.0, "seed": self.seed}
        for name, parse in NUMBERS.items():
            if spec.get(name) is not None:
                try:
                    found[name] = parse(repr(spec[name]))  # "1" and true are no numbers, and their repr shows it
                except argparse.ArgumentTypeError as error:
                    raise UserError(f"{spec['where']}: {name}: {error}") from None
            elif getattr(self.args, name) is not None:
                found[name] = getattr(self.args, name)
        return found

    def result(self, request: Request, answer: Answer) -> dict:
        """What --json prints of an answer, but for `stats`."""
        result = {"prompt_tokens": request.prompt, "tokens": answer.tokens, **vars(answer.reply)}
        result["finish_reason"] = answer.finish_reason
        if request.logprobs:
            result |= {"prompt_logprobs": answer.prompt_logprobs, "logprobs": answer.logprobs}
        return result


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
    for first in range(0, len(specs), args.batch_size):
        if len(specs) == 1 and not args.json:
            results = [stream(session, specs[0], base)]
        else:
            results = session.answer(specs[first : first + args.batch_size], base)
        if place.rank > 0:
            continue
        for i, result in enumerate(results, first + 1):
            if args.json:
                print(json.dumps(result, ensure_ascii=False), flush=True)
            elif len(specs) > 1:
                print(f"[{i}] {result['text']}", end="")
                print_calls(result)
        if not args.json:
            stats = results[0]["stats"]
            speeds = f"{stats['prefill_tokens_per_s']} prompt tokens/s, {stats['decode_tokens_per_s']} new tokens/s"
            print(f"loaded in {stats['load_s']} s, {speeds}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
