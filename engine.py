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

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from chat import NAME
from model import KVCache
from parallel import all_gather
from pipeline import Channel
from tokenizer import SentencePiece, StreamDecoder, Tekken

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
    raw: bool = False  # no chat: the answer is all text
    logprobs: bool = False


@dataclass
class Answer:
    """What came of a request. Log-probabilities are natural logs of the untempered softmax."""

    reply: "Reply"
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    finish_reason: str = "length"


class Row:
    """A request, number `index` of its batch, while it is being answered."""

    def __init__(self, index: int, request: Request, limit: int, tokenizer):
        self.index, self.request = index, request
        self.parser = ReplyParser(tokenizer, request.prompt, request.stop, request.raw)
        self.answer = Answer(self.parser.reply)
        self.length = len(request.prompt)  # tokens in the cache, once the prompt is
        self.room = min(request.max_new_tokens, limit - self.length)  # for tokens of the answer
        self.scores: list[torch.Tensor] = []  # of the prompt's tokens, on the last stage
        self.generator = torch.Generator().manual_seed(request.seed)

    def take(self, token: int, logprob: float) -> list[tuple[str, str]]:
        """Append a sampled token; returns the pieces of the reply (see ReplyParser) that became certain with it."""
        self.answer.tokens.append(token)
        self.answer.logprobs.append(logprob)
        pieces = self.parser.add(token)
        if self.parser.ended or self.parser.stopped:
            self.answer.finish_reason = "stop"
        return pieces + self.parser.finish() if self.done else pieces

    @property
    def done(self) -> bool:
        return self.answer.finish_reason == "stop" or len(self.answer.tokens) >= self.room


class Group:
    """Rows that decode together. `rows[i]` is row i of the cache."""

    def __init__(self, rows: list[Row], model):
        self.rows = rows
        self.cache: KVCache = model.new_cache(len(rows), max(row.length + row.room for row in rows))
        self.posted: tuple[torch.Tensor | None, dist.Work | None] = (None, None)  # see Engine.post

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

    def __init__(self, model, tokenizer, max_context: int):
        self.model, self.place, self.tokenizer, self.max_context = model, model.place, tokenizer, max_context
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
        rows = [Row(i, request, self.max_context, self.tokenizer) for i, request in enumerate(requests)]
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
        """Last stage: send the group's (B, 2) tokens and log-probabilities on their way. The others: nothing yet.

        They join the broadcast when they need it, because on a GPU a collective that waits for its peers is a kernel
        that spins and takes compute from the other groups.
        """
        group.posted = (sampled, None if sampled is None else self.broadcast(sampled))

    def pick_up(self, group: Group) -> list[tuple[int, float]]:
        """The token and log-probability of each row of the group, wherever they were sampled."""
        sampled, work = group.posted
        if sampled is None:
            sampled = torch.empty(len(group.rows), 2, dtype=torch.float64, device=self.place.device)
            work = self.broadcast(sampled)
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
