"""What a topology needs, before anyone rents it: memory per rank, and time.

    python parallel.py --plan --config CONFIG.json --tp 8 --pp 8
    python parallel.py --plan --config CONFIG.json --inference --tp 8 --gpu h200

Every rank's part of the model is built with the real classes on the `meta` device, where a tensor has a shape but no
memory: parameters, weights, gradients and optimizer state are those of a real run. Activations and time come from
running it there, forward and backward, under a `Meter` (meter.py) that counts living bytes, operations and messages;
two of a stage's layers are built, and stand for the others. Images are taken at their worst, as if every token came
from one. Adam needs room too, but when activations are gone: the larger counts. RESERVE is an estimate.

Time on paper, for text alone. The *estimate* sums up kernels and messages at a GPU's published peaks (`GPUS`), with the
efficiencies of large products and copies, the launch of a kernel and NCCL's latency; the *floor* is
max(operations / peak, bytes / bandwidth) of matrix products and attention alone:

    kernel: max(operations / (0.7 · peak), bytes / (0.8 · bandwidth), 3 µs)     message: 15 µs + bytes / (0.7 · link)

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

from model import CHUNK, Config
from parallel import Place, TopologyError
from runtime.config import read_config
from runtime.files import UserError
from runtime.launch import SIZE, Parser, gather_objects, number, together
from runtime.lora import add_adapters
from runtime.memory import cpu_memory
from runtime.meter import COPIES, GPUS, LINKS, Gpu, Meter, infer_on_shapes, small, train_on_shapes
from runtime.optimizer import BUCKET, FREEZABLE, Held, held_tensors, is_trained
from vision import PATCHES_AT_ONCE, build_model

MOST_RANKS = 1024  # a smallest topology is looked for up to here

RESERVE = 2_000_000_000  # bytes per GPU: CUDA context, libraries' workspaces, NCCL's buffers, what the allocator wastes

FP32 = 4  # bytes per number

IDS = 16  # bytes per token of what has a number for each: ids, targets, losses, log-probabilities


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
        plan["bubble"] = (args.pp - 1) / (m + args.pp - 1)  # see pipeline.py
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
    return min(args.micro_batch_size, args.global_batch_size), -(
        -args.max_length // place.token_parts
    ) * place.token_parts


def plan_rank(
    config: Config, place: Place, args: argparse.Namespace, keep_fp8: bool, dtype=torch.bfloat16, activations=True
) -> tuple[StagePlan, Counter]:
    """What the rank at `place` needs, and what its parameters count as: "parameters" or "adapters" where it owns them,
    a kind of copy where another rank does, and "padding", the zeros past the end of a tensor cut into equal parts.

    Raises TopologyError where the topology does not divide the model.
    """
    layers, (few, here) = place.layers(config.num_hidden_layers), small(config, place)
    model = build_model(few, replace(here, rank=place.rank, tp_rank=place.tp_rank), dtype, keep_fp8)
    if args.lora_rank:
        add_adapters(model, args.lora_rank, 1.0)
    # The last of the layers that are built stands for those that are not.
    unbuilt = [len(layers) - len(model.layers), 0]
    repeats = {f"layers.{[*model.layers][-1]}.": unbuilt[0] + 1}
    if config.vision is not None:
        unbuilt[1] = config.vision.num_hidden_layers - few.vision.num_hidden_layers
        repeats[f"vision_tower.transformer.layers.{few.vision.num_hidden_layers - 1}."] = unbuilt[1] + 1

    def times(name: str) -> int:  # how many tensors the one of this name stands for
        return next((count for prefix, count in repeats.items() if name.removeprefix("vision.").startswith(prefix)), 1)

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
        stage.cache_bytes = len(layers) * cache.layers[0].nbytes
        tokens = min(CHUNK, args.max_context)
        chunk = (args.max_context - tokens, tokens, keep_fp8, dtype, GPUS[args.gpu].fp8 > 0)
        if activations:
            stage.activation_bytes = infer_on_shapes(few, here, *chunk)[1] + IDS * tokens
    else:
        freeze = tuple(FREEZABLE if args.lora_rank else args.freeze)
        trained = [t for t in held if is_trained(t.name, freeze) or (args.lora_rank and ".adapter." in t.name)]
        total = sum(times(tensor.name) * tensor.parameter.numel() for tensor in trained)
        # In FP32 (see optimizer.py): the sum of gradients; the master weight and Adam's two moments.
        stage.gradient_bytes, stage.optimizer_bytes = FP32 * total, 3 * FP32 * total
        m, rows = count_micro_batches(args, place.dp_size), batch_shape(args, place)
        most = min(place.pp_size - place.pp_rank, m)  # micro-batches that are held; see pipeline.py
        run = min(most, 3) + (m > most)  # one more, if a stage gets to alternate between forward and backward passes
        options = (args.activation_checkpointing, freeze, args.lora_rank, keep_fp8, dtype, tuple(unbuilt))
        if activations:
            _, peak, each = train_on_shapes(few, here, rows, run, *options)
            peak += max(0, most - 3) * each + IDS * math.prod(rows)
            stage.activation_bytes = max(peak, FP32 * min(BUCKET, total))
    return stage, counts


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


ADAM_BYTES = 82  # that a step of optimizer.py reads and writes per trained weight

RECIPE_STEPS, MEDPIX = 100, 20_500  # of the published fine-tune; samples of its data


def stage_seconds(config: Config, place: Place, gpu: Gpu, run: Callable[[Config, Place], Meter]) -> torch.Tensor:
    """(floor, estimate) of `run` on the whole stage at `place`, from runs of one layer and of two: float64."""
    one, two = (torch.tensor(run(*small(config, place, n)).seconds(gpu, place.pp_size)).double() for n in (1, 2))
    return one + (len(place.layers(config.num_hidden_layers)) - 1) * (two - one)


def make_times(config: Config, args: argparse.Namespace, keep_fp8: bool, trained: int) -> dict[str, list[float]]:
    """What takes how long: name -> [floor, estimate], in seconds. `trained`: the most weights that a rank trains."""
    gpu, p, dtype = GPUS[args.gpu], args.pp, torch.bfloat16
    grid = [stage[0] for stage in places(args.tp, p, args.dp, args.sequence_parallel)]
    ends = [grid[i] for i in sorted({0, min(1, p - 1), p - 1})]  # the stages between are alike

    def infer(start: int, tokens: int) -> list[torch.Tensor]:
        options = (start, tokens, keep_fp8, dtype, gpu.fp8 > 0, True)
        return [stage_seconds(config, at, gpu, lambda *on: infer_on_shapes(*on, *options)[0]) for at in ends]

    times = {}
    if args.inference:
        context = min(8192, args.max_context)
        stages = infer(context - 1, 1)
        times[f"a token after {context:,}"] = sum(stages) + max(0, p - 3) * stages[len(stages) // 2]
        for length in (n for n in (8192, 131072) if n <= args.max_context):
            pairs = zip(infer(0, CHUNK), infer(length - CHUNK, CHUNK))
            slowest = torch.stack([(first + last) / 2 for first, last in pairs]).amax(0)
            times[f"a prompt of {length:,}"] = (length // CHUNK + p - 1) * slowest
    else:
        freeze = tuple(FREEZABLE if args.lora_rank else args.freeze)
        options = (args.activation_checkpointing, freeze, args.lora_rank, keep_fp8, dtype, (0, 0), True)
        rows = batch_shape(args, ends[0])
        step = lambda *on: train_on_shapes(*on, rows, 1, *options)[0]  # noqa: E731
        slowest = torch.stack([stage_seconds(config, at, gpu, step) for at in ends]).amax(0)
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

    def needs(place: Place, room: float, exact: bool = False) -> StagePlan:
        """Activations take a second to count, and are only bounded where that says already whether all of it fits."""
        stage, _ = plan_rank(config, place, wanted, keep_fp8, dtype, activations=False)
        stage.reserve_bytes = RESERVE if gpu else 0
        stage.activation_bytes = most_activations(config, place, wanted)
        rest = stage.weight_bytes if exact else stage.peak_bytes - stage.activation_bytes
        if stage.peak_bytes > room >= rest:
            stage.activation_bytes = plan_rank(config, place, wanted, keep_fp8, dtype)[0].activation_bytes
        return stage

    room = torch.cuda.mem_get_info(place.device)[0] if gpu else cpu_memory()
    mine = together(lambda: needs(place, room if gpu else room / place.world_size, True))
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


def most_activations(config: Config, place: Place, args: argparse.Namespace) -> int:
    """More bytes than activations can take, whatever the topology: 64 for each of the numbers that a layer computes."""
    tokens = CHUNK if args.inference else math.prod(batch_shape(args, place))
    held = min(place.pp_size - place.pp_rank, count_micro_batches(args, place.dp_size))
    layers = 2 if args.inference else held * len(place.layers(config.num_hidden_layers)) + 2
    width = 3 * config.hidden_size + 3 * config.intermediate_size + 4 * config.num_attention_heads * config.head_dim
    most = tokens * (64 * layers * width + 16 * config.vocab_size)
    if config.vision is not None and place.first_stage:
        v, layers = config.vision, 2 if args.inference else held * config.vision.num_hidden_layers + 2
        patches = max(tokens * v.spatial_merge_size**2, PATCHES_AT_ONCE)
        most += 64 * patches * layers * 3 * (2 * v.hidden_size + v.intermediate_size)
    return most + 8 * config.hidden_size * max(config.intermediate_size, config.vocab_size)  # a gradient; a weight


def smallest_topology(needs: Callable[[Place, float], StagePlan], room: float) -> tuple[int, int] | None:
    """(tp, pp) of the fewest ranks that have `room` bytes each; tp within a machine of 8 where there is a choice."""
    whole = needs(Place(), 0)
    fewest = math.ceil((whole.weight_bytes + whole.gradient_bytes + whole.optimizer_bytes) / max(1, room))
    step = 8 if fewest > 64 else 1  # whole machines
    for ranks in range(-(-max(1, fewest) // step) * step, min(2 * fewest + 16, MOST_RANKS), step):
        for tp in sorted((n for n in range(1, ranks + 1) if ranks % n == 0), key=lambda n: (n > 8, -n)):
            pp = ranks // tp
            # The first stage has the embedding and the tower, the last the head; and with 1F1B the earlier ones hold
            # more activations than the later ones.
            some = [Place(0, 0, tp, stage, pp) for stage in sorted({0, min(1, pp - 1), pp - 1})]
            with contextlib.suppress(TopologyError):
                if all(needs(place, room).peak_bytes <= room for place in some):
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
