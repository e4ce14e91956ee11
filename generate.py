"""Generate from a checkpoint: one prompt, a file of requests, or a chat in the terminal.

    python generate.py --ckpt DIR --prompt "…"
    torchrun --nproc-per-node 8 generate.py --ckpt DIR --tp 8 --requests FILE.jsonl --json

Human-readable text and progress go to stderr, answers to stdout; with --json stdout carries JSON lines only.
"""

import argparse
import json
import os
import random
import select
import sys
import time
from functools import partial

import torch
import torch.distributed as dist

from chat import encode_chat, parse_reply
from checkpoint import Checkpoint, fill
from config import UserError, read_config
from engine import Engine, Request
from launch import (
    COUNT,
    SIZE,
    Parser,
    Progress,
    check_utf8,
    find_place,
    gather_objects,
    number,
    peak_memory,
    run_program,
    together,
)
from model import MistralMedium
from parallel import Place
from tokenizer import load_tokenizer
from vision import grid, image_size, load_image, pixels

HEARTBEAT = 60.0  # seconds

STILL_THERE = 0  # what rank 0 says then, instead of a line

TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "examples", "tiny")


KEYS = {"messages", "tools", "raw", "reasoning_effort", "max_new_tokens", "temperature", "top_p", "seed", "stop"}

TEMPERATURE, TOP_P, SEED = number(float, 0, 100), number(float, 0, 1, above=True), number(int, 0, (1 << 63) - 1)


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
    add(
        "--temperature",
        type=TEMPERATURE,
        metavar="F",
        help="0 is greedy; default 0, or 0.7 with --reasoning-effort high",
    )
    add("--top-p", type=TOP_P, metavar="F", help="default 1, or 0.95 with --reasoning-effort high")
    add("--seed", type=SEED, metavar="N", help="default: a new one each time")
    add("--batch-size", type=SIZE, default=16, metavar="N", help="requests answered together")
    add("--max-context", type=SIZE, metavar="N", help="longest prompt and answer together; default: the model's")
    add("--tp", type=SIZE, metavar="N", help="tensor-parallel size; default: all processes")
    add("--pp", type=SIZE, metavar="N", help="pipeline-parallel size; default 1")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--weights", choices=["auto", "fp8", "dequantized"], default="auto", help="keep FP8 weights FP8 in memory?")
    add("--logprobs", action="store_true", help="with --json: log-probabilities too")
    add("--json", action="store_true", help="one JSON object a request on stdout")
    args = parser.parse_args(argv)
    if args.requests and (args.prompt is not None or args.image or args.system or args.interactive):
        raise UserError("--requests already says what to ask; leave out --prompt, --image, --system and --interactive")
    if args.raw and (args.image or args.system is not None):
        raise UserError("--raw continues plain text; leave out --image and --system")
    if args.interactive and (args.prompt is not None or args.json or args.raw or args.image):
        raise UserError(
            "--interactive reads the turns from the terminal; leave out --prompt, --image, --raw and --json"
        )
    if not args.requests and args.prompt is None and not args.interactive:
        if args.json or args.image or args.raw or not sys.stdin.isatty():
            raise UserError("nothing to do: give --prompt TEXT or --requests FILE (or chat in a terminal)")
        args.interactive = True
    return args


# ------------------------------------------------------------------------------------------------------- requests


def read_requests(args: argparse.Namespace) -> tuple[list[dict], str]:
    """The requests as JSON objects, each with a `where` for error messages; and the folder of their image paths."""
    if not args.requests:
        for text, where in ((args.prompt, "--prompt"), (args.system or "", "--system")):
            check_utf8(text, where)
        if args.raw:
            return [{"raw": args.prompt, "where": "--prompt"}], ""
        content = [{"type": "image_url", "image_url": {"url": path}} for path in args.image]
        content.append({"type": "text", "text": args.prompt})
        system = [{"role": "system", "content": args.system}] if args.system is not None else []
        turn = {"role": "user", "content": content if args.image else args.prompt}
        return [{"messages": [*system, turn], "where": "--prompt"}], ""
    specs = []
    try:
        with open(args.requests, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{args.requests}: cannot be read ({error.strerror})") from None
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{args.requests} line {i}"
        try:
            spec = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(spec, dict) or ("messages" in spec) == ("raw" in spec):
            raise UserError(f"{where}: should be an object with either 'messages' or 'raw'")
        if strange := set(spec) - KEYS:
            raise UserError(f"{where}: unknown key {sorted(strange)[0]!r}; known are {', '.join(sorted(KEYS))}")
        specs.append({**spec, "where": where})
    if not specs:
        raise UserError(f"{args.requests}: holds no request")
    return specs, os.path.dirname(args.requests)


def field(spec: dict, name: str, parse, default):
    """A number of the request, or the command line's."""
    if spec.get(name) is None:
        return default
    try:
        if isinstance(spec[name], (bool, str)):
            raise argparse.ArgumentTypeError(f"{spec[name]!r} is not a number")
        return parse(repr(spec[name]))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{spec['where']}: {name}: {error}") from None


class Session:
    """A loaded checkpoint that answers JSON requests."""

    def __init__(self, args: argparse.Namespace, place: Place):
        self.args, self.place = args, place
        started = time.perf_counter()
        checkpoint = together(self.prepare)
        self.seed = args.seed
        if self.seed is None:
            self.seed = gather_objects(random.getrandbits(32))[0]
        together(lambda: fill(self.model, checkpoint, Progress(checkpoint, place)))
        self.model.eval()
        weights = {id(t): t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers())}
        self.weight_bytes = sum(weights.values())
        self.model.lay_out_weights()
        self.load_s, self.bytes_read = time.perf_counter() - started, checkpoint.bytes_read

    def prepare(self) -> Checkpoint:
        """Everything but the weights: config, tokenizer, and this rank's part of the model on `meta`."""
        args = self.args
        directory = args.ckpt or TINY
        if not args.ckpt and not os.path.isdir(TINY):
            raise UserError("this repository holds no checkpoint of its own; name one with --ckpt DIR")
        self.config, checkpoint = read_config(directory), Checkpoint(directory)
        self.tokenizer = load_tokenizer(directory, self.config.vocab_size)
        self.max_context = min(
            args.max_context or self.config.max_position_embeddings, self.config.max_position_embeddings
        )
        on_gpu, stored_fp8 = self.place.device.type == "cuda", checkpoint.is_fp8()
        if args.weights == "fp8" and not stored_fp8:
            raise UserError(f"{directory}: its weights are not FP8; leave out --weights fp8")
        keep_fp8 = args.weights == "fp8" or (args.weights == "auto" and on_gpu and stored_fp8)
        self.model = MistralMedium(self.config, self.place, getattr(torch, args.dtype), keep_fp8)
        return checkpoint

    def request(self, spec: dict, base: str = "") -> Request:
        """A JSON request -> token ids, pixels and settings. Raises UserError that begins with `spec["where"]`."""
        args, where = self.args, spec["where"]
        effort = spec.get("reasoning_effort", args.reasoning_effort)
        images: list[str] = []
        if "raw" in spec:
            if not isinstance(spec["raw"], str):
                raise UserError(f"{where}: raw should be a string")
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(spec["raw"])]
        else:
            grids = partial(self.image_grid, base=base) if self.config.vision is not None else None
            try:
                chat = encode_chat(self.tokenizer, spec["messages"], spec.get("tools"), effort, grids)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            prompt, images = chat.ids, chat.images
        if len(prompt) > self.max_context:
            raise UserError(
                f"{where}: {len(prompt)} tokens are more than the context of {self.max_context}; "
                "shorten it or raise --max-context as far as the model goes"
            )
        stop = spec.get("stop") or []
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
            raise UserError(f"{where}: stop should be a string or a list of strings")
        thinks = effort == "high"
        temperature = args.temperature if args.temperature is not None else (0.7 if thinks else 0.0)
        top_p = args.top_p if args.top_p is not None else (0.95 if thinks else 1.0)
        pictures = []
        if self.place.first_stage:
            pictures = [pixels(load_image(url, base), self.config.vision) for url in images]
        return Request(
            prompt,
            pictures,
            max_new_tokens=field(spec, "max_new_tokens", COUNT, args.max_new_tokens),
            temperature=field(spec, "temperature", TEMPERATURE, temperature),
            top_p=field(spec, "top_p", TOP_P, top_p),
            seed=field(spec, "seed", SEED, self.seed),
            stop=stop,
            logprobs=args.logprobs or field(spec, "max_new_tokens", COUNT, args.max_new_tokens) == 0,
        )

    def image_grid(self, url: str, base: str) -> tuple[int, int]:
        return grid(*image_size(url, base), self.config.vision)

    def answer(self, specs: list[dict], base: str = "", on_text=lambda i, token, text: None) -> list[dict]:
        """The requests' answers as the JSON objects that --json prints."""
        requests = together(lambda: [self.request(spec, base) for spec in specs])
        engine = Engine(self.model, self.tokenizer, self.max_context)
        answers = engine.generate(requests, on_text)
        stats = {"load_s": round(self.load_s, 3)}
        for phase in ("prefill", "decode"):
            seconds = engine.seconds[phase]
            stats[f"{phase}_tokens_per_s"] = round(engine.tokens[phase] / seconds, 2) if seconds else 0.0
        mine = (peak_memory(self.place), self.weight_bytes, self.bytes_read)
        every = map(list, zip(*gather_objects(mine)))
        stats |= dict(zip(("peak_memory_bytes", "weight_bytes", "bytes_read"), every))
        results = []
        for spec, request, answer in zip(specs, requests, answers):
            if "raw" in spec:
                text, reasoning, calls = self.tokenizer.decode(answer.tokens), None, []
            else:
                reply = parse_reply(self.tokenizer, answer.tokens)
                text, reasoning, calls = reply.text, reply.reasoning, reply.tool_calls
            if answer.stopped_at is not None:
                text = text.split(answer.stopped_at)[0]
            result = {
                "prompt_tokens": request.prompt,
                "tokens": answer.tokens,
                "text": text,
                "reasoning": reasoning,
                "tool_calls": calls,
                "finish_reason": answer.finish_reason,
            }
            if request.logprobs:
                result |= {"prompt_logprobs": answer.prompt_logprobs, "logprobs": answer.logprobs}
            results.append({**result, "stats": stats})
        return results


# ------------------------------------------------------------------------------------------------------- the terminal


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


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    place = find_place(args.tp, args.pp)
    if place.dp_size > 1:
        raise UserError(f"--tp {place.tp_size} × --pp {place.pp_size} should be the number of processes; see --help")
    specs, base = ([], "") if args.interactive else together(lambda: read_requests(args))
    session = Session(args, place)
    if args.interactive:
        return interact(session)
    for first in range(0, len(specs), args.batch_size):
        batch = specs[first : first + args.batch_size]
        streams = len(specs) == 1 and not args.json and place.rank == 0
        stop = batch[0].get("stop") or [] if streams else []
        printer = Printer(session.tokenizer, [stop] if isinstance(stop, str) else stop)
        results = session.answer(batch, base, printer if streams else lambda *_: None)
        for i, result in enumerate(results if place.rank == 0 else [], first + 1):
            if args.json:
                print(json.dumps(result, ensure_ascii=False), flush=True)
            elif streams:
                printer.flush()
                print_calls(result)
            else:
                print(f"[{i}] {result['text']}", end="")
                print_calls(result)
        if place.rank == 0 and not args.json:
            stats = results[0]["stats"]
            speeds = f"{stats['prefill_tokens_per_s']} prompt tokens/s, {stats['decode_tokens_per_s']} new tokens/s"
            print(f"loaded in {stats['load_s']} s, {speeds}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
