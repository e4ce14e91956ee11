"""JSON requests and the dataclasses that the engine works on."""

import argparse
import os
from dataclasses import dataclass, field

import torch

from runtime.chat import opening, user_turn
from runtime.files import UserError, parse_line, read_lines
from runtime.launch import COUNT, number


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
            if ("messages" in spec) == ("raw" in spec):
                raise UserError(f"{where}: should hold either 'messages' or 'raw'")
            specs.append({**spec, "where": where})
    if not specs:
        raise UserError(f"{name}: holds no request")
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
