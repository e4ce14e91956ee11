"""What is asked and answered: JSON requests -> `Request`, which the engine takes; its `Answer` -> JSON."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from model import VisionConfig
from parallel import Place
from runtime.chat import Reply, ReplyParser, encode_chat, opening, user_turn
from runtime.files import UserError, parse_line, read_lines, require
from runtime.images import grid, grid_of, image_name, load_image, pixels
from runtime.launch import COUNT, number
from runtime.tokenizer import SentencePiece, Tekken


@dataclass
class Request:
    """What to continue, and how."""

    prompt: list[int]
    pixels: list[torch.Tensor] = field(default_factory=list)  # the images, in the order of their tokens; first stage
    max_new_tokens: int | None = None  # None: as many as the context leaves
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False
    images: list[tuple[str, int]] = field(default_factory=list)  # of each a name of its own, and how many tokens it has


@dataclass
class Answer:
    """What came of a request. Log-probabilities are natural logs of the untempered softmax."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    finish_reason: str = "length"  # or "stop", or "cancelled"


TEMPERATURE, TOP_P, SEED = number(float, 0, 100), number(float, 0, 1, above=True), number(int, 0, (1 << 63) - 1)

NUMBERS = {"max_new_tokens": COUNT, "temperature": TEMPERATURE, "top_p": TOP_P, "seed": SEED}

KEYS = {"messages", "tools", "raw", "reasoning_effort", "stop", *NUMBERS}  # of a request
KEYS |= {"answer"}  # is not used here: the chat saves the last answer under it


def read_requests(args: argparse.Namespace, data: bytes | None = None) -> tuple[list[dict], str]:
    """The requests as JSON objects, each with a `where` for error messages; and the folder of their image paths."""
    if not args.requests:
        return [command_line_request(args, data)], ""
    lines, name = read_lines(args.requests) if data is None else list(enumerate(data.splitlines(), 1)), args.requests
    specs = []
    for i, line in lines:
        where = f"{name if data is None else 'standard input'} line {i}"
        if line.strip():
            spec = parse_line(line, where, KEYS)
            require(("messages" in spec) != ("raw" in spec), f"{where}: should hold either 'messages' or 'raw'")
            specs.append({**spec, "where": where})
    require(specs, f"{name}: holds no request")
    return specs, os.path.dirname(name)


def command_line_request(args: argparse.Namespace, data: bytes | None) -> dict:
    where = "the question" if data is None else "standard input"
    text = args.prompt if data is None else data.decode(errors="surrogateescape").strip("\n")
    check_utf8(text, where)
    check_utf8(args.system or "", "--system")
    if args.raw:
        return {"raw": text, "where": where}
    return {"messages": [*opening(args.system), user_turn(args.image, text)], "where": where}


def check_utf8(text: str, where: str) -> None:
    """Bytes that are not UTF-8 come from the command line and the terminal as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not UTF-8 text; check the encoding of the terminal or script") from None


@dataclass
class RequestReader:
    """Reads requests for one checkpoint. What a request leaves out, the command line says, or a default."""

    args: argparse.Namespace
    tokenizer: Tekken | SentencePiece
    vision: VisionConfig | None
    place: Place
    max_context: int
    seed: int  # of requests that want none in particular

    def read(self, spec: dict, base: str = "", index: int = 0) -> tuple[Request, ReplyParser]:
        """A JSON request -> token ids, pixels and settings, and what reads its answer.

        `base` is the folder of image paths. Requests that want no seed in particular get different ones, by their
        `index`: asked twice, two answers. Raises UserError that begins with `spec["where"]`.
        """
        effort = spec.get("reasoning_effort", self.args.reasoning_effort)
        request = Request([], **self.numbers(spec, effort == "high", index))
        try:
            request.prompt = self.prompt(spec, effort, partial(self.see, base, request))
            sizes = f"{len(request.prompt)} tokens are more than the context of {self.max_context}"
            advice = "shorten it or raise --max-context as far as the model goes"
            require(len(request.prompt) <= self.max_context, f"{sizes}; {advice}")
            parser = ReplyParser(self.tokenizer, request.prompt, stop_strings(spec), "raw" in spec)
        except UserError as error:
            raise UserError(f"{spec['where']}: {error}") from None
        request.logprobs = self.args.logprobs or request.max_new_tokens == 0
        return request, parser

    def prompt(self, spec: dict, effort: str | None, see: Callable[[str], tuple[int, int]]) -> list[int]:
        if "raw" in spec:
            require(isinstance(spec["raw"], str), "raw should be a string")
            return [self.tokenizer.bos_id, *self.tokenizer.encode(spec["raw"])]
        messages, tools = spec["messages"], spec.get("tools")
        prompt = encode_chat(self.tokenizer, messages, tools, effort, see if self.vision else None).ids
        if answer := spec.get("answer"):  # the chat's /load goes on from it; the images are known already
            encode_chat(self.tokenizer, [*messages, answer], tools, None, lambda url: (1, 1), training=True)
        return prompt

    def see(self, base: str, request: Request, url: str) -> tuple[int, int]:
        """The chat asks for an image's size in tokens. The first stage, which has the tower, takes it at once."""
        if self.place.first_stage:
            image = load_image(url, base)
            request.pixels.append(pixels(image, self.vision))
            rows, columns = grid(*image.size, self.vision)
        else:
            rows, columns = grid_of(url, base, self.vision)
        request.images.append((image_name(url, base), rows * columns))
        return rows, columns

    def numbers(self, spec: dict, thinks: bool, index: int = 0) -> dict:
        """max_new_tokens, temperature, top_p and seed: the request's, else the command line's, else the defaults."""
        found = {"temperature": 0.7 if thinks else 0.0, "top_p": 0.95 if thinks else 1.0}
        found |= {"seed": (self.seed + index) % (1 << 63), "max_new_tokens": None}  # None: what the context leaves
        for name, parse in NUMBERS.items():
            if spec.get(name) is not None:
                try:
                    found[name] = parse(repr(spec[name]))  # "1" and true are no numbers, and their repr shows it
                except argparse.ArgumentTypeError as error:
                    raise UserError(f"{spec['where']}: {name}: {error}") from None
            elif getattr(self.args, name) is not None:
                found[name] = getattr(self.args, name)
        return found


def stop_strings(spec: dict) -> list[str]:
    stop = spec.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    good = isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)
    require(good, "stop should be a string or a list of strings")
    return stop


def result_of(request: Request, reply: Reply, answer: Answer) -> dict:
    """What --json prints of an answer, but for `stats`."""
    result = {"prompt_tokens": request.prompt, "tokens": answer.tokens, **vars(reply)}
    result["finish_reason"] = answer.finish_reason
    if request.logprobs:
        result |= {"prompt_logprobs": answer.prompt_logprobs, "logprobs": answer.logprobs}
    return result
