"""The memory of activations, by formula: what a training step or a prompt takes besides weights and optimizer state.

After Korthikanti et al., arXiv:2205.05198, whose formula is for other layers; this one is for grouped-query flash
attention, SwiGLU, FP8 weights and adapters, and also counts what comes and goes. tests/test_plan_dry.py holds it to
what the code allocates on tensors that pretend to be a GPU's: never less, at most 10 % more. Images are taken at their
worst, as if every token came from one.
"""

import argparse
import math
from dataclasses import dataclass

from model import CHUNK, LOGIT_ROWS, Config, local_heads
from parallel import Place
from vision import PATCHES_AT_ONCE

FP32 = 4  # bytes per number

IDS = 32  # bytes per token of what has a number or two for each: ids, targets, masks, losses, log-probabilities

ROUNDING = 1.01  # activations: the allocator's blocks of 512 bytes, and tensors too small to have a term


def count_micro_batches(args: argparse.Namespace, dp: int) -> int:
    """How many a replica runs per step; of the replica that has most."""
    return math.ceil(math.ceil(args.global_batch_size / args.micro_batch_size) / dp)


def batch_shape(args: argparse.Namespace, place: Place) -> tuple[int, int]:
    """(B, T) of the largest micro-batch."""
    parts = place.token_parts
    return min(args.micro_batch_size, args.global_batch_size), -(-args.max_length // parts) * parts


@dataclass(frozen=True)
class Layer:
    """Bytes of activations of a layer, of the decoder or of the tower, on one rank.

    Numbers per token: C hidden_size; of the rank A = H · D queries, Q = (H + 2 KV) · D outputs of qkv_proj, F of
    intermediate_size. N tokens go through products; norms and residuals have n of them, N / tp under sequence
    parallelism. All in numbers of `size` bytes, but for the float32 statistics of norms and softmax.
    """

    width: int  # C
    heads: int  # H
    kv_heads: int  # KV
    head_dim: int  # D
    inner: int  # F
    tokens: int  # N
    own_tokens: int  # n
    size: int
    trained: bool = False  # the matrices; a frozen one needs no input for its backward pass
    fp8: bool = False  # weights in FP8
    products: bool = False  # and multiplied so, which quantizes inputs; else each is dequantized for its product
    rank: int = 0  # of adapters, which need the inputs whatever is frozen
    # Whether attention's output is copied before o_proj. With several samples and key/value heads `attend` cannot view
    # (B, KV) as one dimension; the tower lays its images' outputs end to end.
    copied: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """A, Q, F, C for all tokens, and C for the rank's own."""
        A, KV = self.heads * self.head_dim, self.kv_heads * self.head_dim
        N, C = self.tokens, self.width
        return N * A, N * (A + 2 * KV), N * self.inner, N * C, self.own_tokens * C

    @property
    def inputs(self) -> bool:
        """Whether the inputs of products are kept."""
        return self.trained or self.rank > 0

    @property
    def kept(self) -> tuple[int, int]:
        """What autograd keeps between forward and backward pass: of attention, of the MLP.

        Attention: the norm's input, n C, with one float32 per row; the norm's output, N C, for the gradient of qkv_proj
        (the gathered one under sequence parallelism); q, k and v, N Q, which is the output of qkv_proj turned in place;
        flash attention's output, N A, and a float32 log-sum-exp for each query and head; the input of o_proj, N A, if
        that is a copy. MLP: the norm's input and output as above; gate and up, 2 N F, silu(gate), N F, and their
        product, N F, for down_proj. Adapters: the outputs of lora_A, of seven matrices. No scores, no dropout.
        """
        A, Q, F, C, c = self.sizes
        N, n, inputs = self.tokens, self.own_tokens, self.inputs
        attention = c + Q + A + inputs * (C + self.copied * A) + 4 * N * self.rank
        mlp = c + 3 * F + inputs * (C + F) + 3 * N * self.rank
        return self.size * attention + FP32 * (n + N * self.heads), self.size * mlp + FP32 * n

    def held(self, recomputed: bool) -> tuple[int, int]:
        """What is kept of a layer until its backward pass, and what that has to compute again."""
        inputs, kept = self.size * self.own_tokens * self.width, sum(self.kept)
        return (inputs, kept - inputs) if recomputed else (kept, 0)

    @property
    def forward(self) -> int:
        """The most that a forward pass takes that keeps nothing, with its input.

        Input and norm are there during attention; so are q, k, v and the output, until o_proj is done. During the MLP
        input, residual and norm are there, and gate, up, silu(gate) and their product. FP8 quantizes a product's input:
        5 bytes for each number, float32 and E4M3; without FP8 arithmetic the weight is there once more.
        """
        A, Q, F, C, c = self.sizes
        norm = c + (C > c) * C  # and gathered, where tokens are split

        def product(inputs: int, outputs: int, rows: int) -> int:
            """Bytes of a product's output, and of what its input or weight becomes; `rows` of its weight."""
            if self.products:
                return max(5 * inputs, inputs + self.size * outputs)
            return self.size * (outputs + self.fp8 * rows * inputs // self.tokens)

        out = self.size * (c + norm + Q + (1 + self.copied) * A) + FP32 * self.tokens * self.heads
        mlp, sums = self.size * (2 * c + norm), self.size * (norm - c + 2 * self.inputs * (self.rank > 0) * C)
        return max(
            self.size * (c + norm) + max(product(C, Q, Q // self.tokens), self.size * 2 * Q),
            out + product(A, C, self.width) + sums,
            mlp + max(product(C, 2 * F, 2 * self.inner), self.size * 4 * F),
            mlp + self.size * 3 * F + product(F, C, self.width) + sums,
        )

    @property
    def adding(self) -> int:
        """The most that adding an adapter's output takes beyond what is kept.

        Beside gate and up come the adapter's two parts, both of them together, and that scaled, 2 N F each, when
        silu(gate) and the product are still to come.
        """
        return (self.rank > 0) * self.size * 4 * self.tokens * self.inner

    def backward(self, recomputed: bool, received: bool = True) -> int:
        """The most that its backward pass takes beyond what is kept of it, with the gradient g of its output.

        A product's backward pass has the gradient of its input, and of its weight (or, frozen and in FP8, the weight
        dequantized) at once. In the order of time, less what was freed before, with g gathered where it is split:

        MLP: down_proj, g + F + C F; the two factors of silu(gate) · up, g + 2 N F, while silu(gate) is still there;
        gate_up_proj, whose output's gradient is in place of 4 N F kept, g - 2 N F + N C + 2 C F.
        Attention, when the MLP's are gone, with a g of its own: o_proj, N A + C A; flash, which gets the output's
        gradient and finds those of q and of keys and values repeated for each query head, 4 N A; qkv_proj, N C + C Q.
        Adapters find a gradient of the input, too. If layers are `recomputed`, it is while g and the scaled gradient of
        the last adapter are there, and takes inputs of products that are not kept. What was `received` from the next
        stage stays until the end.
        """
        A, Q, F, C, c = self.sizes
        weights = (self.trained or self.fp8) * self.width  # of a product with one output
        split, adapters, inputs = C > c, self.rank > 0, self.inputs
        g, freed = c + split * C, (1 + self.copied * inputs) * A
        mlp = max(
            g + F + weights * self.inner,
            c + (3 - inputs) * F,
            c - (1 + inputs) * F + (1 + adapters) * C + 2 * weights * self.inner,
            split * (c + 2 * C),
            recomputed * (g + split * c + adapters * C + self.adding // self.size + (not inputs) * (C + F)),
        )
        attention = received * c + max(
            g + (1 + adapters) * A + weights * self.heads * self.head_dim - adapters * (freed - A),
            c + 5 * A - freed,
            c + C + weights * Q // self.tokens - freed,
        )
        return max(self.size * mlp, self.size * attention - self.kept[1])


def decoder_layer(config: Config, place: Place, tokens: int, size: int, **more) -> Layer:
    heads, kv_heads = local_heads(config, place)
    inner = config.intermediate_size // place.tp_size
    return Layer(
        config.hidden_size, heads, kv_heads, config.head_dim, inner, tokens, tokens // place.token_parts, size, **more
    )


def tower_layer(config: Config, place: Place, patches: int, size: int, trained: bool = False) -> Layer:
    v, tp = config.vision, place.tp_size
    heads, inner = v.num_attention_heads // tp, v.intermediate_size // tp
    return Layer(v.hidden_size, heads, heads, v.head_dim, inner, patches, patches, size, trained, copied=True)


def in_one_pass(config: Config, patches: int) -> int:
    """How many of `patches` go through the tower at a time, at most; a large image goes alone."""
    return min(patches, max(PATCHES_AT_ONCE, (config.vision.image_size // config.vision.patch_size) ** 2))


def tower_forward(config: Config, place: Place, patches: int, size: int) -> int:
    """Images on their way through the tower where nothing is kept: pixels, rotary tables with their angles, a layer."""
    v, patches = config.vision, in_one_pass(config, patches)
    pixels = v.num_channels * v.patch_size**2
    rotary = 2 * size * v.head_dim + FP32 * v.head_dim // 2
    return patches * (size * pixels + rotary) + tower_layer(config, place, patches, size).forward


def rotary_bytes(config: Config, place: Place, length: int, size: int) -> int:
    """Cosines and sines; with query scaling each head has its own."""
    heads = sum(local_heads(config, place)) if config.rope.query_scaling_beta else 1
    return 2 * size * heads * length * config.head_dim


def image_bytes(
    config: Config, place: Place, tokens: int, size: int, freeze: tuple[str, ...], recomputed: bool
) -> tuple[int, int, int]:
    """Of images that fill `tokens` tokens: what tower and projector keep, and the most that their passes add.

    The tower keeps patches of pixels, the patches embedded, rotary tables, and its layers; the projector the tower's
    output, its norm merged to cells, their linear's output, and gelu's input and output. A frozen projector behind a
    trained tower keeps what is not the input of a product. Where both are frozen nothing is kept.
    """
    v, tp, C = config.vision, place.tp_size, config.hidden_size
    if v is None or not place.first_stage:
        return 0, 0, 0
    trains_tower, trains_projector = (part not in freeze for part in ("vision_tower", "projector"))
    patches, pixels = tokens * v.spatial_merge_size**2, v.num_channels * v.patch_size**2
    layer, width = tower_layer(config, place, patches, size, trains_tower), patches * v.hidden_size
    each, _ = layer.held(recomputed)
    group = tower_layer(config, place, in_one_pass(config, patches), size, trains_tower)
    tower = size * (patches * (pixels + 2 * v.head_dim) + width) + v.num_hidden_layers * each
    gelu, merged = tokens * C // tp, width + tokens * v.hidden_size
    projector = size * (width + gelu + trains_projector * (merged + gelu)) + FP32 * patches
    moments = (
        tower_forward(config, place, patches, size),
        trains_tower * (group.held(recomputed)[1] + group.backward(recomputed)),
        trains_projector * size * (2 * C * C // tp + 3 * tokens * C),
    )
    return trains_tower * tower, (trains_tower or trains_projector) * projector, max(moments)


def training_bytes(
    config: Config, place: Place, args: argparse.Namespace, freeze: tuple[str, ...], fp8: bool, size: int
) -> int:
    """The most bytes of activations during a step's passes, on the rank at `place`.

    A stage keeps of each micro-batch of (B, T) tokens, for as many of them as 1F1B begins before it ends one, what its
    layers keep (if these are computed again only their inputs, n C), rotary tables and ids; of images, what tower and
    projector do. On top comes the largest of several moments: a layer's backward pass, with what it computed again; the
    last layer's forward pass; the loss; the gradient of the embedding; and the tower. What was sent to neighbouring
    stages, n C each, stays until the next message.
    """
    (B, T), C, V = batch_shape(args, place), config.hidden_size, -(-config.vocab_size // place.tp_size)
    N, recomputed, first, last = B * T, args.activation_checkpointing, place.first_stage, place.last_stage
    trained, copied = "language_model" not in freeze, B > 1 and local_heads(config, place)[1] > 1
    options = dict(trained=trained, fp8=fp8, rank=args.lora_rank or 0, copied=copied)
    layer = decoder_layer(config, place, N, size, **options)
    each, again = layer.held(recomputed)
    states, own = size * N * C, size * layer.own_tokens * C
    # Of one sample, a rank's own tokens are a view of all tokens; of several, a copy.
    view, copy = (states - own) * (B == 1), states * (B > 1 and own < states)
    decoder = len(place.layers(config.num_hidden_layers)) * each + rotary_bytes(config, place, T, size) + IDS * N
    decoder += first * view
    tower, projector, images = image_bytes(config, place, N, size, freeze, recomputed)
    batches = count_micro_batches(args, place.dp_size)
    held = min(place.pp_size - place.pp_rank, batches)
    everything = held * (decoder + tower + projector)
    done = everything - decoder  # when the decoder is through with one of them
    # On the first stage features, and the embedding's output if the layers have a copy, live as long as a forward pass.
    forward = everything + first * (states * (images > 0) + copy)
    output = (
        layer.forward if recomputed else max(own + states * (1 + (own < states) + 2 * (layer.rank > 0)), layer.adding)
    )
    moments = [everything + again + layer.backward(recomputed, not last) + last * view, forward + output]
    if last:
        # States where there are targets, their norm, logits in the run dtype and in float32, which become probabilities
        # and gradients in place. Then the gradient of the head; a padded one copies that of its logits before.
        padded = (place.tp_rank + 1) * V > config.vocab_size
        moments += [
            forward + 3 * states + (size + FP32) * N * V,
            everything + (1 + trained) * states + padded * 2 * FP32 * N * V,
            everything + (2 + trained) * states + size * (N * V + trained * V * C),
        ]
    if first:
        embedding = trained and "embeddings" not in freeze
        moments += [
            done + embedding * (IDS * N + own + size * V * C + states * (2 + (projector > 0))),
            done - projector + own + images,
        ]
    sent = own * ((not last) + (batches > 1 and not first))
    return int(ROUNDING * (max(moments) + sent))


def prompt_bytes(config: Config, place: Place, context: int, fp8: bool, products: bool, size: int) -> int:
    """The most bytes of activations of a prompt, on the rank at `place`: of a chunk, which goes through the layers.

    Its states are there before and in the layers, with rotary tables and ids. On the first stage come the features of
    images, as many as go through the tower at a time, and those of this chunk again; before that, the tower's own. On
    the last stage LOGIT_ROWS positions have their logits: in the run dtype, in float32, and as exponentials.
    """
    tokens, C, V = min(CHUNK, context), config.hidden_size, -(-config.vocab_size // place.tp_size)
    layer = decoder_layer(config, place, tokens, size, fp8=fp8, products=products, copied=True)
    states, images, tower = size * tokens * C, 0, 0
    if place.first_stage and config.vision is not None:
        v = config.vision
        most = in_one_pass(config, context * v.spatial_merge_size**2)
        images = size * C * (most // v.spatial_merge_size**2) + states
        tower = tower_forward(config, place, most, size)
    chunk = images + states + rotary_bytes(config, place, tokens, size) + IDS * tokens
    logits = place.last_stage * min(LOGIT_ROWS, tokens) * (V * (2 * FP32 + size) + 2 * size * C)
    return int(ROUNDING * max(tower, chunk + max(layer.forward, logits)))
