"""Tensor and pipeline parallelism by hand: a rank's place, and layers that know how to be one part of many.

**Tensor parallelism** (Megatron-LM, arXiv:1909.08053) cuts every matrix. Attention and MLP are each a *column-parallel*
step, where a rank computes some of the outputs, followed by a *row-parallel* step, where it uses some of the inputs:

                rank 0                      rank 1
       x ────────┬────────────────────────────┐            x (B, T, C) is whole on both
                 │ copy_to_group              │
         gate, up: rows 0…F/2          rows F/2…F          ColumnParallelLinear: half of the outputs each, (B, T, F/2)
                 │ silu(gate) · up            │            needs no communication
         down: columns 0…F/2           columns F/2…F       RowParallelLinear: partial sums of the whole (B, T, C)
                 └───────── all-reduce ───────┘            reduce_from_group adds them up
       x + … is whole on both again

What lies between the two steps (heads, activations) never leaves the rank, and the two all-reduces per layer are the
only communication in the forward pass. In the backward pass the roles swap: `copy_to_group` all-reduces the gradient,
since each rank used the same x for its own part, and `reduce_from_group` does nothing. With 96 query heads and 8
key/value heads, a rank of TP=8 has 12 and 1. The vocabulary is cut as well: the embedding looks up the tokens it has,
and the head gives each rank the logits of its own tokens, which sampling and cross-entropy work on as they are.

**Sequence parallelism** (arXiv:2205.05198) also cuts what lies between the pairs, norms and residuals: each rank has
T / tp of the tokens there. `copy_to_group` then gathers the tokens, and `reduce_from_group` hands each rank the sums of
its own (all-gather and reduce-scatter move as many bytes as the all-reduce did).

**Pipeline parallelism** gives each stage a run of layers (`Place.layers`) and sends hidden states from stage to stage
through a `Channel`; the first stage also has the embedding and the vision encoder, the last the norm and the head.
`Pipeline` is the schedule of training.

What keeps it small: no full-size layer is ever built and then cut. A layer's constructor asks its `Place` who it is,
creates a parameter of its local shape on the `meta` device, and notes in `parts` which slices of which checkpoint
tensors that is; the loader reads just those. With one process every slice is everything and every group is None: the
same layers are the plain model.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import; `run_program` sets the rule

import functools
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge

import fp8

# PLAIN_KERNELS=1 in the environment leaves out what a GPU has a faster kernel for but can do without: flash-decoding
# (see model.py), and all that follows. SYMMETRIC_MEMORY=1 lets `summed` use symmetric memory. That is off by default:
# ranks wait for each other inside a kernel, which no time-out ends, and nobody has tried it on GPUs yet.
PLAIN_KERNELS = os.environ.get("PLAIN_KERNELS") == "1"
SYMMETRIC_MEMORY = os.environ.get("SYMMETRIC_MEMORY") == "1" and not PLAIN_KERNELS
SMALL = 1 << 19  # bytes that are summed in symmetric memory at most: 16 tokens of this model are 0.4 MB


class TopologyError(ValueError):
    """The model cannot be split this way. The program that knows the flags adds what to do about it."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the grid of pp × dp × tp processes. One process alone is the default place.

    rank = (pp_rank · dp_size + dp_rank) · tp_size + tp_rank: tensor-parallel ranks, which exchange data in every layer,
    are neighbours and share a node's fast links; stages, which do so once per micro-batch, can lie across nodes.
    """

    rank: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    answer_group: dist.ProcessGroup | None = (
        None  # the pipeline's ranks again, for tokens and gradients on their way back
    )
    sequence_parallel: bool = False  # each rank of tp_group has T / tp of the tokens outside attention and MLP
    device: torch.device = torch.device("cpu")

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def token_parts(self) -> int:
        """Among how many ranks the tokens are split outside attention and MLP."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def layers(self, num_hidden_layers: int) -> range:
        """The layers of this stage; where they do not divide, the earlier stages have one more."""
        each, more = divmod(num_hidden_layers, self.pp_size)
        if each == 0:
            raise TopologyError(f"pipeline-parallel size {self.pp_size} is more than the {num_hidden_layers} layers")
        start = self.pp_rank * each + min(self.pp_rank, more)
        return range(start, start + each + (self.pp_rank < more))


@dataclass(frozen=True)
class Slice:
    """The part `[start:stop]` along `dim` of a checkpoint tensor of shape `shape`; past its end lie zeros (padding)."""

    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    stop: int = 0

    @staticmethod
    def of(shape: tuple[int, ...], dim: int, index: int, count: int) -> "Slice":
        """Part `index` of `count` equal parts, rounded up, so that the last ones may be padded."""
        size = -(-shape[dim] // count)
        return Slice(tuple(shape), dim, index * size, (index + 1) * size)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    @property
    def length(self) -> int:
        """How much of `[start:stop]` lies inside the tensor and is not padding."""
        return max(0, min(self.stop, self.shape[self.dim]) - self.start)


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint, or a slice of it, inside a parameter of this rank.

    A parameter usually is one; that of a linear with several matrices (q, k, v) has them one below the other.
    """

    slice: Slice
    name: str = ""  # its own name, where several share a parameter: "q_proj"
    start: int = 0  # where its rows begin in the parameter
    sharers: int = 1  # neighbours that hold the same slice, and find a share of its gradient each

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part's rows of the parameter, or of a tensor that is laid out like it: a view."""
        return tensor.narrow(0, self.start, self.slice.local_shape[0])


def parts_of(model: nn.Module) -> dict[str, tuple[nn.Module, Part]]:
    """Name in the checkpoint -> (the layer that holds a part of this tensor, that part), in the order of the model.

    Loading, optimizer, export and plan all go by these. The names are those of the HF layout without its prefixes. An
    adapter's factors are named after the matrix beside which they stand; the copy of a tensor that belongs to another
    stage (`copy_of`: a tied head) has the name of that tensor.
    """
    found = {}
    for path, layer in model.named_modules():
        for part in getattr(layer, "parts", ()):
            owner, adapter, factor = path.removeprefix("vision.").partition(".adapter")
            if part.name:
                owner = f"{owner.rpartition('.')[0]}.{part.name}"
            found[getattr(layer, "copy_of", f"{owner}{adapter}{factor}.weight")] = (layer, part)
    return found


def divide(total: int, parts: int, what: str) -> int:
    if total % parts:
        raise TopologyError(f"tensor-parallel size {parts} does not divide the {total} {what}")
    return total // parts


class _Pair(torch.autograd.Function):
    """`there(x, group)` forward, `back(gradient, group)` backward: all four collectives below are such pairs."""

    @staticmethod
    def forward(ctx, x, group, there, back):
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad, ctx.group), None, None, None


def same(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x


def summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    fits = x.nbytes <= SMALL and x.nbytes % 16 == 0 and x.storage_offset() * x.itemsize % 16 == 0
    if SYMMETRIC_MEMORY and x.device.type == "cuda" and fits and torch.is_inference_mode_enabled():
        if (buffer := symmetric_buffer(group, x.dtype, x.device)) is not None:
            return summed_at_once(x, buffer, group)
    dist.all_reduce(x, group=group)
    return x


def summed_at_once(x: torch.Tensor, buffer: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A one-shot all-reduce: each rank puts `x` into its buffer, and adds up all ranks' in the order of their numbers.

    One kernel over NVLink instead of NCCL's rings: a few microseconds where little is added. The part of the buffer has
    to be as long as `x`, since the kernel goes by its length.
    """
    flat = x.view(-1)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer[: len(flat)], flat, "sum", group.group_name).view_as(x)


@functools.cache
def symmetric_buffer(group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """SMALL bytes that every rank of `group` can read, of each rank; None if it cannot be, or does not add up.

    All ranks come together. They have to be on one node, whose GPUs reach each other's memory.
    """
    import torch.distributed._symmetric_memory as symmetric

    def everywhere(good: bool) -> bool:
        votes = torch.tensor([good], dtype=torch.int32, device=device)
        dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
        return bool(votes)

    ranks, buffer = dist.get_world_size(group), None
    try:
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) % ranks == 0:  # ranks of a group are neighbours
            buffer = symmetric.empty(SMALL // dtype.itemsize, dtype=dtype, device=device)
            symmetric.rendezvous(buffer, group.group_name)
    except RuntimeError:  # this build or these GPUs cannot
        buffer = None
    if not everywhere(buffer is not None):
        return None
    numbers = (torch.arange(1024, device=device) % 7).to(dtype)
    total = summed_at_once(numbers + dist.get_rank(group), buffer, group)
    return buffer if everywhere(torch.equal(total, numbers * ranks + ranks * (ranks - 1) // 2)) else None


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(B, T / tp, C) of every rank -> (B, T, C)."""
    return torch.cat(all_gather(x, group).unbind(), dim=1)


def summed_and_cut(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Partial sums (B, T, C) of every rank -> this rank's tokens (B, T / tp, C) of the sums: a reduce-scatter."""
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(group), dim=1)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts, group=group)
    return out


def cut(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(B, T, C), the same on every rank -> this rank's tokens (B, T / tp, C)."""
    return x.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)].contiguous()


def copy_to_group(x: torch.Tensor, group: dist.ProcessGroup | None, sequence: bool = False) -> torch.Tensor:
    """Mark where a replicated value enters a tensor-parallel region (Megatron's *f*).

    Forward nothing happens; backward the gradients are summed, since every rank used the value for its own part of the
    result. `sequence`: the value is split along the tokens, and is gathered here (Megatron's *g*, arXiv:2205.05198).
    """
    if group is None:
        return x
    return _Pair.apply(x, group, gathered, summed_and_cut) if sequence else _Pair.apply(x, group, same, summed)


def reduce_from_group(x: torch.Tensor, group: dist.ProcessGroup | None, sequence: bool = False) -> torch.Tensor:
    """Add up the ranks' partial sums where a tensor-parallel region ends (Megatron's *g*); the gradient passes through.

    `sequence`: each rank gets its tokens of the sums only.
    """
    if group is None:
        return x
    return _Pair.apply(x, group, summed_and_cut, gathered) if sequence else _Pair.apply(x, group, summed, same)


def split_sequence(x: torch.Tensor, place: Place) -> torch.Tensor:
    """(B, T, C), the same on all ranks -> (B, T / tp, C), where sequence parallelism begins. T must divide."""
    return _Pair.apply(x, place.tp_group, cut, gathered) if place.sequence_parallel else x


def join_sequence(x: torch.Tensor, place: Place) -> torch.Tensor:
    """And back, where it ends."""
    return _Pair.apply(x, place.tp_group, gathered, cut) if place.sequence_parallel else x


def all_gather(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(…) on every rank -> (ranks, …), in rank order."""
    if group is None:
        return x[None]
    out = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, x.contiguous(), group=group)
    return torch.stack(out)


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] = log Σ exp(logits) - logits[target], where each rank holds some of the columns.

    Forward: three numbers per token are all-reduced, so that the logits (N, V / tp) stay where they are; their memory
    becomes that of the probabilities. Backward: probability minus one-hot, without communication.
    """

    @staticmethod
    def forward(ctx, logits, targets, start, group):
        columns = targets - start
        # (N,) which targets this rank has the logit of, and (N, 1) their columns, any column for the others. A list of
        # those it has would be shorter, but the host would have to wait for a GPU to say how long it is.
        here = (columns >= 0) & (columns < logits.shape[1])
        columns = columns.masked_fill(~here, 0)[:, None]
        peak = logits.amax(1)  # (N,), over all ranks: subtracted from every logit, so that no exp() overflows
        if group is not None:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        logits.sub_(peak[:, None])
        # The target's logit comes from the one rank that has it (zeros from the others), the sum from all of them.
        own = logits.gather(1, columns)[:, 0].masked_fill(~here, 0)
        sums = torch.stack((own, logits.exp_().sum(1)))  # (2, N); from here on `logits` holds exp(logit - peak)
        if group is not None:
            dist.all_reduce(sums, group=group)
        ctx.save_for_backward(logits.div_(sums[1, :, None]), here, columns)
        return sums[1].log() - sums[0]

    @staticmethod
    def backward(ctx, grad):
        probabilities, here, columns = ctx.saved_tensors
        # In place: this is the only reader, and it is the largest tensor of a step.
        probabilities.scatter_add_(1, columns, -here[:, None].to(probabilities.dtype))
        return probabilities.mul_(grad[:, None]), None, None, None


class Linear(nn.Module):
    """`y = x W^T`: the base of the parallel linears. W is what this rank has of one matrix, or of several below each
    other (`parts`). This model has no biases.

    With `keep_fp8` the weight stays E4M3; `weight_scale` (out, 1) float32 and, where the checkpoint has one,
    `activation_scale` (0-d) are filled by the loader.
    """

    def __init__(self, parts: list[Part], dtype: torch.dtype, keep_fp8: bool = False):
        super().__init__()
        self.parts = parts
        rows, columns = sum(part.slice.local_shape[0] for part in parts), parts[0].slice.local_shape[1]
        weight = torch.empty(rows, columns, dtype=fp8.E4M3 if keep_fp8 else dtype, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=not keep_fp8)
        self.register_buffer("weight_scale", torch.empty(rows, 1, device="meta") if keep_fp8 else None)
        self.register_buffer("activation_scale", None)
        self.adapter: nn.Module | None = None  # see runtime/lora.py

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight_scale is None:
            return F.linear(x, self.weight)
        if len(self.parts) == 1:
            return fp8.linear(x, self.weight, self.weight_scale[0, 0], self.activation_scale)
        if fp8.multiplies_in_fp8(x, self.weight) and not fp8.takes_row_scales(x.device):
            pairs = [(part.rows_of(self.weight), part.rows_of(self.weight_scale)[0, 0]) for part in self.parts]
            return torch.cat([fp8.linear(x, *pair, self.activation_scale) for pair in pairs], dim=-1)
        return fp8.linear(x, self.weight, self.weight_scale, self.activation_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.multiply(x)
        return y if self.adapter is None else y + self.adapter(x)


class ColumnParallelLinear(Linear):
    """Holds `out / tp` rows of each matrix. Input (..., in) whole, through `copy_to_group`; output (..., out / tp).

    `matrices`: the rows of the only one; or of several that have the same input, by name, since one large product is
    faster than several small ones. Those named in `pieces` are cut into that many, fewer than tp: there are fewer
    key/value heads than ranks, and neighbours hold the same one. Each of them finds only a share of its gradient, and
    a trainer has to add the shares up.
    """

    def __init__(
        self,
        in_features: int,
        matrices: int | dict[str, int],
        place: Place,
        dtype: torch.dtype,
        keep_fp8: bool = False,
        pieces: dict[str, int] | None = None,
    ):
        tp, parts, start = place.tp_size, [], 0
        for name, out_features in matrices.items() if isinstance(matrices, dict) else [("", matrices)]:
            count = (pieces or {}).get(name, tp)
            part = Slice.of((out_features, in_features), 0, place.tp_rank * count // tp, count)
            parts.append(Part(part, name, start, sharers=tp // count))
            start += part.local_shape[0]
        super().__init__(parts, dtype, keep_fp8)


class RowParallelLinear(Linear):
    """Holds `in_features / tp` columns of W. Input (..., in / tp); output (..., out) whole, by an all-reduce."""

    def __init__(self, in_features: int, out_features: int, place: Place, dtype, keep_fp8=False):
        part = Slice.of((out_features, in_features), 1, place.tp_rank, place.tp_size)
        super().__init__([Part(part)], dtype, keep_fp8)
        self.group, self.sequence = place.tp_group, place.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reduce_from_group(super().forward(x), self.group, self.sequence)


class VocabParallelEmbedding(nn.Module):
    """Holds the embeddings of `vocab_size / tp` tokens; a token of another rank gives zeros until the all-reduce."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Place, dtype: torch.dtype):
        super().__init__()
        part = Slice.of((vocab_size, hidden_size), 0, place.tp_rank, place.tp_size)
        self.parts, self.group, self.start = [Part(part)], place.tp_group, part.start
        self.weight = nn.Parameter(torch.empty(part.local_shape, dtype=dtype, device="meta"))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids -> (B, T, hidden_size)."""
        if self.group is None:
            return F.embedding(tokens, self.weight)
        local = tokens - self.start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0)
        return reduce_from_group(x, self.group)


class VocabParallelHead(Linear):
    """The output head: column-parallel over the vocabulary. Logits of this rank's tokens, -inf where padded.

    A vocabulary that tp does not divide is padded up; the -inf keep the padding out of every softmax and maximum.
    """

    def __init__(self, hidden_size: int, vocab_size: int, place: Place, dtype: torch.dtype):
        part = Slice.of((vocab_size, hidden_size), 0, place.tp_rank, place.tp_size)
        super().__init__([Part(part)], dtype)
        self.group, self.start, self.stop = place.tp_group, part.start, min(part.stop, vocab_size)
        self.holder = [self]  # the layer whose weight it is; a list, so that nn.Module does not register it

    def tie(self, name: str, embedding: VocabParallelEmbedding | None) -> None:
        """Multiply with the weight of the embedding, which is the tensor `name` of the whole model.

        An `embedding` on this stage keeps the only weight, and the head has no parameter of its own. Where it is on
        another stage (None), the head holds a copy; `copy_of` tells everyone whose copy it is.
        """
        if embedding is None:
            self.copy_of = name
        else:
            self.parts, self.weight, self.holder = [], None, [embedding]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.holder[0].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., padded vocab_size / tp), float32."""
        x = copy_to_group(x, self.group)
        logits = super().forward(x).float()
        if self.stop - self.start < logits.shape[-1]:
            logits[..., max(0, self.stop - self.start) :] = -torch.inf
        return logits

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of `targets` (N,) under this rank's `logits` (N, V / tp), which are overwritten: (N,), float32, in nats."""
        return _CrossEntropy.apply(logits, targets, self.start, self.group)

    def log_probabilities(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of `targets` (N,) under this rank's `logits` (N, V / tp): natural logs, float32, without gathering logits."""
        here = (targets >= self.start) & (targets < self.stop)
        local = (targets - self.start).masked_fill(~here, 0)
        own = logits.gather(1, local[:, None])[:, 0].masked_fill(~here, -torch.inf)
        parts = all_gather(torch.stack((own, logits.logsumexp(1))), self.group)  # (tp, 2, N)
        return parts[:, 0].amax(0) - parts[:, 1].logsumexp(0)

    def sample(
        self, logits: torch.Tensor, temperature: torch.Tensor | None, top_p: torch.Tensor | None, *noise: torch.Tensor
    ) -> torch.Tensor:
        """This rank's `logits` (B, V / tp) -> (B, 2) float64, on all ranks: the token sampled, its log-probability.

        The Gumbel-max trick (arXiv:1411.0030): the largest of logit / temperature + G, with G from a Gumbel
        distribution for every token, is a draw from the softmax. A maximum over a split vocabulary is the maximum of
        the parts' maxima, so each rank looks at its own logits and four numbers per row are exchanged. Only top-p needs
        more: all logits, to see where the nucleus ends. `temperature` and `top_p` (B, 1), where 0 takes the likeliest;
        None stands for 0, and 1, in all rows. `noise`: seeds and positions (B,), see `gumbel`.
        """
        keys = logits
        if temperature is not None:
            hot = temperature > 0
            # In float64, where no temperature that float32 can hold makes a logit overflow.
            divisor = torch.where(hot, temperature, 1.0)
            keys = logits.double() / divisor
            if top_p is not None:
                everything = all_gather(logits, self.group).transpose(0, 1).flatten(1)  # (B, V), padding included
                inside = nucleus(everything.double() / divisor, top_p) | (top_p >= 1)
                keys = keys.masked_fill(~inside[:, self.start :][:, : keys.shape[1]], -torch.inf)
            ids = torch.arange(self.start, self.start + keys.shape[1], device=keys.device)
            keys = keys + torch.where(hot, gumbel(*noise, ids), 0.0)
        best, index = keys.max(dim=1)
        own = logits.gather(1, index[:, None])[:, 0]
        # Of each rank's best token: its key, its id, its logit; and the rank's share of the softmax's denominator.
        candidates = torch.stack([x.double() for x in (best, index + self.start, own, logits.logsumexp(1))], dim=1)
        candidates = all_gather(candidates, self.group)  # (tp, B, 4)
        winner = candidates[:, :, :1].argmax(0, keepdim=True)  # (1, B, 1): the rank that holds the largest key
        chosen = candidates.gather(0, winner.expand(1, -1, 4))[0]  # (B, 4)
        return torch.stack((chosen[:, 1], chosen[:, 2] - candidates[:, :, 3].logsumexp(0)), dim=1)


def nucleus(logits: torch.Tensor, top_p: torch.Tensor | float) -> torch.Tensor:
    """(B, V), (B, 1) -> (B, V) bool: the fewest tokens whose probabilities reach `top_p`; of equal ones the first.

    Holtzman et al., arXiv:1904.09751.
    """
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    # A token is outside if the likelier ones reach top_p without it: their sum is the cumulative sum one place earlier.
    outside = ordered.softmax(-1).cumsum(-1).roll(1, -1) >= top_p
    outside[..., 0] = False  # roll put the total there; the likeliest token is always inside
    return torch.empty_like(outside).scatter_(-1, tokens, ~outside)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Noise for every row (seeds and positions (B,) int64) and token (ids (V,)): (B, V) float64, Gumbel-distributed.

    A pure function of the three numbers, the same on every device: so a seed gives the same tokens on any topology and
    in any batch, each rank computes the share of its own tokens, and a recorded step draws new numbers whenever it is
    replayed. The bits are those of SplitMix64 (Steele et al., OOPSLA 2014).
    """
    state = mix(mix(seeds) + positions)[:, None] + ids * -0x61C8864680B583EB  # the golden ratio, as a signed number
    uniform = ((mix(state) >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52  # never 0 or 1
    return -(-uniform.log()).log()


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer: int64 -> int64 of which every bit depends on all. The masks are for negative numbers."""
    x = (x ^ x >> 30 & (1 << 34) - 1) * -0x40A7B892E31B1A47
    x = (x ^ x >> 27 & (1 << 37) - 1) * -0x6B2FB644ECCEEE15
    return x ^ x >> 31 & (1 << 33) - 1


class Channel:
    """One direction along the pipeline: takes messages from the neighbour behind, sends them to the one ahead.

    `step` is 1 down the stages and -1 up. The directions use two process groups: on one NCCL communicator sends and
    receives wait for each other in the order in which they were posted, and two neighbours that both send first would
    wait for ever. A send runs in the background, and its tensor has to stay alive until the neighbour took it; at most
    `in_flight` of them do, then `send` waits for the oldest.
    """

    def __init__(self, place: Place, dtype: torch.dtype, step: int = 1, in_flight: int = 1):
        self.group = place.pp_group if step == 1 else place.answer_group
        self.behind, self.ahead = place.pp_rank - step, place.pp_rank + step
        self.dtype, self.device, self.in_flight = dtype, place.device, in_flight
        self.sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, x: torch.Tensor) -> None:
        self.flush(self.in_flight - 1)
        x = x.contiguous()
        self.sent.append((dist.isend(x, group=self.group, group_dst=self.ahead), x))

    def receive(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Wait for the next message. Its shape has to be known: no message says how large it is."""
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        dist.recv(x, group=self.group, group_src=self.behind)
        return x

    def flush(self, keep: int = 0) -> None:
        """Wait until at most `keep` messages are in flight."""
        while len(self.sent) > keep:
            self.sent.popleft()[0].wait()


def from_last_stage(x: torch.Tensor, place: Place) -> dist.Work | None:
    """`x` of the last stage into `x` of all, in the background; None where there is one stage."""
    if place.answer_group is None:
        return None
    return dist.broadcast(x, group=place.answer_group, group_src=place.pp_size - 1, async_op=True)


class Pipeline:
    """Runs micro-batches through `run_stage`, this rank's part of the model: one forward, one backward.

    1F1B (PipeDream-flush, arXiv:2104.04473, figure 4). Micro-batches walk down the stages, their gradients walk back
    up. With p stages and m micro-batches (p = 4, m = 6; a number is a forward pass, a letter the backward pass of the
    same micro-batch, 1 and a, 2 and b, …):

        stage 0   1 2 3 4 . . . a 5 b 6 c . d . e . f      warm-up: p - 1 forward passes
        stage 1     1 2 3 . . a 4 b 5 c 6 d . e . f                 p - 2
        stage 2       1 2 . a 3 b 4 c 5 d 6 e . f
        stage 3         1 a 2 b 3 c 4 d 5 e 6 f            the last stage turns round at once

    After its warm-up a stage alternates (steady), and at the end it has backward passes only (cool-down). Stage s never
    holds the activations of more than p - s micro-batches, however many there are; running all forward passes first
    would hold m. The dots are the bubble, (p - 1) / (m + p - 1) of the time.

    `run_stage(x, batch)` takes the hidden states (B, T, hidden_size) of the previous stage, None on the first, and
    returns its own; on the last stage it returns the loss (0-d). All that the schedule needs of a batch is `.shape`,
    its (B, T), which may differ from one to the next. `trained` says whether this stage has trained parameters: no
    gradient is sent to stages that have none and come after none.
    """

    def __init__(self, place: Place, run_stage: Callable, hidden_size: int, dtype: torch.dtype, trained: bool):
        self.place, self.run_stage, self.hidden_size = place, run_stage, hidden_size
        everywhere = all_gather(torch.tensor([trained], device=place.device), place.pp_group)[:, 0].tolist()
        self.gradient_up = any(everywhere[: place.pp_rank])  # the previous stage waits for a gradient
        self.gradient_here = self.gradient_up or trained  # this one does
        self.down, self.up = Channel(place, dtype), Channel(place, dtype, step=-1)
        self.held: deque = deque()  # (batch, input, where the graph ends) of micro-batches before their backward pass
        self.most_held = 0

    def train(self, batches: list) -> None:
        """Forward and backward passes of all `batches`, which every stage gets in the same order."""
        warm_up = self.place.pp_size - 1 - self.place.pp_rank
        for batch in batches:
            # Until the warm-up is over this is a row of forward passes. Then the stage has as many micro-batches as it
            # may hold, and has to finish the oldest before it starts another: one forward, one backward.
            if len(self.held) > warm_up:
                self.backward()
            self.forward(batch)
        while self.held:  # the last pair's backward pass, and the cool-down
            self.backward()
        self.down.flush()
        self.up.flush()

    @torch.no_grad()
    def evaluate(self, batches: list) -> None:
        """Forward passes only."""
        for batch in batches:
            x = self.run_stage(self.receive(batch), batch)
            if not self.place.last_stage:
                self.down.send(x)
        self.down.flush()

    def shape(self, batch) -> tuple[int, int, int]:
        """Of the hidden states that stages exchange about `batch`, and of their gradients."""
        rows, tokens = batch.shape
        return rows, tokens // self.place.token_parts, self.hidden_size

    def receive(self, batch) -> torch.Tensor | None:
        return None if self.place.first_stage else self.down.receive(self.shape(batch))

    def forward(self, batch) -> None:
        x = self.receive(batch)
        if x is not None and self.gradient_up:
            x.requires_grad_()
        with torch.set_grad_enabled(self.gradient_here):
            out = self.run_stage(x, batch)
        # The backward pass needs to know where the graph ends, but not the values there: they are gone once sent.
        end = get_gradient_edge(out) if out.requires_grad else None
        self.held.append((batch, x, end))
        self.most_held = max(self.most_held, len(self.held))
        if not self.place.last_stage:
            self.down.send(out.detach())

    def backward(self) -> None:
        batch, x, end = self.held.popleft()
        # On the last stage `out` is the loss, whose own gradient is 1: None. Elsewhere the next stage computes it.
        receives = self.gradient_here and not self.place.last_stage
        grad = self.up.receive(self.shape(batch)) if receives else None
        if end is not None:  # no end: nothing that this micro-batch met here is trained, an unused projector say
            torch.autograd.backward([end], [grad])
        if self.gradient_up:
            self.up.send(x.grad)


if __name__ == "__main__":
    from runtime import launch, plan

    launch.run_program(plan.main, alone=True)
