"""Rewrite a checkpoint of any layout in the HF layout, in FP8 or BF16, one shard in memory at a time.

    python fp8.py IN OUT [--to fp8|bfloat16] [--calibrate CHATS.jsonl]

FP8 weights get one float32 scale each. With --calibrate the model is run over some chats first, and the largest input
that each linear saw becomes its static activation scale; without, activations are scaled dynamically.
"""

import glob
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import fp8
from checkpoint import Checkpoint, check_names, fill, hf_name, is_quantized, layers_with_slices, scale_name
from config import Config, UserError, read_config, to_hf, write_json
from data import Chats, MicroBatch, decode_images, micro_batches
from launch import Parser, gather_objects, together
from model import MistralMedium
from optimizer import held_tensors, len_inside
from parallel import Place, Slice
from tokenizer import load_tokenizer

SHARD_BYTES = 4_000_000_000  # a file written is at most about this large


def save(
    directory: str,
    config: Config,
    sizes: dict[str, int],
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: str | None,
) -> None:
    """Write a checkpoint in the HF layout: sharded safetensors with an index, `config.json`, and the tokenizer's files.

    `sizes` gives every canonical name and its bytes, in the order in which `tensors` yields them (only one shard is
    held at a time). `source` is the directory whose other small files come along. The folder appears under its name
    when it is whole, or not at all.
    """
    if os.path.exists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
        raise UserError(f"{directory}: already exists; choose a new folder or remove it")
    partial = f"{directory.rstrip('/')}.partial-{os.getpid()}"
    try:
        os.makedirs(partial)
        shards, filled = [[]], 0
        for name, size in sizes.items():
            if shards[-1] and filled + size > SHARD_BYTES:
                shards, filled = [*shards, []], 0
            shards[-1].append(name)
            filled += size
        single, weight_map, stream = len(shards) == 1, {}, iter(tensors)
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shard = {hf_name(name, config): tensor.contiguous() for name, (_, tensor) in zip(names, stream)}
            weight_map |= dict.fromkeys(shard, file)
            save_file(shard, os.path.join(partial, file), metadata={"format": "pt"})
            os.chmod(os.path.join(partial, file), 0o644)  # not for the writer's eyes alone
        write_json(
            os.path.join(partial, "model.safetensors.index.json"),
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
        )
        write_json(os.path.join(partial, "config.json"), to_hf(config))
        for path in glob.glob(os.path.join(glob.escape(source), "*")) if source else ():
            name = os.path.basename(path)
            own = name in ("config.json", "params.json") or name.endswith((".safetensors", ".index.json"))
            if os.path.isfile(path) and not own:
                shutil.copy(path, partial)
        os.rename(partial, directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_config(config: Config, in_fp8: bool, activation_scheme: str = "dynamic") -> Config:
    """The config of the model as written: its precision, whatever the checkpoint's was."""
    raw = json.loads(json.dumps(config.raw))
    for fields in (raw, raw.get("text_config"), raw.get("vision_config")):
        if fields and ("dtype" in fields or "torch_dtype" in fields or fields is raw):
            fields.pop("torch_dtype", None)
            fields["dtype"] = "bfloat16"
    return replace(config, raw=raw, fp8=in_fp8, activation_scheme=activation_scheme)


# ---------------------------------------------------------------------------------------- gathered from ranks


def export(directory: str, model: nn.Module, precision: str, source: str) -> None:
    """Write the trained model in the HF layout, `precision` "bfloat16" or "fp8"; all ranks call this together.

    Adapters are merged on the way. FP8 has one scale a tensor and none for activations (they are scaled dynamically).
    The tokenizer comes from `source`.
    """
    config = model.config
    whole = {tensor.name: tensor.part.shape for tensor in held_tensors(type(model)(config))}
    in_fp8 = {name for name in whole if precision == "fp8" and is_quantized(name)}
    stream = collect(model, whole)

    def write() -> None:
        if model.place.rank > 0:
            return
        sizes = {}
        for name, shape in whole.items():
            sizes[name] = math.prod(shape) * (1 if name in in_fp8 else 2)
            if name in in_fp8:
                sizes[scale_name(name)] = 4
        shutil.rmtree(directory, ignore_errors=True)
        try:
            save(directory, export_config(config, precision == "fp8"), sizes, quantized(stream, in_fp8), source)
        finally:
            for _ in stream:  # after an error the other ranks still wait to send the rest
                pass

    together(write)


def collect(model: nn.Module, whole: dict[str, tuple]) -> Iterator[tuple[str, torch.Tensor]]:
    """Rank 0 gets whole BF16 tensors of the names and shapes `whole`, one after the other; the other ranks nothing.

    They send their parts, and rank 0 never holds more than one tensor.
    """
    place, layers = model.place, layers_with_slices(model)
    owned = [t for t in held_tensors(model) if t.owner and t.name in whole and place.dp_rank == 0]
    parts = {tensor.name: tensor.part for tensor in owned}
    holders = gather_objects(parts)
    if place.rank == 0:
        return received(model, whole, holders)
    for name in whole:
        if name in parts:
            dist.send(merged(layers[name][0], model.dtype).cpu().contiguous(), dst=0)
    return iter(())


def received(
    model: nn.Module, whole: dict[str, tuple], holders: list[dict[str, Slice]]
) -> Iterator[tuple[str, torch.Tensor]]:
    layers = layers_with_slices(model)
    for name, shape in whole.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        for rank, parts in enumerate(holders):
            if name not in parts:
                continue
            part, length = parts[name], len_inside(parts[name])
            if rank == 0:
                piece = merged(layers[name][0], model.dtype).cpu()
            else:
                piece = torch.empty(part.local_shape, dtype=model.dtype)
                dist.recv(piece, src=rank)
            tensor.narrow(part.dim, part.start, length).copy_(piece.narrow(part.dim, 0, length))
        yield name, tensor


def quantized(stream: Iterator[tuple[str, torch.Tensor]], in_fp8: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `stream`; those named in `in_fp8` as FP8, followed by their scales."""
    for name, tensor in stream:
        if name not in in_fp8:
            yield name, tensor
        else:
            scale = fp8.scale_of(tensor.abs().amax())
            yield name, fp8.quantize(tensor, scale)
            yield scale_name(name), scale


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


def save_adapters(directory: str, tensors: dict[str, torch.Tensor], model: nn.Module, rank: int, alpha: float) -> None:
    """Write the adapters in the form that the peft library reads: adapter_model.safetensors and its config."""
    os.makedirs(directory, exist_ok=True)
    inside = "model.language_model." if model.config.vision is not None else "model."
    names = {name: f"base_model.model.{inside}{name.replace('.adapter.', '.')}" for name in tensors}
    targets = sorted({name.split(".adapter.")[0].rpartition(".")[2] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    config |= {
        "lora_dropout": 0.0,
        "target_modules": rf".*layers\.\d+\..*\.({'|'.join(targets)})",
        "inference_mode": True,
    }
    path = os.path.join(directory, "adapter_model.safetensors")
    save_file({names[name]: tensor for name, tensor in tensors.items()}, f"{path}.partial", metadata={"format": "pt"})
    os.replace(f"{path}.partial", path)
    write_json(os.path.join(directory, "adapter_config.json"), config)


def export_adapters(directory: str, model: nn.Module, rank: int, alpha: float) -> None:
    """Write the adapters, as they are, for the peft library; all ranks call this together."""
    mine = {name: part.shape for name, (_, part) in layers_with_slices(model).items() if ".adapter." in name}
    whole = {name: shape for part in gather_objects(mine) for name, shape in part.items()}
    tensors = dict(collect(model, whole))
    together(lambda: None if model.place.rank else save_adapters(directory, tensors, model, rank, alpha))


# ----------------------------------------------------------------------------------------------- conversion


def measure_inputs(model: MistralMedium, batches: Iterable[MicroBatch]) -> dict[str, torch.Tensor]:
    """Static activation scales: the largest input of every decoder linear over `batches`, over 448. By tensor name."""
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(module, inputs):
            amax = inputs[0].abs().amax().float()
            largest[name] = torch.maximum(largest.get(name, amax), amax)

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, layer in model.named_modules()
        if is_quantized(f"{name}.weight")
    ]
    with torch.inference_mode():
        for batch in batches:
            features = model.image_features(batch.pixels) if batch.pixels else None
            model(model.embed(batch.tokens, features), [0] * len(batch.tokens))
    for handle in handles:
        handle.remove()
    return {name: fp8.scale_of(amax) for name, amax in largest.items()}


def calibrate(directory: str, chats_file: str, config: Config, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Run the checkpoint, dequantized to BF16, over the chats of a file; see `measure_inputs`."""
    model = MistralMedium(config)
    chats = Chats(chats_file, load_tokenizer(directory), config, config.max_position_embeddings, Place())
    fill(model, checkpoint)

    def decoded() -> Iterator:
        for batch in micro_batches(chats.samples, 1, 0):
            decode_images([batch], chats.base, config.vision, torch.bfloat16)
            yield batch
            batch.pixels = []

    return measure_inputs(model, decoded())


def convert(source: str, target: str, to_fp8: bool, chats: str | None) -> None:
    """Rewrite the checkpoint in `source` as `target`, in the HF layout; one shard is in memory at a time.

    The decoder's linears become E4M3 with a float32 scale (those that are FP8 already keep weight and scales), or BF16;
    everything else becomes BF16. Raises UserError.
    """
    config, checkpoint = read_config(source), Checkpoint(source)
    whole = MistralMedium(config)
    check_names(checkpoint, config, whole)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    slices = {name: part for name, (_, part) in layers_with_slices(whole).items() if name not in tied}
    quantized = [name for name in slices if to_fp8 and is_quantized(name)]
    measured = calibrate(source, chats, config, checkpoint) if chats else {}

    def activation_scale(name: str) -> torch.Tensor | None:
        stored = name.replace(".weight", ".activation_scale")
        return measured.get(name) if chats else checkpoint.scale(stored) if stored in checkpoint.tensors else None

    inputs = {name: scale for name in quantized if (scale := activation_scale(name)) is not None}
    if inputs and len(inputs) < len(quantized):
        inputs = {}  # half a checkpoint with static scales has no name in a config; all dynamic has
    sizes: dict[str, int] = {}
    for name, part in slices.items():
        sizes[name] = math.prod(part.shape) * (1 if name in quantized else 2)
        if name in quantized:
            sizes[scale_name(name)] = 4
            sizes |= {name.replace(".weight", ".activation_scale"): 4} if inputs else {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, part in slices.items():
            weight, scale = checkpoint.weight(name, part, config)
            if name not in quantized:
                yield name, weight.bfloat16() if scale is None else fp8.dequantize(weight, scale, torch.bfloat16)
                continue
            if scale is None:
                scale = fp8.scale_of(weight.abs().amax())
                weight = fp8.quantize(weight, scale)
            yield name, weight
            yield scale_name(name), scale
            if inputs:
                yield name.replace(".weight", ".activation_scale"), inputs[name]

    scheme = "static" if inputs else "dynamic"
    save(target, export_config(config, to_fp8, scheme), sizes, tensors(), source)


def main(argv: list[str]) -> None:
    parser = Parser(description="Rewrite a checkpoint in the HF layout.")
    parser.add_argument("source", metavar="IN")
    parser.add_argument("target", metavar="OUT")
    parser.add_argument("--to", choices=["fp8", "bfloat16"], default="fp8")
    parser.add_argument("--calibrate", metavar="FILE.jsonl", help="chats that measure static activation scales")
    args = parser.parse_args(argv)
    if args.calibrate and args.to != "fp8":
        raise UserError("--calibrate measures scales for FP8; leave it out with --to bfloat16")
    convert(args.source, args.target, args.to == "fp8", args.calibrate)
