"""Tensor and pipeline parallelism by hand: a rank's place, and the layers that know how to be one part of many.

**Tensor parallelism** (Megatron-LM, arXiv:1909.08053) cuts every matrix. A *column-parallel* linear holds some of the
outputs, so its results stay apart; a *row-parallel* linear holds some of the inputs, so its results are partial sums
that an all-reduce adds up. Attention and MLP are one column-parallel step followed by one row-parallel step: what
happens between them (heads, activations) never leaves the rank, and a layer costs two all-reduces forward and two
backward. **Pipeline parallelism** gives each stage a run of layers and sends hidden states from stage to stage.

With one process every layer here is the plain layer: a slice of everything is everything, and a collective over one
rank does nothing. Parameters are born on the `meta` device with their local shape; `Slice` says which part of the
checkpoint's tensor they are, and the loader reads just that.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fp8
from config import UserError

# ---------------------------------------------------------------------------------------------- a rank's place


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the world = pp × dp × tp grid. One process is the default place.

    Tensor-parallel ranks are neighbours, since they talk most:
    rank = (pp_rank · dp_size + dp_rank) · tp_size + tp_rank.
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
    device: torch.device = torch.device("cpu")

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def layers(self, num_hidden_layers: int) -> range:
        """The layers of this stage; where they do not divide, the earlier stages have one more."""
        each, more = divmod(num_hidden_layers, self.pp_size)
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


def divide(total: int, parts: int, what: str) -> int:
    if total % parts:
        raise UserError(f"--tp {parts} does not divide the {total} {what}; choose a size that does")
    return total // parts


# -------------------------------------------------------------------------------------------------- collectives


class _CopyToGroup(torch.autograd.Function):
    """Forward: nothing. Backward: all-reduce, since every rank used the value for its own part of the result."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFromGroup(torch.autograd.Function):
    """Forward: all-reduce of the partial sums. Backward: nothing, the sum passes its gradient to every term."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def copy_to_group(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Mark where a replicated value enters a tensor-parallel region (Megatron's *f*)."""
    return x if group is None else _CopyToGroup.apply(x, group)


def reduce_from_group(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Add up the ranks' partial sums where a tensor-parallel region ends (Megatron's *g*)."""
    return x if group is None else _ReduceFromGroup.apply(x, group)


# ------------------------------------------------------------------------------------------------------- layers


class Linear(nn.Module):
    """`y = x W^T` for the part `part` of W (out, in): the base of the parallel linears. No biases in this model.

    With `keep_fp8` the weight stays E4M3; `weight_scale` (0-d) and, where the checkpoint has one, `activation_scale`
    are filled by the loader.
    """

    def __init__(self, part: Slice, dtype: torch.dtype, keep_fp8: bool = False):
        super().__init__()
        self.slices = {"weight": part}
        dtype = fp8.E4M3 if keep_fp8 else dtype
        self.weight = nn.Parameter(
            torch.empty(part.local_shape, dtype=dtype, device="meta"), requires_grad=not keep_fp8
        )
        self.register_buffer("weight_scale", torch.empty((), device="meta") if keep_fp8 else None)
        self.register_buffer("activation_scale", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight_scale is not None:
            return fp8.linear(x, self.weight, self.weight_scale, self.activation_scale)
        return F.linear(x, self.weight)


class ColumnParallelLinear(Linear):
    """Holds `out_features / tp` rows of W. Input (..., in) whole, through `copy_to_group`; output (..., out / tp).

    `parts` < tp means that several neighbours share a part: key and value heads fewer than the ranks.
    """

    def __init__(self, in_features: int, out_features: int, place: Place, dtype, keep_fp8=False, parts: int = 0):
        parts = parts or place.tp_size
        part = Slice.of((out_features, in_features), 0, place.tp_rank * parts // place.tp_size, parts)
        super().__init__(part, dtype, keep_fp8)


class RowParallelLinear(Linear):
    """Holds `in_features / tp` columns of W. Input (..., in / tp); output (..., out) whole, by an all-reduce."""

    def __init__(self, in_features: int, out_features: int, place: Place, dtype, keep_fp8=False):
        super().__init__(Slice.of((out_features, in_features), 1, place.tp_rank, place.tp_size), dtype, keep_fp8)
        self.group = place.tp_group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reduce_from_group(super().forward(x), self.group)


class VocabParallelEmbedding(nn.Module):
    """Holds the embeddings of `vocab_size / tp` tokens; the other ranks' tokens give zeros until the all-reduce."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Place, dtype: torch.dtype):
        super().__init__()
        part = Slice.of((vocab_size, hidden_size), 0, place.tp_rank, place.tp_size)
        self.slices, self.group, self.start = {"weight": part}, place.tp_group, part.start
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
    """The output head: column-parallel over the vocabulary. Logits of this rank's tokens, -inf where padded."""

    def __init__(self, hidden_size: int, vocab_size: int, place: Place, dtype: torch.dtype):
        super().__init__(Slice.of((vocab_size, hidden_size), 0, place.tp_rank, place.tp_size), dtype)
        self.vocab_size, self.group = vocab_size, place.tp_group
        self.start, self.stop = self.slices["weight"].start, min(self.slices["weight"].stop, vocab_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., padded vocab_size / tp), float32."""
        logits = super().forward(copy_to_group(x, self.group)).float()
        if self.stop - self.start < logits.shape[-1]:
            logits[..., max(0, self.stop - self.start) :] = -torch.inf
        return logits
