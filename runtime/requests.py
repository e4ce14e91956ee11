"""What is asked and answered: JSON requests -> `Request`, which the engine takes; its `Answer` -> JSON."""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from model import VisionConfig
from runtime.chat import Encoded, Reply, ReplyParser, encode_chat, opening, user_turn
from runtime.files import UserError, lines_of, parse_line, read_json, read_lines, require, within
from runtime.images import grid_of, image_name, load_image, pixels
from runtime.launch import COUNT, number
from runtime.tokenizer import Tokenizer


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
    decode: Callable[[], list[torch.Tensor]] = list  # the pixels, which are large: only once there is room for them


@dataclass
class Answer:
    """What came of a request. Log-probabilities are natural logs of the untempered softmax."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    finish_reason: str = "length"  # or "stop", or "cancelled"


NUMBERS = {
    "max_new_tokens": COUNT,
    "temperature": number(float, 0, 100),
    "top_p": number(float, 0, 1, above=True),
    "seed": number(int, 0, (1 << 63) - 1),
}

KEYS = {"messages", "tools", "raw", "reasoning_effort", "stop", *NUMBERS}  # of a request
KEYS |= {"answer"}  # is not used here: the chat saves the last answer under it


def read_requests(args: argparse.Namespace, data: bytes | None = None) -> list[dict]:
    """The requests as JSON objects, each with a `where` for error messages and the folder `base` of its image paths."""
    if not args.requests:
        return [command_line_request(args, data)]
    name = args.requests if data is None else "standard input"
    specs = []
    for i, line in read_lines(args.requests) if data is None else lines_of(data):
        where = f"{name} line {i}"
        spec = parse_line(line, where, KEYS)
        require(("messages" in spec) != ("raw" in spec), f"{where}: should hold either 'messages' or 'raw'")
        specs.append({**spec, "where": where, "base": os.path.dirname(args.requests)})
    require(specs, f"{name}: holds no request")
    return specs


def command_line_request(args: argparse.Namespace, data: bytes | None) -> dict:
    where = "the question" if data is None else "standard input"
    text = args.prompt if data is None else data.decode(errors="surrogateescape").strip("\n")
    check_utf8(text, where)
    check_utf8(args.system or "", "--system")
    if args.raw:
        return {"raw": text, "where": where}
    tools = read_tools(args.tools) if args.tools else None
    return {"messages": [*opening(args.system), user_turn(args.image, text)], "tools": tools, "where": where}


def read_tools(path: str) -> list:
    """Of --tools FILE. What stands in the list is checked with the chat."""
    tools = read_json(path)
    require(isinstance(tools, list), f"{path}: should be a JSON list of tools, in OpenAI's form")
    return tools


def check_utf8(text: str, where: str) -> None:
    """Bytes that are not UTF-8 come from the command line and the terminal as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not UTF-8 text; check the encoding of the terminal or script") from None


def read_number(name: str, text: str) -> int | float:
    try:
        return NUMBERS[name.replace("-", "_")](text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None


@dataclass
class RequestReader:
    """Reads requests for one checkpoint. What a request leaves out, the command line says, or a default."""

    args: argparse.Namespace
    tokenizer: Tokenizer
    vision: VisionConfig | None
    max_context: int
    seed: int  # of requests that want none in particular

    def read(self, spec: dict, index: int = 0) -> tuple[Request, ReplyParser]:
        """A JSON request -> token ids and settings, and what reads its answer.

        Only the images' headers are read now. Requests that want no seed in particular get different ones, by their
        `index`: asked twice, two answers. Raises UserError that begins with `spec["where"]`.
        """
        with within(spec["where"]):
            effort, base = spec.get("reasoning_effort", self.args.reasoning_effort), spec.get("base", "")
            chat = self.prompt(spec, effort, base)
            sizes = f"{len(chat.ids)} tokens are more than the context of {self.max_context}"
            advice = "shorten it (in a chat: /undo, /clear) or raise --max-context as far as the model goes"
            require(len(chat.ids) <= self.max_context, f"{sizes}; {advice}")
            request = Request(chat.ids, **self.numbers(spec, effort == "high", index))
            request.images = [
                (image_name(url, base), math.prod(grid_of(url, base, self.vision))) for url in chat.images
            ]
            request.decode = lambda: [pixels(load_image(url, base), self.vision) for url in chat.images]
            request.logprobs = self.args.logprobs or request.max_new_tokens == 0
            return request, ReplyParser(self.tokenizer, stop_strings(spec), chat.thinks, "raw" in spec)

    def prompt(self, spec: dict, effort: str | None, base: str) -> Encoded:
        if "raw" in spec:
            require(isinstance(spec["raw"], str), "raw should be a string")
            return Encoded([self.tokenizer.bos_id, *self.tokenizer.encode(spec["raw"])], [], [])
        messages, tools = spec["messages"], spec.get("tools")
        see = partial(grid_of, base=base, vision=self.vision) if self.vision else None
        if spec.get("answer") not in (None, {}):  # the chat's /load goes on from it
            require(isinstance(messages, list), "messages should be a list")
            encode_chat(self.tokenizer, [*messages, spec["answer"]], tools, None, see, training=True)
        return encode_chat(self.tokenizer, messages, tools, effort, see)

    def numbers(self, spec: dict, thinks: bool, index: int) -> dict:
        """max_new_tokens, temperature, top_p and seed: the request's, else the command line's, else the defaults."""
        found = {"temperature": 0.7 if thinks else 0.0, "top_p": 0.95 if thinks else 1.0}
        found |= {"seed": (self.seed + index) % (1 << 63), "max_new_tokens": None}  # None: what the context leaves
        for name in NUMBERS:
            value = getattr(self.args, name)
            if spec.get(name) is not None:
                value = read_number(name, repr(spec[name]))  # "1" and true are no numbers, and their repr shows it
            if value is not None:
                found[name] = value
        return found


def stop_strings(spec: dict) -> list[str]:
    stop = spec.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
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
