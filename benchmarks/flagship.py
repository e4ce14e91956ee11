"""The 128B at its true sizes with random FP8 weights: decoding, prefill and a LoRA step, against what the GPU can do.

    python benchmarks/flagship.py                                        # one GPU: all layers, or as many as fit
    torchrun --nproc-per-node 8 benchmarks/flagship.py --tp 8
    python benchmarks/flagship.py --device cpu                           # a small model: does it run?

Speed does not depend on the values of weights, so none have to be downloaded. The limits are measured in the same run:
the bandwidth of copies of 4 GB, and products of large matrices in FP8 and BF16. All times are medians of several runs,
those of answers on a warm engine: its steps are recorded, and each run has prompts of its own, which share nothing.
Prints rows for RESULTS.md. Where fewer layers fit than the model has, the times of the layers that were there are
scaled to all of them, and the row says so. Takes less than four minutes on one H200, by estimate.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT]
import torch
from torch import nn

from fp8 import E4M3, has_fp8_matmul
from generate import Engine
from model import Config, MistralMedium
from parallel import Place
from runtime.config import read_config
from runtime.launch import find_place, gather_objects, run_program
from runtime.lora import add_adapters
from runtime.optimizer import held_tensors
from runtime.requests import Request
from vision import build_model

RUNS, STEPS = 5, 8  # that a median is of; over which kernels are counted
SPARE = 12_000_000_000  # bytes left for the cache, activations and the libraries when layers are counted
SMALL = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2)


@dataclass
class Limits:
    """What was measured of this device: bytes/s that a copy reads and writes, operations/s of dense products."""

    memory: float
    fp8: float
    bf16: float


def seconds(action: Callable[[], object], device: torch.device, together: int = 1) -> float:
    """Of one `action`, once warm: the median of RUNS waits for `together` of them, one after the other."""
    taken = []
    for _ in range(1 + RUNS):
        wait_for(device)
        started = time.perf_counter()
        for _ in range(together):
            action()
        wait_for(device)
        taken.append((time.perf_counter() - started) / together)
    return median(taken[1:])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_limits(device: torch.device, size: int, copied: int) -> Limits:
    """With matrices of `size` × `size`, and `copied` bytes. Without FP8 arithmetic its limit is that of BF16."""
    target, source = torch.empty(2, copied, device=device, dtype=torch.uint8)
    memory = 2 * copied / seconds(lambda: target.copy_(source), device, 2)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * size**3 / seconds(lambda: a @ b.t(), device, 10)
    if not has_fp8_matmul(device):
        return Limits(memory, bf16, bf16)
    a8, b8, one = a.to(E4M3), b.to(E4M3), torch.ones((), device=device)
    product = lambda: torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    return Limits(memory, 2 * size**3 / seconds(product, device, 10), bf16)


def layers_that_fit(config: Config, place: Place) -> int:
    """Of FP8 on this GPU, beside embedding, head and tower."""
    free = torch.cuda.mem_get_info(place.device)[0]
    sizes = []
    for layers in (1, 2):
        model = build_model(replace(config, num_hidden_layers=layers), place, torch.bfloat16, True)
        sizes.append(sum(x.nbytes for x in model.parameters()))
    one, each = sizes[0], sizes[1] - sizes[0]
    return min(config.num_hidden_layers, 1 + int((free - SPARE - one) // each))


def build(config: Config, place: Place) -> MistralMedium:
    """The model with random FP8 weights, drawn on the device itself, and scales that keep activations near 1."""
    model = build_model(config, place, torch.bfloat16, keep_fp8=True)
    fill_at_random(model, place.device)
    return model


def fill_at_random(model: nn.Module, device: torch.device) -> None:
    """Every parameter that is still on `meta`."""
    for layer in model.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            weight = torch.empty_like(parameter, device=device)
            in_fp8 = weight.dtype == E4M3
            deviation = 1 if in_fp8 or weight.dim() == 1 else 0.02
            for rows in weight.split(1024):  # so that what is drawn stays small beside the weight
                rows.copy_(torch.randn(rows.shape, dtype=torch.bfloat16, device=device) * deviation)
            setattr(layer, name, nn.Parameter(weight, requires_grad=False))
            if in_fp8:
                layer.weight_scale = torch.full(layer.weight_scale.shape, 0.02, device=device)
                layer.activation_scale = torch.full((), 1 / 16, device=device)


def layer_weights(model: MistralMedium) -> int:
    """Numbers in the matrices of this rank's decoder layers."""
    return sum(t.size for t in held_tensors(model) if t.name.startswith("layers.") and t.parameter.dim() > 1)


def measure_lora(model: MistralMedium, length: int, rank: int = 8) -> float:
    """Seconds of the passes of one sample of `length` tokens with adapters, activation checkpointing on."""
    device = model.place.device
    add_adapters(model, rank, 4.0 * rank)
    fill_at_random(model, device)
    adapters = [p for name, p in model.named_parameters() if ".adapter." in name]
    for parameter in adapters:
        parameter.requires_grad_()
    model.activation_checkpointing = True
    tokens = torch.randint(model.config.vocab_size, (1, length + 1), device=device)

    def step() -> None:
        hidden = model(model.embed(tokens[:, :-1]))
        model.lm_head.cross_entropy(model.logits(hidden[0]), tokens[0, 1:]).mean().backward()
        for parameter in adapters:
            parameter.grad = None

    return seconds(step, device)


@dataclass
class Generation:
    """What was measured of some rows: seconds of the prefill, seconds and kernels of a decoded step."""

    prefill: float
    step: float
    kernels: float


def measure_generation(model: MistralMedium, rows: int, prompt: int, new_tokens: int) -> Generation:
    """Of `rows` prompts of `prompt` tokens."""
    engine, vocabulary = Engine(model, eos_id=-1, max_context=prompt + new_tokens), model.config.vocab_size

    def answer(new_tokens: int) -> dict[str, float]:
        """Seconds by phase, of prompts never seen before."""
        prompts = torch.randint(3, vocabulary, (rows, prompt)).tolist()
        engine.generate([Request(tokens, max_new_tokens=new_tokens) for tokens in prompts])
        return engine.seconds

    for _ in range(2):  # steps are recorded; and again, where the cache grew during the first run
        answer(new_tokens)
    runs = [answer(new_tokens) for _ in range(RUNS)]
    prefill, decode = (median(run[phase] for run in runs) for phase in ("prefill", "decode"))
    if new_tokens == 1:
        return Generation(prefill, 0, 0)
    few, more = (count_kernels(partial(answer, count), model.place.device) for count in (1, 1 + STEPS))
    return Generation(prefill, decode / (new_tokens - 1), (more - few) / STEPS)


def count_kernels(action: Callable[[], object], device: torch.device) -> int:
    """How many a GPU runs, those of recorded steps too; 0 where the profiler is not allowed to see them."""
    if device.type != "cuda":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        action()
        wait_for(device)
    kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)


def benchmark(config: Config, place: Place, layers: int, sizes: argparse.Namespace) -> list[str]:
    """All of it: the rows of the table."""
    device = place.device
    limits = measure_limits(device, sizes.matrix, sizes.copied)
    model = build(replace(config, num_hidden_layers=layers), place)
    weights, share = layer_weights(model), config.num_hidden_layers / layers
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = f"{place.tp_size} × {name}, " + (
        f"{layers} of {config.num_hidden_layers} layers" if share > 1 else "all layers"
    )
    speeds = f"FP8 {limits.fp8 / 1e12:.3g}, BF16 {limits.bf16 / 1e12:.3g} TFLOP/s"
    rows = [f"limits of {name} | {limits.memory / 1e12:.3g} TB/s; {speeds}"]

    def row(what: str, taken: float, limit: float) -> None:
        scaled = f", {1e3 * taken * share:.1f} ms scaled to all layers" if share > 1 else ""
        rows.append(
            f"{what}, {where} | {1e3 * taken:.1f} ms{scaled}; the limit is {1e3 * limit:.3g} ms: {limit / taken:.1%}"
        )

    head, per_token = model.lm_head.weight.nbytes, model.new_cache(1, 1).nbytes
    for count in (1, 16):
        seen = measure_generation(model, count, sizes.decode_at, sizes.new_tokens)
        traffic = weights + head + count * sizes.decode_at * per_token  # FP8: a byte per weight
        kernels = f", {seen.kernels:,.0f} kernels" if seen.kernels else ""
        row(f"a decoded token of {count} at {sizes.decode_at:,}{kernels}", seen.step, traffic / limits.memory)
    seen = measure_generation(model, 1, sizes.prompt, 1)
    row(f"prefill of {sizes.prompt:,} tokens", seen.prefill, 2 * weights * sizes.prompt / limits.fp8)
    # Forward twice (the second time for the backward pass), and the gradients of inputs; weights have none.
    lora = measure_lora(model, sizes.length)
    row(f"LoRA, passes of {sizes.length:,} tokens", lora, 6 * weights * sizes.length / limits.bf16)
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=os.path.join(ROOT, "tests", "data", "config.json"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--layers", type=int, help="default: all, or as many as fit")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--decode-at", type=int, default=512, help="tokens in the cache while decoding")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048, help="of the sample of the LoRA step")
    parser.add_argument("--matrix", type=int, default=8192, help="rows and columns of the products that set the limits")
    parser.add_argument("--copied", type=int, default=4_000_000_000, help="bytes of the copy that sets the limit")
    args = parser.parse_args(argv)
    config, place = read_config(args.config), find_place(args.tp, 1)
    if args.device == "cpu":
        config = replace(config, **SMALL, head_dim=32, num_hidden_layers=4, vision=None)
        place = replace(place, device=torch.device("cpu"))
        args.prompt, args.decode_at, args.new_tokens, args.length = 256, 32, 8, 64
        args.matrix, args.copied = 512, 1 << 26
    fit = layers_that_fit if args.device == "cuda" else lambda config, place: config.num_hidden_layers
    layers = args.layers or min(gather_objects(fit(config, place)))
    rows = benchmark(config, place, layers, args)
    if place.rank == 0:
        command = " ".join(["python benchmarks/flagship.py", *argv])
        for what, result in (row.split(" | ") for row in rows):
            print(f"| {what} | `{command}` | {result} |")


if __name__ == "__main__":
    run_program(main)
