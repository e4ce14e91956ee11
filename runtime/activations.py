"""The memory of activations, by formula: what a training step or a prompt takes besides weights and optimizer state.

    training: micro-batches held by 1F1B · (layers · kept by a layer + kept of images) + the largest working set
    a prompt: one chunk on its way through a layer, or its logits, + features of images

After Korthikanti et al., arXiv:2205.05198, whose formula is for other layers; this one is for grouped-query flash
attention, SwiGLU, FP8 weights and adapters. Where the exact moment of the peak depends on the sizes it takes a bound
that is a little too high. tests/test_plan_dry.py holds it to what the code allocates on tensors that pretend to be a
GPU's: never less, and at most 10 % more for models of usual proportions: an MLP at least twice as wide as the hidden
states, and attention about as wide. Images are taken at their worst, as if every token came from one.

Numbers are counted, and bytes only in the end. Per token, on one rank: C hidden_size; A = H · D of the queries;
Q = (H + 2 KV) · D of queries, keys and values; F of intermediate_size. N tokens go through products; norms and
residuals have N / tp of them under sequence parallelism.
"""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

from model import CHUNK, LOGIT_ROWS, Config, local_heads
from parallel import Place
from vision import PATCHES_AT_ONCE

FP32 = 4  # bytes per number

IDS = 16  # numbers per token of what has one or two for each

ROUNDING = 1.01  # the allocator's blocks of 512 bytes, and tensors too small to have a term


def count_micro_batches(args: argparse.Namespace, dp: int) -> int:
    """How many a replica runs per step; of the replica that has most."""
    return math.ceil(math.ceil(args.global_batch_size / args.micro_batch_size) / dp)


def batch_shape(args: argparse.Namespace, place: Place) -> tuple[int, int]:
    """(B, T) of the largest micro-batch."""
    parts = place.token_parts
    return min(args.micro_batch_size, args.global_batch_size), -(-args.max_length // parts) * parts


class Layer(NamedTuple):
    """A layer of the decoder or of the tower, as wide as one rank has it."""

    C: int
    A: int
    Q: int
    F: int
    H: int  # query heads

    def kept(self, inputs: bool, copied: bool, rank: int) -> int:
        """What autograd keeps of a token between forward and backward pass, without the norms' inputs, 2 C.

        q, k and v, Q, which is the output of qkv_proj turned in place; flash attention's output, A; gate and up, 2 F,
        and silu(gate), F. Where weights or adapters are trained also the `inputs` of products: two norms' outputs, 2 C,
        and silu(gate) · up, F. Attention's output is the input of o_proj, unless that is a copy. Adapters of this
        `rank`: the outputs of lora_A, of seven matrices. No scores: of softmax a float32 log-sum-exp per head, 2 H.
        """
        return 2 * self.H + self.Q + self.A + 3 * self.F + inputs * (2 * self.C + self.F + copied * self.A) + 7 * rank

    def forward(self, tokens: int, size: int, fp8: bool, products: bool) -> int:
        """Bytes, the most that a forward pass takes that keeps nothing, with its input: in the MLP.

        Input, residual and norm are there, 3 C, and gate, up, silu(gate) and their product, 4 F. Multiplying in FP8
        (`products`) quantizes the input: a byte for each number. FP8 weights without FP8 arithmetic are there once
        more for their product, whose float32 sums then become the output.
        """
        C, F = self.C, self.F

        def product(inputs: int, outputs: int, weights: int) -> int:
            """Bytes of a product's output, and of what its input or its weights become."""
            if products:
                return tokens * (inputs + size * outputs)
            if fp8:
                return tokens * outputs * FP32 + max(size * weights, size * tokens * outputs)
            return size * tokens * outputs

        gate_up = max(product(C, 2 * F, 2 * C * F), size * tokens * 4 * F)
        return size * tokens * 3 * C + max(gate_up, size * tokens * 3 * F + product(F, C, C * F))

    def backward(self, tokens: int, own: int, weights: bool, rank: int, fp8: bool = False) -> int:
        """The most that its backward pass takes beyond what is kept of it: in the MLP, before anything of it is freed.

        The gradient of the output, of `own` tokens, and

        - in down_proj the gradient of its input, F, and of its weight, C F; or a frozen FP8 weight converted, C F, with
          float32 sums, 2 F, which become that gradient;
        - the gradients of the two factors of silu(gate) · up, 2 F; adapters, when the layer is computed again: their
          output of gate and up in parts, joined, and scaled, 3 · 2 F, while silu(gate) and the product are to come;
        - in gate_up_proj, whose output's gradient has taken the place of 4 F, C (of adapters, too) and 2 C F; that
          gradient times an FP8 weight's scales, 2 F.
        """
        C, F = self.C, self.F
        down, adapters = weights * C * F, rank > 0
        g = tokens * C if own < tokens else 0  # the gathered gradient
        return own * C + max(
            g + max((1 + fp8) * tokens * F + down, fp8 * 3 * tokens * F),
            adapters * (2 * g + tokens * C) + (2 + 2 * adapters) * tokens * F,
            adapters * (g + tokens * C) + tokens * (C - 2 * (not fp8) * F) + 2 * down,
        )


def decoder_layer(config: Config, place: Place) -> Layer:
    H, KV = local_heads(config, place)
    D = config.head_dim
    return Layer(config.hidden_size, H * D, (H + 2 * KV) * D, config.intermediate_size // place.tp_size, H)


def tower_layer(config: Config, place: Place) -> Layer:
    v, A = config.vision, config.vision.hidden_size // place.tp_size
    return Layer(v.hidden_size, A, 3 * A, v.intermediate_size // place.tp_size, v.num_attention_heads // place.tp_size)


def at_once(config: Config, tokens: int) -> int:
    """How many of the tokens of images go through the tower together, at most; a large image goes alone."""
    v = config.vision
    return min(tokens, max(PATCHES_AT_ONCE, (v.image_size // v.patch_size) ** 2) // v.spatial_merge_size**2)


def tables(config: Config, place: Place) -> int:
    """Of a position: its cosines and sines, for each head where queries are scaled; ids, targets, log-probabilities."""
    heads = sum(local_heads(config, place)) if config.rope.query_scaling_beta else 1
    return 2 * heads * config.head_dim + IDS


def image_numbers(
    config: Config, place: Place, tokens: int, trained: Sequence[bool] = (False, False), recomputed: bool = False
) -> tuple[int, int]:
    """Of images that fill `tokens` tokens: what tower and projector keep, and the most that their passes add.

    `trained`: the tower, the projector. A pass through the tower takes pixels, rotary tables with their angles, and of
    a layer what `Layer.forward` does. A trained tower keeps pixels, tables, the embedded patches, its layers; the
    projector the tower's output, its norm merged to cells, their linear's output, and gelu's input and output. Where
    both are frozen nothing is kept.
    """
    v, C = config.vision, config.hidden_size
    if v is None or not place.first_stage:
        return 0, 0
    (tower, projector), patches = trained, tokens * v.spatial_merge_size**2
    group = at_once(config, tokens) * v.spatial_merge_size**2
    layer, pixels = tower_layer(config, place), v.num_channels * v.patch_size**2 + 3 * v.head_dim
    inside = layer.kept(True, True, 0) + layer.C
    each = layer.C + (not recomputed) * inside
    kept = tower * patches * (pixels + layer.C + v.num_hidden_layers * each)
    kept += (tower or projector) * (2 * patches * layer.C + tokens * (layer.C + 2 * C // place.tp_size))
    return kept, max(
        group * (pixels + 3 * layer.C + 4 * layer.F),
        tower * (recomputed * group * inside + layer.backward(group, group, True, 0)),
        projector * (2 * C * C // place.tp_size + 3 * tokens * C),
    )


def loss(config: Config, place: Place, tokens: int, trained: bool, size: int, draft: bool) -> int:
    """Of the last stage: hidden states, those that have targets, their norm; and logits, in the run dtype and in
    float32, which become probabilities and gradients in place (a padded head copies these); or the gradients of the
    norm and, where it is trained, of the head. Of a draft: two states in float32, between which there is a distance,
    two distributions, their product, and where one of them is 0.
    """
    C, V = config.hidden_size, -(-config.vocab_size // place.tp_size)
    padded = (place.tp_rank + 1) * V > config.vocab_size
    logits = tokens * V * (3 * FP32 + 1 if draft else 2 * FP32 if padded else FP32 + size) // size
    states = 3 + place.first_stage + draft * 2 * FP32 // size
    return states * tokens * C + max(logits, V * (tokens + trained * C))


def training_bytes(
    config: Config,
    place: Place,
    args: argparse.Namespace,
    freeze: tuple[str, ...],
    fp8: bool,
    size: int,
    draft: bool = False,
) -> int:
    """The most bytes of activations during a step's passes, on the rank at `place`. `draft`: of a head's layers.

    A stage keeps of each micro-batch of (B, T) tokens, for as many of them as 1F1B begins before it ends one, what its
    layers keep (if these are computed again only their inputs), rotary tables, and what tower and projector keep. On
    top comes the largest working set: a layer's backward pass, with what it computed again; a forward pass; the loss;
    or, when the decoder is through with a micro-batch, the gradient of the embedding, or the images of the next one.
    What was sent to neighbouring stages stays until the next message.
    """
    (B, T), layer = batch_shape(args, place), decoder_layer(config, place)
    first, last, vision = place.first_stage, place.last_stage, [x not in freeze for x in ("vision_tower", "projector")]
    trained, rank, recomputed = "language_model" not in freeze, args.lora_rank or 0, args.activation_checkpointing
    N, n = B * T, B * T // place.token_parts
    split, states, own = n < N, N * layer.C, n * layer.C
    # With several samples and key/value heads `attend` cannot view (B, KV) as one dimension: its output is copied.
    inside = N * layer.kept(trained or rank > 0 or recomputed, B > 1 and local_heads(config, place)[1] > 1, rank)
    again = recomputed * (own + inside)
    decoder = len(place.layers(config.num_hidden_layers)) * (2 * own + inside - again) + T * tables(config, place)
    view = (B == 1) * (states - own)  # of one sample, a rank's own tokens are a view of all
    features, images = image_numbers(config, place, N, vision, recomputed)
    held = min(place.pp_size - place.pp_rank, count_micro_batches(args, place.dp_size)) * (
        decoder + features + first * view
    )
    embedding = first and trained and "embeddings" not in freeze
    working = (
        again + layer.backward(N, n, trained or fp8, rank, fp8) + last * view,
        # The residual, an output, that in parts where tokens are split, and on the first stage features
        (not recomputed) * (own + (1 + split + first) * states + (not trained) * 3 * N * layer.F),
        last * loss(config, place, N, trained and not draft, size, draft),
        own - decoder + max(images, embedding * (3 * states + layer.C * config.vocab_size // place.tp_size)),
    )
    return int(ROUNDING * size * (held + max(working) + own * ((not first) + (not last))))


def head_training_bytes(
    config: Config, head: Config, place: Place, args: argparse.Namespace, fp8: bool, size: int
) -> int:
    """The same where a draft's `head` learns beside the model, which is frozen and keeps nothing.

    Embeddings and states of all tokens, 2 C, are there throughout. Then come a layer's forward pass, or the images; or
    both once more, side by side, and what training the head's layers takes.
    """
    N, C = math.prod(batch_shape(args, place)), config.hidden_size
    forward = decoder_layer(config, place).forward(N, size, fp8, False)
    images = size * image_numbers(config, place, N)[1]
    learning = 2 * size * N * C + training_bytes(head, place, args, ("embeddings",), False, size, draft=True)
    return int(ROUNDING * (2 * size * N * C + max(forward, images, learning)))


def prompt_bytes(config: Config, place: Place, context: int, fp8: bool, products: bool, size: int) -> int:
    """The most bytes of activations of a prompt, on the rank at `place`: of a chunk, which goes through the layers.

    Its states are there before and in the layers, with rotary tables. On the first stage come the features of images,
    as many as go through the tower at a time, and those of this chunk again; before that, the tower's own. On the last
    stage LOGIT_ROWS positions have their logits: in the run dtype, in float32, and as exponentials.
    """
    tokens, C, V = min(CHUNK, context), config.hidden_size, -(-config.vocab_size // place.tp_size)
    chunk = tokens * ((1 + (not place.last_stage)) * C + tables(config, place))
    _, tower = image_numbers(config, place, context)
    if tower:
        chunk += C * (tokens + at_once(config, context))
    logits = place.last_stage * min(LOGIT_ROWS, tokens) * (V * (2 * FP32 + size) + 2 * size * C)
    layer = decoder_layer(config, place).forward(tokens, size, fp8, products)
    return int(ROUNDING * max(size * tower, size * chunk + max(layer, logits)))
