"""Draft and verify (speculative decoding): a small head guesses some tokens, the model reads them all in one step.

A step of decoding reads every weight once, whether it computes one token or four. So something cheap guesses the next K
tokens, and the model computes its own token at each of their places at the same time. The guesses stay up to the first
one that the model would not have chosen; there, its own token stands instead. With K = 3 and two guesses right:

    in the text      … The  star                            the last token has not gone through the model yet
    guessed                       is   a    red             `propose`
    one step over         star    is   a    red             four positions at once, each attends to those before
    the model says        is      a    blue square          `accept`: two guesses were right
    in the text      … The  star  is   a    blue            three tokens for one step; "red" is overwritten

**Exactly.** Leviathan et al. (arXiv:2211.17192) accept a guess at random, so that the distribution stays the same. Here
the tokens themselves do. The noise of a sample is a pure function of seed, position and token (`parallel.gumbel`), so
what the model draws at a position depends on its logits there and on nothing else: a guess is right if it is that very
token. The head draws with the same noise, and so guesses right more often than one that has dice of its own. Only
rounding can part the two: BF16 sums of four rows may be rounded otherwise than those of one, as in any batch.

**The head** is that of EAGLE (arXiv:2401.15077), published with this model. It does not guess from tokens alone, but
from the model's own last state, which knows more than the token that was drawn from it. With e(t) the embedding of
token t, and h(P) the model's state at position P after its final norm:

    h'(P + 1) = norm(layers(W [e(t(P + 1)), h(P)]))         W: `eagle_linear`; the state that the model will have
    logits(P + 1) = lm_head(h'(P + 1))                      embedding and output head are the model's

The layers are decoder layers with a cache of their own, whose entry P stands for token P + 1 and h(P). To guess a
second token, h'(P + 1) takes the place of the state that the model has not computed yet. Once it has, the entry is
made anew from it: `propose` begins with the tokens that the last step accepted.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import Config, KVCache, MistralMedium
from parallel import Place, RowParallelLinear, copy_to_group, divide
from runtime.checkpoint import Checkpoint, fill, scale_names
from runtime.config import parse_config, read_config
from runtime.cpu import speed_up
from runtime.files import require
from runtime.native import to_params, translate_params

EAGLE = "eagle_linear.weight"
LOOKUP = "lookup"


class Guesses:
    """What guesses `count` tokens (K) for each row of a `generate.Group`, by tensors alone: a GPU can record a step.

    This one is for no draft at all. A group has for it:

    - `positions` (rows,): where the last token of each row goes, which has not been through the model;
    - `sampled` (rows, K + 1, 2): the tokens that the last step brought, and -1 after them; log-probabilities;
    - `memory` (rows, …): what `new_memory` asked for;
    - the last of the cache's layers, as many as `new_layers` made.

    B are the rows `part` of a call, T tokens of each. `choose(states, places)` samples, with these rows' temperatures:
    states (B, T, C) and the places (B, T) of the tokens to come -> tokens and log-probabilities (B, T, 2).
    """

    needs_state = False  # of the token before a prompt's first new one; no cache has that

    def __init__(self, count: int = 0, device: torch.device = Place.device):
        self.count, self.device = count, device

    def new_layers(self, rows: int, length: int) -> list[torch.Tensor]:
        return []

    def new_memory(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows, self.count, dtype=torch.long, device=self.device)

    def read(self, group, pieces: list, tokens: torch.Tensor, features: torch.Tensor | None, hidden: torch.Tensor):
        """`tokens` (1, T) went through the model, `pieces` of several rows' prompts, and became `hidden` (1, T, C)."""

    def begin(self, group, part: slice) -> None:
        """The prompts of these rows have all been read."""

    def prepare(self, group) -> None:
        """On the host, before a step."""

    def last_of(self, group, part: slice) -> torch.Tensor:
        """(B, 1): the last tokens."""
        return group.sampled[part, :, 0].gather(1, self.brought(group, part)[:, None] - 1).long()

    def brought(self, group, part: slice) -> torch.Tensor:
        """(B,): how many tokens the last step brought."""
        return (group.sampled[part, :, 0] >= 0).sum(1)

    def propose(self, group, part: slice, length: int, choose: Callable) -> torch.Tensor:
        """Guesses (B, K). `length` of the cache is attended to."""
        return group.memory[part]

    def accept(self, group, part: slice, guessed: torch.Tensor, sampled: torch.Tensor, states: torch.Tensor) -> None:
        """Keep what is right of `guessed` (B, K): the model `sampled` (B, K + 1, 2) from its `states` (B, K + 1, C).

        Nothing has to be taken back: what a wrong guess left in the cache stands where the next step begins, which
        overwrites it before anything attends to it.
        """
        right = (sampled[:, :-1, 0] == guessed).long().cumprod(1).sum(1)  # (B,)
        wrong = torch.arange(self.count + 1, device=right.device) > right[:, None]
        sampled[..., 0].masked_fill_(wrong, -1)
        group.sampled[part] = sampled
        group.positions[part].add_(right + 1)


class Lookup(Guesses):
    """Guesses what followed the last two tokens where they stood before in the row's own text; for any checkpoint."""

    def prepare(self, group) -> None:
        guesses = [self.guess(row.request.prompt + row.answer.tokens) for row in group.rows]
        group.memory[: len(guesses)] = torch.tensor(guesses)

    def guess(self, ids: list[int]) -> list[int]:
        """The K ids that followed the latest earlier place of the last two; the last one again where there is none."""
        after = next((i for i in range(len(ids) - 2, 1, -1) if ids[i - 2 : i] == ids[-2:]), len(ids))
        return (ids[after : after + self.count] + ids[-1:] * self.count)[: self.count]


def sizes_of_head(config: Config, layers: int) -> Config:
    """Of a head for a model with this config, as far as a params.json can say them: they are read from one."""
    said = to_params(replace(config, num_hidden_layers=layers, vision=None))
    return replace(parse_config(translate_params(said)), initializer_range=config.initializer_range)


class Head(MistralMedium):
    """The draft's network: `eagle_linear`, layers, norm. `place` is that of a model without pipeline stages.

    `keep_linear`: whether `eagle_linear` stays FP8.
    """

    def __init__(self, config: Config, place: Place, dtype: torch.dtype, keep_fp8: bool = False, keep_linear=False):
        super().__init__(config, place, dtype, keep_fp8)
        del self.embed_tokens, self.lm_head
        C = config.hidden_size
        divide(C, place.tp_size, "dimensions of hidden_size")
        self.eagle_linear = RowParallelLinear(2 * C, C, place, dtype, keep_linear)

    def predict(self, embeddings: torch.Tensor, states: torch.Tensor, span=None, cache: KVCache | None = None):
        """Embeddings of tokens, and the states before them, (B, T, C) each -> the states at the tokens, normalized."""
        part = self.eagle_linear.parts[0].slice  # the columns of this rank
        x = copy_to_group(torch.cat((embeddings, states), dim=-1), self.place.tp_group)
        x = self.eagle_linear(x[..., part.start : part.stop])
        return self.norm(self(x, span, cache))

    def losses(self, model: MistralMedium, embeddings: torch.Tensor, states: torch.Tensor, at: torch.Tensor):
        """How far the head is from `model`, whose `embeddings` and normalized `states` (B, T, C) these are.

        `at` (N,): places in B · T, none the first of its row. Returns (N,) float32, SmoothL1(h', h) + 0.1 · the
        cross-entropy between the two distributions of the next token; and whether their likeliest tokens are the same.
        """
        guessed = self.predict(embeddings[:, 1:], states[:, :-1])  # (B, T - 1, C), from the second place on
        guessed, states = guessed.flatten(0, 1)[at - at // states.shape[1] - 1], states.flatten(0, 1)[at]
        distances = F.smooth_l1_loss(guessed.float(), states.float(), reduction="none").mean(1)
        own, wanted = model.lm_head(guessed), model.lm_head(states)  # (N, V / tp)
        with torch.no_grad():
            agree = torch.eq(*(model.lm_head.sample(logits, None, None)[:, 0] for logits in (own, wanted)))
        return distances + 0.1 * _SoftCrossEntropy.apply(own, wanted, self.place.tp_group), agree


class _SoftCrossEntropy(torch.autograd.Function):
    """-Σ p log q = log Σ exp(logits) - Σ p · logits, with p the softmax of `targets`, q that of `logits`.

    Both are (N, V / tp), with -inf where padded, and are overwritten; the result is (N,). As in
    `parallel._CrossEntropy` sums are all-reduced, and logits stay where they are. Backward: q - p.
    """

    @staticmethod
    def forward(ctx, logits, targets, group):
        peaks = torch.stack((logits.amax(1), targets.amax(1)))
        if group is not None:
            dist.all_reduce(peaks, dist.ReduceOp.MAX, group=group)
        p = targets.sub_(peaks[1, :, None]).exp_()
        expected = (p * logits.sub_(peaks[0, :, None])).masked_fill_(p == 0, 0).sum(1)  # 0 · -inf would be NaN
        q = logits.exp_()
        sums = torch.stack((q.sum(1), p.sum(1), expected))
        if group is not None:
            dist.all_reduce(sums, group=group)
        ctx.save_for_backward(q.div_(sums[0, :, None]).sub_(p.div_(sums[1, :, None])))
        return sums[0].log() - sums[2] / sums[1]

    @staticmethod
    def backward(ctx, grad):
        (difference,) = ctx.saved_tensors
        return difference.mul_(grad[:, None]), None, None


class Eagle(Guesses):
    """Guesses with a `Head` beside `model`. Remembers the model's states (rows, K + 1, C) at the last step's tokens."""

    needs_state = True

    def __init__(self, head: Head, model: MistralMedium, count: int):
        super().__init__(count, model.place.device)
        self.head, self.model = head, model

    def new_layers(self, rows: int, length: int) -> list[torch.Tensor]:
        return self.head.new_cache(rows, length).layers

    def new_memory(self, rows: int) -> torch.Tensor:
        size = self.head.config.hidden_size
        return torch.zeros(rows, self.count + 1, size, dtype=self.head.dtype, device=self.device)

    def layers_of(self, group, part: slice) -> KVCache:
        return KVCache(group.cache.layers[-len(self.head.layers) :]).rows(part.start, part.stop)

    def read(self, group, pieces: list, tokens: torch.Tensor, features: torch.Tensor | None, hidden: torch.Tensor):
        """Entry P is made of token P + 1 and the state at P, so a piece begins with the last state of the one before.

        The first piece has none before it, and begins an entry later: the one that it leaves out is in the cache.
        """
        embeddings = self.model.embed(tokens.to(self.device), features)[0]
        states, sizes = self.model.norm(hidden)[0], [piece.size for piece in pieces]
        inputs, segments = [], []
        for piece, x, h in zip(pieces, embeddings.split(sizes), states.split(sizes)):
            row, first = group.rows[piece.row], piece.start - 1
            if row.state is None:
                x, first = x[1:], first + 1
            else:
                h = torch.cat((row.state[None], h))
            row.state = states.new_empty(h.shape[1:]).copy_(h[-1])  # not a view, which would keep all of them
            if len(x):
                inputs.append((x, h[:-1]))
                segments.append((piece.row, first, len(x)))
        if segments:
            embeddings, states = (torch.cat(parts)[None] for parts in zip(*inputs))
            self.head.predict(embeddings, states, self.head.prompts(segments), self.layers_of(group, slice(None)))

    def begin(self, group, part: slice) -> None:
        group.memory[part, 0] = torch.stack([row.state for row in group.rows[part]])

    def propose(self, group, part: slice, length: int, choose: Callable) -> torch.Tensor:
        cache, places = self.layers_of(group, part), group.positions[part, None]  # (B, 1)
        brought = self.brought(group, part)[:, None]
        # The entries of all tokens that the last step brought, by the model's own states; those of rejected tokens are
        # overwritten below. What comes out at the last token is the first guess's state.
        at = places - brought + torch.arange(self.count + 1, device=places.device)
        tokens = group.sampled[part, :, 0].long().clamp(min=0)
        states = self.head.predict(self.model.embed(tokens), group.memory[part], self.head.step(at, length), cache)
        state = states.gather(1, (brought - 1)[..., None].expand(-1, -1, states.shape[2]))  # (B, 1, C)
        guesses = [choose(state, places + 1)[..., 0].long()]
        for i in range(self.count - 1):
            x = self.model.embed(guesses[-1])
            state = self.head.predict(x, state, self.head.step(places + i, length), cache)
            guesses.append(choose(state, places + i + 2)[..., 0].long())
        return torch.cat(guesses, dim=1)

    def accept(self, group, part: slice, guessed: torch.Tensor, sampled: torch.Tensor, states: torch.Tensor) -> None:
        super().accept(group, part, guessed, sampled, states)
        group.memory[part] = states


def open_draft(name: str, count: int, model: MistralMedium) -> Guesses:
    """What `--draft name` asks for, with `count` guesses a step."""
    if name == LOOKUP:
        return Lookup(count, model.place.device)
    head = read_draft(name, model).eval()
    speed_up(head)
    return Eagle(head, model, count)


def read_draft(directory: str, model: MistralMedium) -> Head:
    """The head in `directory` for `model`: of each rank its slices, FP8 kept where the model's is. Raises UserError."""
    checkpoint, config, own = Checkpoint(directory), read_config(directory), model.config
    for name in ("hidden_size", "vocab_size"):
        mine, its = getattr(own, name), getattr(config, name)
        require(mine == its, f"{directory}: {name} is {its}, but the model's is {mine}; this draft is another model's")
    require(EAGLE in checkpoint.tensors, f"{directory}: holds no {EAGLE}; --draft takes an EAGLE head")
    keep = model.keep_fp8 and checkpoint.is_fp8()
    stored = scale_names(EAGLE)[0] in checkpoint.tensors
    head = Head(config, model.place, model.dtype, keep, keep and stored)
    fill(head, checkpoint)
    return head
