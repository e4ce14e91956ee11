"""What a topology needs, before anyone rents it: memory per rank, and time.

    python parallel.py --plan --config CONFIG.json --tp 8 --pp 8
    python parallel.py --plan --config CONFIG.json --inference --tp 8 --gpu h200

Parameters, weights, gradients and optimizer state are counted on the real classes, built on the `meta` device, where a
tensor has a shape but no memory: one layer of the stage and of the tower stands for all of them. Activations follow a
formula (`Layer`, `training_bytes`, `prompt_bytes`), after Korthikanti et al., arXiv:2205.05198, for grouped-query flash
attention and SwiGLU; tests/test_plan_dry.py holds it to what the code allocates on tensors that pretend to be a GPU's:
never less, at most 10 % more. Images are taken at their worst, as if every token came from one. RESERVE is an estimate.

Time on paper, for text alone, from published peaks (`GPUS`). The *floor* is max(operations / peak, bytes / bandwidth)
of matrix products and attention alone. The *estimate* is what a GPU may be hoped to do:

    product: max(operations / (0.7 · peak), bytes / (0.8 · bandwidth), 3 µs)
    other kernels: max(3 µs for each, bytes / (0.8 · bandwidth))        message: 15 µs + bytes / (0.7 · link)

With p stages, m micro-batches or chunks, and t the time of one on the slowest stage, a token takes the sum of all
stages, a prefill (m + p - 1) · t, a step (m + p - 1) · t + Adam's traffic.
"""

import argparse
import contextlib
import json
import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from model import CHUNK, LOGIT_ROWS, Config, local_heads
from parallel import Place, TopologyError
from runtime.config import read_config
from runtime.files import UserError
from runtime.launch import SIZE, Parser, gather_objects, number, together
from runtime.lora import add_adapters
from runtime.memory import cpu_memory
from runtime.optimizer import BUCKET, FREEZABLE, Held, held_tensors, is_trained
from vision import PATCHES_AT_ONCE, build_model

MOST_RANKS = 1024  # a smallest topology is looked for up to here

RESERVE = 2_000_000_000  # bytes per GPU: CUDA context, libraries' workspaces, NCCL's buffers, what the allocator wastes

FP32 = 4  # bytes per number

IDS = 32  # bytes per token of what has a number or two for each: ids, targets, masks, losses, log-probabilities

ROUNDING = 1.01  # activations: the allocator's blocks of 512 bytes, and tensors too small to have a term


# ------------------------------------------------------------------------------------------------------ activations


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
        the last adapter are there. What was `received` from the next stage stays until the end.
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
            recomputed * (adapters * (g + C) + self.adding // self.size),
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


def tower_forward(config: Config, place: Place, patches: int, size: int) -> int:
    """Images on their way through the tower where nothing is kept: pixels, rotary tables with their angles, a layer."""
    v, patches = config.vision, min(patches, PATCHES_AT_ONCE)
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
    each, again = layer.held(recomputed)
    tower = size * (patches * (pixels + 2 * v.head_dim) + width) + v.num_hidden_layers * each
    gelu, merged = tokens * C // tp, width + tokens * v.hidden_size
    projector = size * (width + gelu + trains_projector * (merged + gelu)) + FP32 * patches
    moments = (
        tower_forward(config, place, patches, size),
        trains_tower * (again + layer.backward(recomputed)),
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
        most = min(context * v.spatial_merge_size**2, max(PATCHES_AT_ONCE, (v.image_size // v.patch_size) ** 2))
        images = size * C * (most // v.spatial_merge_size**2) + states
        tower = tower_forward(config, place, most, size)
    chunk = images + states + rotary_bytes(config, place, tokens, size) + IDS * tokens
    logits = place.last_stage * min(LOGIT_ROWS, tokens) * (V * (2 * FP32 + size) + 2 * size * C)
    return int(ROUNDING * max(tower, chunk + max(layer.forward, logits)))


@dataclass
class StagePlan:
    """Bytes (and parameters) of one rank of a pipeline stage: of the one that needs most, where they differ."""

    stage: int
    layers: list[int]  # the first and the last
    parameters: int  # as held: with padding, and with what other ranks hold too
    weight_bytes: int
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0
    reserve_bytes: int = RESERVE  # an estimate
    fits: bool = True

    @property
    def peak_bytes(self) -> int:
        return sum(value for name, value in vars(self).items() if name.endswith("_bytes"))


def make_plan(config: Config, args: argparse.Namespace) -> dict:
    """The plan as the JSON object that --json prints. Raises UserError where the topology does not divide the model."""
    keep_fp8 = config.fp8 and (args.weights != "dequantized" if args.inference else bool(args.lora_rank))
    counts, stages, memory = Counter(), [], args.gpu_memory_gb * 1e9
    for stage_places in places(args.tp, args.pp, args.dp, args.sequence_parallel):
        ranks = []
        for place in stage_places:
            rank, kinds = plan_rank(config, place, args, keep_fp8)
            counts += kinds
            ranks.append(rank)
        worst = max(ranks, key=lambda rank: rank.peak_bytes)
        worst.fits = worst.peak_bytes <= memory
        stages.append(worst)
    plan = {
        "gpus": args.tp * args.pp * args.dp,
        **{name: counts.pop(name, 0) for name in ("parameters", "adapters", "padding")},
        "copies": dict(counts),  # what is left, by kind
        "stages": [{**asdict(stage), "peak_bytes": stage.peak_bytes} for stage in stages],
        "fits": all(stage.fits for stage in stages),
        "gpu": args.gpu,
        "seconds": make_times(config, args, keep_fp8, max(stage.gradient_bytes // FP32 for stage in stages)),
    }
    if args.inference:
        # Of the columns only the cache grows with the context (activations stop growing at one chunk of the prompt).
        rooms = [memory - (stage.peak_bytes - stage.cache_bytes) for stage in stages]
        contexts = [int(room * args.max_context / stage.cache_bytes) for room, stage in zip(rooms, stages)]
        plan["largest_context"] = max(0, min(config.max_position_embeddings, *contexts))
    else:
        plan["micro_batches"] = m = count_micro_batches(args, args.dp)
        plan["bubble"] = (args.pp - 1) / (m + args.pp - 1)  # see parallel.Pipeline
    return plan


def places(tp: int, pp: int, dp: int = 1, sequence: bool = False) -> list[list[Place]]:
    """One replica's places, stage by stage, without process groups: enough to build models on `meta`."""
    meta = torch.device("meta")
    more = dict(dp_size=dp, device=meta, sequence_parallel=sequence and tp > 1)
    return [[Place(s * dp * tp + t, t, tp, s, pp, **more) for t in range(tp)] for s in range(pp)]


def count_micro_batches(args: argparse.Namespace, dp: int) -> int:
    """How many a replica runs per step; of the replica that has most."""
    return math.ceil(math.ceil(args.global_batch_size / args.micro_batch_size) / dp)


def batch_shape(args: argparse.Namespace, place: Place) -> tuple[int, int]:
    """(B, T) of the largest micro-batch."""
    parts = place.token_parts
    return min(args.micro_batch_size, args.global_batch_size), -(-args.max_length // parts) * parts


def plan_rank(
    config: Config, place: Place, args: argparse.Namespace, keep_fp8: bool, dtype=torch.bfloat16
) -> tuple[StagePlan, Counter]:
    """What the rank at `place` needs, and what its parameters count as: "parameters" or "adapters" where it owns them,
    a kind of copy where another rank does, and "padding", the zeros past the end of a tensor cut into equal parts.

    Raises TopologyError where the topology does not divide the model.
    """
    layers, v = place.layers(config.num_hidden_layers), config.vision
    few = replace(config, num_hidden_layers=place.pp_size, vision=v and replace(v, num_hidden_layers=1))
    model = build_model(few, replace(place, device=torch.device("meta")), dtype, keep_fp8)
    if args.lora_rank:
        add_adapters(model, args.lora_rank, 1.0)

    def times(name: str) -> int:
        """How many tensors the one of this name stands for."""
        if name.startswith("layers."):
            return len(layers)
        return v.num_hidden_layers if ".layers." in name else 1

    weights = sum(times(name) * x.nbytes for name, x in [*model.named_parameters(), *model.named_buffers()])
    if config.activation_scheme == "static":  # the loader adds the scales of activations
        weights += sum(FP32 * times(name) for name, _ in model.named_buffers() if name.endswith(".weight_scale"))
    held, counts = held_tensors(model), Counter()
    for tensor in held:
        inside = math.prod(tensor.part.shape) // tensor.part.shape[tensor.part.dim] * tensor.part.length
        counts[kind_of(tensor)] += times(tensor.name) * inside
        counts["padding"] += times(tensor.name) * (tensor.size - inside)
    stage = StagePlan(place.pp_rank, [layers[0], layers[-1]], sum(counts.values()), weights)
    if args.inference:
        stage.cache_bytes = len(layers) * model.new_cache(1, args.max_context).nbytes
        products = keep_fp8 and GPUS[args.gpu].fp8 > 0
        stage.activation_bytes = prompt_bytes(config, place, args.max_context, keep_fp8, products, dtype.itemsize)
    else:
        plan_training(stage, config, place, args, [(tensor, times(tensor.name)) for tensor in held], keep_fp8, dtype)
    return stage, counts


def plan_training(
    stage: StagePlan, config: Config, place: Place, args: argparse.Namespace, held: list, keep_fp8: bool, dtype
) -> None:
    """Adds to `stage` what training takes. `held`: its tensors, each with how many others it stands for."""
    freeze = tuple(FREEZABLE if args.lora_rank else args.freeze)
    trained = [(t, count) for t, count in held if ".adapter." in t.name or is_trained(t.name, freeze)]
    total = sum(count * tensor.size for tensor, count in trained)
    # In FP32 (see optimizer.py): the sum of gradients; the master weight and Adam's two moments.
    stage.gradient_bytes, stage.optimizer_bytes = FP32 * total, 3 * FP32 * total
    # After the passes the shares of a gradient are added up in whole tensors, a bucket at a time.
    shared = [(count, math.prod(tensor.part.shape)) for tensor, count in trained if tensor.sharers > 1]
    bucket = min(max([BUCKET, *(size for _, size in shared)]), sum(count * size for count, size in shared))
    passes = training_bytes(config, place, args, freeze, keep_fp8, dtype.itemsize)
    stage.activation_bytes = max(passes, FP32 * bucket)


def kind_of(tensor: Held) -> str:
    if tensor.owner:
        return "adapters" if ".adapter." in tensor.name else "parameters"
    if len(tensor.part.shape) == 1:
        return "norms"
    if ".adapter." in tensor.name:
        return "whole factors of adapters"
    if tensor.name.startswith("embed_tokens."):
        return "tied embedding"
    return "key/value heads" if tensor.sharers > 1 else "patch_conv"


# ------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Gpu:
    """Published peaks: operations/s of dense products, bytes/s of memory and, in one direction, of the links."""

    bf16: float
    fp8: float  # 0: it has none
    memory: float
    nvlink: float  # inside a node of 8
    network: float  # between nodes, per GPU: HDR or NDR InfiniBand
    gigabytes: float


GPUS = {
    "a100": Gpu(312e12, 0, 2.039e12, 300e9, 25e9, 80),
    "h100": Gpu(989e12, 1979e12, 3.35e12, 450e9, 50e9, 80),
    "h200": Gpu(989e12, 1979e12, 4.8e12, 450e9, 50e9, 141),
}

PRODUCTS, COPIES, LINKS = 0.7, 0.8, 0.7  # what is reached of them

KERNEL, MESSAGE = 3e-6, 15e-6  # seconds that each takes at least

KERNELS = 13  # of a layer's step, beside six products: norms, rotation, cache, softmax, silu, residuals
ENDS = 22  # kernels of a stage before its layers, in a step; and of the last one after them, to sample the next token

ADAM_BYTES = 82  # that a step of optimizer.py reads and writes per trained weight

RECIPE_STEPS, MEDPIX = 100, 20_500  # of the published fine-tune; samples of its data


def stage_times(
    config: Config, place: Place, gpu: Gpu, layer: Layer, pairs: float, keys: int, passes: tuple[int, int] = (1, 0)
) -> torch.Tensor:
    """(floor, estimate), in seconds, of a stage's passes over N tokens: so many forward and `passes`[1] times backward.

    `pairs`: how many pairs of a query and a key each head has; `keys`: how many keys there are. Per token and layer:

    - four products, 2 · in · out operations each, which read the weight once; backward as many for the input's gradient
      and, where weights are trained, for theirs. In inference one position goes through the head; in training all.
    - attention: 4 D operations per pair and head; in the backward pass, which forms the scores again, 10 D.
    - other kernels read and write, in bytes: norms and residuals 8 C + 12 C; the rotation (roll, times cosine, plus
      times sine) 4 + 4 + 6 for each number of q and k; the cache 8 KV D; silu and product 4 F + 6 F; quantizing to FP8
      (divide, clamp, convert) 6 + 8 + 5 for each input of a product, or dequantizing 7 for each weight; putting an
      adapter's output together, scaling and adding it 4 + 4 + 6 for each output. Backward, norms and residuals 12 C +
      12 C, the rotation of a copy 4 Q + 14, silu, product and joining their gradients 6 F + 12 F + 8 F; and each
      trained weight's gradient is added to a float32 sum, 10 bytes. Logits in training: 52 bytes for each.
    - two all-reduces of 2 C bytes forward, two backward, in a ring: every part travels twice, but for a rank's own.
      Computing a layer again ends before down_proj. One message goes to each neighbouring stage.
    """
    (forward, backward), tp, (A, Q, F, C, _) = passes, place.tp_size, replace(layer, tokens=1, own_tokens=1).sizes
    N, layers, training = layer.tokens, len(place.layers(config.num_hidden_layers)), backward > 0
    turned, V, last = (A + Q) // 2, config.vocab_size / tp, place.last_stage
    matrices, fp8, adapters = [(C, Q), (A, C), (C, 2 * F), (F, C)], layer.products, layer.rank > 0
    weights, quantized, outputs = sum(x * y for x, y in matrices), 19 * fp8 * (2 * C + A + F), Q + 2 * C + 2 * F
    dequantizes, adding, again = layer.fp8 and not fp8, 14 * adapters * outputs, forward > 1 and not adapters
    scored, peak = N if training else 1, gpu.fp8 if fp8 else gpu.bf16
    # How often, operations, bytes, operations per second
    products = [
        (layers * 2 * (forward + 2.5 * training), 2 * pairs * A, 2 * keys * (turned - A) + 2 * N * A, gpu.bf16),
        (last * (1 + backward), 2 * scored * C * V, 2 * (C * V + scored * (C + V)), gpu.bf16),
    ]
    for x, y in matrices:
        times, nbytes = layers * (forward + backward - (again and x == F)), (2 - fp8) * (x * y + N * x) + 2 * N * y
        products.append((times, 2 * N * x * y, nbytes, peak))
        products.append((layers * adapters * (forward + 2), 2 * N * layer.rank * (x + y), 2 * N * (x + y), gpu.bf16))
    # How often, kernels, bytes
    moved = 20 * C + 14 * turned + 8 * (turned - A) + 10 * F + quantized + adding
    kernels = KERNELS + 12 * fp8 + 8 * dequantizes + 20 * adapters
    others = [
        (layers * forward, kernels, N * moved),
        (layers * training, kernels, N * (24 * C + 14 * turned + 4 * Q + 26 * F + adding)),
        (layers * (forward + training) * dequantizes, 0, 7 * weights),
        (layers * training * layer.trained, 0, 10 * weights),
        (1, ENDS, 0),
        (last, ENDS, 52 * training * N * V),
    ]
    # How often, bytes, bytes per second
    sums = layers * (2 * forward + 2 * training - again) + place.first_stage + last
    far = gpu.network if tp * place.pp_size > 8 else gpu.nvlink
    messages = [
        ((tp > 1) * sums, 4 * (1 - 1 / tp) * N * C, gpu.network if tp > 8 else gpu.nvlink),
        ((not last) + training * (not place.first_stage), 2 * layer.own_tokens * C, far),
    ]
    floor = about = 0.0
    for count, operations, nbytes, peak in products:
        compute, memory = operations / peak, nbytes / gpu.memory
        floor += count * max(compute, memory)
        about += count * max(compute / PRODUCTS, memory / COPIES, KERNEL)
    about += sum(count * max(n * KERNEL, nbytes / gpu.memory / COPIES) for count, n, nbytes in others)
    about += sum(count * (MESSAGE + nbytes / link / LINKS) for count, nbytes, link in messages)
    return torch.tensor([floor, about], dtype=torch.float64)


def make_times(config: Config, args: argparse.Namespace, keep_fp8: bool, trained: int) -> dict[str, list[float]]:
    """What takes how long: name -> [floor, estimate], in seconds. `trained`: the most weights that a rank trains."""
    gpu, p, times = GPUS[args.gpu], args.pp, {}
    grid = [stage[0] for stage in places(args.tp, p, args.dp, args.sequence_parallel)]

    def infer(start: int, tokens: int) -> torch.Tensor:
        """Of each stage, for `tokens` of one row from position `start` on: (p, 2)."""
        options = dict(fp8=keep_fp8, products=keep_fp8 and gpu.fp8 > 0)
        layer = decoder_layer(config, grid[0], tokens, 2, **options)
        pairs = tokens * (start + (tokens + 1) / 2)
        return torch.stack([stage_times(config, at, gpu, layer, pairs, start + tokens) for at in grid])

    if args.inference:
        context = min(8192, args.max_context)
        times[f"a token after {context:,}"] = infer(context - 1, 1).sum(0)
        for length in (n for n in (8192, 131072) if n <= args.max_context):
            slowest = (infer(0, CHUNK) + infer(length - CHUNK, CHUNK)).amax(0) / 2
            times[f"a prompt of {length:,}"] = (length // CHUNK + p - 1) * slowest
    else:
        (B, T), whole = batch_shape(args, grid[0]), not (args.lora_rank or "language_model" in args.freeze)
        options = dict(trained=whole, fp8=keep_fp8, rank=args.lora_rank or 0)
        layer, passes = (
            decoder_layer(config, grid[0], B * T, 2, **options),
            (1 + args.activation_checkpointing, 1 + whole),
        )
        pairs = B * T * (T + 1) / 2
        slowest = torch.stack([stage_times(config, at, gpu, layer, pairs, B * T, passes) for at in grid]).amax(0)
        adam = torch.tensor([1, 1 / COPIES]) * ADAM_BYTES * trained / gpu.memory
        adam[1] += 2 * (args.dp - 1) / args.dp * FP32 * trained / gpu.network / LINKS  # gradients of replicas
        times["a step"] = step = (count_micro_batches(args, args.dp) + p - 1) * slowest + adam
        times[f"{RECIPE_STEPS} steps (the published fine-tune)"] = RECIPE_STEPS * step
        times[f"an epoch of MedPix ({MEDPIX:,} samples)"] = math.ceil(MEDPIX / args.global_batch_size) * step
    return {name: value.tolist() for name, value in times.items()}


def check_memory(config: Config, place: Place, args: argparse.Namespace, keep_fp8: bool) -> int:
    """Refuse a model whose weights alone do not fit here, and warn where the run's estimate does not.

    `args` are those of generate.py or train.py. A GPU is a rank's own; on a CPU all ranks of a machine share its
    memory. Every rank has to come here: they find the tightest device together. Raises UserError on all. Returns the
    bytes of this rank's plan.
    """
    wanted = argparse.Namespace(**{**vars(parse_args(["--plan", "--config", "-"])), **vars(args)})
    wanted.inference = not hasattr(args, "lora_rank")
    if wanted.inference:  # one request, of a chunk; the cache of more, or longer ones, comes on top
        longest = args.max_context or config.max_position_embeddings
        wanted.max_context = min(longest, CHUNK + (args.max_new_tokens or CHUNK))
    dtype, gpu = getattr(torch, args.dtype), place.device.type == "cuda"

    def needs(place: Place) -> StagePlan:
        stage, _ = plan_rank(config, place, wanted, keep_fp8, dtype)
        stage.reserve_bytes = RESERVE if gpu else 0
        return stage

    mine = together(lambda: needs(place))
    room = torch.cuda.mem_get_info(place.device)[0] if gpu else cpu_memory()
    devices: dict[tuple, list] = {}
    for device, *numbers in gather_objects(
        ((socket.gethostname(), str(place.device)), mine.weight_bytes, mine.peak_bytes, room)
    ):
        devices.setdefault(device, []).append(numbers)
    sums = [[sum(column) for column in zip(*ranks)] + [len(ranks)] for ranks in devices.values()]
    weights, peak, room, sharers = max(sums, key=lambda each: each[1] / each[2])
    room /= sharers  # each of them saw all of it
    if peak <= room:
        return mine.peak_bytes
    topology = smallest_topology(needs, room / sharers)
    what = "the smallest split that fits is --tp {} --pp {}, {} processes with {:.1f} GB each"
    what = what.format(*topology, math.prod(topology), room / sharers / 1e9) if topology else "no split makes it fit"
    there = f"{room / 1e9:.1f} GB are free on {'the GPU' if gpu else 'the machine'}; {what}"
    if weights > room:
        raise UserError(f"the weights take {weights / 1e9:.1f} GB, but {there}")
    if place.rank == 0:
        print(f"caution: this may take {peak / 1e9:.1f} GB, but {there}", file=sys.stderr)
    return mine.peak_bytes


def smallest_topology(needs: Callable[[Place], StagePlan], room: float) -> tuple[int, int] | None:
    """(tp, pp) of the fewest ranks that have `room` bytes each; tp within a machine of 8 where there is a choice."""
    whole = needs(Place())
    fewest = math.ceil((whole.weight_bytes + whole.gradient_bytes + whole.optimizer_bytes) / max(1, room))
    step = 8 if fewest > 64 else 1  # whole machines
    for ranks in range(-(-max(1, fewest) // step) * step, min(2 * fewest + 16, MOST_RANKS), step):
        for tp in sorted((n for n in range(1, ranks + 1) if ranks % n == 0), key=lambda n: (n > 8, -n)):
            pp = ranks // tp
            # The first stage has the embedding and the tower, the last the head; and with 1F1B the earlier ones hold
            # more activations than the later ones.
            some = [Place(0, 0, tp, stage, pp) for stage in sorted({0, min(1, pp - 1), pp - 1})]
            with contextlib.suppress(TopologyError):
                if all(needs(place).peak_bytes <= room for place in some):
                    return tp, pp
    return None


class Progress:
    """A line on stderr, once a second, while a large checkpoint loads."""

    def __init__(self, checkpoint, place: Place):
        self.checkpoint, self.shown = checkpoint, place.rank == 0
        self.started = self.last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.shown and (now - self.last > 1 or (done == total and self.last > self.started)):
            self.last, read = now, self.checkpoint.bytes_read / 1e9
            rate = read / (now - self.started)
            print(f"loading: {100 * done // total} %, {read:.1f} GB read, {rate:.2f} GB/s", file=sys.stderr)


def show(plan: dict, args: argparse.Namespace) -> str:
    """The plan as a table."""
    middle = ["KV cache"] if args.inference else ["gradients", "optimizer"]
    fields = ["cache_bytes"] if args.inference else ["gradient_bytes", "optimizer_bytes"]
    names = ["stage", "layers", "parameters", "weights", *middle, "activations", "reserve*", "peak", "fits"]
    fields = ["weight_bytes", *fields, "activation_bytes", "reserve_bytes", "peak_bytes"]
    rows = [
        [str(s["stage"]), "{}-{}".format(*s["layers"]), f"{s['parameters']:,}", *(f"{s[f] / 1e9:.2f}" for f in fields)]
        + ["yes" if s["fits"] else "no"]
        for s in plan["stages"]
    ]
    widths = [max(map(len, column)) for column in zip(names, *rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [names, *rows]]
    lines += ["", "GB (10^9 bytes) and parameters of one rank; * estimated"]
    adapters = f", {plan['adapters']:,} of adapters" if plan["adapters"] else ""
    copies = ", ".join(f"{name} {count:,}" for name, count in plan["copies"].items())
    besides = f"besides, over all ranks of a replica: copies {copies or 0}; padding {plan['padding']:,}"
    lines.append(f"{plan['parameters']:,} parameters{adapters}; {besides}")
    if args.inference:
        lines.append(f"context {args.max_context:,} tokens, one request; at most {plan['largest_context']:,} fit")
    else:
        bubble, m = f"{100 * plan['bubble']:.1f} %", plan["micro_batches"]
        lines.append(f"bubble {bubble} of the time: {args.pp} stages, {m} micro-batches a step")
    lines.append(f"time on {args.gpu.upper()}s, on paper:")
    lines += [
        f"  {name}: {human(low)} at least, about {human(guess)}" for name, (low, guess) in plan["seconds"].items()
    ]
    lines.append(f"{'fits' if plan['fits'] else 'does not fit'} on {plan['gpus']} × {args.gpu_memory_gb:g} GB")
    return "\n".join(lines)


def human(seconds: float) -> str:
    unit, size = next((pair for pair in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= pair[1]), ("ms", 1e-3))
    return f"{seconds / size:.1f} {unit}"


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, prog="parallel.py", usage="%(prog)s --plan --config CONFIG.json [options]")
    add = parser.add_argument_group("what to plan").add_argument
    add("--plan", action="store_true", required=True, help="the only thing that parallel.py does as a program")
    add("--config", required=True, metavar="CONFIG.json", help="config.json or params.json of the model")
    add("--tp", type=SIZE, default=1, metavar="N", help="tensor-parallel size")
    add("--pp", type=SIZE, default=1, metavar="N", help="pipeline-parallel size")
    add("--dp", type=SIZE, default=1, metavar="N", help="data-parallel size")
    add("--gpu", choices=[*GPUS], default="h100", help="whose published speed to reckon with")
    add("--gpu-memory-gb", type=number(float, 0, 1e6, above=True), metavar="F", help="10^9 bytes; default: the GPU's")
    add("--json", action="store_true", help="one JSON object on stdout")
    add = parser.add_argument_group("training, as with train.py").add_argument
    add("--max-length", type=SIZE, metavar="N", help="tokens of a sample; default 2048, or the model's context")
    add("--micro-batch-size", type=SIZE, default=1, metavar="N", help="samples that go through the model together")
    add("--global-batch-size", type=SIZE, default=64, metavar="N", help="samples a step, which decide the bubble")
    add("--activation-checkpointing", action="store_true", help="compute activations twice, to hold fewer")
    add("--sequence-parallel", action="store_true", help="norms and residuals split along the tokens")
    add("--freeze", nargs="+", default=[], choices=sorted(FREEZABLE), metavar="NAME", help=", ".join(FREEZABLE))
    add("--lora-rank", type=SIZE, metavar="N", help="adapters of this rank; weights frozen, FP8 ones as they are")
    add = parser.add_argument_group("generation, as with generate.py").add_argument
    add("--inference", action="store_true", help="plan generate.py with one request, not train.py")
    add("--weights", choices=["fp8", "dequantized"], help="FP8 weights in memory; default: as stored")
    add("--max-context", type=SIZE, metavar="N", help="tokens; default: the model's context")
    args = parser.parse_args(argv)
    args.gpu_memory_gb = args.gpu_memory_gb or GPUS[args.gpu].gigabytes
    training = args.freeze or args.activation_checkpointing or args.sequence_parallel or args.max_length
    if args.inference and (args.dp > 1 or training or args.lora_rank):
        flags = "--dp, --freeze, --activation-checkpointing, --sequence-parallel, --max-length and --lora-rank"
        raise UserError(f"{flags} are for training, not --inference")
    if not args.inference and (args.weights or args.max_context):
        raise UserError("--weights and --max-context go with --inference")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    config = read_config(args.config)
    limit = config.max_position_embeddings
    args.max_length, args.max_context = args.max_length or min(2048, limit), args.max_context or limit
    if max(args.max_length, args.max_context) > limit:
        raise UserError(f"this model's context is {limit} tokens; --max-length and --max-context go up to that")
    if args.weights == "fp8" and not config.fp8:
        raise UserError(f"{args.config}: its weights are not FP8; leave out --weights fp8")
    plan = make_plan(config, args)
    print(json.dumps(plan) if args.json else show(plan, args))
