"""A session: a loaded checkpoint that answers JSON requests, and the parser of its replies.

Whatever a user asks becomes a *spec*, the JSON object of a line in --requests, be it read from the file, made from the
command line or from a turn in the terminal. A `Session` turns specs into requests of token ids and pixels, lets the
engine answer them, and turns the answers' ids into text. Every rank does all of this alike; only rank 0 prints.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from chat import NAME, encode_chat, opening, user_turn
from checkpoint import Checkpoint, Stored, canonical_name, fill, weight_bytes
from config import UserError, find_folder, parse_line, read_config, read_json, read_lines, reading
from engine import Answer, Engine, Request
from launch import COUNT, gather_objects, number, together
from model import MistralMedium, add_adapters
from parallel import Place
from plan import Progress, check_memory, peak_memory
from tokenizer import SentencePiece, StreamDecoder, Tekken, load_tokenizer
from vision import grid, grid_of, image_name, load_image, pixels

TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "examples", "tiny")

TEMPERATURE, TOP_P, SEED = number(float, 0, 100), number(float, 0, 1, above=True), number(int, 0, (1 << 63) - 1)
NUMBERS = {"max_new_tokens": COUNT, "temperature": TEMPERATURE, "top_p": TOP_P, "seed": SEED}

KEYS = {"messages", "tools", "raw", "reasoning_effort", "stop", *NUMBERS}  # of a request
KEYS |= {"answer"}  # is not used here: the chat saves the last answer under it


class Session:
    """A loaded checkpoint that answers JSON requests."""

    def __init__(self, args: argparse.Namespace, place: Place):
        self.args, self.place = args, place
        started = time.perf_counter()
        checkpoint = together(self.read)
        check_memory(self.config, place, args, self.keep_fp8)
        dtype = getattr(torch, args.dtype)
        self.model = together(lambda: MistralMedium(self.config, place, dtype, self.keep_fp8))
        if self.lora:
            add_adapters(self.model, *self.lora)
        # All ranks sample the same tokens, so they need the same seed: rank 0's, where none was given.
        self.seed = gather_objects(random.getrandbits(32) if args.seed is None else args.seed)[0]
        self.model.join()
        together(lambda: fill(self.model, checkpoint, Progress(checkpoint, place)))
        self.model.eval()
        self.weight_bytes = weight_bytes(self.model)
        self.engine = Engine(self.model, self.tokenizer.eos_id, self.max_context)
        self.load_s, self.bytes_read = time.perf_counter() - started, checkpoint.bytes_read

    def read(self) -> Checkpoint:
        """Everything but the model: config, tokenizer, and which tensors there are."""
        args = self.args
        directory = args.ckpt or TINY
        if not args.ckpt and not os.path.isdir(TINY):
            raise UserError("this repository holds no checkpoint of its own; name one with --ckpt DIR")
        checkpoint = Checkpoint(directory)
        self.config = checkpoint.fit(read_config(directory))
        self.lora = read_adapters(args.lora, checkpoint) if args.lora else None  # rank and alpha
        self.tokenizer = load_tokenizer(directory, self.config)
        longest = self.config.max_position_embeddings
        self.max_context = min(args.max_context or longest, longest)
        stored_fp8 = checkpoint.is_fp8()
        if args.weights == "fp8" and not stored_fp8:
            raise UserError(f"{directory}: its weights are not FP8; leave out --weights fp8")
        on_gpu = self.place.device.type == "cuda"  # a CPU has no fast FP8 arithmetic
        self.keep_fp8 = args.weights == "fp8" or (args.weights == "auto" and on_gpu and stored_fp8)
        return checkpoint

    def answer(
        self,
        specs: list[dict],
        base: str = "",
        on_piece: Callable[[int, str, str], None] = lambda i, kind, text: None,
        on_result: Callable[[dict], None] = lambda result: None,
        stop: Callable[[], bool] | None = None,
    ) -> list[dict]:
        """The requests' answers as the JSON objects that --json prints.

        `on_piece` (see the engine) and `on_result`, which gets them in the order of the requests, are called on rank 0.
        Raises UserError for a request that cannot be read, once those before it that had begun are answered.
        """
        first, results, early, mistakes = self.place.rank == 0, [], {}, []

        def requests() -> Iterator[Request]:  # each is read, its images too, when there is room for it
            for i, spec in enumerate(specs):
                try:
                    request = together(lambda: self.request(spec, base, i))
                except UserError as mistake:
                    if i < self.args.batch_size:  # nothing has begun; later, what has is not thrown away
                        raise
                    mistakes.append(mistake)
                    return
                yield request

        def on_done(i: int, request: Request, answer: Answer) -> None:
            early[i] = self.result(request, answer)
            while (result := early.pop(len(results), None)) is not None:
                results.append({**result, "stats": self.stats()})
                if first:
                    on_result(results[-1])

        pieces = (on_piece,) if first else ()
        self.engine.generate(requests(), *pieces, on_done=on_done, width=self.args.batch_size, stop=stop)
        if mistakes:
            raise mistakes[0]
        return results

    def stats(self) -> dict:
        """Of the answers until now. All ranks call this together."""
        engine, stats = self.engine, {"load_s": round(self.load_s, 3)}
        for phase in ("prefill", "decode"):
            stats[f"{phase}_tokens"], seconds = engine.tokens[phase], engine.seconds[phase]
            stats[f"{phase}_tokens_per_s"] = round(engine.tokens[phase] / seconds, 2) if seconds else 0.0
        every = zip(*gather_objects((peak_memory(self.place), self.weight_bytes, self.bytes_read)))
        return stats | dict(zip(("peak_memory_bytes", "weight_bytes", "bytes_read"), map(list, every)))

    def request(self, spec: dict, base: str = "", index: int = 0) -> Request:
        """A JSON request -> token ids, pixels and settings. Raises UserError that begins with `spec["where"]`.

        Requests that want no seed in particular get different ones, by their `index`: asked twice, two answers.
        """
        where, vision = spec["where"], self.config.vision
        effort = spec.get("reasoning_effort", self.args.reasoning_effort)
        images: list[torch.Tensor] = []
        names: list[tuple[str, int]] = []

        def see(url: str) -> tuple[int, int]:
            """The chat asks for an image's size in tokens. The first stage, which has the tower, takes it at once."""
            if self.place.first_stage:
                image = load_image(url, base)
                images.append(pixels(image, vision))
                rows, columns = grid(*image.size, vision)
            else:
                rows, columns = grid_of(url, base, vision)
            names.append((image_name(url, base), rows * columns))
            return rows, columns

        if isinstance(raw := spec.get("raw"), str):
            prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(raw)]
        elif "raw" in spec:
            raise UserError(f"{where}: raw should be a string")
        else:
            try:
                messages, tools = spec["messages"], spec.get("tools")
                prompt = encode_chat(self.tokenizer, messages, tools, effort, see if vision else None).ids
                if answer := spec.get("answer"):  # the chat's /load goes on from it; the images are known already
                    encode_chat(self.tokenizer, [*messages, answer], tools, None, lambda url: (1, 1), training=True)
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
        numbers = self.numbers(spec, effort == "high", index)
        scored = self.args.logprobs or numbers["max_new_tokens"] == 0
        reader = ReplyParser(self.tokenizer, prompt, stop, "raw" in spec)
        return Request(prompt, images, **numbers, reader=reader, logprobs=scored, images=names)

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

    def result(self, request: Request, answer: Answer) -> dict:
        """What --json prints of an answer, but for `stats`."""
        result = {"prompt_tokens": request.prompt, "tokens": answer.tokens, **vars(request.reader.reply)}
        result["finish_reason"] = answer.finish_reason
        if request.logprobs:
            result |= {"prompt_logprobs": answer.prompt_logprobs, "logprobs": answer.logprobs}
        return result


def read_adapters(directory: str, checkpoint: Checkpoint) -> tuple[int, float]:
    """Adds adapters in peft's form, as train.py exports them, to the tensors of `checkpoint`; (rank, alpha)."""
    path, file = (
        os.path.join(find_folder(directory), f"adapter_{name}") for name in ("config.json", "model.safetensors")
    )
    fields = read_json(path)
    with reading(path, "adapter config"):
        rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
        if not (0 < rank <= 1 << 16 and math.isfinite(alpha)):
            raise UserError(f"rank {rank} and alpha {alpha} cannot be; r should be above 0 and lora_alpha finite")
        for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
            if fields.get(name):
                raise UserError(f"{name} is not supported; --lora takes what train.py exports")
    for key in checkpoint.file(file).keys():
        name = canonical_name(key.removeprefix("base_model.model."), native=False)
        checkpoint.tensors[name.replace(".lora_", ".adapter.lora_")] = Stored(file, key)
    checkpoint.title += f" with {directory}"  # where a tensor is missing, or has no place, in either
    return rank, alpha


# ------------------------------------------------------------------------------------------- from a user to specs


def read_input(args: argparse.Namespace) -> tuple[bytes | None, bool]:
    """(what standard input asks, where the command line doesn't; whether a person is to ask, in a chat). On rank 0."""
    chat = args.interactive
    if not (args.requests or args.prompt is not None or args.json or args.raw):
        chat = chat or sys.stdin.isatty()
    if chat:
        for path in args.image:
            load_image(path)  # its mistakes now, not once the model is loaded
    if chat or args.prompt is not None or args.requests not in (None, "-"):
        return None, chat
    data = b"" if sys.stdin.isatty() and not args.requests else sys.stdin.buffer.read()
    if not data.strip():
        raise UserError("nothing to do: give a question, --requests FILE, or in a terminal neither, for a chat")
    return data, False


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


# -------------------------------------------------------------------------------------------------- what is printed


def note(text: str) -> None:
    """A line beside the conversation, dimmed."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def stream(session: Session, spec: dict, base: str = "", stop=None) -> dict:
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


# ------------------------------------------------------------------------ from the model's tokens to its reply


@dataclass
class Reply:
    text: str = ""  # without reasoning and special tokens
    reasoning: str | None = None  # what stood between [THINK] and [/THINK]
    tool_calls: list[dict] = field(default_factory=list)  # {"name", "arguments": parsed JSON, or text that is none}


class ReplyParser:
    """Reads a reply token by token. What is streamed, what JSON carries and what a chat remembers all come from here.

    `add` and `finish` return pieces (kind, text), kind "text" or "reasoning", as soon as they are certain; joined, they
    are the texts of `reply`. A stop string counts in the answer's text alone. Of several, the one that is complete
    first ends the text where it begins; of two complete at the same character, the one listed first. Text that may
    still turn out to be the beginning of one is held back. Never raises, whatever the tokens.

    `prompt`: its ids tell whether the reply begins inside a [THINK] that the prompt opened. `raw`: no chat, only text.
    """

    def __init__(self, tokenizer: Tekken | SentencePiece, prompt: list[int] = (), stop: list[str] = (), raw=False):
        self.reply, self.stop, self.stopped, self.ended = Reply(), list(stop), False, False
        self._tokenizer, special = tokenizer, tokenizer.special
        marks = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
        self._marks = {} if raw else {special[name]: name for name in marks if name in special}
        self._text, self._thought = StreamDecoder(tokenizer), StreamDecoder(tokenizer)
        self._held = ""  # text that may be the beginning of a stop string
        self._calls: list[dict[str, list[int]]] = []  # for each, the ids of its "name", "[CALL_ID]" and "[ARGS]"
        self._into = "text"  # or "reasoning" or "calls"
        # The reply begins inside a thought if the last of these tokens in the prompt opened one.
        turns = {special.get(name) for name in ("[THINK]", "[/THINK]", "[/INST]", "[/TOOL_RESULTS]", "</s>")}
        last = next((id for id in reversed(prompt) if id in turns), None)
        if last is not None and self._marks.get(last) == "[THINK]":
            self._into, self.reply.reasoning = "reasoning", ""

    def add(self, id: int) -> list[tuple[str, str]]:
        mark = self._marks.get(id)
        if self.stopped or self.ended:
            return []
        if id == self._tokenizer.eos_id:
            self.ended = True
        elif mark == "[THINK]":
            self._into, self.reply.reasoning = "reasoning", self.reply.reasoning or ""
        elif mark == "[/THINK]":
            self._into = "text" if self._into == "reasoning" else self._into  # one that nothing opened closes nothing
        elif mark == "[TOOL_CALLS]":
            self._calls.append({"name": []})
            self._into, self._part = "calls", self._calls[-1]["name"]
        elif mark and self._into == "calls":
            self._part = self._calls[-1][mark] = []
        elif self._into == "calls":
            self._part.append(id)
        elif self._into == "reasoning":
            return self._think(self._thought.add(id))
        else:
            return self._say(self._text.add(id))
        return []

    def finish(self) -> list[tuple[str, str]]:
        """The rest: halves of characters, text held back, and what stood where a call should be and is none."""
        pieces = self._think(self._thought.flush()) if self.reply.reasoning is not None else []
        if not self.stopped:
            rest, self._held = self._held + self._text.flush(), ""
            for call in self._calls:
                rest += self._read_call(call)
            pieces += self._emit(rest)
        return pieces

    def _think(self, new: str) -> list[tuple[str, str]]:
        self.reply.reasoning += new
        return [("reasoning", new)] if new else []

    def _say(self, new: str) -> list[tuple[str, str]]:
        before, text = len(self._held), self._held + new
        # (where it is complete, its place in the list, where it begins) of every stop string that ends in `new`
        found = []
        for order, stop in enumerate(self.stop):
            start = text.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), order, start))
        if found:
            self.stopped, self._held = True, ""
            return self._emit(text[: min(found)[2]])
        starts = (i for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in self.stop))
        keep = next(starts, len(text)) if self.stop else len(text)
        self._held = text[keep:]
        return self._emit(text[:keep])

    def _emit(self, text: str) -> list[tuple[str, str]]:
        self.reply.text += text
        return [("text", text)] if text else []

    def _read_call(self, ids: dict[str, list[int]]) -> str:
        """Add what one [TOOL_CALLS] introduces to the reply's calls; returns the text in it that is no call."""
        name = self._tokenizer.decode(ids["name"])
        if "[ARGS]" in ids:
            if not NAME.fullmatch(name):
                return name + self._tokenizer.decode(ids["[ARGS]"])
            arguments = _arguments(self._tokenizer.decode(ids["[ARGS]"]))
            self.reply.tool_calls.append({"name": name, "arguments": arguments})
            return ""
        # The older form: [{"name": …, "arguments": …}, …]
        start = match.start() if (match := re.search(r"\[\s*\{", name)) else 0
        try:
            calls, end = _READER.raw_decode(name, start)
            calls = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
            if not all(NAME.fullmatch(call["name"]) for call in calls):
                return name
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return name
        self.reply.tool_calls += calls
        return name[:start] + name[end:]


def _arguments(text: str) -> object:
    """The JSON value, or the text itself where it is not JSON (cut off, for example)."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return text


def _finite(number: str) -> float:
    """Python's JSON reader lets NaN, Infinity and 1e999 through, but they cannot be written as JSON again."""
    if not math.isfinite(float(number)):
        raise ValueError
    return float(number)


_READER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
