"""Mistral Medium 3.5, the whole model: an embedding, 88 decoder layers, a head; for images a tower in front.

Each layer is attention and an MLP, both added to a residual stream of `hidden_size` numbers per token:

    x = x + Attention(RMSNorm(x))       grouped-query attention with rotary positions (YaRN)
    x = x + MLP(RMSNorm(x))             SwiGLU, in vision.py, since the tower has it too

Every linear is one of the parallel layers of `parallel.py`; with one process they are plain linears. `MistralMedium` is
what one rank holds: one pipeline stage, and of each matrix in it one tensor-parallel slice. Names are those of the HF
layout.

Shapes: B batch, T tokens of this call, S tokens attended to, H query heads of this rank, KV key/value heads of this
rank, D head_dim, C hidden_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fp8
from fp8 import Joined
from parallel import (
    ColumnParallelLinear,
    Linear,
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


LOGIT_ROWS = 64  # positions that are scored at a time: the logits of a whole chunk would take gigabytes
CHUNK = 4096  # prompt tokens that go through the model at a time: bounds the memory of activations

SHORT = 512  # tokens of several prompts up to which, on a CPU, they go into attention together, with a mask

FEW_ROWS = 512  # see RMSNorm


class RMSNorm(nn.Module):
    """x / rms(x) · weight (arXiv:1910.07467), computed in float32.

    On a CPU the normalized x is rounded before it is scaled, as transformers does; the GPU's fused kernel rounds once.
    A CPU has no such kernel, but one for layer norms, which subtract the mean and divide by the deviation: of (x, -x)
    these are 0 and rms(x). For few rows it is faster than the eight kernels that `rms_norm` starts.
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.slices = {"weight": Slice((size,), 0, 0, size)}
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            size = x.shape[-1]
            if x.numel() <= FEW_ROWS * size:
                return self.weight * F.layer_norm(torch.cat((x, -x), -1), (2 * size,), eps=self.eps)[..., :size]
            return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(act(gate(x)) · up(x)). The decoder's `act` is SiLU."""

    def __init__(self, hidden_size: int, intermediate_size: int, place: Place, dtype, keep_fp8=False, act=F.silu):
        super().__init__()
        divide(intermediate_size, place.tp_size, "rows of intermediate_size")
        self.act, self.group, self.sequence = act, place.tp_group, place.sequence_parallel
        self.gate_proj = ColumnParallelLinear(hidden_size, intermediate_size, place, dtype, keep_fp8)
        self.up_proj = ColumnParallelLinear(hidden_size, intermediate_size, place, dtype, keep_fp8)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, place, dtype, keep_fp8)
        self.joined: Joined | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = copy_to_group(x, self.group, self.sequence)
        gate, up = self.joined(x).chunk(2, dim=-1) if self.joined else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(self.act(gate) * up)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None):
    """Turn the pairs (i, i + D/2) of `x` (..., T, D) by the angles of `cos`, `sin` from `rotary_tables`.

    The first of a pair becomes a cos - b sin, the second b cos + a sin: every number times its cosine, plus the other
    one of its pair times its sine, whose sign the table has. `out` may be `x`.
    """
    other = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(torch.mul(x, cos, out=out), other, sin, out=out)


def rotary_tables(angles: torch.Tensor, factor: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles (..., D/2) in radians, float32 -> cosines and signed sines (..., D) for `apply_rotary`, times `factor`."""
    cos, sin = ((f(angles) * factor).to(dtype) for f in (torch.cos, torch.sin))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


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


@dataclass
class Span:
    """Which positions the tokens of a call have: what every layer needs to know about them.

    There are two kinds of call. The tokens of *prompts* stand one after the other in a single row, B = 1: `segments`
    says which of them belong to which row of the cache, and from which position on. In a *step* every row of the cache
    has one token, T = 1, at a position of its own. There nothing that changes from step to step is a Python number, so
    that a GPU can record a step once and replay it: rows write where the tensor `positions` says, attend to the whole
    `length`, and a `bias` hides what lies beyond a row's own end.
    """

    cos: torch.Tensor  # (B or 1, 1, T, D)
    sin: torch.Tensor
    query_scale: torch.Tensor | None  # (B or 1, 1, T, 1)
    segments: list[tuple[int, int, int]] | None = None  # row of the cache, position of the first token, tokens
    mask: torch.Tensor | None = None  # (T, T): whom each token sees, of short prompts on a CPU
    positions: torch.Tensor | None = None  # (B,), of a step
    rows: torch.Tensor | None = None  # (B,): 0, 1, …
    length: int = 0  # 0: that of the cache
    bias: torch.Tensor | None = None  # (B, 1, 1, length): 0, or -inf beyond a row's end; None: nothing lies beyond


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal grouped-query attention of T tokens to themselves and to those before. q (B, H, T, D), k and v
    (B, KV, S, D) -> (B, H, T, D). H / KV query heads share a key/value head, never repeated. No gradients for S > T.
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
    if q.device.type != "cpu":  # flash attention on a GPU can do that, and no mask exists; any mask excludes flash
        from torch.nn.attention.bias import causal_lower_right  # here, since it takes two seconds to import

        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S)).reshape(B, H, T, D)
    # On a CPU that would take a mask, and with one the kernel computes what it hides, too. So the chunk attends to
    # itself and to what came before, and the two are weighted by the sums of their exponentials.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_sum = flash(q, k[:, :, S - T :], v[:, :, S - T :], is_causal=True)
    before, before_sum = flash(q, k[:, :, : S - T], v[:, :, : S - T])
    share = (before_sum - own_sum).sigmoid_()[..., None]
    return own.float().lerp_(before.float(), share).to(q.dtype).view(B, H, T, D)


def attend_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Attention of one token per row. q (B, H, 1, D), k and v (B, KV, S, D), bias (B, 1, 1, S) -> (B, H, 1, D).

    The one query of each head may see all S keys, so the heads of a group can stand where tokens would: (H/KV, D)
    against (S, D) reads each key once for the whole group.
    """
    q = q.squeeze(2).unflatten(1, (k.shape[1], -1))  # (B, KV, H/KV, D)
    attention = F.scaled_dot_product_attention if q.device.type == "cpu" else product_attention
    return attention(q, k, v, bias).flatten(1, 2).unsqueeze(2)


def product_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Attention as two products. q (B, KV, H/KV, D), k and v (B, KV, S, D), bias (B, 1, 1, S) float32 -> like q.

    The fused kernels give each row and head one thread block, which reads all S keys alone: at 16 rows of one head
    most of a GPU idles. Products are split over S as well. Scores are float32, as inside a fused kernel.
    """
    B, KV, G, D = q.shape
    q, keys, values = (x.reshape(B * KV, -1, D) for x in (q, k, v))
    if q.device.type == "cpu":  # where no product returns more than it is given
        scores = q.float() @ keys.float().transpose(1, 2)
    else:
        scores = torch.bmm(q, keys.transpose(1, 2), out_dtype=torch.float32)
    scores = scores.view(B, KV, G, -1)
    scores = scores * D**-0.5 if bias is None else torch.add(bias, scores, alpha=D**-0.5)
    return (scores.softmax(-1).to(v.dtype).view(B * KV, G, -1) @ values).view(B, KV, G, D)


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245). A rank holds whole heads: H = heads / tp, KV = kv_heads / tp.

    With fewer key/value heads than ranks, neighbouring ranks hold a copy of the same one.
    """

    def __init__(self, config: Config, place: Place, dtype: torch.dtype, keep_fp8: bool):
        super().__init__()
        D, C = config.head_dim, config.hidden_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        divide(heads, place.tp_size, "attention heads")
        if kv_heads >= place.tp_size:
            divide(kv_heads, place.tp_size, "key/value heads")
        else:
            divide(place.tp_size, kv_heads, "tensor-parallel ranks over the key/value heads")
        self.head_dim, self.group, self.sequence = D, place.tp_group, place.sequence_parallel
        parts = min(kv_heads, place.tp_size)
        self.heads, self.kv_heads = heads // place.tp_size, kv_heads // parts
        self.q_proj = ColumnParallelLinear(C, heads * D, place, dtype, keep_fp8)
        self.k_proj = ColumnParallelLinear(C, kv_heads * D, place, dtype, keep_fp8, parts)
        self.v_proj = ColumnParallelLinear(C, kv_heads * D, place, dtype, keep_fp8, parts)
        self.o_proj = RowParallelLinear(heads * D, C, place, dtype, keep_fp8)
        self.joined: Joined | None = None

    def forward(self, x: torch.Tensor, span: Span, cache: torch.Tensor | None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). `cache`: this layer's keys and values (2, rows, KV, length, D), or None."""
        x = copy_to_group(x, self.group, self.sequence)
        if self.joined:
            heads = self.joined(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 KV, T, D)
            turned = heads.narrow(1, 0, self.heads + self.kv_heads)
            apply_rotary(turned, span.cos, span.sin, out=turned)
            q, new = heads.split((self.heads, 2 * self.kv_heads), dim=1)
            new = new.unflatten(1, (2, -1)).transpose(0, 1)  # (2, B, KV, T, D)
        else:
            q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or KV, T, D)
            q, k = apply_rotary(q, span.cos, span.sin), apply_rotary(k, span.cos, span.sin)
            new = (k, v) if cache is None else torch.stack((k, v))
        if span.query_scale is not None:
            q = q * span.query_scale
        if cache is None:
            out = attend(q, *new)
        elif span.positions is not None:
            if span.bias is None:  # all at the same position
                cache.index_copy_(3, span.positions[:1], new)
            else:  # not scatter_, which on a CPU copies the whole cache there and back
                cache[:, span.rows, :, span.positions] = new.squeeze(3).transpose(0, 1)
            out = attend_step(q, *(cache[:, :, :, : span.length] if span.length else cache), span.bias)
        else:
            out = [] if span.mask is None else [F.scaled_dot_product_attention(q, *new, span.mask, enable_gqa=True)]
            parts = (x.split([size for *_, size in span.segments], dim=-2) for x in (q, new))
            for (row, start, size), query, part in zip(span.segments, *parts):
                cache[:, row, :, start : start + size] = part[:, 0]
                if span.mask is None:
                    out.append(attend(query, *cache[:, row : row + 1, :, : start + size]))
            out = out[0] if len(out) == 1 else torch.cat(out, dim=2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, place: Place, dtype: torch.dtype, keep_fp8: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, place, dtype, keep_fp8)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, place, dtype, keep_fp8)
        if place.sequence_parallel:  # a rank's norms see only its own tokens, and so a share of their gradient
            self.input_layernorm.sharers = self.post_attention_layernorm.sharers = place.tp_size

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

    The first stage has the embedding (and, unless the checkpoint is text-only, tower and projector), every stage some
    layers, the last one the norm and the head. `layers` is keyed by the layer's number in the whole model, so that
    names are the same on every stage. Parameters are on `meta` until a checkpoint (or an initialization) fills them.
    `keep_fp8`: the layers' linears stay FP8 in memory.
    """

    def __init__(
        self,
        config: Config,
        place: Place = Place(),
        dtype=torch.bfloat16,
        keep_fp8: bool = False,
        vision: nn.Module | None = None,
    ):
        super().__init__()
        self.config, self.place, self.dtype, self.keep_fp8 = config, place, dtype, keep_fp8
        self.activation_checkpointing = False
        self.unpacked: list[Linear | Joined] = []  # see join and pack
        self.products: list[Callable | None] = []  # what `pack` made of them
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

    def forward(self, x: torch.Tensor, where: Span | int = 0, cache: KVCache | None = None) -> torch.Tensor:
        """This stage's layers over the hidden states `x` (B, T, C), whose positions `where` says.

        A number is the position of the first token: of every row, without a cache; of the only row, with one. Keys and
        values go into `cache` and are read from it. Under sequence parallelism stages pass T / tp tokens on, and T must
        be a multiple of tp.
        """
        if self.place.first_stage:
            x = split_sequence(x, self.place)
        if isinstance(where, int):
            where = self.span([(0, where, x.shape[1] * self.place.token_parts)])
        for i, layer in enumerate(self.layers.values()):
            x = run_layer(layer, self.activation_checkpointing, x, where, cache and cache.layers[i])
        return join_sequence(x, self.place) if self.place.last_stage else x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Last stage only: hidden states (..., C) -> this rank's logits (..., padded vocab / tp), float32."""
        return self.lm_head(self.norm(x))

    def span(self, segments: list[tuple[int, int, int]]) -> Span:
        """For the tokens of prompts, which stand in one row: (row of the cache, first position, tokens) of each."""
        parts = [torch.arange(start, start + size, device=self.place.device) for _, start, size in segments]
        span, sizes = Span(*self.tables(torch.cat(parts)[None]), segments), [size for *_, size in segments]
        alone = len(sizes) == 1 or any(start for _, start, _ in segments)
        if self.place.device.type == "cpu" and sum(sizes) <= SHORT and not alone:
            row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            span.mask = (row[:, None] == row).tril_()
        return span

    def step_span(self, positions: torch.Tensor, length: int, alike: bool = False) -> Span:
        """For one token of every row, at `positions` (B,), which attends to the first `length` of the cache.

        `alike`: every row has exactly `length` tokens with this one, and nothing has to be hidden.
        """
        rows = bias = None
        if not alike:
            rows = torch.arange(len(positions), device=self.place.device)
            # What a row must not see gets -inf. In the dtype in which scores are: on a CPU, that of the inputs.
            dtype = self.dtype if self.place.device.type == "cpu" else torch.float32
            beyond = torch.arange(length, device=self.place.device) > positions[:, None]  # (B, length)
            bias = beyond.new_zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)[:, None, None]
        return Span(*self.tables(positions[:, None]), positions=positions, rows=rows, length=length, bias=bias)

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Of positions (B, T), once for all layers: cosines and sines (B, 1, T, D), scales of queries (B, 1, T, 1)."""
        rope, positions = self.config.rope, positions[:, None, :, None]
        # Angles in float32: at position 200,000 BF16 could not tell a token from its 500 neighbours on either side.
        cos, sin = rotary_tables(positions.float() * self.frequencies, rope.attention_factor, self.dtype)
        scale = None
        if rope.query_scaling_beta:
            periods = torch.floor(positions / rope.original_max_position_embeddings)
            scale = (1 + rope.query_scaling_beta * torch.log(1 + periods)).to(self.dtype)
        return cos, sin, scale

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache for so many rows of at most `length` tokens, in the run dtype."""
        kv_heads = max(1, self.config.num_key_value_heads // self.place.tp_size)
        shape = (2, rows, kv_heads, length, self.config.head_dim)
        return KVCache([torch.zeros(shape, dtype=self.dtype, device=self.place.device) for _ in self.layers])

    def join(self) -> None:
        """For inference, before the weights are filled: those that share an input will lie together.

        FP8 weights, a scale each, only where the GPU takes them so: in whole multiples of its units, giving BF16.
        """
        for layer in self.layers.values():
            for part, names in ((layer.self_attn, "qkv"), (layer.mlp, ("gate", "up"))):
                linears = [getattr(part, f"{name}_proj") for name in names]
                fit = self.dtype == torch.bfloat16 and fp8.has_fp8_matmul(self.place.device)
                fit &= all(fp8.fits_units(linear.weight) for linear in linears)
                if (fit or not self.keep_fp8) and not any(linear.adapter for linear in linears):
                    part.joined = Joined(linears)
                if not self.keep_fp8:
                    self.unpacked += [part.joined] if part.joined else linears
            if not self.keep_fp8:
                self.unpacked += [layer.self_attn.o_proj, layer.mlp.down_proj]
        if self.place.last_stage and self.lm_head.weight is not None:  # a tied one's weight is looked up, too
            self.unpacked.append(self.lm_head)

    def pack(self) -> None:
        """Before the first step, for its speed: on a CPU a second's work, for which the first token need not wait."""
        if self.unpacked:
            self.requires_grad_(False)  # what a graph holds may not want gradients
        while self.unpacked:
            self.products.append(self.unpacked.pop().pack())
