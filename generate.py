"""Generate from a checkpoint: one question, a file of requests, or a chat in the terminal.

    python generate.py --ckpt DIR "Why is the sky blue?"
    python generate.py --ckpt DIR                     # a chat
    git log -1 | python generate.py --ckpt DIR        # the question from a pipe
    python generate.py --ckpt DIR --requests FILE.jsonl --json
    torchrun --nproc-per-node 8 generate.py --ckpt DIR "…"     # on 8 GPUs

Human-readable text and progress go to stderr, answers to stdout; with --json stdout carries JSON lines only.

What is asked becomes a JSON request, which a `Session` answers.
"""

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice

import torch
import torch.distributed as dist

import fp8
from model import CHUNK, LOGIT_ROWS, KVCache, MistralMedium, Span
from parallel import Channel, Place, from_last_stage
from runtime.chat import ReplyParser
from runtime.checkpoint import Checkpoint, fill, weight_bytes
from runtime.config import read_config
from runtime.files import UserError
from runtime.images import load_image
from runtime.launch import COUNT, SIZE, Parser, find_place, gather_objects, number, run_program, together
from runtime.lora import add_adapters, read_adapters
from runtime.memory import peak_memory
from runtime.plan import Progress, check_memory
from runtime.requests import NUMBERS, Answer, Request, RequestReader, read_requests, result_of
from runtime.terminal import interact, print_calls, stream
from runtime.tokenizer import load_tokenizer
from vision import build_model

CPU_CHUNK = 2048  # on a CPU no slower, and half the memory


SHARED = 16  # tokens at least that a beginning must have to be copied from another row

Piece = tuple[int, int, int, torch.Tensor | None]  # row of the cache, first position, tokens, features of images


class Row:
    """A request, number `index` of its batch, while it is being answered."""

    def __init__(self, index: int, request: Request, engine: "Engine"):
        self.index, self.request, self.eos_id, self.answer = index, request, engine.eos_id, Answer()
        self.length = len(request.prompt)  # tokens in the cache, once the prompt is
        room = engine.max_context - self.length
        self.room = room if request.max_new_tokens is None else min(request.max_new_tokens, room)
        self.start = 0  # tokens that the cache had already
        self.scores: list[torch.Tensor] = []  # of the prompt's tokens, on the last stage
        # What its place in the cache depends on: ids, and at an [IMG] token which image it is of; nobody else has one
        # that has no name.
        images, nameless = iter([name for name, count in request.images for _ in range(count)]), object()
        self.ids = [next(images, nameless) if id == engine.image_token_id else id for id in request.prompt]

    def take(self, token: int, logprob: float) -> list[tuple[str, str]]:
        """Append a sampled token; returns the pieces of the reply that became certain with it."""
        self.answer.tokens.append(token)
        self.answer.logprobs.append(logprob)
        reader = self.request.reader
        pieces = reader.add(token) if reader else []
        if token == self.eos_id or (reader and reader.stopped):
            self.answer.finish_reason = "stop"
        return pieces + reader.finish() if reader and self.done else pieces

    def cancel(self, on_piece: Callable) -> None:
        self.answer.finish_reason = "cancelled"
        for piece in self.request.reader.finish() if self.request.reader else ():
            on_piece(self.index, *piece)

    @property
    def done(self) -> bool:
        return self.answer.finish_reason != "length" or len(self.answer.tokens) >= self.room


class Group:
    """Up to `width` rows that decode together: rows[i] is row i of the cache and of all tensors here."""

    def __init__(self, model: MistralMedium, width: int, length: int):
        self.rows: list[Row] = []
        self.room = width  # how many rows there may be; a GPU's steps run over a power of two
        self.cache: KVCache = model.new_cache(width, length)
        self.held: list[list] = [[] for _ in range(width)]  # the ids (see Row.ids) of what each row of the cache holds
        device = model.place.device
        self.sampled = torch.zeros(width, 2, dtype=torch.float64, device=device)  # the last token, its log-probability
        self.positions, self.seeds = torch.zeros(2, width, dtype=torch.long, device=device)  # where that token goes
        self.heat = torch.zeros(width, 2, device=device)  # temperature, top_p
        self.work: dist.Work | None = None  # the broadcast of `sampled`
        self.phase = "prefill"  # what is in flight
        self.steps: dict[tuple, Callable | None] = {}  # see Engine.decode

    def drop_finished(self) -> list[Row]:
        """Takes out what is finished and returns it. Last rows take these places: a step runs over the first rows."""
        finished = [row for row in self.rows if row.done]
        for i in reversed(range(len(self.rows))):
            if self.rows[i].done:
                last, end = self.rows.pop(), len(self.rows)
                if i < end:
                    self.rows[i], self.held[i], self.held[end] = last, self.held[end], []
                    self.cache.copy_row(end, i, last.length)
                    for tensor in (self.sampled, self.positions, self.seeds, self.heat):
                        tensor[i] = tensor[end]
        return finished

    def admit(self, row: Row, shared: list[int]) -> None:
        """Make `row` the next one. It begins like each row of the cache for as many tokens as `shared` says."""
        at, best = len(self.rows), shared.index(max(shared))
        if not row.request.logprobs and (best == at or shared[best] >= SHARED):  # scores are of all tokens
            row.start = min(shared[best], row.length - 1)  # something has to go through the model to sample from
        if best != at and row.start:
            self.cache.copy_row(best, at, row.start)
        self.held[at] = row.ids
        self.rows.append(row)
        state = (self.positions[at], self.seeds[at], *self.heat[at])
        for element, value in zip(state, (row.length, row.request.seed, row.request.temperature, row.request.top_p)):
            element.fill_(value)  # by a kernel: a GPU copies nothing from the host


def common(a: list, b: list) -> int:
    """How many items two lists have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Engine:
    """Answers requests with `model` (one rank's part of it). `max_context` bounds prompt and answer together."""

    def __init__(self, model: MistralMedium, eos_id: int, max_context: int):
        self.model, self.place, self.eos_id, self.max_context = model, model.place, eos_id, max_context
        self.image_token_id = model.config.vision and model.config.vision.image_token_id
        self.chunk = CHUNK if (on_gpu := self.place.device.type == "cuda") else CPU_CHUNK
        # What replays a step: on a GPU, see `decode`; on a CPU, `layers`. Messages between stages cannot be replayed.
        self.record = record if on_gpu and self.place.pp_size == 1 else None
        self.traced = None if on_gpu or model.keep_fp8 or self.place.world_size > 1 else fp8.Traced(model.products)
        # While decoding, a group has one message in flight; the bound is for the chunks of prompts.
        self.down = Channel(self.place, model.dtype, in_flight=2 * self.place.pp_size)
        self.groups: list[Group] = []
        self.seconds, self.tokens, self.mark = {}, {}, 0.0  # of the last call, by phase: "prefill" and "decode"

    @torch.inference_mode()
    def generate(
        self,
        requests: Iterable[Request],
        on_piece: Callable[[int, str, str], None] = lambda i, kind, text: None,
        on_done: Callable[[int, Request, Answer], None] = lambda i, request, answer: None,
        width: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Answer]:
        """Answer `requests`, at most `width` of them at the same time. All ranks call this together.

        Requests are taken when there is room for them. `on_piece(i, kind, text)` gets each reply piece by piece,
        `on_done` each answer, first come, first served. `stop`, which all ranks have to give or none, is called on rank
        0 for every token: True ends all answers where they are, as "cancelled". Prompts must not be longer than
        `max_context`; an answer ends there at the latest.
        """
        rows = (Row(i, request, self) for i, request in enumerate(requests))
        self.seconds, self.tokens = ({"prefill": 0, "decode": 0} for _ in range(2))
        self.mark, answers, first = time.perf_counter(), {}, list(islice(rows, width))
        waiting = chain(first, rows)

        def drop(row: Row) -> None:
            self.share_scores(row)
            answers[row.index] = row.answer
            on_done(row.index, row.request, row.answer)

        try:
            self.prepare_groups(first)
            running = True
            while running:
                running = False
                for group in self.groups:
                    self.pick_up(group, on_piece)
                    if stop is not None and group is self.groups[0] and self.agree(stop):
                        for row in (row for group in self.groups for row in group.rows if not row.done):
                            row.cancel(on_piece)
                        for row in waiting:
                            row.cancel(on_piece)
                            drop(row)
                    for row in group.drop_finished():
                        drop(row)
                    self.advance(group, waiting)
                    running |= bool(group.rows)
        except BaseException:
            self.groups.clear()  # nobody knows how much of a row is in the cache
            raise
        self.down.flush()
        return [answers[i] for i in range(len(answers))]

    def prepare_groups(self, rows: list[Row]) -> None:
        """Groups for as many rows as these: those of the last call if they will do, and hold something of use."""
        count = min(self.place.pp_size, len(rows))
        asked = [-(-(len(rows) - i) // count) for i in range(count)]
        widths = asked if self.record is None else [power_of_two(width) for width in asked]
        length = KVCache.length_for(max((row.length for row in rows), default=0) + 1)
        held = [ids for group in self.groups for ids in group.held]
        useful = any(common(ids, row.ids) >= SHARED for row in rows for ids in held)
        useful |= all(group.cache.length <= 2 * length for group in self.groups)
        if not useful or [len(group.held) for group in self.groups] != widths:
            self.groups.clear()  # first, to have their memory
            self.groups += [Group(self.model, width, length) for width in widths]
        for group, width in zip(self.groups, asked):
            group.room = width

    def agree(self, stop: Callable[[], bool]) -> bool:
        """What `stop()` says on rank 0, on all ranks."""
        said = torch.tensor(int(self.place.rank == 0 and stop()))
        if dist.is_initialized():
            dist.broadcast(said, src=0)
        return bool(said)

    def advance(self, group: Group, waiting: Iterator[Row]) -> None:
        """A token for every row; and rows that wait take the places that are free, with the first token of theirs."""
        old, new = len(group.rows), list(islice(waiting, group.room - len(group.rows)))
        longest = max((row.length for row in (*group.rows, *new)), default=0) + 1  # with the token that goes in
        if longest > group.cache.length:
            group.cache.grow(KVCache.length_for(longest))
            group.steps.clear()  # none of them will come again, and recordings take memory
        if old:
            self.decode(group)
        if new:
            self.prefill(group, new)
        group.phase = "prefill" if new else "decode"
        self.tokens["decode"] += old
        self.tokens["prefill"] += sum(row.length - row.start for row in new)
        if old or new:
            self.post(group)

    def prefill(self, group: Group, new: list[Row]) -> None:
        """Prompts of new rows: chunk by chunk into the cache, and the first token of each sampled.

        A chunk attends to the earlier ones through the cache, so that a long prompt costs the activations of one chunk.
        Short ones share a chunk, one after the other: nothing is padded, and the weights are read once for all of them.
        """
        first, last = len(group.rows), []
        for pieces in self.chunks(group, new):
            last += self.prefill_chunk(group, pieces)
        if self.place.last_stage:
            self.sample(torch.stack(last), group, slice(first, len(group.rows)), *warm_and_choosy(new))

    def prefill_chunk(self, group: Group, pieces: list[Piece]) -> list[torch.Tensor]:
        """The states (C,) after prompts that end here, on the last stage."""
        segments = [(i, start, size) for i, start, size, _ in pieces]
        prompts = [group.rows[i].request.prompt for i, _, _ in segments]
        tokens = [id for prompt, (_, start, size) in zip(prompts, segments) for id in prompt[start : start + size]]
        features = [part for *_, part in pieces if part is not None]
        features, span = torch.cat(features) if features else None, self.model.span(segments)
        hidden = self.run_stage(torch.tensor([tokens]), span, group.cache, features)
        if hidden is None:
            return []
        parts, last = hidden[0].split([size for *_, size in segments]), []  # each (size, C)
        for part, prompt, (i, start, size) in zip(parts, prompts, segments):
            if group.rows[i].request.logprobs:
                # The state at a token scores the next one, so the last state needs the next chunk's first token.
                group.rows[i].scores += self.score(part, prompt[start + 1 : start + size + 1])
            if start + size == len(prompt):
                last.append(part[-1].clone())  # not a view, which would keep all of them
        return last

    def chunks(self, group: Group, new: list[Row]) -> Iterator[list[Piece]]:
        """Pieces of prompts, `self.chunk` tokens at a time."""
        pieces, room = [], self.chunk
        for row in new:
            shared, pending = [common(ids, row.ids) for ids in group.held], {i for i, *_ in pieces}
            ready = [0 if i in pending else count for i, count in enumerate(shared)]
            if max(shared) >= max(ready) + SHARED:  # this chunk has what it needs, which has to be in the cache first
                yield pieces
                pieces, room, ready = [], self.chunk, shared
            group.admit(row, ready)
            features, start = self.features_of(row), row.start
            while start < row.length:
                size = min(room, row.length - start)
                part = None
                if features is not None:  # a chunk may end in the middle of an image: each piece takes its share
                    count = row.request.prompt[start : start + size].count(self.image_token_id)
                    part, features = (features[:count] if count else None), features[count:]
                pieces.append((len(group.rows) - 1, start, size, part))
                start, room = start + size, room - size
                if room == 0:
                    yield pieces
                    pieces, room = [], self.chunk
        if pieces:
            yield pieces

    def features_of(self, row: Row) -> torch.Tensor | None:
        """One feature (C,) for each [IMG] token of the prompt that is not in the cache; on the first stage."""
        request = row.request
        if not (self.place.first_stage and request.pixels):
            return None
        seen, pixels = request.prompt[: row.start].count(self.image_token_id), list(request.pixels)
        counts = [count for _, count in request.images]
        while counts and seen >= counts[0]:  # all of this image is there
            seen, pixels = seen - counts.pop(0), pixels[1:]
        return self.model.vision(pixels)[seen:] if pixels else None

    def decode(self, group: Group) -> None:
        """One more token for every row of the group.

        Where steps are recorded, they run over a power of two of rows and over the whole cache, and so are the same
        operations on the same addresses until rows end or the cache grows. The first step of a kind runs as it is,
        which also lets libraries choose their kernels; the second is recorded; from then on it is replayed. A row
        without a request goes along, at position 0: counted on and on, it would leave the cache.
        """
        self.model.pack()
        rows = group.rows
        for row, held in zip(rows, group.held):
            row.length += 1
            held.append(row.answer.tokens[-1])
        longest = max(row.length for row in rows)
        if self.record is None:
            return self.step(group, len(rows), longest, len(rows) == 1, *warm_and_choosy(rows))
        kind = (power_of_two(len(rows)), group.cache.length, False, *warm_and_choosy(rows))
        for i in range(len(rows), kind[0]):
            group.held[i] = []
        group.positions[len(rows) : kind[0]].zero_()
        run = group.steps.get(kind) or partial(self.step, group, *kind)
        if kind in group.steps and group.steps[kind] is None:
            run = group.steps[kind] = self.record(run)
        group.steps.setdefault(kind)
        run()

    def step(self, group: Group, count: int, length: int, alike: bool, warm: bool, choosy: bool) -> None:
        """`sampled` of the first `count` rows -> their next ones, attending to the first `length` of the cache."""
        positions = group.positions[:count]
        span = self.model.step_span(positions, length, alike)
        hidden = self.run_stage(group.sampled[:count, :1].long(), span, group.cache.rows(0, count))  # (B, 1, C)
        positions.add_(1)
        if hidden is not None:
            self.sample(hidden[:, 0], group, slice(0, count), warm, choosy)

    def sample(self, hidden: torch.Tensor, group: Group, part: slice, warm: bool, choosy: bool) -> None:
        """hidden (B, C) after the last tokens of the group's rows `part` -> their next ones, in `group.sampled`."""
        temperature, top_p = (group.heat[part, i : i + 1] if asked else None for i, asked in enumerate((warm, choosy)))
        noise = group.seeds[part], group.positions[part]
        group.sampled[part] = self.model.lm_head.sample(self.model.logits(hidden), temperature, top_p, *noise)

    def run_stage(self, tokens: torch.Tensor, span: Span, cache: KVCache, features: torch.Tensor | None = None):
        """This rank's layers over some tokens (B, T); on the first stage `features` (n, C) stand for n `[IMG]` tokens.

        The hidden states (B, T, C) come from the previous stage and go to the next; the last one returns them.
        """
        if self.place.first_stage:
            x = self.model.embed(tokens.to(self.place.device), features)
        else:
            x = self.down.receive((*tokens.shape, self.model.config.hidden_size))
        x = self.layers(x, span, cache)
        return x if self.place.last_stage else self.down.send(x)

    def layers(self, x: torch.Tensor, span: Span, cache: KVCache) -> torch.Tensor:
        """The model's layers; on a CPU as a graph, see `fp8.Traced`. From some rows on other kernels may be used."""
        if self.traced is None or span.positions is None or len(x) >= fp8.FLOAT32_ROWS:
            return self.model(x, span, cache)
        tensors = {name: value for name, value in vars(span).items() if isinstance(value, torch.Tensor)}

        def step(x, tensors, seen):
            return self.model(x, replace(span, length=0, **tensors), KVCache(seen))

        seen = [layer[:, :, :, : span.length] for layer in cache.layers]
        return self.traced(len(x) == 1, step, x, tensors, seen)

    # --- what flows back, from the last stage to all

    # Who waits for whom: every rank visits the groups in the same order, and waits only for what others do earlier in
    # that order. `receive` waits for the previous stage's turn with the same group, `pick_up` for the last stage's turn
    # with it one round ago. Hidden states are sent in the background, so nobody has to be ready to take them. Hence
    # some rank can always go on. That holds as long as the two directions do not share a communicator: NCCL runs the
    # operations of one in the order of posting, and a broadcast would wait behind a send whose receiver waits for it.

    def post(self, group: Group) -> None:
        """Send the rows' tokens and log-probabilities on their way, in the background.

        All stages join at once, although they need the tokens only later: NCCL makes a communicator at its first use,
        and there the last stage would wait for the others, which wait for it to take their hidden states.
        """
        group.work = from_last_stage(group.sampled[: len(group.rows)], self.place)

    def pick_up(self, group: Group, on_piece: Callable) -> None:
        """Give the rows of the group their tokens, wherever these were sampled."""
        if group.work is not None:
            group.work.wait()
            group.work = None
        sampled = group.sampled[: len(group.rows)].tolist()  # here, and only here, a GPU is waited for
        now = time.perf_counter()
        self.seconds[group.phase] += now - self.mark
        self.mark = now
        for row, (token, logprob) in zip(group.rows, sampled):
            for piece in row.take(int(token), logprob) if not row.done else ():
                on_piece(row.index, *piece)

    def share_scores(self, row: Row) -> None:
        """Put the log-probabilities of the prompt's tokens after the first, if they are wanted, into the answer."""
        size = len(row.request.prompt) - 1
        if row.request.logprobs and size > 0 and row.answer.finish_reason != "cancelled":
            # `scores` is empty but on the last stage; the others receive into new memory.
            x = torch.cat(row.scores or [torch.empty(size, dtype=torch.float64, device=self.place.device)])
            if work := from_last_stage(x, self.place):
                work.wait()
            row.answer.prompt_logprobs += x.tolist()

    # --- what the last stage computes

    def score(self, hidden: torch.Tensor, targets: list[int]) -> list[torch.Tensor]:
        """Log-probabilities of the N `targets` after the first N of the hidden states (T, C): float64, in pieces."""
        head, ids = self.model.lm_head, torch.tensor(targets, device=self.place.device)
        pieces = zip(hidden[: len(targets)].split(LOGIT_ROWS), ids.split(LOGIT_ROWS))
        return [head.log_probabilities(self.model.logits(x), y).double() for x, y in pieces if len(y)]


def warm_and_choosy(rows: list[Row]) -> tuple[bool, bool]:
    """Whether any of them has a temperature above 0, and a top-p below 1."""
    return any(row.request.temperature > 0 for row in rows), any(row.request.top_p < 1 for row in rows)


def power_of_two(count: int) -> int:
    """The smallest that is not below `count`."""
    return 1 << (count - 1).bit_length()


def record(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a CUDA graph: one launch for thousands of kernels."""
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        step()
    return graph.replay


TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "examples", "tiny")


class Session:
    """A loaded checkpoint that answers JSON requests."""

    def __init__(self, args: argparse.Namespace, place: Place):
        self.args, self.place = args, place
        started = time.perf_counter()
        checkpoint = together(self.read)
        check_memory(self.config, place, args, self.keep_fp8)
        dtype = getattr(torch, args.dtype)
        self.model = together(lambda: build_model(self.config, place, dtype, self.keep_fp8))
        if self.lora:
            add_adapters(self.model, *self.lora)
        # All ranks sample the same tokens, so they need the same seed: rank 0's, where none was given.
        seed = gather_objects(random.getrandbits(32) if args.seed is None else args.seed)[0]
        self.requests = RequestReader(args, self.tokenizer, self.config, place, self.max_context, seed)
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

        On rank 0, `on_piece(i, kind, text)` gets each reply as it comes (see `ReplyParser`), and `on_result` the
        answers in the order of the requests. Raises UserError for a request that cannot be read, once those before it
        that had begun are answered. `stop`: as the engine's.
        """
        on_rank_0, results, early, mistakes = self.place.rank == 0, [], {}, []
        parsers: list[ReplyParser] = []

        def requests() -> Iterator[Request]:  # each is read, its images too, when there is room for it
            for i, spec in enumerate(specs):
                try:
                    request, parser = together(lambda: self.requests.read(spec, base, i))
                except UserError as mistake:
                    if i < self.args.batch_size:  # nothing has begun; later, what has is not thrown away
                        raise
                    mistakes.append(mistake)
                    return
                parsers.append(parser)
                request.reader = parser
                yield request

        def on_done(i: int, request: Request, answer: Answer) -> None:
            early[i] = result_of(request, parsers[i].reply, answer)
            while (result := early.pop(len(results), None)) is not None:
                results.append({**result, "stats": self.stats()})
                if on_rank_0:
                    on_result(results[-1])

        pieces = (on_piece,) if on_rank_0 else ()
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


def read_input(args: argparse.Namespace) -> tuple[bytes | None, bool]:
    """(what standard input asks, where the command line doesn't; whether a person is to ask, in a chat). On rank 0."""
    for_scripts = any([args.requests, args.prompt is not None, args.json, args.raw])
    chat = args.interactive or (sys.stdin.isatty() and not for_scripts)
    if chat:
        for path in args.image:
            load_image(path)  # its mistakes now, not once the model is loaded
    if chat or args.prompt is not None or args.requests not in (None, "-"):
        return None, chat
    data = b"" if sys.stdin.isatty() and not args.requests else sys.stdin.buffer.read()
    if not data.strip():
        raise UserError("nothing to do: give a question, --requests FILE, or in a terminal neither, for a chat")
    return data, False


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s [options] [question]")
    add = parser.add_argument_group("what to ask").add_argument
    add("question", nargs="?", help="one user turn; default: standard input, or in a terminal a chat")
    add("--prompt", metavar="TEXT", help="the same as an option")
    add("--image", metavar="PATH", action="append", default=[], help="image before the question's text; repeatable")
    add("--system", metavar="TEXT", help="system prompt")
    add("--raw", action="store_true", help="no chat template: <s> + the text, continued")
    add("--requests", metavar="FILE", help="one JSON request a line; - is standard input")
    add("--interactive", action="store_true", help="a chat, also where standard input is no terminal")
    add = parser.add_argument_group("how to answer").add_argument
    add("--reasoning-effort", choices=["none", "high"], help="default: the checkpoint's")
    add("--max-new-tokens", type=COUNT, metavar="N", help="0 only scores; default: what the context leaves")
    add("--temperature", type=NUMBERS["temperature"], metavar="F", help="0 is greedy; default 0, with reasoning 0.7")
    add("--top-p", type=NUMBERS["top_p"], metavar="F", help="default 1, with reasoning 0.95")
    add("--seed", type=NUMBERS["seed"], metavar="N", help="default: a new one each time")
    add("--json", action="store_true", help="one JSON object a request on stdout")
    add("--logprobs", action="store_true", help="with --json: log-probabilities too")
    add = parser.add_argument_group("the model").add_argument
    add("--ckpt", metavar="DIR", help="checkpoint, any layout; default: the small one in the repository")
    add("--lora", metavar="DIR", help="adapters that train.py exported, to add to it")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of activations and unquantized weights")
    add(
        "--weights", choices=["auto", "fp8", "dequantized"], default="auto", help="FP8 weights in memory; auto: on GPUs"
    )
    add("--max-context", type=SIZE, metavar="N", help="longest prompt and answer together; default: the model's")
    add = parser.add_argument_group("processes").add_argument
    add("--tp", type=SIZE, metavar="N", help="tensor-parallel size; default: all processes")
    add("--pp", type=SIZE, metavar="N", help="pipeline-parallel size; default 1")
    add("--batch-size", type=SIZE, default=16, metavar="N", help="requests answered together")
    add("--timeout", type=number(float, 5, 1e9), default=300, metavar="S", help="a rank silent for so long is gone")
    args = parser.parse_args(argv)
    check_args(args)
    args.prompt = args.question if args.prompt is None else args.prompt
    return args


def check_args(args: argparse.Namespace) -> None:
    """Options that do not go together."""
    if args.question is not None and args.prompt is not None:
        raise UserError(f"the question is given twice, as {args.question!r} and with --prompt; leave out one")
    asks = args.question is not None or args.prompt is not None
    if args.requests and any([asks, args.image, args.system, args.interactive]):
        raise UserError("--requests already says what to ask; leave out question, --image, --system and --interactive")
    if args.raw and any([args.image, args.system is not None]):
        raise UserError("--raw continues plain text; leave out --image and --system")
    if args.interactive and any([asks, args.json, args.raw]):
        raise UserError("--interactive reads turns from the terminal; leave out question, --raw and --json")


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    place = find_place(args.tp, args.pp)
    if place.dp_size > 1:
        sizes = f"--tp {place.tp_size} × --pp {place.pp_size}"
        raise UserError(f"{sizes} should be the number of processes, {place.world_size}; start so many with torchrun")
    data, chat = gather_objects(together(lambda: read_input(args) if place.rank == 0 else None))[0]
    specs, base = ([], "") if chat else together(lambda: read_requests(args, data))
    session = Session(args, place)
    if chat:
        return interact(session)
    numbers = itertools.count(1)

    def show(result: dict) -> None:
        if args.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            print(f"[{next(numbers)}] {result['text']}", end="")
            print_calls(result)

    if len(specs) == 1 and not args.json:
        results = [stream(session, specs[0], base)]
    else:
        results = session.answer(specs, base, on_result=show)
    if place.rank == 0 and not args.json:
        stats = results[-1]["stats"]
        speeds = f"{stats['prefill_tokens_per_s']} prompt tokens/s, {stats['decode_tokens_per_s']} new tokens/s"
        print(f"loaded in {stats['load_s']} s, {speeds}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
