"""Generate from a checkpoint: one question, a file of requests, or a chat in the terminal.

    python generate.py --ckpt DIR "Why is the sky blue?"
    python generate.py --ckpt DIR                     # a chat
    git log -1 | python generate.py --ckpt DIR        # the question from a pipe
    python generate.py --ckpt DIR --requests FILE.jsonl --json
    torchrun --nproc-per-node 8 generate.py --ckpt DIR "…"     # on 8 GPUs

Human-readable text and progress go to stderr, answers to stdout; with --json stdout carries JSON lines only.

What is asked becomes a JSON request, which a `Session` answers.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import; `run_program` sets the rule

import argparse
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import torch
import torch.distributed as dist

from model import CHUNK, LOGIT_ROWS, KVCache, MistralMedium, Span
from parallel import Channel, Place, from_last_stage, symmetric_buffer
from runtime.checkpoint import Checkpoint, fill, weight_bytes
from runtime.config import read_config
from runtime.cpu import speed_up
from runtime.draft import LOOKUP, Guesses, open_draft
from runtime.files import UserError, require, within
from runtime.images import load_image
from runtime.launch import COUNT, SIZE, Parser, find_place, gather_objects, number, run_program, together
from runtime.lora import add_adapters, read_adapters
from runtime.memory import peak_memory
from runtime.plan import Progress, check_memory, keeps_fp8
from runtime.requests import NUMBERS, Answer, Request, RequestReader, read_requests, read_tools, result_of
from runtime.terminal import interact, print_calls, printable, speed_of, stream
from runtime.tokenizer import load_tokenizer
from vision import build_model

CPU_CHUNK = 2048  # instead of CHUNK: on a CPU no slower, and half the memory
SHARED = 16  # tokens that a beginning must have at least to be copied from another row


class Row:
    """A request, number `index` of its batch, while it is being answered."""

    def __init__(self, index: int, request: Request, engine: "Engine"):
        self.index, self.request, self.eos_id, self.answer = index, request, engine.eos_id, Answer()
        room = engine.max_context - self.length
        self.room = room if request.max_new_tokens is None else min(request.max_new_tokens, room)
        self.start = 0  # tokens that the cache had already
        self.scores: list[torch.Tensor] = []  # of the prompt's tokens, on the last stage
        self.state: torch.Tensor | None = None  # (C,) after the last token that went through the model; for a draft
        self.cache_keys = cache_keys(request, engine.image_token_id)

    @property
    def length(self) -> int:
        """Tokens in the cache, once the prompt is: the last one of the answer has not gone through the model."""
        return len(self.request.prompt) + max(0, len(self.answer.tokens) - 1)

    def take(self, token: int, logprob: float, stop: bool) -> None:
        """Append a sampled token. `stop`: whoever reads the answer needs no more."""
        self.answer.tokens.append(token)
        self.answer.logprobs.append(logprob)
        if token == self.eos_id or stop:
            self.answer.finish_reason = "stop"

    @property
    def done(self) -> bool:
        return self.answer.finish_reason != "length" or len(self.answer.tokens) >= self.room


def cache_keys(request: Request, image_token_id: int | None) -> list:
    """What each place of the cache depends on: the token id, and at an [IMG] token which image it is of.

    An unnamed image gets a unique key, so it is never reused.
    """
    names = iter([name for name, count in request.images for _ in range(count)])
    unnamed = object()
    return [next(names, unnamed) if id == image_token_id else id for id in request.prompt]


def common(a: list, b: list) -> int:
    """How many items two lists have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Group:
    """Up to `width` rows that decode together: rows[i] is row i of the cache and of all tensors here."""

    def __init__(self, model: MistralMedium, width: int, length: int, draft: Guesses):
        self.rows: list[Row] = []
        self.room = width  # how many rows there may be; a GPU's steps run over a power of two
        self.cache = KVCache(model.new_cache(width, length).layers + draft.new_layers(width, length))
        self.held: list[list] = [[] for _ in range(width)]  # the `cache_keys` of what each row of the cache holds
        self.draft, device = draft, model.place.device
        # The tokens of the last step, -1 after those that count, and their log-probabilities.
        self.sampled = torch.zeros(width, 1 + draft.count, 2, dtype=torch.float64, device=device)
        self.positions, self.seeds = torch.zeros(2, width, dtype=torch.long, device=device)  # where the last one goes
        self.temperature, self.top_p = torch.zeros(2, width, 1, device=device)
        self.memory = draft.new_memory(width)
        self.work: dist.Work | None = None  # the broadcast of `sampled`
        self.phase = "prefill"  # what is in flight
        self.steps: dict[tuple, Callable | None] = {}  # see Engine.decode
        self.pool: tuple | None = None  # the memory of the recorded ones

    def state_of(self, i: int) -> tuple[torch.Tensor, ...]:
        """The numbers of row i, each a view."""
        return self.positions[i], self.seeds[i], self.temperature[i], self.top_p[i], self.sampled[i], self.memory[i]

    def drop_finished(self) -> list[Row]:
        """Takes out what is finished and returns it. Last rows take these places: a step runs over the first rows."""
        finished = [row for row in self.rows if row.done]
        for i in reversed(range(len(self.rows))):
            if self.rows[i].done:
                last, end = self.rows.pop(), len(self.rows)
                if i < end:
                    self.rows[i], self.held[i], self.held[end] = last, self.held[end], []
                    self.cache.copy_row(end, i, last.length)
                    for target, source in zip(self.state_of(i), self.state_of(end)):
                        target.copy_(source)
        return finished

    def admit(self, row: Row, shared: list[int]) -> None:
        """Make `row` the next one. It begins like each row of the cache for as many tokens as `shared` says."""
        at, best, request = len(self.rows), shared.index(max(shared)), row.request
        # Log-probabilities need every prompt token computed, so nothing is reused for them.
        if not request.logprobs and (best == at or shared[best] >= SHARED):
            # Something has to go through the model to sample from; and the draft needs the state before what is new.
            row.start = max(0, min(shared[best] - self.draft.needs_state, row.length - 1))
        if best != at and row.start:
            self.cache.copy_row(best, at, row.start)
        self.held[at] = row.cache_keys
        self.rows.append(row)
        values = (row.length, request.seed, request.temperature, request.top_p)
        for element, value in zip(self.state_of(at), values):
            element.fill_(value)  # by a kernel: a GPU copies nothing from the host


class Piece(NamedTuple):
    """Some tokens of a prompt on their way into the cache."""

    row: int  # of the group
    start: int  # position of the first
    size: int
    features: torch.Tensor | None  # (n, C) of the [IMG] tokens among them, on the first stage


class Engine:
    """Answers requests with `model` (one rank's part of it). `max_context` bounds prompt and answer together.

    Prompts go through the model in chunks, then one token at a time for a whole batch of rows:

        prompts     <s> Is it ? | <s> How many          tokens of several rows, end to end (`prefill_chunk`)
          embed, layers: keys and values go into row 0, row 1 of the cache
          logits after "?" and after "many", sampled    the first token of each answer
        step        Yes | Three                         one token of every row (`step`)
          embed, layers: each writes its key and value at its own position, and attends to its own row
          logits, sampled, picked up by all ranks       the second token, and so on until a row is done

    Every rank runs this same loop. A *group* is a batch of rows with one key/value cache. A row's next token cannot be
    computed before the last one is known, so a single group would keep one pipeline stage busy and all others waiting.
    The requests are therefore answered by as many groups as there are stages:

        time ─────────────────────────────────────────────►
        stage 0    g0   g1   g0   g1   g0                   `run_stage`: receive, run the layers, send on
                     ╲ ╱  ╲ ╱  ╲ ╱  ╲                       hidden states go down to the next stage (pp_group) …
        stage 1       g0   g1   g0   g1                     … sampled tokens come back up to all (answer_group)

    The last stage samples; a broadcast brings the tokens to all (`post`), and each stage picks them up (`pick_up`) when
    that group's turn comes again. Since every rank sees every token, all agree on each row's length and end without
    asking. With one process the same loop has one stage, one group and no messages.

    In its turn a group gives the places of rows that ended to requests that wait (continuous batching): their prompts
    go through the model, the other rows get a token each, and all these tokens are posted together. Between calls the
    caches stay. A new row begins with the longest beginning that its prompt shares with some row (prefix caching): a
    chat's next turn computes only what is new. With a `draft` a step brings several tokens, see `runtime/draft.py`.

    Shapes: B rows of a group, T tokens of each that go through the model together, C hidden_size, V / tp logits per
    rank.
    """

    def __init__(self, model: MistralMedium, eos_id: int, max_context: int, draft: Guesses | None = None):
        self.model, self.place, self.eos_id, self.max_context = model, model.place, eos_id, max_context
        self.draft = draft or Guesses(0)
        self.image_token_id = model.config.vision and model.config.vision.image_token_id
        on_gpu = self.place.device.type == "cuda"
        self.chunk = CHUNK if on_gpu else CPU_CHUNK
        # What replays a step, see `decode`. Messages between stages cannot be replayed.
        self.record = record if on_gpu and self.place.pp_size == 1 else None
        # While decoding, a group has one message in flight; the bound is for the chunks of prompts.
        self.down = Channel(self.place, model.dtype, in_flight=2 * self.place.pp_size)
        self.groups: list[Group] = []
        self.seconds, self.tokens, self.mark = {}, {}, 0.0  # of the last call, by phase: "prefill" and "decode"
        self.row_steps = 0  # of the last call: a row's steps, of which each brings a token or, with a draft, several

    @torch.inference_mode()
    def generate(
        self,
        requests: Iterable[Request],
        on_token: Callable[[int, int, float], bool] = lambda i, token, logprob: False,
        on_done: Callable[[int, Request, Answer], None] = lambda i, request, answer: None,
        width: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Answer]:
        """Answer `requests`, at most `width` of them at the same time (continuous batching). All ranks come together.

        Requests are taken when there is room for them. `on_token(i, token, logprob)` gets each token of answer i as it
        comes, and True, the same on all ranks, ends that answer with it; `on_done` gets the answers as they finish.
        `stop`, which all ranks have to give or none, is called on rank 0 for every token, and between the chunks of a
        long prompt: True ends all answers where they are, as "cancelled". Prompts must not be longer than
        `max_context`; an answer ends there at the latest.
        """
        rows = (Row(i, request, self) for i, request in enumerate(requests))
        self.seconds, self.tokens = ({"prefill": 0, "decode": 0} for _ in range(2))
        self.stop, self.row_steps = stop, 0
        self.mark, answers, first = time.perf_counter(), {}, list(islice(rows, width))
        waiting = chain(first, rows)

        def finish(row: Row) -> None:
            self.share_scores(row)
            answers[row.index] = row.answer
            on_done(row.index, row.request, row.answer)

        try:
            self.prepare_groups(first)
            running = True
            while running:
                for group in self.groups:
                    self.pick_up(group, on_token)
                    for row in group.drop_finished():
                        finish(row)
                    self.advance(group, waiting)
                    # Asked while GPUs compute the next token, which is not wanted any more if the answer is yes.
                    if stop is not None and group is self.groups[0] and self.agree(stop):
                        self.cancel(waiting, finish)
                running = any(group.rows for group in self.groups)
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
        small = all(group.cache.length <= 2 * length for group in self.groups)
        fit = [len(group.held) for group in self.groups] == widths
        if not fit or not (small or self.hold_a_beginning_of(rows)):
            self.groups.clear()  # first, to have their memory
            self.groups += [Group(self.model, width, length, self.draft) for width in widths]
        for group, width in zip(self.groups, asked):
            group.room = width

    def hold_a_beginning_of(self, rows: list[Row]) -> bool:
        held = [keys for group in self.groups for keys in group.held]
        return any(common(keys, row.cache_keys) >= SHARED for row in rows for keys in held)

    def agree(self, stop: Callable[[], bool]) -> bool:
        """What `stop()` says on rank 0, on all ranks."""
        said = torch.tensor(int(self.place.rank == 0 and stop()))
        if dist.is_initialized():
            dist.broadcast(said, src=0)
        return bool(said)

    def cancel(self, waiting: Iterator[Row], finish: Callable[[Row], None]) -> None:
        """End every answer where it is; those that wait are not begun."""
        for row in (row for group in self.groups for row in group.rows):
            if not row.done:
                row.answer.finish_reason = "cancelled"
        for row in waiting:
            row.answer.finish_reason = "cancelled"
            finish(row)

    def advance(self, group: Group, waiting: Iterator[Row]) -> None:
        """A token for every row; and rows that wait take the places that are free, with the first token of theirs."""
        old, new = len(group.rows), list(islice(waiting, group.room - len(group.rows)))
        longest = max((row.length for row in (*group.rows, *new)), default=0) + 1 + self.draft.count
        if longest > group.cache.length:
            group.cache.grow(KVCache.length_for(longest))
            group.steps.clear()  # none of them will come again, and recordings take memory
            group.pool = None  # it ends with the last of them
        if old:
            self.decode(group)
        if new:
            self.prefill(group, new)
        group.phase = "prefill" if new else "decode"
        self.row_steps += old
        self.tokens["prefill"] += sum(row.length - row.start for row in new)
        if old or new:
            self.post(group)

    # --- prompts

    def prefill(self, group: Group, new: list[Row]) -> None:
        """Prompts of new rows: chunk by chunk into the cache, and the first token of each sampled.

        A chunk attends to the earlier ones through the cache, so that a long prompt costs the activations of one chunk.
        Short ones share a chunk, one after the other (varlen prompts): nothing is padded, and the weights are read once
        for all of them.
        """
        first, last = len(group.rows), []
        for i, pieces in enumerate(self.chunks(group, new)):
            if i and self.stop:
                if self.place.device.type == "cuda":
                    torch.cuda.synchronize()  # else this would be asked long before the GPU is here
                if self.agree(self.stop):
                    return self.abandon(group, first, new, pieces)
            last += self.prefill_chunk(group, pieces)
        if self.place.last_stage:
            part = slice(first, len(group.rows))
            self.sample(self.model.norm(torch.stack(last))[:, None], group, part, *sampling_flags(new))
            self.draft.begin(group, part)

    def abandon(self, group: Group, first: int, new: list[Row], pieces: list[Piece]) -> None:
        """End `new`, the group's rows from `first` on, before the chunk `pieces`: the cache holds what came before."""
        for piece in pieces:
            group.held[piece.row] = group.held[piece.row][: piece.start]
        group.rows[first:] = new
        for row in new:
            row.answer.finish_reason = "cancelled"

    def prefill_chunk(self, group: Group, pieces: list[Piece]) -> list[torch.Tensor]:
        """The states (C,) after prompts that end here, on the last stage."""
        tokens = []
        for i, start, size, _ in pieces:
            tokens += group.rows[i].request.prompt[start : start + size]
        features = [piece.features for piece in pieces if piece.features is not None]
        features = torch.cat(features) if features else None
        span = self.model.prompts([(piece.row, piece.start, piece.size) for piece in pieces])
        tokens = torch.tensor([tokens])
        hidden = self.run_stage(tokens, span, group.cache, features)
        if hidden is None:
            return []
        self.draft.read(group, pieces, tokens, features, hidden)
        last = []
        for states, (i, start, size, _) in zip(hidden[0].split([piece.size for piece in pieces]), pieces):
            row, end = group.rows[i], start + size
            if row.request.logprobs:
                # The state at a token scores the next one, so the last state needs the next chunk's first token.
                row.scores += self.score(states, row.request.prompt[start + 1 : end + 1])
            if end == row.length:
                last.append(states[-1].clone())  # not a view, which would keep all of them
        return last

    def chunks(self, group: Group, new: list[Row]) -> Iterator[list[Piece]]:
        """Pieces of prompts, `self.chunk` tokens at a time (chunked prefill)."""
        pieces, room = [], self.chunk
        for row in new:
            shared = [common(keys, row.cache_keys) for keys in group.held]
            pending = {piece.row for piece in pieces}
            ready = [0 if i in pending else count for i, count in enumerate(shared)]
            # A row of the unfinished chunk shares a longer beginning (prefix caching): run that chunk first.
            if max(shared) >= max(ready) + SHARED:
                yield pieces
                pieces, room, ready = [], self.chunk, shared
            group.admit(row, ready)
            features, start = self.features_of(row), row.start
            while start < row.length:
                size, part = min(room, row.length - start), None
                if features is not None:  # a chunk may end in the middle of an image: each piece takes its share
                    count = row.request.prompt[start : start + size].count(self.image_token_id)
                    part, features = (features[:count] if count else None), features[count:]
                pieces.append(Piece(len(group.rows) - 1, start, size, part))
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
        without a request goes along, near position 0: counted on and on, it would leave the cache.
        """
        rows = group.rows
        for row, held in zip(rows, group.held):
            held += row.answer.tokens[len(held) - len(row.request.prompt) :]
        self.draft.prepare(group)
        if self.record is None:
            longest = max(row.length for row in rows) + 1 + self.draft.count
            return self.step(group, len(rows), longest, len(rows) == 1, *sampling_flags(rows))
        kind = (power_of_two(len(rows)), group.cache.length, False, *sampling_flags(rows))
        for i in range(len(rows), kind[0]):
            group.held[i] = []
        group.positions[len(rows) : kind[0]].fill_(1 + self.draft.count)
        run = group.steps.get(kind) or partial(self.step, group, *kind)
        if kind in group.steps and group.steps[kind] is None:
            group.steps[kind], group.pool = self.record(run, group.pool)
            run = group.steps[kind]
        group.steps.setdefault(kind)
        run()

    def step(self, group: Group, count: int, length: int, aligned: bool, *flags: bool) -> None:
        """`sampled` of the first `count` rows -> their next ones, attending to the first `length` of the cache."""
        part = slice(0, count)
        if self.draft.count:
            return self.draft_and_verify(group, part, length, *flags)
        span = self.model.step(group.positions[part, None], length, aligned)
        hidden = self.run_stage(group.sampled[part, :, 0].long(), span, group.cache.rows(0, count))  # (B, 1, C)
        group.positions[part].add_(1)
        if hidden is not None:
            self.sample(self.model.norm(hidden), group, part, *flags)

    def draft_and_verify(self, group: Group, part: slice, length: int, *flags: bool) -> None:
        """`step` with K guesses for each row: all K + 1 tokens go through the model, and what is right stays."""
        choose = partial(self.choose, group, part, *flags)
        guessed = self.draft.propose(group, part, length, choose)
        tokens = torch.cat((self.draft.last_of(group, part), guessed), dim=1)  # (B, K + 1)
        places = group.positions[part, None] + torch.arange(tokens.shape[1], device=tokens.device)
        span = self.model.step(places, length)
        states = self.model.norm(self.run_stage(tokens, span, group.cache.rows(part.start, part.stop)))
        self.draft.accept(group, part, guessed, choose(states, places + 1), states)

    def sample(self, states: torch.Tensor, group: Group, part: slice, *flags: bool) -> None:
        """States (B, 1, C) after the last tokens of the group's rows `part` -> their next ones, in `group.sampled`."""
        group.sampled[part, :1] = self.choose(group, part, *flags, states, group.positions[part, None])
        group.sampled[part, 1:] = -1  # nothing where there is no draft

    def choose(
        self, group: Group, part: slice, temperature: bool, top_p: bool, states: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """States (B, T, C) of the rows `part` -> tokens and their log-probabilities (B, T, 2), for the places (B, T).

        The noise of a sample is a hash of seed and place, see `parallel.gumbel`: it does not depend on the batch.
        """

        def each(values: torch.Tensor) -> torch.Tensor:  # one of a row for each of its T places
            return values[part].view(-1, 1).expand(places.shape).flatten()

        asked = each(group.temperature)[:, None] if temperature else None, each(group.top_p)[:, None] if top_p else None
        logits = self.model.lm_head(states.flatten(0, 1))
        sampled = self.model.lm_head.sample(logits, *asked, each(group.seeds), places.flatten())
        return sampled.view(*places.shape, 2)

    def run_stage(self, tokens: torch.Tensor, span: Span, cache: KVCache, features: torch.Tensor | None = None):
        """This rank's layers over some tokens (B, T); on the first stage `features` (n, C) stand for n `[IMG]` tokens.

        The hidden states (B, T, C) come from the previous stage and go to the next; the last one returns them.
        """
        if self.place.first_stage:
            x = self.model.embed(tokens.to(self.place.device), features)
        else:
            x = self.down.receive((*tokens.shape, self.model.config.hidden_size))
        x = self.model(x, span, cache)
        return x if self.place.last_stage else self.down.send(x)

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

    def pick_up(self, group: Group, on_token: Callable[[int, int, float], bool]) -> None:
        """Give the rows of the group their tokens, wherever these were sampled."""
        if group.work is not None:
            group.work.wait()
            group.work = None
        sampled = group.sampled[: len(group.rows)].tolist()  # here, and only here, a GPU is waited for
        now = time.perf_counter()
        self.seconds[group.phase] += now - self.mark
        self.mark = now
        for row, token, logprob in [(row, *pair) for row, pairs in zip(group.rows, sampled) for pair in pairs]:
            check_finite(logprob)
            if token >= 0 and not row.done:
                self.tokens["decode"] += bool(row.answer.tokens)  # the first one is the prompt's
                row.take(int(token), logprob, on_token(row.index, int(token), logprob))

    def share_scores(self, row: Row) -> None:
        """Put the log-probabilities of the prompt's tokens after the first, if they are wanted, into the answer."""
        size = len(row.request.prompt) - 1
        if row.request.logprobs and size > 0 and row.answer.finish_reason != "cancelled":
            # `scores` is empty but on the last stage; the others receive into new memory.
            x = torch.cat(row.scores or [torch.empty(size, dtype=torch.float64, device=self.place.device)])
            if work := from_last_stage(x, self.place):
                work.wait()
            check_finite(float(x.sum()))
            row.answer.prompt_logprobs += x.tolist()

    # --- what the last stage computes

    def score(self, hidden: torch.Tensor, targets: list[int]) -> list[torch.Tensor]:
        """Log-probabilities of the N `targets` after the first N of the hidden states (T, C): float64, in pieces."""
        head, ids = self.model.lm_head, torch.tensor(targets, device=self.place.device)
        pieces = zip(hidden[: len(targets)].split(LOGIT_ROWS), ids.split(LOGIT_ROWS))
        return [head.log_probabilities(self.model.logits(x), y).double() for x, y in pieces if len(y)]


def check_finite(logprob: float) -> None:
    if not math.isfinite(logprob):
        raise UserError("the model's log-probabilities are not finite; try --dtype float32, or other adapters", 1)


def sampling_flags(rows: list[Row]) -> tuple[bool, bool]:
    """(any of them has a temperature above 0, any has a top-p below 1): what need not be computed is not."""
    return any(row.request.temperature > 0 for row in rows), any(row.request.top_p < 1 for row in rows)


def power_of_two(count: int) -> int:
    """The smallest that is not below `count`."""
    return 1 << (count - 1).bit_length()


def record(step: Callable[[], None], pool: tuple | None) -> tuple[Callable[[], None], tuple]:
    """(`step` as a CUDA graph, which is one launch for thousands of kernels; the pool that its memory is from).

    Graphs of which one runs at a time can share a `pool`, since a replay leaves nothing there; None makes a new one.
    """
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool, capture_error_mode="thread_local"):
        step()
    return graph.replay, graph.pool()


TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "examples", "tiny")


def ignore(*arguments) -> None:
    """A callback of no interest."""


class Session:
    """A loaded checkpoint that answers JSON requests."""

    def __init__(self, args: argparse.Namespace, place: Place):
        self.args, self.place = args, place
        started = time.perf_counter()
        checkpoint = together(self.read)
        self.keep_fp8 = keeps_fp8(self.config, place, args, checkpoint.is_fp8())
        check_memory(self.config, place, args, self.keep_fp8)
        dtype = getattr(torch, args.dtype)
        self.model = together(lambda: build_model(self.config, place, dtype, self.keep_fp8))
        if self.lora:
            add_adapters(self.model, *self.lora)
        # All ranks sample the same tokens, so they need the same seed: rank 0's, where none was given.
        seed = gather_objects(random.getrandbits(32) if args.seed is None else args.seed)[0]
        self.requests = RequestReader(args, self.tokenizer, self.config.vision, self.max_context, seed)
        together(lambda: fill(self.model, checkpoint, Progress(checkpoint, place)))
        self.model.eval()
        self.weight_bytes = weight_bytes(self.model)
        speed_up(self.model)
        draft = together(lambda: open_draft(args.draft, args.draft_tokens or 3, self.model)) if args.draft else None
        self.engine = Engine(self.model, self.tokenizer.eos_id, self.max_context, draft)
        self.load_s, self.bytes_read = time.perf_counter() - started, checkpoint.bytes_read

    def read(self) -> Checkpoint:
        """Everything but the model: config, tokenizer, and which tensors there are."""
        args = self.args
        directory = args.ckpt or TINY
        require(os.path.isdir(TINY) or args.ckpt, "this repository holds no checkpoint; name one with --ckpt DIR")
        checkpoint = Checkpoint(directory)
        self.config = checkpoint.fit(read_config(directory))
        self.lora = read_adapters(args.lora, checkpoint) if args.lora else None  # rank and alpha
        self.tokenizer = load_tokenizer(directory, self.config)
        longest = self.config.max_position_embeddings
        self.max_context = min(args.max_context or longest, longest)
        good = checkpoint.is_fp8() or args.weights != "fp8"
        require(good, f"{directory}: its weights are not FP8; leave out --weights fp8")
        drafts = args.draft and args.draft != LOOKUP
        args.draft_layers = read_config(args.draft).num_hidden_layers if drafts else None  # for the plan
        return checkpoint

    def answer(
        self,
        specs: list[dict],
        on_piece: Callable[[int, str, str], None] = ignore,
        on_result: Callable[[dict], None] = ignore,
        stop: Callable[[], bool] | None = None,
    ) -> list[dict]:
        """The requests' answers as the JSON objects that --json prints.

        All are read before the first is begun. On rank 0, `on_piece(i, kind, text)` gets each reply as it comes (see
        `ReplyParser`), and `on_result` the answers in the order of the requests. Raises UserError for a request that
        cannot be read. `stop`: as the engine's.
        """
        read = together(lambda: [self.requests.read(spec, i) for i, spec in enumerate(specs)])
        parsers, results, early = [parser for _, parser in read], [], {}
        if self.place.rank > 0:
            on_piece = on_result = ignore

        def requests() -> Iterator[Request]:
            for (request, _), spec in zip(read, specs):
                if request.images:
                    with within(spec["where"]):
                        request.pixels = together(request.decode if self.place.first_stage else list)
                yield request

        def show(i: int, pieces: list[tuple[str, str]]) -> None:
            for kind, text in pieces:
                on_piece(i, kind, text)

        def on_token(i: int, token: int, logprob: float) -> bool:
            show(i, parsers[i].add(token))
            return parsers[i].stopped

        def on_done(i: int, request: Request, answer: Answer) -> None:
            show(i, parsers[i].finish())
            early[i], request.pixels = result_of(request, parsers[i].reply, answer), []
            while len(results) in early:
                results.append({**early.pop(len(results)), "stats": self.stats()})
                on_result(results[-1])

        self.engine.generate(requests(), on_token, on_done, self.args.batch_size, stop)
        return results

    def stats(self) -> dict:
        """Of the answers until now. All ranks call this together."""
        engine, stats = self.engine, {"load_s": round(self.load_s, 3)}
        for phase in ("prefill", "decode"):
            stats[f"{phase}_tokens"], seconds = engine.tokens[phase], engine.seconds[phase]
            stats[f"{phase}_tokens_per_s"] = round(engine.tokens[phase] / seconds, 2) if seconds else 0.0
        if engine.draft.count:
            stats["tokens_per_step"] = round(engine.tokens["decode"] / max(1, engine.row_steps), 2)
        mine = {"peak_memory_bytes": peak_memory(self.place), "weight_bytes": self.weight_bytes}
        ranks = gather_objects({**mine, "bytes_read": self.bytes_read})
        return stats | {name: [rank[name] for rank in ranks] for name in ranks[0]}


def read_input(args: argparse.Namespace) -> tuple[bytes | None, bool]:
    """(what standard input asks, where the command line doesn't; whether a person is to ask, in a chat). On rank 0."""
    for_scripts = any([args.requests, args.prompt is not None, args.json, args.raw])
    chat = args.interactive or (sys.stdin.isatty() and not for_scripts)
    if chat:  # mistakes now, not once the model is loaded
        for path in args.image:
            load_image(path)
        if args.tools:
            read_tools(args.tools)
    if chat or args.prompt is not None or args.requests not in (None, "-"):
        return None, chat
    data = b"" if sys.stdin.isatty() and not args.requests else sys.stdin.buffer.read()
    require(data.strip(), "nothing to do: give a question, --requests FILE, or in a terminal neither, for a chat")
    return data, False


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s [options] [question]")
    add = parser.add_argument_group("what to ask").add_argument
    add("question", nargs="?", help="one user turn; default: standard input, or in a terminal a chat")
    add("--prompt", metavar="TEXT", help="the same as an option")
    add("--image", metavar="PATH", action="append", default=[], help="image before the question's text; repeatable")
    add("--system", metavar="TEXT", help="system prompt")
    add("--tools", metavar="FILE", help="JSON list of tools that the model may call, in OpenAI's form")
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
    weights = "FP8 weights in memory; auto: on GPUs, without FP8 units only where dequantized ones don't fit"
    add("--weights", choices=["auto", "fp8", "dequantized"], default="auto", help=weights)
    add("--draft", metavar="DIR", help=f"EAGLE head that guesses tokens, or {LOOKUP}; the same answers, sooner")
    add("--draft-tokens", type=SIZE, metavar="N", help="guesses a step; default 3")
    add("--max-context", type=SIZE, metavar="N", help="longest prompt and answer together; default: the model's")
    add = parser.add_argument_group("processes").add_argument
    add("--tp", type=SIZE, metavar="N", help="tensor-parallel size; default: all processes")
    add("--pp", type=SIZE, metavar="N", help="pipeline-parallel size; default 1")
    add("--batch-size", type=SIZE, default=16, metavar="N", help="requests answered together")
    add("--timeout", type=number(float, 5, 1e9), default=300, metavar="S", help="a rank silent for so long is gone")
    args = parser.parse_args(argv)
    check_args(args)
    require(args.draft or not args.draft_tokens, "--draft-tokens goes with --draft DIR")
    args.prompt = args.question if args.prompt is None else args.prompt
    return args


def check_args(args: argparse.Namespace) -> None:
    """Options that do not go together."""
    asked = [text for text in (args.question, args.prompt) if text is not None]
    require(len(asked) < 2, f"the question is given twice, as {args.question!r} and with --prompt; leave out one")
    chat = args.image or args.tools
    says, more = asked or chat or args.system, "leave out question, --image, --system, --tools and --interactive"
    require(not args.requests or not (says or args.interactive), f"--requests already says what to ask; {more}")
    plain = not chat and args.system is None
    require(not args.raw or plain, "--raw continues plain text; leave out --image, --system and --tools")
    scripted, more = asked or args.json or args.raw, "leave out question, --raw and --json"
    require(not args.interactive or not scripted, f"--interactive reads turns from the terminal; {more}")


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    place = find_place(args.tp, args.pp)
    sizes = f"--tp {place.tp_size} × --pp {place.pp_size} should be the number of processes, {place.world_size}"
    require(place.dp_size == 1, f"{sizes}; start that many with torchrun")
    require(place.pp_size == 1 or not args.draft, "--draft works with tensor parallelism alone: leave out --pp")
    data, chat = gather_objects(together(lambda: read_input(args) if place.rank == 0 else None))[0]
    specs = [] if chat else together(lambda: read_requests(args, data))
    session = Session(args, place)
    try:
        interact(session) if chat else answer_all(session, args, specs)
    finally:
        # A recorded step that is still there would keep `destroy_process_group` from ending (pytorch #115388).
        session.engine.groups.clear()
        symmetric_buffer.cache_clear()


def answer_all(session: Session, args: argparse.Namespace, specs: list[dict]) -> None:
    """Print the answers as they come; without --json also, on stderr, how fast they were."""
    numbers = itertools.count(1)

    def show(result: dict) -> None:
        if args.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            print(f"[{next(numbers)}] {printable(result['text'], sys.stdout)}", end="")
            print_calls(result)

    if len(specs) == 1 and not args.json:
        results = [stream(session, specs[0])]
    else:
        results = session.answer(specs, on_result=show)
    if session.place.rank == 0 and not args.json:
        stats = results[-1]["stats"]
        speeds = f"{stats['prefill_tokens_per_s']} prompt tokens/s, {speed_of(stats, 'new tokens/s')}"
        print(f"loaded in {stats['load_s']} s, {speeds}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
