"""Write a checkpoint in the HF layout, in FP8 or BF16: from the ranks of a training run, or from another checkpoint.

    python fp8.py IN OUT --calibrate CHATS.jsonl
    python fp8.py IN OUT --to bfloat16

Either way the tensors come as a stream, one shard in memory at a time. FP8 weights get one float32 scale each. With
--calibrate the model runs over some chats first (all of it in memory, in BF16), and the largest input that each linear
saw becomes its static activation scale. Without, scales that are there stay, or activations are scaled dynamically.
"""

import glob
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn

import fp8
from checkpoint import (
    Checkpoint,
    check_names,
    held_tensors,
    hf_name,
    is_quantized,
    layers_with_slices,
    scale_names,
    writing,
)
from config import Config, UserError, parse_line, read_config, read_lines, write_json
from launch import Parser, caught, gather_objects, together
from model import MistralMedium
from optimizer import RECORD, STAGED, write_record
from pipeline import calibrate

SHARD_BYTES = 4_000_000_000  # a file written is at most about this large


def save(directory: str, config: Config, shapes: dict[str, tuple], weights: Iterable, source: str | None) -> None:
    """Write a checkpoint in the HF layout: sharded safetensors with an index, `config.json`, and the tokenizer's files.

    `weights` yields (canonical name, whole tensor of any dtype), followed by its scale if it is FP8 already, and by its
    input's static scale if there is one; see `stored`. `shapes` gives all names and whole shapes in the same order, so
    that the shards can be planned before the first tensor is there. `config` decides what is written: with `config.fp8`
    the decoder's linears in E4M3, all else in BF16. `source` is the directory whose other small files come along. The
    folder appears under its name when it is whole, or not at all. Raises UserError.
    """
    if os.path.exists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
        raise UserError(f"{directory}: already exists; choose a new folder or remove it")
    partial = f"{directory.rstrip('/')}.partial-{secrets.token_hex(4)}"  # in containers, process ids repeat
    with writing(directory), new_folder(partial):
        shards, filled = [[]], 0
        for name, shape in shapes.items():
            size = math.prod(shape) * (1 if config.fp8 and is_quantized(name) else 2)
            if shards[-1] and filled + size > SHARD_BYTES:
                shards, filled = [*shards, []], 0
            shards[-1].append(name)
            filled += size
        weight_map, total, stream = {}, 0, iter(weights)
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shard = {}
            for _, weight in zip(names, stream):  # `names` first, so that zip takes nothing beyond them from the stream
                shard |= stored(config, *weight)
            shard = {hf_name(name, config): tensor.contiguous() for name, tensor in shard.items()}
            weight_map |= dict.fromkeys(shard, file)
            total += sum(tensor.nbytes for tensor in shard.values())
            save_file(shard, os.path.join(partial, file), metadata={"format": "pt"})
            os.chmod(os.path.join(partial, file), 0o644)  # make it world-readable; save_file does not
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(os.path.join(partial, "model.safetensors.index.json"), index)
        write_json(os.path.join(partial, "config.json"), to_hf(config))
        for path in glob.glob(os.path.join(glob.escape(source), "*")) if source else ():
            name = os.path.basename(path)
            own = name in ("config.json", "params.json") or name.endswith((".safetensors", ".index.json"))
            if os.path.isfile(path) and not own:
                shutil.copy(path, partial)
        os.rename(partial, directory)


@contextmanager
def new_folder(path: str) -> Iterator[None]:
    """A folder for the block to fill and to rename. Whatever ends the block early, a signal too, removes it again."""

    def remove(number: int, frame) -> None:
        shutil.rmtree(path, ignore_errors=True)
        if not callable(before[number]):
            os._exit(128 + number)
        signal.signal(number, before[number])
        signal.raise_signal(number)

    with caught(remove) as before:
        os.makedirs(path)
        try:
            yield
        finally:
            shutil.rmtree(path, ignore_errors=True)


def stored(config: Config, name: str, weight: torch.Tensor, scale=None, input_scale=None) -> dict[str, torch.Tensor]:
    """What a weight becomes in the file, by canonical name: one tensor in BF16, or E4M3 with its scales.

    A weight that is FP8 already has a `scale` (0-d float32) and stays as it is; where there is none, it is measured.
    """
    if not (config.fp8 and is_quantized(name)):
        return {name: weight.bfloat16() if scale is None else fp8.dequantize(weight, scale, torch.bfloat16)}
    if scale is None:
        scale = fp8.scale_of(weight.abs().amax())
        weight = fp8.quantize(weight, scale)
    tensors = dict(zip((name, *scale_names(name)), (weight, scale, input_scale)))
    return {key: t for key, t in tensors.items() if t is not None}


def export_config(config: Config, in_fp8: bool, activation_scheme: str = "dynamic") -> Config:
    """The config of the model as written: its precision, whatever the checkpoint's was."""
    raw = json.loads(json.dumps(config.raw))
    for fields in (raw, raw.get("text_config"), raw.get("vision_config")):
        if fields and ("dtype" in fields or "torch_dtype" in fields or fields is raw):
            fields.pop("torch_dtype", None)
            fields["dtype"] = "bfloat16"
    return replace(config, raw=raw, fp8=in_fp8, activation_scheme=activation_scheme)


def to_hf(config: Config) -> dict:
    """The `config.json` of an export: what was read, with the head and the quantization that `config` has by now."""
    raw = {name: value for name, value in config.raw.items() if name != "quantization_config"}
    raw |= dict(tie_word_embeddings=config.tie_word_embeddings)
    if "text_config" in raw:
        raw["text_config"] = raw["text_config"] | dict(tie_word_embeddings=config.tie_word_embeddings)
    if config.fp8:
        raw["quantization_config"] = dict(
            quant_method="fp8",
            activation_scheme=config.activation_scheme,
            weight_block_size=None,
            dequantize=False,
            modules_to_not_convert=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
    return raw


# ---------------------------------------------------------------------------------------- gathered from ranks


def export(directory: str, model: nn.Module, precision: str, source: str) -> None:
    """Write the trained model in the HF layout, `precision` "bfloat16" or "fp8"; all ranks call this together.

    Adapters are merged on the way. FP8 has one scale per tensor and none for activations (they are scaled dynamically).
    The tokenizer comes from `source`.
    """
    shapes, stream = collect(model, adapters=False)

    def write() -> None:
        try:
            save(directory, export_config(model.config, precision == "fp8"), shapes, stream, source)
        finally:
            for _ in stream:  # after an error the other ranks still wait to send the rest
                pass

    together(write if model.place.rank == 0 else lambda: None)


def collect(model: nn.Module, adapters: bool) -> tuple[dict[str, tuple], Iterator[tuple[str, torch.Tensor]]]:
    """The whole shapes of the model's tensors (or its adapters') by name; and on rank 0 (name, BF16 tensor on the CPU).

    All ranks call this together. The others send their parts, and rank 0 never holds more than one whole tensor.
    """
    place, layers = model.place, layers_with_slices(model)
    owned = [t for t in held_tensors(model) if t.owner and place.dp_rank == 0 and (".adapter." in t.name) == adapters]
    holders = gather_objects({t.name: t.part for t in owned})  # of every rank, the parts that come from it
    shapes = {name: part.shape for parts in holders for name, part in parts.items()}

    def piece(name: str) -> torch.Tensor:
        return merged(layers[name][0], model.dtype).cpu().contiguous()

    def received() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            whole = torch.empty(shape, dtype=torch.bfloat16)
            for rank, parts in enumerate(holders):
                if (part := parts.get(name)) is None:
                    continue
                found = piece(name) if rank == 0 else torch.empty(part.local_shape, dtype=model.dtype)
                if rank > 0:
                    dist.recv(found, src=rank)
                whole.narrow(part.dim, part.start, part.length).copy_(found.narrow(part.dim, 0, part.length))
            yield name, whole

    if place.rank == 0:
        return shapes, received()
    for name in shapes:  # the order in which rank 0 receives: messages between two ranks match by order alone
        if name in holders[place.rank]:
            dist.send(piece(name), dst=0)
    return shapes, iter(())


# ------------------------------------------------------------------------------------------------- adapters


@torch.no_grad()
def merged(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight of `layer` with its adapter added, if it has one: summed in float32, rounded once to `dtype`."""
    adapter, scale, weight = getattr(layer, "adapter", None), getattr(layer, "weight_scale", None), layer.weight.data
    if scale is not None:
        weight = fp8.dequantize(weight, scale, torch.float32 if adapter else dtype)
    if adapter is None:
        return weight
    return torch.addmm(
        weight.float(), adapter.lora_B.weight.float(), adapter.lora_A.weight.float(), alpha=adapter.scale
    ).to(dtype)


def export_adapters(directory: str, model: nn.Module, rank: int, alpha: float, base: str) -> None:
    """Write the adapters in the form that the peft library reads: adapter_model.safetensors and its config.

    `rank` and `alpha` are the adapters' own, `base` is the checkpoint beside which they were trained; all ranks call
    this together.
    """
    tensors = dict(collect(model, adapters=True)[1])

    def write() -> None:
        inside = "model.language_model." if model.config.vision is not None else "model."
        renamed = {f"base_model.model.{inside}{name.replace('.adapter.', '.')}": t for name, t in tensors.items()}
        config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none")
        targets = r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # the vision tower's have other names
        config |= dict(target_modules=targets, inference_mode=True, base_model_name_or_path=os.path.abspath(base))
        with writing(directory):
            os.makedirs(directory, exist_ok=True)
            path = os.path.join(directory, "adapter_model.safetensors")
            save_file(renamed, path, metadata={"format": "pt"})
            os.chmod(path, 0o644)  # as in `save`
            write_json(os.path.join(directory, "adapter_config.json"), config)

    together(write if model.place.rank == 0 else lambda: None)


# ------------------------------------------------------------------------------- what a run leaves in its folder

WEIGHTS = r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors"


@contextmanager
def finishing(out: str, finished: dict, rank: int) -> Iterator[str]:
    """Yields a folder for what a run leaves in `out` at its end, which takes its place there when all of it is whole.

    All ranks come here. What an earlier end of the run left is replaced; a folder with files that this program does not
    write is kept under another name.
    """
    staged = os.path.join(out, STAGED)

    def put() -> None:
        for name in os.listdir(staged):
            new, final = os.path.join(staged, name), os.path.join(out, name)
            if os.path.isdir(final):
                own = {*os.listdir(new), *(name for name in os.listdir(final) if re.fullmatch(WEIGHTS, name))}
                strange = set(os.listdir(final)) - own
                os.rename(final, f"{final}.old" if strange else os.path.join(staged, f"old {name}"))
        write_record(out, finished)  # whoever is killed before the next line left no model, and --resume writes it anew
        for name in sorted(os.listdir(staged), key=lambda name: name == "model"):  # last: with it all is in place
            if not name.startswith("old "):
                os.rename(os.path.join(staged, name), os.path.join(out, name))

    def guarded(action) -> None:
        with writing(out, "make room, then --resume"):
            action()

    with ExitStack() as stack:
        together(lambda: guarded(lambda: stack.enter_context(new_folder(staged))) if rank == 0 else None)
        yield staged
        with caught(lambda number, frame: None):  # the last moment: a signal has nothing left to stop
            together(lambda: guarded(put) if rank == 0 else None)


LINE = "step {step}/{total}  loss {loss:.4f}  gradient norm {grad_norm:.4g}  {tokens_per_s:.0f} tokens/s  {left} left"


class Metrics:
    """`metrics.jsonl` in the folder `out`, one JSON object per line, and each line for people on stderr.

    In a terminal the line of a step takes the place of the last one's.
    """

    def __init__(self, out: str, after_step: int, total: int):
        """Keeps what an earlier run wrote, up to `after_step`: the steps after it will be taken again."""
        self.path, self.total = os.path.join(out, "metrics.jsonl"), total
        lines = read_lines(self.path) if os.path.exists(self.path) else []
        if lines and not lines[-1][1].endswith(b"}"):
            lines.pop()  # cut off when its process was killed
        self.lines = []
        for number, text in lines:
            line = parse_line(text, where := f"{self.path} line {number}")
            if type(line.get("step")) is not int:
                raise UserError(f"{where}: has no step; remove this line, or the file, to resume")
            if line["step"] <= after_step:
                self.lines.append(line)
        if not os.path.exists(os.path.join(out, RECORD)):
            write_record(out)  # the first file of a run: the folder is one from here on
        with writing(self.path):
            with open(f"{self.path}.partial", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.lines)
            os.replace(f"{self.path}.partial", self.path)
        self.seconds: list[float] = []  # of the steps taken here, at most 20
        self.open = False  # the last line shown is to be replaced

    def write(self, line: dict) -> None:
        self.lines.append(line)
        with writing(self.path, "make room, then --resume"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if "val_loss" in line:
            shown = [f"{name} {value:.4f}" for name, value in line.items() if name != "step"]
            return self.say(f"step {line['step']}: {', '.join(shown)}")
        self.seconds = [*self.seconds[-19:], line["step_s"]]
        seconds = sum(self.seconds) / len(self.seconds) * (self.total - line["step"])
        left = timedelta(seconds=round(min(seconds, 1e9)))  # 30 years: no calendar goes on for ever
        text = LINE.format(**line, total=self.total, left=left)
        if not sys.stderr.isatty():
            self.say(text)
        else:
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be replaced
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self.open = True
        if len(self.seconds) == 10 and line["step"] < self.total:
            end = datetime.now() + left
            self.say(f"after ten steps: {left} left, which is until {end:%H:%M} on {end:%d %B}")

    def say(self, text: str) -> None:
        """A line that stays."""
        print("\n" * self.open + text, file=sys.stderr, flush=True)
        self.open = False

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        """What is said next, an error perhaps, gets a line of its own."""
        print("\n" * self.open, end="", file=sys.stderr, flush=True)
        self.open = False

    def summary(self) -> str:
        """How the loss went, over tenths of the run, since single steps are noise."""
        losses = [line["loss"] for line in self.lines if is_loss(line.get("loss"))] or [math.nan]
        some = max(1, len(losses) // 10)
        first, last = sum(losses[:some]) / some, sum(losses[-some:]) / some
        return f"loss {first:.4f} in the first {some} steps, {last:.4f} in the last {some}"


WIDTH, HEIGHT, MARGIN = 900, 500, 60  # of loss.png, in pixels
SMOOTHING = 0.9  # of the curve over the noise: each step's share in it shrinks by this with every later one


def draw_loss(path: str, lines: list[dict]) -> None:
    """A picture of the loss by step (pale), smoothed (blue), the validation loss (orange), the learning rate (grey)."""
    names = ("lr", "loss", "val_loss")
    found = {name: [(line["step"], line[name]) for line in lines if is_loss(line.get(name))] for name in names}
    smooth, mean, weight = [], 0.0, 0.0
    for step, loss in found["loss"]:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
        smooth.append((step, mean / weight))  # over what there was: the first steps don't lean to 0
    steps, losses = zip(*(found["loss"] + found["val_loss"] or [(1, 0.0)]))
    last, low, high = max(2, *steps), min(losses), max(losses)
    high = max(high, low + 1e-3 * max(1, abs(low)))
    largest = max((rate for _, rate in found["lr"]), default=0) or 1
    rates = [(step, low + rate / largest * (high - low)) for step, rate in found["lr"]]

    def at(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (step - 1) / (last - 1) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (loss - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for loss in round_numbers(low, high):
        left, y = at(1, loss)
        draw.line((left, y, WIDTH - MARGIN, y), fill="#dddddd")
        draw.text((left - 8, y), f"{loss:.6g}", fill="black", anchor="rm")
    for step in sorted({max(1, round(step)) for step in round_numbers(1, last)}):
        x, y = at(step, low)
        draw.line((x, y, x, y + 5), fill="black")
        draw.text((x, y + 8), str(step), fill="black", anchor="mt")
    draw.text((WIDTH / 2, HEIGHT - 20), "step", fill="black", anchor="mm")
    curves = [("#bbbbbb", rates, f"learning rate, 0 to {largest:.3g}"), ("#b5d3ea", found["loss"], "loss")]
    curves += [("#1f77b4", smooth, "loss, smoothed"), ("#ff7f0e", found["val_loss"], "validation loss")]
    for i, (color, points, name) in enumerate(curves):
        if xy := [at(*point) for point in points]:
            draw.line(xy, fill=color, width=2)
            for x, y in xy if len(xy) == 1 or points is found["val_loss"] else ():
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
            draw.text((WIDTH - MARGIN, 12 + 14 * i), name, fill=color, anchor="rm")
    with writing(path):
        image.save(path)


def round_numbers(low: float, high: float) -> list[float]:
    """At most nine from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 8))
    apart = next(n * power for n in (1, 2, 5, 10, 20) if (high - low) / (n * power) <= 8)
    return [i * apart for i in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


def is_loss(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


# ----------------------------------------------------------------------------------------------- conversion


def convert(source: str, target: str, to_fp8: bool, chats: str | None) -> None:
    """Rewrite the checkpoint in `source` as `target`, in the HF layout; one shard is in memory at a time.

    The decoder's linears become E4M3 with a float32 scale (those that are FP8 already keep weight and scales), or BF16;
    everything else becomes BF16. Raises UserError.
    """
    checkpoint = Checkpoint(source)
    config = checkpoint.fit(read_config(source))
    model = MistralMedium(config)
    check_names(checkpoint, model)
    parts = {name: part for name, (_, part) in layers_with_slices(model).items()}
    quantized = [name for name in parts if to_fp8 and is_quantized(name)]
    inputs = {} if chats else {name: checkpoint.scale(scale_names(name)[1]) for name in quantized}
    if any(scale is None for scale in inputs.values()):
        inputs = {}  # a config calls all linears static or all dynamic: one without a scale makes them dynamic

    def weights() -> Iterator[tuple]:  # asked for once the folder is there: what takes hours is not for nothing
        scales = calibrate(source, chats, config, checkpoint) if chats else inputs
        for name, part in parts.items():
            yield name, *checkpoint.weight(name, part, config), scales.get(name)

    written = export_config(config, to_fp8, "static" if chats or inputs else "dynamic")
    save(target, written, {name: part.shape for name, part in parts.items()}, weights(), source)


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, prog="fp8.py", usage="%(prog)s IN OUT [options]")
    parser.add_argument("source", metavar="IN", help="folder of a checkpoint, any layout")
    parser.add_argument("target", metavar="OUT", help="a new folder, for the HF layout")
    parser.add_argument("--to", choices=["fp8", "bfloat16"], default="fp8", help="of the decoder's linears")
    parser.add_argument("--calibrate", metavar="FILE.jsonl", help="chats that measure static activation scales")
    args = parser.parse_args(argv)
    if args.calibrate and args.to != "fp8":
        raise UserError("--calibrate measures scales for FP8; leave it out with --to bfloat16")
    convert(args.source, args.target, args.to == "fp8", args.calibrate)
