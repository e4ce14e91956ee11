"""Mistral Medium 3.5, the decoder: an embedding, 88 layers, a head. Images enter as features; `vision.py` makes them.

Each layer is attention and an MLP, both added to a residual stream of `hidden_size` numbers per token:

    x = x + Attention(RMSNorm(x))       grouped-query attention with rotary positions (YaRN)
    x = x + MLP(RMSNorm(x))             SwiGLU

Every linear is one of the parallel layers of `parallel.py`; with one process they are plain linears. `MistralMedium` is
what one rank holds: one pipeline stage, and of each matrix in it one tensor-parallel slice. Names are those of the HF
layout.

How tokens attend depends on the call, and a *span* says it once for all layers: `Whole` samples in training, chunks of
`Prompts` on their way into the key/value cache, or a `Step` with one new token per row, or a few. `generate_simply` is
what all of generation comes down to.

Shapes, with the sizes of this model where one rank holds everything: B batch, T tokens of this call, S tokens attended
to, H query heads of this rank (96), KV key/value heads of this rank (8), D head_dim (128), C hidden_size (12,288),
F intermediate_size (28,672), V vocab_size (131,072).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel import (
    PLAIN_KERNELS,
    ColumnParallelLinear,
    Part,
    Place,
    RowParallelLinear,
    Slice,
    VocabParallelEmbedding,
    VocabParallelHead,
    copy_to_group,
    divide,
    join_sequence,
    split_sequence,
)

CHUNK = 4096  # prompt tokens that go through the model at a time: bounds the memory of activations
LOGIT_ROWS = 64  # positions that are scored at a time: the logits of a whole chunk would take gigabytes

# ------------------------------------------------------------------------------------------------------ the sizes


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (RoFormer, arXiv:2104.09864) and its YaRN extension (arXiv:2309.00071)."""

    theta: float
    yarn: bool = False
    factor: float = 1.0  # YaRN: how many times longer the context became
    original_max_position_embeddings: int = 0  # context length before YaRN; also the period of query scaling
    # YaRN leaves a frequency as it is where it turns more than `beta_fast` times over the original context, divides it
    # by `factor` where it turns less than `beta_slow` times, and blends the two in between, along a linear ramp.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ends of the ramp outwards to whole dimensions
    attention_factor: float = 1.0  # multiplies cos and sin, so that scores grow by its square
    query_scaling_beta: float = 0.0  # Llama 4: queries times 1 + beta * ln(1 + position // original context)


@dataclass(frozen=True)
class VisionConfig:
    """The Pixtral tower and the projector behind it. Lengths of images are in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int  # longest side of an image after scaling
    rope_theta: float
    hidden_act: str  # of the tower's feed-forward: "silu" or "gelu"
    num_channels: int
    spatial_merge_size: int  # the projector merges this many patches along each side into one token
    image_token_id: int  # the token whose positions take image features

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    """The decoder's sizes; `vision` is None for a text-only checkpoint."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool  # the head is the embedding's own matrix
    rope: RopeConfig
    vision: VisionConfig | None
    fp8: bool  # the decoder's linears are stored as float8_e4m3fn with a scale each
    activation_scheme: str  # of FP8: "static" has a scale for inputs in the file, "dynamic" has none
    initializer_range: float  # standard deviation of random initial weights
    raw: dict = field(repr=False, compare=False)  # the HF dictionary that all this was read from, for export


# ---------------------------------------------------------------------------------------------- norms and the MLP


class RMSNorm(nn.Module):
    """x / rms(x) · weight (arXiv:1910.07467), computed in float32. `sharers`: see `parallel.Part`."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, sharers: int = 1):
        super().__init__()
        self.eps = eps
        self.parts = [Part(Slice((size,), 0, 0, size), sharers=sharers)]
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(act(gate(x)) · up(x)). The decoder's `act` is SiLU."""

    def __init__(self, hidden_size: int, intermediate_size: int, place: Place, dtype, keep_fp8=False, act=F.silu):
        super().__init__()
        divide(intermediate_size, place.tp_size, "rows of intermediate_size")
        self.act, self.group, self.sequence = act, place.tp_group, place.sequence_parallel
        matrices = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = ColumnParallelLinear(hidden_size, matrices, place, dtype, keep_fp8)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, place, dtype, keep_fp8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = copy_to_group(x, self.group, self.sequence)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, F / tp) each
        return self.down_proj(self.act(gate) * up)


# ------------------------------------------------------------------------------------------------ rotary positions


def rope_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position for each pair of dimensions, (D / 2,), float32.

    Plain: θ^(-2i/D), from 1 radian per token down to almost none. YaRN (arXiv:2309.00071, section 3.2) stretches the
    context by `factor`: it divides the slow frequencies, which never made a full turn in the original context and
    would meet angles never seen in training; it keeps the fast ones, which tell neighbours apart; and ramps between.
    """
    inverse = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if not rope.yarn:
        return 1.0 / inverse

    def dimension(rotations: float) -> float:  # the pair that makes this many rotations over the original context
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    # 1 for the fast pairs (kept as they are), 0 for the slow ones (divided by the factor), a straight line between
    keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * inverse) * (1 - keep) + 1.0 / inverse * keep


def rotary_tables(angles: torch.Tensor, factor: torch.Tensor | float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Angles (..., D/2) in radians, float32 -> cosines and signed sines (..., D) for `rotate`, times `factor`.

    The sign of the sines belongs to the pairs' other halves; see `turn`.
    """
    cos, sin = ((f(angles) * factor).to(dtype) for f in (torch.cos, torch.sin))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn the pairs (i, i + D/2) of `x` (..., T, D), in place, by the angles of `cos` and `sin` from `rotary_tables`.

    The first of a pair becomes a cos - b sin, the second b cos + a sin: every number times its cosine, plus the other
    one of its pair times its sine, whose sign the table has.
    """
    other = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(other, sin)


class _Rotate(torch.autograd.Function):
    """`turn` of the first heads of y (B, T, N · D), in place. Its gradient is turned back: a rotation's transpose."""

    @staticmethod
    def forward(ctx, y, heads, cos, sin):
        ctx.heads = heads
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(y)
        turn(split_heads(y, cos.shape[-1])[:, :heads], cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        grad = grad.clone()  # others may read it
        turn(split_heads(grad, cos.shape[-1])[:, : ctx.heads], cos, -sin)
        return grad, None, None, None


def split_heads(y: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, T, N · D) -> (B, N, T, D), a view."""
    return y.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(y: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """y (B, T, N · D), which is overwritten -> (B, N, T, D) with the first `heads` of the N heads turned."""
    if torch.is_grad_enabled():
        y = _Rotate.apply(y, heads, cos, sin)
    else:
        turn(split_heads(y, cos.shape[-1])[:, :heads], cos, sin)
    return split_heads(y, cos.shape[-1])


# ------------------------------------------------------------------------------------------- the cache, and attention


class KVCache:
    """Keys and values of this stage's layers: for each a tensor (2, rows, KV, length, D), longer than what is in it.

    The engine says at which positions a call's tokens go; the cache itself remembers nothing else. It holds zeros at
    first, since a masked position still enters attention with weight 0, uninitialized memory may hold NaN, and 0 times
    NaN is NaN.
    """

    def __init__(self, layers: list[torch.Tensor]):
        self.layers = layers

    @property
    def length(self) -> int:
        return self.layers[0].shape[3]

    @staticmethod
    def length_for(tokens: int) -> int:
        """So many tokens or up to a quarter more, so that a cache rarely has to grow."""
        step = max(64, 1 << max(0, tokens.bit_length() - 3))
        return -(-tokens // step) * step

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def rows(self, start: int, stop: int) -> "KVCache":
        """A view of the rows `[start:stop]`."""
        return KVCache([layer[:, start:stop] for layer in self.layers])

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of a row into another one."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]

    def grow(self, length: int) -> None:
        """To a larger length, layer by layer: no more than one layer is ever there twice."""
        for i, layer in enumerate(self.layers):
            self.layers[i] = F.pad(layer, (0, 0, 0, length - layer.shape[3]))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal grouped-query attention of T tokens to themselves and to those before. q (B, H, T, D), k and v
    (B, KV, S, D) -> (B, H, T, D). H / KV query heads share a key/value head, without materializing repeated keys.
    Not differentiable on a GPU when S > T.
    """
    B, H, T, D = q.shape
    KV, S = k.shape[1], k.shape[2]
    # Rows and key/value heads become the batch, the query heads of a group the heads: q (B·KV, H/KV, T, D), k and v
    # (B·KV, H/KV, S, D), where the second dimension has stride 0.
    q = q.reshape(B * KV, H // KV, T, D)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, H // KV, -1, -1) for x in (k, v))
    if S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(B, H, T, D)
    # A later chunk: query i stands at position S - T + i, and a causal triangle has to be aligned with the last key.
    # That is what flash attention itself means by causal, and no mask exists; an explicit mask would exclude it.
    if has_flash(q.device, q.dtype, D):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0].reshape(B, H, T, D)
    from torch.nn.attention.bias import causal_lower_right  # here, since it takes two seconds to import

    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S)).reshape(B, H, T, D)


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention takes such heads: in 16 bits, from compute capability 8.0 (A100) on."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    return device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Attention of a few tokens per row. q (B, H, T, D), k and v (B, KV, S, D), bias see `Step` -> (B, H, T, D).

    No query is hidden from another, only from keys, so the heads of a group can stand where tokens would: (T · H/KV, D)
    against (S, D) reads each key once for the whole group.
    """
    B, H, T, D = q.shape
    KV = k.shape[1]
    q = q.view(B, KV, H // KV, T, D).transpose(2, 3).reshape(B, KV, -1, D)  # (B, KV, T · H/KV, D)
    attention = F.scaled_dot_product_attention if q.device.type == "cpu" else product_attention
    return attention(q, k, v, bias).view(B, KV, T, -1, D).transpose(2, 3).reshape(B, H, T, D)


def product_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Attention as two products. q (B, KV, G, D), k and v (B, KV, S, D), bias (B, 1, 1 or G, S) float32 -> like q.

    What flash-decoding has to equal, and what takes its place. F.scaled_dot_product_attention gives each row and head
    one thread block, which reads all S keys alone: at 16 rows of one head most of a GPU idles. Products are split over
    S as well. Scores are float32, as inside a fused kernel.
    """
    B, KV, G, D = q.shape
    q, keys, values = (x.reshape(B * KV, -1, D) for x in (q, k, v))
    if q.device.type == "cpu":  # where a product returns the dtype of its inputs
        scores = q.float() @ keys.float().transpose(1, 2)
    else:
        scores = torch.bmm(q, keys.transpose(1, 2), out_dtype=torch.float32)
    scores = scores.view(B, KV, G, -1)
    scores = scores * D**-0.5 if bias is None else torch.add(bias, scores, alpha=D**-0.5)
    return (scores.softmax(-1).to(v.dtype).view(B * KV, G, -1) @ values).view(B, KV, G, D)


def flash_decoding(q: torch.Tensor, cache: torch.Tensor, *segments: torch.Tensor) -> torch.Tensor:
    """`attend_step` by flash attention, which splits the keys among thread blocks and keeps no scores in memory.

    q (B, H, T, D), cache (2, B, KV, length, D) -> (B, H, T, D). Each key/value head of a row is a sample of its own,
    with T query positions of H / KV heads, the last one at its last key, which is what flash attention means by causal:
    the cache is read as it lies, and what counts of it is a number on the device, so no mask is needed and the step can
    be recorded. `segments`: see `segments_of`. Flash-decoding: https://pytorch.org/blog/flash-decoding/
    """
    (B, H, T, D), KV, (queries, keys, values) = q.shape, cache.shape[2], segments
    k, v = (x.view(-1, 1, D) for x in cache)
    q = q.view(B, KV, -1, T, D).transpose(2, 3).reshape(B * KV * T, -1, D)
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, queries, keys, T, cache.shape[3], 0.0, True, False, seqused_k=values
    )
    return out[0].view(B, KV, T, -1, D).transpose(2, 3).reshape(B, H, T, D)


def segments_of(positions: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where the samples of `flash_decoding` begin and end, int32, for tokens of every row at `positions` (B, T).

    First query and first key of each sample, (B · KV + 1,); how many of its keys count, (B · KV,).
    """
    (_, B, KV, length, _), T = cache.shape, positions.shape[1]
    options = dict(dtype=torch.int32, device=positions.device)
    starts = (torch.arange(0, B * KV * size + 1, size, **options) for size in (T, length))
    return *starts, (positions[:, -1:] + 1).int().expand(B, KV).flatten().contiguous()


@functools.cache
def has_flash_decoding(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `flash_decoding` works here, and gives the numbers of the plain form: tried once, on a small cache."""
    if PLAIN_KERNELS or not has_flash(device, dtype, head_dim):
        return False
    positions, length = torch.tensor([[0, 1], [130, 131], [298, 299]], device=device), 300
    numbers = torch.arange(2 * 3 * 2 * length * head_dim, device=device).sin().to(dtype)
    cache, q = numbers.view(2, 3, 2, length, head_dim), numbers[-3 * 12 * 2 * head_dim :].view(3, 12, 2, head_dim)
    beyond = torch.arange(length, device=device) > positions.repeat_interleave(6, dim=1)[..., None]  # (3, 12, length)
    bias = torch.zeros(3, 12, length, device=device).masked_fill_(beyond, -torch.inf)[:, None]
    try:
        found = flash_decoding(q, cache, *segments_of(positions, cache))
    except (AttributeError, RuntimeError, TypeError):  # the operator of another version
        return False
    return torch.allclose(found, attend_step(q, *cache, bias), atol=0.02, rtol=0)


@dataclass
class Whole:
    """Samples from their first token to their last, without a cache: training. Padding stands to the right."""

    cos: torch.Tensor  # (1, 1, T, D), see MistralMedium.tables
    sin: torch.Tensor
    attention: Callable = attend  # or what is faster on this device

    def attend(self, q: torch.Tensor, kv: torch.Tensor, cache: None) -> torch.Tensor:
        """q (B, H, T, D), kv (2, B, KV, T, D): keys and values -> (B, H, T, D)."""
        return self.attention(q, *kv)


@dataclass
class Prompts:
    """Tokens of prompts, or of chunks of them, one after the other in a single row, B = 1: nothing is padded.

    `segments` says which of them belong to which row of the cache, and from which position on.
    """

    cos: torch.Tensor  # (1, 1, T, D)
    sin: torch.Tensor
    segments: list[tuple[int, int, int]]  # row of the cache, position of the first token, tokens
    attention: Callable  # `attend`, or what is faster on this device

    def attend(self, q: torch.Tensor, kv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """q (1, H, T, D), kv (2, 1, KV, T, D), cache (2, rows, KV, length, D) -> (1, H, T, D)."""
        out, sizes = [], [size for *_, size in self.segments]
        for (row, start, size), query, new in zip(self.segments, q.split(sizes, dim=2), kv.split(sizes, dim=3)):
            cache[:, row, :, start : start + size] = new[:, 0]
            out.append(self.attention(query, *cache[:, row : row + 1, :, : start + size]))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)


@dataclass
class Step:
    """One token for every row of the cache, T = 1, each at a position of its own; or a few, one after the other.

    Nothing that changes from step to step is a Python number, so that a GPU can record a step once and replay it: rows
    write where the tensor `positions` says, attend to the whole `length`, and a `bias` hides what lies beyond a row's
    own end.
    """

    cos: torch.Tensor  # (B, 1, T, D)
    sin: torch.Tensor
    positions: torch.Tensor  # (B, T)
    rows: torch.Tensor | None  # (B, 1): 0, 1, …; None: all at the same position
    length: int | None  # how much of the cache is attended to; None: all
    # (B, 1, 1, length), or (B, 1, T · H/KV, length) for several tokens: 0, or -inf beyond a token's position.
    bias: torch.Tensor | None  # None: nothing lies beyond, or `flash`
    flash: bool = False  # attend by `flash_decoding`
    segments: tuple[torch.Tensor, ...] | None = None  # of the cache, once the first layer has shown it

    def attend(self, q: torch.Tensor, kv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """q (B, H, T, D), kv (2, B, KV, T, D), cache (2, B, KV, length, D) -> (B, H, T, D)."""
        if self.rows is None:
            cache.index_copy_(3, self.positions[0], kv)
        else:  # not scatter_, which on a CPU copies the whole cache there and back
            cache[:, self.rows, :, self.positions] = kv.permute(1, 3, 0, 2, 4)  # (B, T, 2, KV, D)
        if self.flash:
            self.segments = self.segments or segments_of(self.positions, cache)
            return flash_decoding(q, cache, *self.segments)
        return attend_step(q, *cache[:, :, :, : self.length], self.bias)


Span = Whole | Prompts | Step


def local_heads(config: Config, place: Place) -> tuple[int, int]:
    """(H, KV) of a rank. With fewer key/value heads than ranks, neighbouring ranks hold a copy of the same one."""
    heads, kv_heads, tp = config.num_attention_heads, config.num_key_value_heads, place.tp_size
    divide(heads, tp, "attention heads")
    if kv_heads >= tp:
        return heads // tp, divide(kv_heads, tp, "key/value heads")
    divide(tp, kv_heads, "tensor-parallel ranks over the key/value heads")
    return heads // tp, 1


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245). A rank holds whole heads."""

    def __init__(self, config: Config, place: Place, dtype: torch.dtype, keep_fp8: bool):
        super().__init__()
        D, C, kv_heads = config.head_dim, config.hidden_size, config.num_key_value_heads
        self.heads, self.kv_heads = local_heads(config, place)
        self.group, self.sequence = place.tp_group, place.sequence_parallel
        matrices = {"q_proj": config.num_attention_heads * D, "k_proj": kv_heads * D, "v_proj": kv_heads * D}
        pieces = dict.fromkeys(("k_proj", "v_proj"), min(kv_heads, place.tp_size))
        self.qkv_proj = ColumnParallelLinear(C, matrices, place, dtype, keep_fp8, pieces)
        self.o_proj = RowParallelLinear(config.num_attention_heads * D, C, place, dtype, keep_fp8)

    def forward(self, x: torch.Tensor, span: Span, cache: torch.Tensor | None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). `cache`: this layer's keys and values (2, rows, KV, length, D), or None."""
        x = copy_to_group(x, self.group, self.sequence)
        heads = rotate(self.qkv_proj(x), self.heads + self.kv_heads, span.cos, span.sin)  # (B, H + 2 KV, T, D)
        q, kv = heads.split((self.heads, 2 * self.kv_heads), dim=1)
        kv = kv.unflatten(1, (2, -1)).transpose(0, 1)  # (2, B, KV, T, D): keys, values
        out = span.attend(q, kv, cache)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


# ------------------------------------------------------------------------------------------------------- the model


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, place: Place, dtype: torch.dtype, keep_fp8: bool):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        # Under sequence parallelism a rank's norms see only its own tokens, and so find a share of their gradient.
        self.input_layernorm = RMSNorm(C, eps, dtype, sharers=place.token_parts)
        self.self_attn = Attention(config, place, dtype, keep_fp8)
        self.post_attention_layernorm = RMSNorm(C, eps, dtype, sharers=place.token_parts)
        self.mlp = MLP(C, config.intermediate_size, place, dtype, keep_fp8)

    def forward(self, x: torch.Tensor, span: Span, cache: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), span, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def run_layer(layer: nn.Module, recompute: bool, *inputs):
    """`layer(*inputs)`. With `recompute` only the inputs are kept, and the backward pass computes the rest once more.

    Activation checkpointing (arXiv:1604.06174). No layer draws random numbers, so no generator's state is kept.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)


class MistralMedium(nn.Module):
    """One rank's part of the model: a pipeline stage, and of each matrix in it a tensor-parallel slice.

    The first stage has the embedding (and, for images, the `vision` encoder that it is handed), every stage some
    layers, the last one the norm and the head. `layers` is keyed by the layer's number in the whole model, so that
    names are the same on every stage. Parameters are on `meta` until a checkpoint (or an initialization) fills them.
    `keep_fp8`: the layers' linears stay FP8 in memory.
    """

    def __init__(
        self,
        config: Config,
        place: Place = Place(),
        dtype: torch.dtype = torch.bfloat16,
        keep_fp8: bool = False,
        vision: nn.Module | None = None,
    ):
        super().__init__()
        self.config, self.place, self.dtype, self.keep_fp8 = config, place, dtype, keep_fp8
        self.activation_checkpointing = False
        self.attention = attend  # of samples and prompts; `runtime/cpu.py` has a faster one for CPUs
        if place.first_stage:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, place, dtype)
        stage = place.layers(config.num_hidden_layers)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config, place, dtype, keep_fp8) for i in stage})
        if place.last_stage:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
            self.lm_head = VocabParallelHead(config.hidden_size, config.vocab_size, place, dtype)
            if config.tie_word_embeddings:
                self.lm_head.tie("embed_tokens.weight", self.embed_tokens if place.first_stage else None)
        self.vision = vision
        frequencies = rope_frequencies(config.rope, config.head_dim).to(place.device)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def embed(self, tokens: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """First stage only: (B, T) token ids -> (B, T, C).

        `features` (n, C) take the places of the n `[IMG]` tokens of this call, row by row.
        """
        x = self.embed_tokens(tokens)
        if features is None:
            return x
        here = tokens == self.config.vision.image_token_id
        return x.masked_scatter(here[..., None], features.to(x.dtype))

    def forward(self, x: torch.Tensor, span: Span | None = None, cache: "KVCache | None" = None) -> torch.Tensor:
        """This stage's layers over the hidden states `x` (B, T, C) -> (B, T, C).

        Without a span they are whole samples. With one of the others, keys and values go into `cache` and are read from
        it. Under sequence parallelism stages pass T / tp tokens on, and T must be a multiple of tp.
        """
        if self.place.first_stage:
            x = split_sequence(x, self.place)
        span = span or self.whole(x.shape[1] * self.place.token_parts)
        for i, layer in enumerate(self.layers.values()):
            x = run_layer(layer, self.activation_checkpointing, x, span, cache and cache.layers[i])
        return join_sequence(x, self.place) if self.place.last_stage else x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Last stage only: hidden states (..., C) -> this rank's logits (..., padded V / tp), float32."""
        return self.lm_head(self.norm(x))

    def whole(self, length: int) -> Whole:
        """For samples of `length` tokens from their beginning."""
        return Whole(*self.tables(torch.arange(length, device=self.place.device)[None]), self.attention)

    def prompts(self, segments: list[tuple[int, int, int]]) -> Prompts:
        """For tokens of prompts, which stand in one row: (row of the cache, first position, tokens) of each."""
        parts = [torch.arange(start, start + size, device=self.place.device) for _, start, size in segments]
        return Prompts(*self.tables(torch.cat(parts)[None]), segments, self.attention)

    def step(self, positions: torch.Tensor, length: int, aligned: bool = False) -> Step:
        """For some tokens of every row, at `positions` (B, T), which attend to the first `length` of the cache.

        `aligned`: T is 1, every row has exactly `length` tokens with this one, and nothing has to be hidden.
        """
        device, rows, bias = self.place.device, None, None
        flash = has_flash_decoding(device, self.dtype, self.config.head_dim)
        if not aligned:
            rows = torch.arange(len(positions), device=device)[:, None]
        if not (aligned or flash):
            # What a row may not attend to gets -inf. In the dtype in which scores are: on a CPU, that of the inputs.
            dtype = self.dtype if device.type == "cpu" else torch.float32
            beyond = torch.arange(length, device=device) > positions[..., None]  # (B, T, length)
            if positions.shape[1] > 1:
                heads, kv_heads = local_heads(self.config, self.place)
                beyond = beyond.repeat_interleave(heads // kv_heads, dim=1)
            bias = beyond.new_zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)[:, None]
        return Step(*self.tables(positions), positions, rows, length, bias, flash)

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of positions (B, T), once for all layers: cosines and signed sines (B, 1, T, D).

        With query scaling (B, H + KV, T, D): the tables of the query heads have the scale in them.
        """
        rope, positions = self.config.rope, positions[:, None, :, None]
        factor = rope.attention_factor
        if rope.query_scaling_beta:
            heads, kv_heads = local_heads(self.config, self.place)
            periods = torch.floor(positions / rope.original_max_position_embeddings)
            scale = 1 + rope.query_scaling_beta * torch.log(1 + periods)  # (B, 1, T, 1)
            scales = scale.expand(-1, heads, -1, -1), torch.ones_like(scale).expand(-1, kv_heads, -1, -1)
            factor = factor * torch.cat(scales, dim=1)
        # Angles in float32: at position 200,000 BF16 could not tell a token from its 500 neighbours on either side.
        return rotary_tables(positions.float() * self.frequencies, factor, self.dtype)

    def new_cache(self, rows: int, length: int) -> "KVCache":
        """An empty cache for this many rows of at most `length` tokens, in the run dtype."""
        _, kv_heads = local_heads(self.config, self.place)
        shape = (2, rows, kv_heads, length, self.config.head_dim)
        return KVCache([torch.zeros(shape, dtype=self.dtype, device=self.place.device) for _ in self.layers])


@torch.no_grad()
def generate_simply(model: MistralMedium, prompt: list[int], max_new_tokens: int, eos_id: int) -> list[int]:
    """The likeliest continuation of `prompt`, without cache or batches: what the engine has to equal."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        hidden = model(model.embed(torch.tensor([tokens])))  # (1, T, C)
        tokens.append(int(model.logits(hidden[:, -1]).argmax()))
        if tokens[-1] == eos_id:
            break
    return tokens[len(prompt) :]
