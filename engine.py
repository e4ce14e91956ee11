"""Generation: prompts through the model in chunks, then one token at a time for a whole batch, over any topology.

Every rank runs this same loop. A *group* is a batch of requests with one key/value cache. A row's next token cannot be
computed before the last one is known, so a single group would keep one pipeline stage busy and all others waiting. A
batch is therefore split into as many groups as there are stages:

    time ─────────────────────────────────────────────►
    stage 0    g0   g1   g0   g1   g0                   `Engine.run_stage`: receive, run the layers, send on
                 ╲ ╱  ╲ ╱  ╲ ╱  ╲                       hidden states go down to the next stage (pp_group) …
    stage 1       g0   g1   g0   g1                     … sampled tokens come back up to all (answer_group)

The last stage samples and posts the tokens (`Engine.post`); each stage picks them up (`Engine.pick_up`) when that
group's turn comes again. Since every rank sees every token, all agree on each row's length and end without asking. A
long prompt fills the pipeline by itself: its chunks need no sampled token, so they follow each other from stage to
stage. With one process the same loop has one stage, one group and no messages.

Shapes: B rows of a group, T tokens of each that go through the model together, C hidden_size, V / tp logits per rank.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from model import KVCache
from parallel import all_gather
from pipeline import Channel

CHUNK = 1024  # prompt tokens that go through the model at a time: bounds the memory of activations
LOGIT_ROWS = 64  # positions whose logits exist at the same time when a prompt is scored


class Reader(Protocol):
    """Reads an answer token by token, as `session.ReplyParser` does."""

    stopped: bool  # nothing after the last token counts

    def add(self, id: int) -> list[tuple[str, str]]:
        """Returns the pieces (kind, text) of the reply that became certain with this token."""

    def finish(self) -> list[tuple[str, str]]:
        """The rest of them."""


@dataclass
class Request:
    """What to continue, and how."""

    prompt: list[int]
    pixels: list[torch.Tensor] = field(default_factory=list)  # the images, in the order of their tokens
    max_new_tokens: int = 1024
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0
    seed: int = 0
    reader: Reader | None = None  # without one, an answer is tokens alone
    logprobs: bool = False


@dataclass
class Answer:
    """What came of a request. Log-probabilities are natural logs of the untempered softmax."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    finish_reason: str = "length"


class Row:
    """A request, number `index` of its batch, while it is being answered."""

    def __init__(self, index: int, request: Request, limit: int, eos_id: int):
        self.index, self.request, self.eos_id, self.answer = index, request, eos_id, Answer()
        self.length = len(request.prompt)  # tokens in the cache, once the prompt is
        self.room = min(request.max_new_tokens, limit - self.length)  # for tokens of the answer
        self.scores: list[torch.Tensor] = []  # of the prompt's tokens, on the last stage
        self.generator = torch.Generator().manual_seed(request.seed)

    def take(self, token: int, logprob: float) -> list[tuple[str, str]]:
        """Append a sampled token; returns the pieces of the reply that became certain with it."""
        self.answer.tokens.append(token)
        self.answer.logprobs.append(logprob)
        reader = self.request.reader
        pieces = reader.add(token) if reader else []
        if token == self.eos_id or (reader and reader.stopped):
            self.answer.finish_reason = "stop"
        return pieces + reader.finish() if reader and self.done else pieces

    @property
    def done(self) -> bool:
        return self.answer.finish_reason == "stop" or len(self.answer.tokens) >= self.room


class Group:
    """Rows that decode together. `rows[i]` is row i of the cache."""

    def __init__(self, rows: list[Row], model):
        self.rows = rows
        self.cache: KVCache = model.new_cache(len(rows), max(row.length + row.room for row in rows))
        self.posted: tuple[torch.Tensor, dist.Work | None] | None = None  # see Engine.post

    def drop_finished(self) -> None:
        """The last row moves into the place of a finished one, so that a step runs over the cache's first rows."""
        for i in reversed(range(len(self.rows))):
            if self.rows[i].done:
                last = self.rows.pop()
                if i < len(self.rows):
                    self.cache.move_row(len(self.rows), i)
                    self.rows[i] = last


class Engine:
    """Answers requests with `model` (one rank's part of it). `max_context` bounds prompt and answer together."""

    def __init__(self, model, eos_id: int, max_context: int):
        self.model, self.place, self.eos_id, self.max_context = model, model.place, eos_id, max_context
        # In flight: while decoding, at most one message per group. Only the chunks of prompts could run further ahead
        # of a slower stage; the bound keeps their hidden states from piling up.
        self.down = Channel(self.place, model.dtype, in_flight=2 * self.place.pp_size)
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self.tokens = {"prefill": 0, "decode": 0}

    @torch.inference_mode()
    def generate(
        self, requests: list[Request], on_piece: Callable[[int, str, str], None] | None = None
    ) -> list[Answer]:
        """Answer `requests` together. `on_piece(i, kind, text)`, where it is given, gets each reply piece by piece.

        Prompts must not be longer than `max_context`; an answer ends there at the latest.
        """
        rows = [Row(i, request, self.max_context, self.eos_id) for i, request in enumerate(requests)]
        count = min(self.place.pp_size, len(rows))
        groups = [Group(rows[g::count], self.model) for g in range(count)]

        started = time.perf_counter()
        for group in groups:
            self.prefill(group)
        self.lap("prefill", started, sum(row.length for row in rows))
        started, generated = time.perf_counter(), 0
        while groups := [group for group in groups if group.rows]:
            for group in groups:
                for row, (token, logprob) in zip(group.rows, self.pick_up(group)):
                    if row.room > 0:
                        for kind, text in row.take(token, logprob):
                            if on_piece is not None:
                                on_piece(row.index, kind, text)
                group.drop_finished()
                if group.rows:
                    generated += len(group.rows)
                    self.decode(group)
        self.down.flush()
        self.lap("decode", started, generated)
        for row in rows:
            self.share_scores(row)
        return [row.answer for row in rows]

    def lap(self, phase: str, started: float, tokens: int) -> None:
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - started
        self.tokens[phase] += tokens

    # --- the two phases

    def prefill(self, group: Group) -> None:
        """The prompts, row by row and chunk by chunk: into the cache, and the first token of each sampled.

        A chunk attends to the earlier ones through the cache, so that a long prompt costs the activations of CHUNK
        tokens, not of all. Rows go one by one because their lengths differ: a padded batch would compute the padding.
        """
        sampled = []
        for i, row in enumerate(group.rows):
            prompt, request = row.request.prompt, row.request
            starts = range(0, len(prompt), CHUNK)
            chunks = [prompt[start : start + CHUNK] for start in starts]
            features = [None] * len(chunks)
            if self.place.first_stage and request.pixels:
                # One feature (C,) per [IMG] token. A chunk may end in the middle of an image, so each takes its share.
                shares = [chunk.count(self.model.config.vision.image_token_id) for chunk in chunks]
                features = self.model.image_features(request.pixels).split(shares)
            for start, chunk, part in zip(starts, chunks, features):
                hidden = self.run_stage([chunk], [start], group.cache.rows(i, i + 1), part)  # (1, T, C)
                # The state at a token scores the next one, so a chunk's last state needs the next chunk's first token.
                targets = prompt[start + 1 : start + CHUNK + 1] if request.logprobs else []
                if targets and self.place.last_stage:
                    row.scores += self.score(hidden[0], targets)
            if self.place.last_stage:
                sampled.append(self.sample(hidden[:, -1], [row]))
        self.post(group, torch.cat(sampled) if sampled else None)

    def decode(self, group: Group) -> None:
        """One more token for every row of the group."""
        tokens = [[row.answer.tokens[-1]] for row in group.rows]
        starts = [row.length for row in group.rows]
        hidden = self.run_stage(tokens, starts, group.cache.rows(0, len(group.rows)))  # (B, 1, C)
        for row in group.rows:
            row.length += 1
        self.post(group, self.sample(hidden[:, -1], group.rows) if self.place.last_stage else None)

    def run_stage(self, tokens: list[list[int]], starts: list[int], cache: KVCache, features=None):
        """This rank's layers over some rows' next tokens (B lists of T), row i from position starts[i] on.

        The hidden states (B, T, C) come from the previous stage and go to the next; the last stage returns them, the
        others None. `features` (n, C) stand for the n `[IMG]` tokens among `tokens`, on the first stage.
        """
        if self.place.first_stage:
            x = self.model.embed(torch.tensor(tokens, device=self.place.device), features)
        else:
            x = self.down.receive((len(tokens), len(tokens[0]), self.model.config.hidden_size))
        x = self.model(x, starts, cache)
        if self.place.last_stage:
            return x
        self.down.send(x)
        return None

    # --- what flows back, from the last stage to all

    # Who waits for whom: every rank visits the groups in the same order, and waits only for what others do earlier in
    # that order. `receive` waits for the previous stage's turn with the same group, `pick_up` for the last stage's turn
    # with it one round ago. Hidden states are sent in the background, so nobody has to be ready to take them. Hence
    # some rank can always go on. That holds as long as the two directions do not share a communicator: NCCL runs the
    # operations of one in the order of posting, and a broadcast would wait behind a send whose receiver waits for it.

    def post(self, group: Group, sampled: torch.Tensor | None) -> None:
        """Last stage: send the group's (B, 2) tokens and log-probabilities on their way. The others: await them.

        All stages join the broadcast here, though the others need its result only in `pick_up`: the first broadcast
        connects the group on NCCL, and the last stage waits there for the others. They would still be sending it the
        prompts of other groups, more than it has buffers for, and all would wait for ever.
        """
        if sampled is None:
            sampled = torch.empty(len(group.rows), 2, dtype=torch.float64, device=self.place.device)
        group.posted = (sampled, self.broadcast(sampled))

    def pick_up(self, group: Group) -> list[tuple[int, float]]:
        """The token and log-probability of each row of the group, wherever they were sampled."""
        sampled, work = group.posted
        if work is not None:
            work.wait()
        return [(int(token), logprob) for token, logprob in sampled.tolist()]

    def share_scores(self, row: Row) -> None:
        """Put the log-probabilities of the prompt's tokens after the first, if they are wanted, into the answer."""
        size = len(row.request.prompt) - 1
        if row.request.logprobs and size > 0:
            # `scores` is empty but on the last stage; the others receive into new memory.
            x = torch.cat(row.scores or [torch.empty(size, dtype=torch.float64, device=self.place.device)])
            if work := self.broadcast(x):
                work.wait()
            row.answer.prompt_logprobs += x.tolist()

    def broadcast(self, x: torch.Tensor) -> dist.Work | None:
        """`x` of the last stage into `x` of all, in the background; None where there is one stage."""
        if self.place.answer_group is None:
            return None
        return dist.broadcast(x, group=self.place.answer_group, group_src=self.place.pp_size - 1, async_op=True)

    # --- what the last stage computes

    def score(self, hidden: torch.Tensor, targets: list[int]) -> list[torch.Tensor]:
        """Log-probabilities of the N `targets` after the first N of the hidden states (T, C): pieces, float64.

        In pieces, because the logits of a whole chunk would take CHUNK · V / tp floats, 0.5 GB for 131,072 tokens.
        """
        head, ids = self.model.lm_head, torch.tensor(targets, device=self.place.device)
        pieces = zip(hidden[: len(targets)].split(LOGIT_ROWS), ids.split(LOGIT_ROWS))
        return [head.log_probabilities(self.model.logits(x), y).double() for x, y in pieces]

    def sample(self, hidden: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """hidden (B, C) after each row's last token -> (B, 2) float64: the token sampled, its log-probability.

        Sampling is the Gumbel-max trick (arXiv:1411.0030): if E is drawn from Exp(1) for every token, the largest of
        logit / temperature - log E is a draw from the softmax. A maximum over a split vocabulary is the maximum of the
        parts' maxima, so each rank looks at its own logits and four numbers per row are exchanged. Only top-p needs
        more: all logits of its rows, to see where the nucleus ends.
        """
        head = self.model.lm_head
        logits = self.model.logits(hidden)  # (B, V / tp)
        keys = logits.clone()
        for i, row in enumerate(rows):
            temperature, top_p = row.request.temperature, row.request.top_p
            if temperature == 0:
                continue
            keys[i] /= temperature
            if top_p < 1:
                inside = nucleus(all_gather(keys[i], head.group).flatten(), top_p)  # (V,), padding included
                keys[i].masked_fill_(~inside[head.start :][: keys.shape[1]], -torch.inf)
            # Every rank draws the noise of the whole vocabulary, on the CPU and from the row's own generator, so that
            # a seed gives the same tokens on any topology and in any batch. The padding's logits stay -inf.
            noise = torch.empty(head.vocab_size).exponential_(generator=row.generator)[head.start : head.stop]
            keys[i, : len(noise)] -= noise.log().to(keys.device)
        best, index = keys.max(dim=1)
        own = logits.gather(1, index[:, None])[:, 0]
        # Of each rank's best token: its key, its id, its logit; and the rank's share of the softmax's denominator.
        candidates = torch.stack([x.double() for x in (best, index + head.start, own, logits.logsumexp(1))], dim=1)
        candidates = all_gather(candidates, head.group)  # (tp, B, 4)
        winner = candidates[:, :, 0].argmax(0)  # (B,): the rank that holds the largest key
        chosen = candidates[winner, torch.arange(len(rows), device=winner.device)]  # (B, 4)
        return torch.stack((chosen[:, 1], chosen[:, 2] - candidates[:, :, 3].logsumexp(0)), dim=1)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """(V,) -> (V,) bool: the fewest tokens whose probabilities reach `top_p`; of equal ones those that come first.

    Holtzman et al., arXiv:1904.09751.
    """
    ordered, tokens = logits.sort(descending=True, stable=True)
    # A token is outside if the likelier ones reach top_p without it: their sum is the cumulative sum one place earlier.
    outside = ordered.softmax(0).cumsum(0).roll(1) >= top_p
    outside[0] = False  # roll put the total there; the likeliest token is always inside
    return torch.empty_like(outside).scatter_(0, tokens, ~outside)
