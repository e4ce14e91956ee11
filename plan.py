"""What a topology needs, before anyone rents it: memory per rank, stage by stage. `python parallel.py --plan`.

Every rank's part of the model is built with the real classes on the `meta` device, where a tensor has a shape but no
memory, so the counts of parameters, weights, gradients and optimizer state are those of a real run. Layers are alike:
one of a stage's is built, and counted as many times as there are. Two columns are not counted but estimated: RESERVE,
and activations, term by term in the functions below. Against small real runs on a
CPU the estimate is 0.9 to 1.4 times what tensors took at the worst moment (`tests/test_plan.py`).

Activations of a training step have three parts:

- What is *held*: a micro-batch's activations, from its forward to its backward pass. The schedule (`pipeline.py`) keeps
  min(p - s, m) of the m micro-batches on stage s of p. Each costs what its layers keep for the backward pass, or with
  activation checkpointing only each layer's input.
- What comes and goes at the worst *moment*: a layer's backward pass, and with activation checkpointing its recomputed
  inside; on the first stage the vision tower's pass, on the last one the logits.
- The messages between stages.

Images are taken at their worst, as if every token came from one. Adam needs room too, but when activations are gone:
the larger of the two counts.

`check_memory` holds the same numbers against the memory that is there, when a program is about to build its model.
"""

import argparse
import contextlib
import json
import math
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from checkpoint import FREEZABLE, Held, held_tensors, is_trained
from config import Config, TopologyError, UserError, read_config
from engine import CHUNK, LOGIT_ROWS
from fp8 import BLOCK
from launch import SIZE, Parser, gather_objects, number, together
from model import MASK_ELEMENTS, MistralMedium, add_adapters
from optimizer import BUCKET
from parallel import Place
from vision import PATCHES_AT_ONCE

RESERVE = 2_000_000_000  # bytes per GPU: CUDA context, libraries' workspaces, NCCL's buffers, what the allocator wastes

MOST_RANKS = 1024  # a smallest topology is looked for up to here

BF16, FP32 = 2, 4  # bytes per number


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
    activation_bytes: int = 0  # an estimate
    reserve_bytes: int = RESERVE
    fits: bool = True

    @property
    def peak_bytes(self) -> int:
        return sum(value for name, value in vars(self).items() if name.endswith("_bytes"))


def make_plan(config: Config, args: argparse.Namespace) -> dict:
    """The plan as the JSON object that --json prints. Raises UserError where the topology does not divide the model."""
    keep_fp8 = config.fp8 and (args.weights != "dequantized" if args.inference else bool(args.lora_rank))
    counts, stages, memory = Counter(), [], args.gpu_memory_gb * 1e9
    for stage_places in places(args.tp, args.pp, args.dp):
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
    }
    if args.inference:
        # Of the columns only the cache grows with the context (activations stop growing at one chunk of the prompt).
        rooms = [memory - (stage.peak_bytes - stage.cache_bytes) for stage in stages]
        contexts = [int(room * args.max_context / stage.cache_bytes) for room, stage in zip(rooms, stages)]
        plan["largest_context"] = max(0, min(config.max_position_embeddings, *contexts))
    else:
        plan["micro_batches"] = m = count_micro_batches(args, args.dp)
        plan["bubble"] = (args.pp - 1) / (m + args.pp - 1)  # see pipeline.py
    return plan


def places(tp: int, pp: int, dp: int = 1) -> list[list[Place]]:
    """One replica's places, stage by stage, without process groups: enough to build models on `meta`."""
    meta = torch.device("meta")
    return [[Place(s * dp * tp + t, t, tp, s, pp, dp_size=dp, device=meta) for t in range(tp)] for s in range(pp)]


def count_micro_batches(args: argparse.Namespace, dp: int) -> int:
    """How many a replica runs per step; of the replica that has most."""
    return math.ceil(math.ceil(args.global_batch_size / args.micro_batch_size) / dp)


def plan_rank(
    config: Config, place: Place, args: argparse.Namespace, keep_fp8: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[StagePlan, Counter]:
    """What the rank at `place` needs, and what its parameters count as: "parameters" or "adapters" where it owns them,
    a kind of copy where another rank does, and "padding", the zeros past the end of a tensor cut into equal parts.

    Raises TopologyError where the topology does not divide the model.
    """
    layers = place.layers(config.num_hidden_layers)
    repeats = {"layers.": len(layers)}
    one = replace(config, num_hidden_layers=place.pp_size)  # a layer on each stage
    if config.vision is not None:
        repeats["vision_tower.transformer.layers."] = config.vision.num_hidden_layers
        one = replace(one, vision=replace(config.vision, num_hidden_layers=1))
    model = MistralMedium(one, replace(place, device=torch.device("meta")), dtype, keep_fp8)
    if args.lora_rank:
        add_adapters(model, args.lora_rank, 1.0)

    def times(name: str) -> int:  # how many tensors the one of this name stands for
        return next((count for prefix, count in repeats.items() if name.startswith(prefix)), 1)

    weights = sum(times(name) * x.nbytes for name, x in [*model.named_parameters(), *model.named_buffers()])
    if config.activation_scheme == "static":  # the loader adds the scales of activations
        weights += sum(FP32 * times(name) for name, _ in model.named_buffers() if name.endswith(".weight_scale"))
    held, counts = held_tensors(model), Counter()
    for tensor in held:
        inside = math.prod(tensor.part.shape) // tensor.part.shape[tensor.part.dim] * tensor.part.length
        counts[kind_of(tensor)] += times(tensor.name) * inside
        counts["padding"] += times(tensor.name) * (tensor.parameter.numel() - inside)
    parameters = sum(times(tensor.name) * tensor.parameter.numel() for tensor in held)
    stage = StagePlan(place.pp_rank, [layers[0], layers[-1]], parameters, weights)
    if args.inference:
        cache = model.new_cache(1, args.max_context)
        stage.cache_bytes = len(layers) * (cache.keys.nbytes + cache.values.nbytes)
        activations = inference_activations(config, place, args.max_context, keep_fp8)
    else:
        freeze = list(FREEZABLE) if args.lora_rank else args.freeze
        trained = [t for t in held if is_trained(t.name, freeze) or (args.lora_rank and ".adapter." in t.name)]
        total = sum(times(tensor.name) * tensor.parameter.numel() for tensor in trained)
        # In FP32 (see optimizer.py): the sum of gradients; the master weight and Adam's two moments.
        stage.gradient_bytes, stage.optimizer_bytes = FP32 * total, 3 * FP32 * total
        shape = (args.micro_batch_size, args.max_length, count_micro_batches(args, place.dp_size))
        passes = training_activations(config, place, *shape, args.activation_checkpointing, freeze, keep_fp8)
        largest = max((tensor.parameter.numel() for tensor in trained), default=0)
        activations = max(passes, adam_activations(total, largest))
    stage.activation_bytes = activations * dtype.itemsize // BF16
    return stage, counts


def kind_of(tensor: Held) -> str:
    if tensor.owner:
        return "adapters" if ".adapter." in tensor.name else "parameters"
    if ".adapter." in tensor.name:
        return "whole factors of adapters"
    if tensor.name.startswith("embed_tokens."):
        return "tied embedding"
    if tensor.sharers > 1:
        return "key/value heads"
    return "norms" if len(tensor.part.shape) == 1 else "patch_conv"


# ----------------------------------------------------------------------------------------- what is estimated


def layer_activations(config: Config, tp: int, tokens: int) -> int:
    """Bytes that a decoder layer keeps for its backward pass: what its operations need again to form gradients."""
    heads, kv_heads = config.num_attention_heads // tp, max(1, config.num_key_value_heads // tp)
    # Attention and MLP begin with a norm. It keeps x, x / rms(x) and that times the norm's weight, whole on each rank.
    width = 2 * 3 * config.hidden_size
    # As wide as the query heads: q after the rotation, attention's result (H, T, D), and that again with heads side by
    # side. As the key/value heads: k after the rotation, and v. Scores: none, the fused kernel computes them anew.
    width += (3 * heads + 2 * kv_heads) * config.head_dim
    # gate, silu(gate), up, and the product of the last two.
    width += 4 * config.intermediate_size // tp
    # In FP32: what each norm divided by, and from attention the logarithm of each head's sum of exponentials.
    return tokens * (BF16 * width + FP32 * (2 + heads))


def layer_backward(config: Config, tp: int, tokens: int) -> int:
    """Bytes that come and go while one layer's backward pass runs."""
    C, F, q = config.hidden_size, config.intermediate_size // tp, config.num_attention_heads * config.head_dim // tp
    inside = 3 * F + 3 * C  # gradients of the product, of gate and of up; of the residual, and of a norm in and out
    largest = max(F, q) * C  # one weight's gradient, before it is added to its sum in FP32
    return BF16 * (tokens * inside + largest)


def vision_layer_activations(config: Config, tp: int, patches: int) -> int:
    """As `layer_activations`, for a layer of the tower, which has as many key/value heads as query heads."""
    v = config.vision
    width = 2 * 3 * v.hidden_size + 5 * v.hidden_size // tp + 4 * v.intermediate_size // tp
    return patches * (BF16 * width + FP32 * (2 + v.num_attention_heads // tp))


def vision_pass(config: Config, tp: int, patches: int) -> int:
    """Bytes at the worst moment of a forward pass that keeps nothing."""
    v = config.vision
    outside = 3 * v.hidden_size  # the residual, and the norm's two
    attention = 7 * v.hidden_size  # q, k and v, q and k rotated, the result twice
    return BF16 * patches * (outside + max(attention, 3 * v.intermediate_size) // tp)  # or gate, up and their product


def training_activations(
    config: Config,
    place: Place,
    micro_batch: int,
    length: int,
    micro_batches: int,
    checkpointing: bool,
    freeze: Sequence[str],
    keep_fp8: bool = False,
) -> int:
    """Bytes at the worst moment of a step's forward and backward passes, for a rank at `place`.

    `micro_batch` samples of `length` tokens go through together, `micro_batches` times per step. What adapters keep is
    left out: a few numbers per token.
    """
    tp, tokens = place.tp_size, micro_batch * length
    row = BF16 * tokens * config.hidden_size  # hidden states
    inside = layer_activations(config, tp, tokens)
    held = len(place.layers(config.num_hidden_layers)) * (row if checkpointing else inside)
    moment = layer_backward(config, tp, tokens) + (inside if checkpointing else 0)
    if keep_fp8:  # one of the frozen weights at a time is there in BF16 too, and a block of it in FP32
        heads = config.num_attention_heads * config.head_dim
        moment += BF16 * config.hidden_size * max(config.intermediate_size, heads) // tp + FP32 * BLOCK
    if config.vision is not None and place.first_stage:
        v = config.vision
        patches = tokens * v.spatial_merge_size**2
        once = vision_pass(config, tp, patches)
        if not {"vision_tower", "projector"} <= set(freeze):
            # The projector keeps what its norm does (x, x / rms(x), times the weight) and the patches in the order of
            # their cells; of each cell the merged vector, linear_1's output and the GELU of that.
            held += BF16 * (4 * patches * v.hidden_size + tokens * (v.hidden_size + 2 * config.hidden_size // tp))
        if "vision_tower" not in freeze:
            inside = vision_layer_activations(config, tp, patches)
            held += v.num_hidden_layers * (BF16 * patches * v.hidden_size if checkpointing else inside)
            once += inside
        moment = max(moment, once)
    if place.last_stage:
        vocabulary = -(-config.vocab_size // tp)
        held += 4 * row  # the last layer's output, its rows that have targets, and the norm's two
        # Logits in BF16 and in FP32, and the gradient of the head's weight.
        moment = max(moment, tokens * vocabulary * (BF16 + FP32) + BF16 * vocabulary * config.hidden_size)
    messages = 4 * row if place.pp_size > 1 else row  # hidden states and gradients, to and from the neighbours
    return min(place.pp_size - place.pp_rank, micro_batches) * held + moment + messages


def adam_activations(trained: int, largest: int) -> int:
    """Bytes of an Adam step beyond its state: one FP32 tensor as large as the largest bucket, for so many parameters in
    all and in the largest tensor."""
    return FP32 * max(largest, min(BUCKET, trained))


def inference_activations(config: Config, place: Place, context: int, keep_fp8: bool) -> int:
    """Bytes at the worst moment of a prefill chunk; nothing is kept from layer to layer but hidden states."""
    tp, tokens = place.tp_size, min(CHUNK, context)
    C, F, q = config.hidden_size, config.intermediate_size // tp, config.num_attention_heads * config.head_dim // tp
    # Attention: q, k, v before and after the rotation, never more than 6 times q. MLP: gate, up and their product.
    # The mask: a bool per element, and the kernel's version of it in BF16.
    moment = BF16 * tokens * max(6 * q, 3 * F) + 3 * MASK_ELEMENTS
    if keep_fp8:
        # Where the GPU multiplies FP8: an input in FP32, over its scale, and in FP8. Elsewhere one weight in BF16.
        moment += max(tokens * (2 * FP32 + 1) * max(C, F, q), BF16 * C * max(F, q) + FP32 * BLOCK)
    if config.vision is not None and place.first_stage:
        v = config.vision
        largest = (v.image_size // v.patch_size) ** 2
        most = min(context * v.spatial_merge_size**2, max(PATCHES_AT_ONCE, largest))
        moment = max(moment, vision_pass(config, tp, most))
    if place.last_stage:  # logits in BF16 and FP32, and their log-softmax
        moment = max(moment, LOGIT_ROWS * -(-config.vocab_size // tp) * (BF16 + 2 * FP32))
    return 4 * BF16 * tokens * C + moment  # hidden states: before and after, normalized, being sent


# ---------------------------------------------------------------------------------------- before a model is built


def check_memory(config: Config, place: Place, args: argparse.Namespace, keep_fp8: bool) -> int:
    """Refuse a model whose weights alone do not fit here, and warn where the run's estimate does not.

    `args` are those of generate.py or train.py. A GPU is a rank's own; on a CPU all ranks of a machine share its
    memory. Every rank has to come here: they find the tightest device together. Raises UserError on all. Returns the
    bytes of this rank's plan.
    """
    wanted = argparse.Namespace(**{**vars(parse_args(["--plan", "--config", ""])), **vars(args)})
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


def cpu_memory() -> float:
    """Bytes that are free on this machine, within the limits that Slurm or a container sets (control groups)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = sum(1024 * int(line.split()[1]) for line in file if line.startswith(("MemAvailable", "SwapFree")))
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return math.inf
    for _, kind, path in groups:
        if kind in ("", "memory"):  # version 2 and version 1
            folder, name = f"/sys/fs/cgroup/{kind}{path}", "memory.limit_in_bytes" if kind else "memory.max"
            while len(folder) >= len("/sys/fs/cgroup"):
                with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, name)) as file:
                    free = min(free, int(file.read()))  # ValueError: "max", no limit
                folder = os.path.dirname(folder)
    return free


# ----------------------------------------------------------------------------------------------- the program


def show(plan: dict, args: argparse.Namespace) -> str:
    """The plan as a table."""
    middle = ["KV cache"] if args.inference else ["gradients", "optimizer"]
    fields = ["cache_bytes"] if args.inference else ["gradient_bytes", "optimizer_bytes"]
    names = ["stage", "layers", "parameters", "weights", *middle, "activations*", "reserve*", "peak", "fits"]
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
    lines.append(
        f"{plan['parameters']:,} parameters{adapters}; besides, over all ranks of a replica: copies {copies or 0}; "
        f"padding {plan['padding']:,}"
    )
    if args.inference:
        largest = f"{plan['largest_context']:,}"
        lines.append(f"context {args.max_context:,} tokens, one request; the largest that fits: {largest}")
    else:
        bubble, m = f"{100 * plan['bubble']:.1f} %", plan["micro_batches"]
        lines.append(f"bubble {bubble} of the time: {args.pp} stages, {m} micro-batches a step")
    lines.append(f"{'fits' if plan['fits'] else 'does not fit'} on {plan['gpus']} × {args.gpu_memory_gb:g} GB")
    return "\n".join(lines)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="parallel.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--plan", action="store_true", required=True)
    add("--config", required=True, metavar="CONFIG.json", help="config.json or params.json of the model")
    add("--tp", type=SIZE, default=1, metavar="N", help="tensor-parallel size")
    add("--pp", type=SIZE, default=1, metavar="N", help="pipeline-parallel size")
    add("--dp", type=SIZE, default=1, metavar="N", help="data-parallel size")
    add("--gpu-memory-gb", type=number(float, 0, 1e6, above=True), default=80.0, metavar="F", help="10^9 bytes a GPU")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--max-length", type=SIZE, metavar="N", help="tokens of a sample; default 2048, or the model's context")
    add("--micro-batch-size", type=SIZE, default=1, metavar="N")
    add("--global-batch-size", type=SIZE, default=64, metavar="N", help="samples a step, which decide the bubble")
    add("--activation-checkpointing", action="store_true")
    add("--freeze", nargs="+", default=[], choices=sorted(FREEZABLE), metavar="NAME", help=", ".join(FREEZABLE))
    add("--lora-rank", type=SIZE, metavar="N", help="adapters of this rank; weights frozen, FP8 ones as they are")
    add("--inference", action="store_true", help="plan generate.py with one request, not train.py")
    add("--weights", choices=["fp8", "dequantized"], help="with --inference: FP8 weights in memory; default: as stored")
    add("--max-context", type=SIZE, metavar="N", help="with --inference: tokens; default: the model's context")
    args = parser.parse_args(argv)
    training = args.freeze or args.activation_checkpointing or args.max_length or args.lora_rank
    if args.inference and (args.dp > 1 or training):
        raise UserError(
            "--dp, --freeze, --activation-checkpointing, --max-length and --lora-rank are for training, not --inference"
        )
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
