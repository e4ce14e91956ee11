"""Generation: prompts through the model in chunks, then one token at a time for a whole batch, over any topology.

Every rank runs this same loop. A *group* is a batch of requests with one key/value cache. With pp pipeline stages a
batch is split into up to pp groups, and while one stage works on a group the others work on the rest:

    stage 0   group 0 │ group 1 │ group 0 │ …          hidden states go down to the next stage,
    stage 1           │ group 0 │ group 1 │ …          sampled tokens go back up to all stages

The last stage samples and posts the tokens; each stage picks them up when it comes to that group again, so that all
ranks know every row's length and end without further talk. With one process the same loop has one stage, one group.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from model import KVCache
from parallel import all_gather
from tokenizer import StreamDecoder

CHUNK = 1024  # prompt tokens that go through the model at a time: bounds the memory of activations
LOGIT_ROWS = 64  # positions whose logits exist at the same time when a prompt is scored


@dataclass
class Request:
    """What to continue, and how."""

    prompt: list[int]
    pixels: list[torch.Tensor] = field(default_factory=list)  # the images, in the order of their tokens
    max_new_tokens: int = 1024
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list)
    logprobs: bool = False


@dataclass
class Answer:
    """What came of a request. Log-probabilities are of the untempered softmax."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    stopped_at: str | None = None  # the stop string that ended it
    finish_reason: str = "length"


class Row:
    """A request while it is being answered."""

    def __init__(self, request: Request, limit: int, tokenizer):
        self.request, self.answer, self.tokenizer = request, Answer(), tokenizer
        self.length = len(request.prompt)  # tokens in the cache, once the prompt is
        self.room = min(request.max_new_tokens, limit - self.length)
        self.decoder, self.text = StreamDecoder(tokenizer), ""
        self.scores: list[torch.Tensor] = []  # of the prompt's tokens, on the last stage
        self.generator = torch.Generator().manual_seed(request.seed)

    def take(self, token: int, logprob: float) -> str:
        """Append a sampled token; returns the text that became complete with it."""
        self.answer.tokens.append(token)
        self.answer.logprobs.append(logprob)
        new = self.decoder.add(token)
        before, self.text = len(self.text), self.text + new
        if token == self.tokenizer.eos_id:
            self.answer.finish_reason = "stop"
        for stop in self.request.stop:
            if stop in self.text[max(0, before - len(stop)) :]:
                self.answer.finish_reason, self.answer.stopped_at = "stop", stop
        return new

    @property
    def done(self) -> bool:
        return self.answer.finish_reason == "stop" or len(self.answer.tokens) >= self.room


class Group:
    """Rows that decode together, the active ones first in the cache."""

    def __init__(self, rows: list[Row], cache: KVCache):
        self.rows, self.cache = rows, cache
        self.posted: tuple[torch.Tensor, dist.Work | None] | None = None

    def drop_finished(self) -> None:
        """The last active row moves into the place of a finished one, so that the active rows stay together."""
        for i in reversed(range(len(self.rows))):
            if self.rows[i].done:
                last = len(self.rows) - 1
                if i < last:
                    self.cache.move_row(last, i)
                    self.rows[i] = self.rows[last]
                self.rows.pop()


class Engine:
    """Answers requests with `model` (one rank's part of it). `max_context` bounds prompt and answer together."""

    def __init__(self, model, tokenizer, max_context: int):
        self.model, self.place, self.tokenizer, self.max_context = model, model.place, tokenizer, max_context
        self.sent: deque = deque()  # hidden states on their way to the next stage, kept until they arrived
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self.tokens = {"prefill": 0, "decode": 0}

    @torch.inference_mode()
    def generate(
        self, requests: list[Request], on_text: Callable[[int, int, str], None] = lambda i, token, text: None
    ) -> list[Answer]:
        """Answer `requests` together. `on_text(i, token, text)` is called on every rank as tokens come.

        Prompts must be shorter than `max_context`; an answer ends there at the latest.
        """
        rows = [Row(request, self.max_context, self.tokenizer) for request in requests]
        numbers = {id(row): i for i, row in enumerate(rows)}
        count = min(self.place.pp_size, len(rows))
        groups = []
        for g in range(count):
            members = rows[g::count]
            longest = max(row.length + row.room for row in members)
            groups.append(Group(members, self.model.new_cache(len(members), longest)))

        started = time.perf_counter()
        for group in groups:
            self.prefill(group)
        self.lap("prefill", started, sum(row.length for row in rows))
        started, generated = time.perf_counter(), 0
        while any(group.rows for group in groups):
            for group in groups:
                if not group.rows:
                    continue
                for row, (token, logprob) in zip(group.rows, self.pick_up(group)):
                    if row.room > 0:
                        on_text(numbers[id(row)], token, row.take(token, logprob))
                group.drop_finished()
                if group.rows:
                    generated += len(group.rows)
                    self.decode(group)
        while self.sent:
            self.sent.popleft()[0].wait()
        self.lap("decode", started, generated)
        for row in rows:
            if row.request.logprobs and row.length > 1:
                row.answer.prompt_logprobs += self.from_last_stage(row.scores, len(row.request.prompt) - 1).tolist()
        return [row.answer for row in rows]

    def lap(self, phase: str, started: float, tokens: int) -> None:
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - started
        self.tokens[phase] += tokens

    # --- the two phases

    def prefill(self, group: Group) -> None:
        """The prompts, row by row and chunk by chunk: into the cache, and the first token of each sampled."""
        sampled = []
        for i, row in enumerate(group.rows):
            prompt, request = row.request.prompt, row.request
            features, used = None, 0
            if self.place.first_stage and request.pixels:
                features = self.model.image_features(request.pixels)
            for start in range(0, len(prompt), CHUNK):
                chunk = prompt[start : start + CHUNK]
                part = None
                if features is not None:
                    count = chunk.count(self.model.config.vision.image_token_id)
                    part, used = features[used : used + count], used + count
                hidden = self.stage([chunk], [start], group.cache.rows(i, i + 1), part)
                if request.logprobs and self.place.last_stage:
                    row.scores.append(self.score(hidden[0], prompt[start + 1 : start + CHUNK + 1]))
            if self.place.last_stage:
                sampled.append(self.sample(hidden[:, -1], [row]))
        self.post(group, torch.cat(sampled) if sampled else None)

    def decode(self, group: Group) -> None:
        """One more token for every active row of the group."""
        tokens = [[row.answer.tokens[-1]] for row in group.rows]
        starts = [row.length for row in group.rows]
        hidden = self.stage(tokens, starts, group.cache.rows(0, len(group.rows)))
        for row in group.rows:
            row.length += 1
        self.post(group, self.sample(hidden[:, -1], group.rows) if self.place.last_stage else None)

    def stage(self, tokens: list[list[int]], starts: list[int], cache: KVCache, features=None) -> torch.Tensor | None:
        """This rank's layers for some rows' next tokens (B lists of T): from the previous stage, to the next."""
        place, model = self.place, self.model
        if place.first_stage:
            ids = torch.tensor(tokens, device=place.device)
            x = model.embed(ids) if features is None else model.embed(ids, features)
        else:
            shape = (len(tokens), len(tokens[0]), model.config.hidden_size)
            x = torch.empty(shape, dtype=model.dtype, device=place.device)
            dist.recv(x, group=place.pp_group, group_src=place.pp_rank - 1)
        x = model(x, starts, cache)
        if place.last_stage:
            return x
        x = x.contiguous()
        self.sent.append((dist.isend(x, group=place.pp_group, group_dst=place.pp_rank + 1), x))
        while len(self.sent) > 2 * place.pp_size:
            self.sent.popleft()[0].wait()
        return None

    # --- what flows back

    def post(self, group: Group, sampled: torch.Tensor | None) -> None:
        """Last stage: send (rows, 2) tokens and log-probabilities on their way to all stages. The others: nothing."""
        work = self.broadcast(sampled) if self.place.last_stage and self.place.answer_group is not None else None
        group.posted = (sampled, work)

    def pick_up(self, group: Group) -> list[tuple[int, float]]:
        """The token and log-probability of each active row, wherever they were sampled."""
        sampled, work = group.posted
        if sampled is None:
            sampled = torch.empty(len(group.rows), 2, dtype=torch.float64, device=self.place.device)
            work = self.broadcast(sampled)
        if work is not None:
            work.wait()
        return [(int(token), logprob) for token, logprob in sampled.tolist()]

    def from_last_stage(self, pieces: list[torch.Tensor], size: int) -> torch.Tensor:
        """The last stage's `pieces`, joined to (size,) float64, on every stage."""
        x = torch.empty(size, dtype=torch.float64, device=self.place.device)
        if self.place.last_stage:
            torch.cat(pieces, out=x)
        if self.place.answer_group is not None:
            self.broadcast(x).wait()
        return x

    def broadcast(self, x: torch.Tensor) -> dist.Work:
        return dist.broadcast(x, group=self.place.answer_group, group_src=self.place.pp_size - 1, async_op=True)

    # --- what the last stage computes

    def score(self, hidden: torch.Tensor, targets: list[int]) -> torch.Tensor:
        """Log-probabilities (N,) float64 of `targets` after the first N of the hidden states (T, C)."""
        ids, scores = torch.tensor(targets, dtype=torch.long, device=self.place.device), []
        for x, y in zip(hidden[: len(targets)].split(LOGIT_ROWS), ids.split(LOGIT_ROWS)):
            scores.append(self.model.lm_head.log_probabilities(self.model.logits(x), y).double())
        return torch.cat(scores) if targets else torch.empty(0, dtype=torch.float64, device=self.place.device)

    def sample(self, hidden: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """hidden (B, C) after each row's last token -> (B, 2) float64: the token sampled, its log-probability.

        Sampling is the Gumbel-max trick: the largest of logit / temperature + noise is a draw from the softmax. The
        noise is the same on every rank, so each looks at its own part of the vocabulary only and four numbers a row
        are exchanged. Only top-p needs more: the logits of its rows, to see where the nucleus ends.
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
                inside = nucleus(all_gather(keys[i], head.group).flatten(), top_p)
                keys[i].masked_fill_(~inside[head.start :][: keys.shape[1]], -torch.inf)
            noise = torch.empty(head.vocab_size).exponential_(generator=row.generator)[head.start : head.stop]
            keys[i, : len(noise)] -= noise.log().to(keys.device)
        best, index = keys.max(dim=1)
        own = logits.gather(1, index[:, None])[:, 0]
        candidates = torch.stack([x.double() for x in (best, index + head.start, own, logits.logsumexp(1))], dim=1)
        candidates = all_gather(candidates, head.group)  # (tp, B, 4)
        winner = candidates[:, :, 0].argmax(0)
        chosen = candidates[winner, torch.arange(len(rows), device=winner.device)]
        return torch.stack((chosen[:, 1], chosen[:, 2] - candidates[:, :, 3].logsumexp(0)), dim=1)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """(V,) -> (V,) bool: the fewest tokens whose probabilities reach `top_p`; of equal ones those that come first.

    Holtzman et al., arXiv:1904.09751.
    """
    ordered, tokens = logits.sort(descending=True, stable=True)
    outside = ordered.softmax(0).cumsum(0).roll(1) >= top_p  # what the likelier tokens sum up to
    outside[0] = False
    return torch.empty_like(outside).scatter_(0, tokens, ~outside)
