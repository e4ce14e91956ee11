"""Mistral Medium 3.5, the whole model: an embedding, 88 decoder layers, a head; for images a tower in front.

Each layer is attention and an MLP, both added to a residual stream of `hidden_size` numbers per token:

    x = x + Attention(RMSNorm(x))       grouped-query attention with rotary positions (YaRN)
    x = x + MLP(RMSNorm(x))             SwiGLU, in parallel.py, since the vision tower has it too

Every linear is one of the parallel layers of `parallel.py`; with one process they are plain linears. `MistralMedium` is
what one rank holds: one pipeline stage, and of each matrix in it one tensor-parallel slice. Names are those of the HF
layout.

Shapes: B batch, T tokens of this call, S tokens attended to, H query heads of this rank, KV key/value heads of this
rank, D head_dim, C hidden_size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from config import Config, RopeConfig, UserError
from parallel import (
    MLP,
    ColumnParallelLinear,
    Joined,
    Linear,
    Place,
    RMSNorm,
    RowParallelLinear,
    Slice,
    VocabParallelEmbedding,
    VocabParallelHead,
    apply_rotary,
    copy_to_group,
    divide,
    join_sequence,
    run_layer,
    split_sequence,
)
from vision import Projector, VisionTower, groups_of

MASK_ELEMENTS = 1 << 22  # a prefill chunk's attention mask is at most this large, however long the context

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


# ------------------------------------------------------------------------------------------------------- attention


class KVCache:
    """Keys and values of this stage's layers: two tensors (layers, B, KV, length, D), allocated once.

    The engine says at which positions a call's tokens go; the cache itself remembers nothing else.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values = keys, values

    def rows(self, start: int, stop: int) -> "KVCache":
        """A view of the rows `[start:stop]`."""
        return KVCache(self.keys[:, start:stop], self.values[:, start:stop])

    def move_row(self, source: int, target: int) -> None:
        for tensor in (self.keys, self.values):
            tensor[:, target].copy_(tensor[:, source])


@dataclass
class Span:
    """Which positions the T tokens of a call have: what every layer needs to know about them."""

    cos: torch.Tensor  # (B or 1, 1, T, D/2)
    sin: torch.Tensor
    query_scale: torch.Tensor | None  # (B or 1, 1, T, 1)
    start: int | None  # the position of the first token, or None where the rows differ (then T is 1)
    positions: torch.Tensor | None  # (B,), where the rows differ
    stop: int  # tokens in the longest row, these included
    mask: torch.Tensor | None  # (B, 1, 1, stop) True where a row has a token, where the rows differ


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span) -> torch.Tensor:
    """Causal grouped-query attention. q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D).

    H / KV query heads share one key/value head. Nothing is ever repeated for them: either they take the place of
    tokens, or a view with stride 0 stands for the copies.
    """
    B, H, T, D = q.shape
    KV, S = k.shape[1], k.shape[2]
    if T == 1:
        # Decoding. The one query of each head may see all S keys, so the heads of a group can stand where tokens
        # would: (B, KV, H/KV, D) against (B, KV, S, D) reads each key once for the whole group.
        return F.scaled_dot_product_attention(q.view(B, KV, H // KV, D), k, v, attn_mask=span.mask).reshape(B, H, 1, D)
    # A prompt. Rows and key/value heads become the batch, the query heads of a group the heads:
    # q (B·KV, H/KV, T, D), k and v (B·KV, H/KV, S, D), where the second dimension has stride 0.
    q = q.reshape(B * KV, H // KV, T, D)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, H // KV, -1, -1) for x in (k, v))
    if S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(B, H, T, D)
    # A later chunk: query i stands at position S - T + i and sees as many keys. `is_causal` would align the triangle
    # with the first key instead of the last, so there has to be a mask; queries are taken few enough at a time that it
    # never exceeds MASK_ELEMENTS, and keys that none of them sees are left out.
    rows, out = max(1, MASK_ELEMENTS // S), torch.empty_like(q)
    for first in range(0, T, rows):
        last = min(first + rows, T)
        stop = S - T + last
        mask = torch.ones(last - first, stop, dtype=torch.bool, device=q.device).tril_(S - T + first)
        block = F.scaled_dot_product_attention(q[:, :, first:last], k[:, :, :stop], v[:, :, :stop], attn_mask=mask)
        out[:, :, first:last] = block
    return out.view(B, H, T, D)


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
        self.q_proj = ColumnParallelLinear(C, heads * D, place, dtype, keep_fp8)
        self.k_proj = ColumnParallelLinear(C, kv_heads * D, place, dtype, keep_fp8, parts)
        self.v_proj = ColumnParallelLinear(C, kv_heads * D, place, dtype, keep_fp8, parts)
        self.o_proj = RowParallelLinear(heads * D, C, place, dtype, keep_fp8)
        self.joined: Joined | None = None

    def forward(self, x: torch.Tensor, span: Span, cache: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). `cache`: this layer's keys and values, each (B, KV, length, D), or None."""
        x = copy_to_group(x, self.group, self.sequence)
        B, T, _ = x.shape
        qkv = self.joined(x) if self.joined else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in qkv)  # (B, H or KV, T, D)
        q, k = apply_rotary(q, span.cos, span.sin), apply_rotary(k, span.cos, span.sin)
        if span.query_scale is not None:
            q = q * span.query_scale
        if cache is not None:
            for stored, new in zip(cache, (k, v)):
                if span.start is not None:
                    stored[:, :, span.start : span.stop] = new
                else:  # each row's one token goes to a position of its own
                    stored[torch.arange(B, device=x.device), :, span.positions] = new[:, :, 0]
            k, v = (stored[:, :, : span.stop] for stored in cache)  # (B, KV, S, D)
        return self.o_proj(attend(q, k, v, span).transpose(1, 2).reshape(B, T, -1))

    def lay_out_weights(self) -> None:
        self.joined = Joined([self.q_proj, self.k_proj, self.v_proj])
        self.o_proj.pack()


# ------------------------------------------------------------------------------------------------------- the model


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, place: Place, dtype: torch.dtype, keep_fp8: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, place, dtype, keep_fp8)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, place, dtype, keep_fp8)
        if place.sequence_parallel:  # a rank's norms see only its own tokens, and so a share of their gradient
            self.input_layernorm.sharers = self.post_attention_layernorm.sharers = place.tp_size

    def forward(
        self, x: torch.Tensor, span: Span, cache: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), span, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class MistralMedium(nn.Module):
    """One rank's part of the model: a pipeline stage, and of each matrix in it a tensor-parallel slice.

    The first stage has the embedding (and, unless the checkpoint is text-only, tower and projector), every stage some
    layers, the last one the norm and the head. `layers` is keyed by the layer's number in the whole model, so that
    names are the same on every stage. Parameters are on `meta` until a checkpoint (or an initialization) fills them.
    `keep_fp8`: the layers' linears stay FP8 in memory.
    """

    def __init__(self, config: Config, place: Place = Place(), dtype=torch.bfloat16, keep_fp8: bool = False):
        super().__init__()
        self.config, self.place, self.dtype, self.keep_fp8 = config, place, dtype, keep_fp8
        self.activation_checkpointing = False
        if place.first_stage:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, place, dtype)
        stage = place.layers(config.num_hidden_layers)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config, place, dtype, keep_fp8) for i in stage})
        if place.last_stage:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
            self.lm_head = VocabParallelHead(config.hidden_size, config.vocab_size, place, dtype)
            if config.tie_word_embeddings:
                self.lm_head.tie("embed_tokens.weight", self.embed_tokens if place.first_stage else None)
        if config.vision is not None and place.first_stage:
            eyes = replace(place, sequence_parallel=False)  # its sequences are patches, of images of any size
            self.vision_tower = VisionTower(config.vision, eyes, dtype)
            self.multi_modal_projector = Projector(config, eyes, dtype)
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

    def forward(self, x: torch.Tensor, starts: list[int], cache: KVCache | None = None) -> torch.Tensor:
        """This stage's layers over the hidden states `x` (B, T, C), row i at positions starts[i], starts[i] + 1, …

        Keys and values go into `cache` and are read from it; rows that start at different positions must have T = 1.
        Under sequence parallelism stages pass T / tp tokens on, and T must be a multiple of tp.
        """
        if self.place.first_stage:
            x = split_sequence(x, self.place)
        span = self.span(starts, x.shape[1] * self.place.token_parts)
        for i, layer in enumerate(self.layers.values()):
            layer_cache = None if cache is None else (cache.keys[i], cache.values[i])
            x = run_layer(layer, self.activation_checkpointing, x, span, layer_cache)
        return join_sequence(x, self.place) if self.place.last_stage else x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Last stage only: hidden states (..., C) -> this rank's logits (..., padded vocab / tp), float32."""
        return self.lm_head(self.norm(x))

    def span(self, starts: list[int], T: int) -> Span:
        """Positions and angles, once for all layers.

        There are two kinds of call. Where all rows start at the same position (training, a prompt's chunk, a batch in
        step), the dimension B of the tables is 1, the cache is written as a slice, and no mask is needed for T = 1.
        Rows of different lengths decode one token each: tables and cache positions per row, and a mask that hides the
        cache beyond each row's own end.
        """
        device, rope = self.place.device, self.config.rope
        alike = len(set(starts)) == 1
        first = torch.tensor(starts[:1] if alike else starts, device=device)  # (B or 1,)
        positions = first[:, None] + torch.arange(T, device=device)  # (B or 1, T)
        # Angles in float32: at position 200,000 BF16 could not tell a token from its 500 neighbours on either side.
        angles = positions[:, None, :, None].float() * self.frequencies  # (B or 1, 1, T, D/2)
        cos, sin = ((f(angles) * rope.attention_factor).to(self.dtype) for f in (torch.cos, torch.sin))
        scale = None
        if rope.query_scaling_beta:
            periods = torch.floor(positions / rope.original_max_position_embeddings)
            scale = (1 + rope.query_scaling_beta * torch.log(1 + periods))[:, None, :, None].to(self.dtype)
        stop = max(starts) + T
        mask = None if alike else (torch.arange(stop, device=device) <= first[:, None])[:, None, None]
        return Span(cos, sin, scale, starts[0] if alike else None, None if alike else first, stop, mask)

    def image_features(self, images: Iterable[torch.Tensor]) -> torch.Tensor:
        """First stage only: one or more images from `pixels` -> (tokens, C), image after image, row by row.

        Given an iterator, no more images are held than go through the tower together. With gradients the activations
        of all are kept.
        """
        if self.config.vision is None:
            raise UserError("this checkpoint has no vision tower and cannot see images; leave them out")
        p = self.config.vision.patch_size
        features = []
        for group in groups_of(images, p):
            group = [image.to(self.place.device, self.dtype) for image in group]
            grids = [(image.shape[1] // p, image.shape[2] // p) for image in group]
            features.append(self.multi_modal_projector(self.vision_tower(group), grids))
        return torch.cat(features)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens, in the run dtype.

        Zeros, since a masked position still enters attention with weight 0, uninitialized memory may hold NaN, and 0
        times NaN is NaN.
        """
        kv_heads = max(1, self.config.num_key_value_heads // self.place.tp_size)
        shape = (len(self.layers), batch, kv_heads, length, self.config.head_dim)
        return KVCache(*(torch.zeros(shape, dtype=self.dtype, device=self.place.device) for _ in range(2)))

    def lay_out_weights(self) -> None:
        """For speed, once the weights are there and will not change again. FP8 weights, a scale each, stay apart."""
        for layer in self.layers.values():
            for part in (layer.self_attn, layer.mlp):
                if not self.keep_fp8:
                    part.lay_out_weights()


# ------------------------------------------------------------------------------------------------- LoRA adapters


class Adapter(nn.Module):
    """LoRA (arXiv:2106.09685): beside a frozen W, a product of two small factors learns. (..., in) -> (..., out).

    The linear then computes W x + (alpha / rank) · B A x, with A (rank, in) and B (out, rank). Only A and B have
    gradients and optimizer state, so W may stay FP8: training needs little more memory than inference.

    Under tensor parallelism the factor on the side where W is cut is cut with it, and the other one is whole on every
    rank: A beside a column-parallel W; B beside a row-parallel one, where partial sums pass through it before they are
    added up. Either way a rank finds only its share of the whole factor's gradient, as with a shared key/value head.
    """

    def __init__(self, linear: Linear, rank: int, alpha: float, place: Place, dtype: torch.dtype):
        super().__init__()
        part, self.scale = linear.slices["weight"], alpha / rank
        rows, columns = part.shape
        down, up = Slice((rank, columns), 0, 0, rank), Slice((rows, rank), 0, 0, rows)
        if part.dim == 0:
            up = Slice((rows, rank), 0, part.start, part.stop)
        else:
            down = Slice((rank, columns), 1, part.start, part.stop)
        self.lora_A, self.lora_B = Linear(down, dtype), Linear(up, dtype)
        cut, whole = (self.lora_B, self.lora_A) if part.dim == 0 else (self.lora_A, self.lora_B)
        cut.sharers, whole.sharers = getattr(linear, "sharers", 1), place.tp_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_B(self.lora_A(x)) * self.scale


def add_adapters(model: nn.Module, rank: int, alpha: float) -> None:
    """Freeze `model` and put an adapter, still on `meta`, beside each of its decoder's linears."""
    model.requires_grad_(False)
    for layer in list(model.layers.modules()):
        if isinstance(layer, Linear):
            layer.adapter = Adapter(layer, rank, alpha, model.place, model.dtype)
