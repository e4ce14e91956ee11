"""What a topology needs, before anyone rents it: memory per rank, and time.

    python parallel.py --plan --config CONFIG.json --tp 8 --pp 8
    python parallel.py --plan --config CONFIG.json --inference --tp 8 --gpu h200

Parameters, weights, gradients and optimizer state are counted on the real classes, built on the `meta` device, where a
tensor has a shape but no memory: one layer of the stage and of the tower stands for all of them. Activations follow
the formulas of activations.py, never too low and at most 10 % too high. RESERVE is an estimate.

Time on paper, for text alone, from published peaks (`GPUS`). The *floor* is max(operations / peak, bytes / bandwidth)
of matrix products and attention alone. The *estimate* is what a GPU may be hoped to do:

    product: max(operations / (0.7 · peak), bytes / (0.8 · bandwidth), 3 µs)
    other kernels: max(3 µs for each, bytes / (0.8 · bandwidth))        message: 15 µs + bytes / (0.7 · link)

With p stages, m micro-batches or chunks, and t the time of one on the slowest stage, a token takes the sum of all
stages, a prefill (m + p - 1) · t, a step (m + p - 1) · t + Adam's traffic. A token is also estimated with the kernels
of vLLM (`VLLM`), which joins more of them to one. Files are read and written at `DISK` bytes/s by each machine.
"""

import argparse
import contextlib
import itertools
import json
import math
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from fp8 import has_fp8_matmul
from model import CHUNK, Config, MistralMedium
from parallel import Place, TopologyError
from runtime.activations import (
    FP32,
    batch_shape,
    count_micro_batches,
    decoder_layer,
    head_training_bytes,
    prompt_bytes,
    training_bytes,
)
from runtime.checkpoint import is_quantized, weight_bytes
from runtime.config import read_config
from runtime.draft import Head, sizes_of_head
from runtime.files import UserError
from runtime.launch import SIZE, Parser, gather_objects, number, together
from runtime.lora import add_adapters
from runtime.memory import cpu_memory
from runtime.optimizer import BUCKET, FREEZABLE, STATE, Held, held_tensors, is_trained
from vision import build_model

MOST_RANKS = 1024  # a smallest topology is looked for up to here

RESERVE = 2_000_000_000  # bytes per GPU: CUDA context, libraries' workspaces, NCCL's buffers, what the allocator wastes


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
    reads: int = 0  # of the checkpoint
    saves: int = 0  # of a saved state, if it has no replicas to share that with
    exports: int = 0  # of model/

    @property
    def peak_bytes(self) -> int:
        return sum(value for name, value in vars(self).items() if name.endswith("_bytes"))


def make_plan(config: Config, args: argparse.Namespace) -> dict:
    """The plan as the JSON object that --json prints. Raises UserError where the topology does not divide the model."""
    keep_fp8, memory = config.fp8 and stays_fp8(config, args), args.gpu_memory_gb * 1e9
    grid = places(args.tp, args.pp, args.dp, args.sequence_parallel)
    ranks = {place: plan_rank(config, place, args, keep_fp8) for stage in grid for place in stage}
    counts = sum((kinds for _, kinds in ranks.values()), Counter())
    largest = [max((ranks[place][0] for place in stage), key=lambda rank: rank.peak_bytes) for stage in grid]
    stages = [asdict(rank) | {"peak_bytes": rank.peak_bytes, "fits": rank.peak_bytes <= memory} for rank in largest]
    plan = {
        "gpus": args.tp * args.pp * args.dp,
        **{name: counts.pop(name, 0) for name in ("parameters", "adapters", "padding")},
        "copies": dict(counts),  # what is left, by kind
        "stages": stages,
        "fits": all(stage["fits"] for stage in stages),
        "gpu": args.gpu,
        "seconds": make_times(config, args, keep_fp8, max(stage["gradient_bytes"] // FP32 for stage in stages)),
        "files": make_files(on_machines(ranks, args.dp), args.dp),
    }
    if not plan["fits"]:
        like = Place(dp_size=args.dp, sequence_parallel=args.sequence_parallel)
        plan["smallest"] = smallest_topology(lambda place: plan_rank(config, place, args, keep_fp8)[0], memory, like)
    return plan | (plan_context(config, args, largest) if args.inference else plan_bubble(args))


def plan_context(config: Config, args: argparse.Namespace, ranks: list[StagePlan]) -> dict[str, int]:
    # Of the columns only the cache grows with the context (activations stop growing at one chunk of the prompt).
    grow = min(1 + (args.gpu_memory_gb * 1e9 - rank.peak_bytes) / rank.cache_bytes for rank in ranks)
    return {"largest_context": max(0, min(config.max_position_embeddings, int(args.max_context * grow)))}


def plan_bubble(args: argparse.Namespace) -> dict[str, float]:
    m = count_micro_batches(args, args.dp)
    return {"micro_batches": m, "bubble": (args.pp - 1) / (m + args.pp - 1)}  # see parallel.Pipeline


def stays_fp8(config: Config, args: argparse.Namespace) -> bool:
    """Whether FP8 weights stay as they are. Where --weights does not say so: as generate.py does, see `keeps_fp8`."""
    if not args.inference:
        return bool(args.lora_rank)
    if args.weights or GPUS[args.gpu].fp8:
        return args.weights != "dequantized"
    return not make_plan(config, argparse.Namespace(**vars(args) | {"weights": "dequantized"}))["fits"]


def places(tp: int, pp: int, dp: int = 1, sequence: bool = False) -> list[list[Place]]:
    """One replica's places, stage by stage, without process groups: enough to build models on `meta`."""
    meta = torch.device("meta")
    more = dict(dp_size=dp, device=meta, sequence_parallel=sequence and tp > 1)
    return [[Place(s * dp * tp + t, t, tp, s, pp, **more) for t in range(tp)] for s in range(pp)]


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
    scales = config.activation_scheme == "static"  # of activations, which the loader adds

    def times(name: str) -> int:
        """How many tensors the one of this name stands for."""
        if name.startswith("layers."):
            return len(layers)
        return v.num_hidden_layers if ".layers." in name else 1

    weights = sum(
        times(name) * (x.nbytes + scales * FP32 * name.endswith(".weight_scale"))
        for name, x in [*model.named_parameters(), *model.named_buffers()]
    )
    held, counts = [(tensor, times(tensor.name)) for tensor in held_tensors(model)], Counter()
    for tensor, count in held:
        counts[kind_of(tensor)] += count * inside_of(tensor)
        counts["padding"] += count * (tensor.size - inside_of(tensor))
    stage = StagePlan(place.pp_rank, [layers[0], layers[-1]], sum(counts.values()), weights)
    stage.reads = stored_bytes(held, config.fp8)
    head = add_head(stage, config, args, model, keep_fp8 and args.inference) if args.draft_layers else None
    if args.inference:
        stage.cache_bytes = len(layers) * model.new_cache(1, args.max_context).nbytes
        stage.cache_bytes += head.new_cache(1, args.max_context).nbytes if head else 0
        products = keep_fp8 and GPUS[args.gpu].fp8 > 0
        stage.activation_bytes = prompt_bytes(config, place, args.max_context, keep_fp8, products, dtype.itemsize)
    elif head:
        passes = head_training_bytes(config, head.config, place, args, keep_fp8, dtype.itemsize)
        plan_training(stage, passes, [(tensor, 1) for tensor in held_tensors(head)])
    else:
        plan_model_training(stage, config, place, args, held, keep_fp8, dtype.itemsize)
    return stage, counts


def add_head(stage: StagePlan, config: Config, args: argparse.Namespace, model: MistralMedium, keep_fp8: bool) -> Head:
    """A draft's head beside `model`, which is added to the parameters and weights of `stage`."""
    head = Head(sizes_of_head(config, args.draft_layers), model.place, model.dtype, keep_fp8, keep_fp8)
    stage.parameters += sum(parameter.numel() for parameter in head.parameters())
    stage.weight_bytes += weight_bytes(head)
    return head


def plan_model_training(
    stage: StagePlan, config: Config, place: Place, args: argparse.Namespace, held: list, keep_fp8: bool, size: int
) -> None:
    """Adds to `stage` what training the model takes, or adapters in it. `held`: tensors, and how many of each."""
    freeze = tuple(FREEZABLE if args.lora_rank else args.freeze)
    passes = training_bytes(config, place, args, freeze, keep_fp8, size)
    plan_training(stage, passes, [(t, n) for t, n in held if ".adapter." in t.name or is_trained(t.name, freeze)])
    owned = [(tensor, count) for tensor, count in held if tensor.owner]
    stage.exports = stored_bytes(owned, getattr(args, "export", "") == "fp8")


def plan_training(stage: StagePlan, passes: int, trained: list[tuple[Held, int]]) -> None:
    """Adds to `stage` what training takes. `passes`: bytes of activations; `trained`: tensors, and how many of each."""
    # In FP32 (see optimizer.py): the sum of gradients; the master weight and Adam's two moments.
    stage.gradient_bytes = FP32 * sum(count * tensor.size for tensor, count in trained)
    stage.optimizer_bytes = 3 * stage.gradient_bytes
    stage.saves = len(STATE) * FP32 * sum(count * inside_of(tensor) for tensor, count in trained if tensor.owner)
    # After the passes the shares of a gradient are added up in whole tensors, a bucket at a time.
    shared = [math.prod(tensor.part.shape) for tensor, count in trained if tensor.sharers > 1 for _ in range(count)]
    stage.activation_bytes = max(passes, FP32 * max([min(BUCKET, sum(shared)), *shared]))


def inside_of(tensor: Held) -> int:
    """Its numbers without padding."""
    shape, dim = tensor.part.shape, tensor.part.dim
    return math.prod(shape) // shape[dim] * tensor.part.length


def stored_bytes(held: list[tuple[Held, int]], fp8: bool) -> int:
    """In a checkpoint's files; adapters are not there, or merged into their weights."""
    weights = [(tensor, count) for tensor, count in held if ".adapter." not in tensor.name]
    return sum(count * inside_of(t) * (1 if fp8 and is_quantized(t.name) else BF16) for t, count in weights)


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
    gigabytes: float  # that CUDA has for programs; 80 GB are sold as 80 · 2^30 bytes


GPUS = {
    "a100": Gpu(312e12, 0, 2.039e12, 300e9, 25e9, 85),
    "h100": Gpu(989e12, 1979e12, 3.35e12, 450e9, 50e9, 85),
    "h200": Gpu(989e12, 1979e12, 4.8e12, 450e9, 50e9, 149),
}

NODE = 8  # GPUs of a machine

PRODUCTS, COPIES, LINKS = 0.7, 0.8, 0.7  # what is reached of them

KERNEL, MESSAGE = 3e-6, 15e-6  # seconds that each takes at least


@dataclass(frozen=True)
class Kernels:
    """How many a layer's forward pass launches beside its products, and what an all-reduce inside a node takes."""

    others: int
    quantizing: int  # inputs of products
    seconds: float = MESSAGE


OURS = Kernels(10, 4)  # norms, rotation, cache, silu, residuals; where torch lacks flash-decoding, three more

# Norm, residual and quantizing are one kernel, silu, product and quantizing another, and the rotation a third, beside
# cache and one quantizing; its own all-reduce ("one-shot") saves about 6 µs of NCCL's.
VLLM = Kernels(5, 1, 9e-6)

ENDS = 22  # kernels of a stage before its layers, in a step; and of the last one after them, to sample the next token

DISK = 3e9  # bytes/s between a machine and its files, assumed: an NVMe disk, or a share of a network file system

BF16 = 2  # bytes

SLOW = 10  # seconds from which on a run says how long its files take

ADAM_BYTES = 82  # that a step of optimizer.py reads and writes per trained weight

ACCEPTED = (1.5, 2, 2.5, 3)  # tokens per step that a draft may bring

RECIPE_STEPS, MEDPIX = 100, 20_500  # of the published fine-tune; samples of its data


@dataclass(frozen=True)
class Work:
    """Passes over `rows` rows of `length` tokens, which attend to themselves and to the `start` tokens before."""

    rows: int
    length: int
    start: int = 0
    fp8: bool = False  # weights; multiplied so in inference, where the GPU can
    forward: int = 1  # passes; 2 where activations are computed again
    backward: int = 0  # products for each one forward: the input's gradient, and the weight's if that is trained
    rank: int = 0  # of adapters


def stage_times(config: Config, place: Place, gpu: Gpu, work: Work, kernels: Kernels = OURS) -> torch.Tensor:
    """(floor, estimate), in seconds, of a stage's passes over N tokens. Per token and layer:

    - four products, 2 · in · out operations each, which read the weight once; backward as many for the input's gradient
      and, where weights are trained, for theirs. In inference one position goes through the head; in training all.
    - attention: 4 D operations per pair of query and key and head; in the backward pass, which forms the scores again,
      10 D.
    - other kernels read and write, in bytes: norms and residuals 8 C + 12 C; the rotation (roll, times cosine, plus
      times sine) 4 + 4 + 6 for each number of q and k; the cache 8 KV D; silu and product 4 F + 6 F; quantizing to FP8
      3 for each input of a product; without FP8 units converting 3 for each weight, whose product then takes 2, and
      scaling float32 sums 8 for each output; putting an adapter's output together, scaling and adding it 4 + 4 + 6 for
      each output. Backward, norms and residuals 12 C + 12 C, the rotation of a copy 4 Q + 14, silu, product and joining
      their gradients 6 F + 12 F + 8 F; and each trained weight's gradient is added to a float32 sum, 10 bytes. Logits
      in training: 52 bytes for each.
    - two all-reduces of 2 C bytes forward, two backward, in a ring: every part travels twice, but for a rank's own.
      Computing a layer again ends before down_proj. One message goes to each neighbouring stage.
    """
    (C, A, Q, F, _), forward, backward = decoder_layer(config, place), work.forward, work.backward
    N, KV, training, last = work.rows * work.length, (Q - A) // 2, backward > 0, place.last_stage
    layers, tp, V = len(place.layers(config.num_hidden_layers)), place.tp_size, config.vocab_size / place.tp_size
    fp8, again = work.fp8 and gpu.fp8 > 0 and not training, forward > 1 and not work.rank
    converts, adapters, scored = work.fp8 and not fp8, work.rank > 0, N if training else 1
    weights, inputs, outputs = C * (Q + A + 3 * F), 2 * C + A + F, Q + 2 * C + 2 * F
    both, keys, pairs = forward + training, work.start + work.length, N * (work.start + (work.length + 1) / 2)
    matrices = layers * (forward + backward - again * C * F / weights)
    launched = both * (kernels.others + kernels.quantizing * fp8 + 8 * converts + 20 * adapters)
    moved = both * (14 * (A + KV + adapters * outputs) + 20 * C + 8 * converts * outputs)
    moved += training * (4 * C + 4 * Q + 26 * F) + forward * (8 * KV + 10 * F + 3 * fp8 * inputs)
    peak, ends = gpu.fp8 if fp8 else gpu.bf16, inputs + outputs
    # How often, kernels, bytes, operations, operations per second
    computed = [
        (matrices, 4, (2 - fp8) * (weights + N * inputs) + 2 * N * outputs, 2 * N * weights, peak),
        (layers * (forward + 2.5 * training), 2, 4 * work.rows * keys * KV + 4 * N * A, 4 * pairs * A, gpu.bf16),
        (adapters * layers * (forward + 2), 4, 2 * N * ends, 2 * N * work.rank * ends, gpu.bf16),
        (last * (1 + backward), 1, 2 * (C * V + scored * (C + V)), 2 * scored * C * V, gpu.bf16),
        (layers, launched, N * moved, 0, 1),
        (layers, 0, (3 * converts * both + 10 * (backward > 1)) * weights, 0, 1),
        (1, ENDS * (1 + last), 52 * training * last * N * V, 0, 1),
    ]
    # How often, bytes, ranks among which they travel
    messages = [
        ((tp > 1) * (layers * (2 * both - again) + place.first_stage + last), 4 * (1 - 1 / tp) * N * C, tp),
        ((not last) + training * (not place.first_stage), 2 * N // place.token_parts * C, tp * place.pp_size),
    ]
    floor = about = 0.0
    for count, launches, nbytes, operations, peak in computed:
        compute, memory = operations / peak, nbytes / gpu.memory
        floor += count * max(compute, memory) * (operations > 0)
        about += count * max(compute / PRODUCTS, memory / COPIES, launches * KERNEL)
    for count, nbytes, ranks in messages:
        least, link = (MESSAGE, gpu.network) if ranks > NODE else (kernels.seconds, gpu.nvlink)
        about += count * (least + nbytes / LINKS / link)
    return torch.tensor([floor, about], dtype=torch.float64)


def make_times(config: Config, args: argparse.Namespace, keep_fp8: bool, trained: int) -> dict[str, list[float]]:
    """What takes how long: name -> [floor, estimate], in seconds. `trained`: the most weights that a rank trains."""
    grid = [stage[0] for stage in places(args.tp, args.pp, args.dp, args.sequence_parallel)]

    def stages(*shape: int, kernels: Kernels = OURS, config: Config = config, **more) -> torch.Tensor:
        """Of each stage: (pp, 2)."""
        work = Work(*shape, fp8=keep_fp8, **more)
        return torch.stack([stage_times(config, at, GPUS[args.gpu], work, kernels) for at in grid])

    times = answering_times(config, args, stages) if args.inference else training_times(args, stages, grid[0], trained)
    return {name: value.tolist() for name, value in times.items()}


def answering_times(config: Config, args: argparse.Namespace, stages: Callable[..., torch.Tensor]) -> dict:
    """Of a token, with other kernels and with a draft, too; and of prompts. `stages`: see `make_times`."""
    context, times = min(8192, args.max_context), {}
    token, guesses = f"a token after {context:,}", args.draft_tokens
    for note, kernels in (("", OURS), (", with vLLM's kernels", VLLM)):
        times[token + note] = stages(1, 1, context - 1, kernels=kernels).sum(0)
    if args.draft_layers:
        # A step: guesses and one more token. The head first reads all tokens of the last step; its `eagle_linear`,
        # a fifth of a layer, is left out.
        head = partial(stages, config=sizes_of_head(config, args.draft_layers))
        step = stages(1, 1 + guesses, context - 1) + head(1, 1 + guesses, context) + (guesses - 1) * head(1, 1, context)
        for count in (n for n in ACCEPTED if n <= 1 + guesses):
            times[f"{token}, with a draft that brings {count:g} a step"] = step.sum(0) / count
    for length in (n for n in (8192, 131072) if n <= args.max_context):
        slowest = (stages(1, CHUNK) + stages(1, CHUNK, length - CHUNK)).amax(0) / 2
        times[f"a prompt of {length:,}"] = (length // CHUNK + args.pp - 1) * slowest
    return times


def training_times(args: argparse.Namespace, stages: Callable[..., torch.Tensor], place: Place, trained: int) -> dict:
    gpu, whole = GPUS[args.gpu], not (args.lora_rank or "language_model" in args.freeze)
    passes = dict(forward=1 + args.activation_checkpointing, backward=1 + whole, rank=args.lora_rank or 0)
    slowest = stages(*batch_shape(args, place), **passes).amax(0)
    adam = torch.tensor([1, 1 / COPIES]) * ADAM_BYTES * trained / gpu.memory
    adam[1] += 2 * (args.dp - 1) / args.dp * FP32 * trained / gpu.network / LINKS  # gradients of replicas
    step = (count_micro_batches(args, args.dp) + args.pp - 1) * slowest + adam
    return {
        "a step": step,
        f"{RECIPE_STEPS} steps (the published fine-tune)": RECIPE_STEPS * step,
        f"an epoch of MedPix ({MEDPIX:,} samples)": math.ceil(MEDPIX / args.global_batch_size) * step,
    }


def on_machines(ranks: dict[Place, tuple[StagePlan, Counter]], replicas: int) -> list[tuple]:
    """The shares of `make_files`, of the `ranks` of one replica, NODE to a machine; many replicas are like a few."""
    few = min(replicas, NODE)
    shares = itertools.product(ranks.items(), range(few))
    return [
        (((place.pp_rank * few + replica) * place.tp_size + place.tp_rank) // NODE, place, plan)
        for (place, (plan, _)), replica in shares
    ]


def make_files(shares: list[tuple[object, object, StagePlan]], replicas: int) -> dict[str, list[float]]:
    """What is read and written: name -> [bytes in all, at most of a rank, seconds].

    `shares`: of each rank its machine, which part of the model it has, and its plan. The ranks of a machine read
    what they have in common once; replicas share the writing of a state; rank 0 writes model/.
    """
    reads, saves = Counter(), Counter()  # bytes of each machine
    for (machine, _), nbytes in {(machine, part): plan.reads for machine, part, plan in shares}.items():
        reads[machine] += nbytes
    for machine, _, plan in shares:
        saves[machine] += plan.saves / replicas
    whole = {part: plan for _, part, plan in shares}.values()
    read, saved, total = ([getattr(plan, name) for plan in whole] for name in ("reads", "saves", "exports"))
    files = {"loading": [sum(read), max(read), max(reads.values()) / DISK]}
    if any(saved):
        files["a saved state"] = [sum(saved), max(saved) / replicas, max(saves.values()) / DISK]
        files["model/"] = [sum(total), sum(total), sum(total) / DISK]
    return files


def show_files(files: dict[str, list[float]]) -> list[str]:
    return [
        f"{name}: {total / 1e9:,.1f} GB, at most {most / 1e9:,.1f} a rank, {human(seconds)}"
        for name, (total, most, seconds) in files.items()
    ]


def needs_of(config: Config, place: Place, args: argparse.Namespace, keep_fp8: bool) -> Callable[[Place], StagePlan]:
    """What a rank needs on a device like that of `place`, as a function of its place.

    `args` are those of generate.py or train.py.
    """
    wanted = argparse.Namespace(**{**vars(parse_args(["--plan", "--config", "-"])), **vars(args)})
    wanted.gpu = "h100" if has_fp8_matmul(place.device) else "a100"
    wanted.inference = not hasattr(args, "lora_rank")
    if wanted.inference:  # one request, of a chunk; the cache of more, or longer ones, comes on top
        longest = args.max_context or config.max_position_embeddings
        wanted.max_context = min(longest, CHUNK + (args.max_new_tokens or CHUNK))

    def needs(other: Place) -> StagePlan:
        stage, _ = plan_rank(config, other, wanted, keep_fp8, getattr(torch, args.dtype))
        stage.reserve_bytes = RESERVE if place.device.type == "cuda" else 0
        return stage

    return needs


def tightest_device(mine: StagePlan, place: Place) -> tuple[int, int, float, int]:
    """(bytes of weights, of the estimate, free, ranks) of the device that has least room. All ranks come together.

    A GPU is a rank's own; on a CPU all ranks of a machine share its memory.
    """
    room = torch.cuda.mem_get_info(place.device)[0] if place.device.type == "cuda" else cpu_memory()
    devices = defaultdict(Counter)
    numbers = dict(weights=mine.weight_bytes, peak=mine.peak_bytes, room=room, ranks=1)
    for device, more in gather_objects(((socket.gethostname(), str(place.device)), numbers)):
        devices[device].update(more)
    tightest = max(devices.values(), key=lambda device: device["peak"] / device["room"] * device["ranks"])
    weights, peak, room, ranks = tightest.values()
    return weights, peak, room / ranks, ranks  # each of them saw all of it


def keeps_fp8(config: Config, place: Place, args: argparse.Namespace, stored: bool) -> bool:
    """Whether generate.py keeps weights, which are `stored` in FP8, as they are. All ranks come together.

    --weights auto: on GPUs. Where one has no FP8 units, dequantized weights are twice as fast: only if they don't fit.
    """
    if args.weights != "auto" or not stored or place.device.type != "cuda":
        return args.weights == "fp8"
    if all(gather_objects(has_fp8_matmul(place.device))):
        return True
    needs = needs_of(config, place, args, keep_fp8=False)
    _, peak, room, _ = tightest_device(together(lambda: needs(place)), place)
    return peak > room


def check_memory(config: Config, place: Place, args: argparse.Namespace, keep_fp8: bool) -> int:
    """Refuse a model whose weights alone do not fit here, and warn where the run's estimate does not.

    `args` are those of generate.py or train.py. Every rank has to come here. Raises UserError on all. Returns the bytes
    of this rank's plan.
    """
    needs, gpu = needs_of(config, place, args, keep_fp8), place.device.type == "cuda"
    mine = together(lambda: needs(place))
    weights, peak, room, ranks = tightest_device(mine, place)
    if peak > room:
        what = advice(smallest_topology(needs, room / ranks), room / ranks)
        there = f"{room / 1e9:.1f} GB are free on {'the GPU' if gpu else 'the machine'}; {what}"
        if weights > room:
            raise UserError(f"the weights take {weights / 1e9:.1f} GB, but {there}")
        if place.rank == 0:
            print(f"caution: this may take {peak / 1e9:.1f} GB, but {there}", file=sys.stderr)
    say_files(mine, place, args)
    return mine.peak_bytes


def say_files(mine: StagePlan, place: Place, args: argparse.Namespace) -> None:
    """A line on stderr about the files that take long, if some do. All ranks come together."""
    shares = gather_objects((socket.gethostname(), (place.pp_rank, place.tp_rank), mine))
    files = make_files(shares, place.dp_size)
    if not args.ckpt:  # but for the small model of this repository nothing is read
        del files["loading"]
    slow = {name: numbers for name, numbers in files.items() if numbers[-1] >= SLOW}
    if slow and place.rank == 0:
        print(f"on paper, at {DISK / 1e9:g} GB/s a machine: {'; '.join(show_files(slow))}", file=sys.stderr)


def advice(topology: tuple[int, int] | None, room: float, replicas: int = 1) -> str:
    if not topology:
        return "no split makes it fit"
    tp, pp = topology
    processes = tp * pp * replicas
    return f"the smallest split that fits is --tp {tp} --pp {pp}, {processes} processes with {room / 1e9:.1f} GB each"


def smallest_topology(
    needs: Callable[[Place], StagePlan], room: float, like: Place = Place()
) -> tuple[int, int] | None:
    """(tp, pp) of the fewest ranks that have `room` bytes each; tp within a machine where there is a choice.

    `like` says whether there are replicas and sequence parallelism.
    """
    whole = needs(Place())
    fewest = math.ceil((whole.weight_bytes + whole.gradient_bytes + whole.optimizer_bytes) / max(1, room))
    step = NODE if fewest > 64 else 1  # whole machines
    for ranks in range(-(-max(1, fewest) // step) * step, MOST_RANKS + 1, step):
        for tp in sorted((n for n in range(1, ranks + 1) if ranks % n == 0), key=lambda n: (n > NODE, -n)):
            pp = ranks // tp
            # The first stage has the embedding and the tower, the last the head; and with 1F1B the earlier ones hold
            # more activations than the later ones.
            here = replace(like, tp_size=tp, pp_size=pp, sequence_parallel=like.sequence_parallel and tp > 1)
            some = [replace(here, pp_rank=stage) for stage in sorted({0, min(1, pp - 1), pp - 1})]
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


COLUMNS = {
    "weights": "weight_bytes",
    "KV cache": "cache_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
    "activations": "activation_bytes",
    "reserve*": "reserve_bytes",
    "peak": "peak_bytes",
}


def table(plan: dict, hidden: tuple[str, ...]) -> list[str]:
    """A row for each stage, without the `hidden` columns."""
    columns = [name for name in COLUMNS if name not in hidden]
    rows = [["stage", "layers", "parameters", *columns, "fits"]]
    for stage in plan["stages"]:
        first, last = stage["layers"]
        row = [str(stage["stage"]), f"{first}-{last}", f"{stage['parameters']:,}"]
        row += [f"{stage[COLUMNS[name]] / 1e9:.2f}" for name in columns]
        rows.append([*row, "yes" if stage["fits"] else "no"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def show(plan: dict, args: argparse.Namespace) -> str:
    """The plan as a table, and what there is to say of the whole."""
    adapters = f", {plan['adapters']:,} of adapters" if plan["adapters"] else ""
    copies = ", ".join(f"{name} {count:,}" for name, count in plan["copies"].items())
    besides = f"besides, over all ranks of a replica: copies {copies or 0}; padding {plan['padding']:,}"
    if args.inference:
        hidden = ("gradients", "optimizer")
        use = f"context {args.max_context:,} tokens, one request; at most {plan['largest_context']:,} fit"
    else:
        hidden, bubble, m = ("KV cache",), 100 * plan["bubble"], plan["micro_batches"]
        use = f"bubble {bubble:.1f} % of the time: {args.pp} stages, {m} micro-batches a step"
    fits = f"on {plan['gpus']} × {args.gpu_memory_gb:g} GB"
    if not plan["fits"]:
        fits += f"; {advice(plan['smallest'], args.gpu_memory_gb * 1e9, args.dp)}"
    return "\n".join(
        [
            *table(plan, hidden),
            "",
            "GB (10^9 bytes) and parameters of one rank; * estimated",
            f"{plan['parameters']:,} parameters{adapters}; {besides}",
            use,
            f"time on {args.gpu.upper()}s, on paper:",
            *(
                f"  {name}: {human(low)} at least, about {human(guess)}"
                for name, (low, guess) in plan["seconds"].items()
            ),
            f"files, at {DISK / 1e9:g} GB/s a machine:",
            *(f"  {line}" for line in show_files(plan["files"])),
            f"{'fits' if plan['fits'] else 'does not fit'} {fits}",
        ]
    )


def human(seconds: float) -> str:
    unit, size = next((pair for pair in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= pair[1]), ("ms", 1e-3))
    return f"{seconds / size:.1f} {unit}"


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, prog="parallel.py", usage="%(prog)s --plan --config CONFIG.json [options]")

    def size(flag: str, text: str, default: int | None = None) -> None:
        add(flag, type=SIZE, default=default, metavar="N", help=text)

    add = parser.add_argument_group("what to plan").add_argument
    add("--plan", action="store_true", required=True, help="the only thing that parallel.py does as a program")
    add("--config", required=True, metavar="CONFIG.json", help="config.json or params.json of the model")
    size("--tp", "tensor-parallel size", 1)
    size("--pp", "pipeline-parallel size", 1)
    size("--dp", "data-parallel size", 1)
    add("--gpu", choices=[*GPUS], default="h100", help="whose published speed to reckon with")
    add("--gpu-memory-gb", type=number(float, 0, 1e6, above=True), metavar="F", help="10^9 bytes; default: the GPU's")
    add("--json", action="store_true", help="one JSON object on stdout")
    add = parser.add_argument_group("training, as with train.py").add_argument
    size("--max-length", "tokens of a sample; default 2048, or the model's context")
    size("--micro-batch-size", "samples that go through the model together", 1)
    size("--global-batch-size", "samples a step, which decide the bubble", 64)
    add("--activation-checkpointing", action="store_true", help="compute activations twice, to hold fewer")
    add("--sequence-parallel", action="store_true", help="norms and residuals split along the tokens")
    add("--freeze", nargs="+", default=[], choices=sorted(FREEZABLE), metavar="NAME", help=", ".join(FREEZABLE))
    size("--lora-rank", "adapters of this rank; weights frozen, FP8 ones as they are")
    add = parser.add_argument_group("generation, as with generate.py").add_argument
    add("--inference", action="store_true", help="plan generate.py with one request, not train.py")
    add("--weights", choices=["fp8", "dequantized"], help="FP8 weights in memory; default: generate.py's")
    size("--max-context", "tokens; default: the model's context")
    size("--draft-layers", "layers of a draft head; the published one has 2")
    size("--draft-tokens", "guesses a step", 3)
    args = parser.parse_args(argv)
    args.gpu_memory_gb = args.gpu_memory_gb or GPUS[args.gpu].gigabytes
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Options that do not go together."""
    training = args.freeze or args.activation_checkpointing or args.sequence_parallel or args.max_length
    if args.inference and (args.dp > 1 or training or args.lora_rank):
        flags = "--dp, --freeze, --activation-checkpointing, --sequence-parallel, --max-length and --lora-rank"
        raise UserError(f"{flags} are for training, not --inference")
    if not args.inference and (args.weights or args.max_context or args.draft_layers):
        raise UserError("--weights, --max-context and --draft-layers go with --inference")


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    config = read_config(args.config)
    limit = config.max_position_embeddings
    args.max_length, args.max_context = args.max_length or min(2048, limit), args.max_context or limit
    if max(args.max_length, args.max_context) > limit:
        raise UserError(f"this model's context is {limit} tokens; --max-length and --max-context go up to that")
    if args.weights == "fp8" and not config.fp8:
        raise UserError(f"{args.config}: its weights are not FP8; leave out --weights fp8")
    if args.draft_layers and args.pp > 1:
        raise UserError("a draft works with tensor parallelism alone: leave out --pp, or --draft-layers")
    plan = make_plan(config, args)
    print(json.dumps(plan) if args.json else show(plan, args))
