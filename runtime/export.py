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
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import fp8
from model import Config, MistralMedium
from parallel import Place, parts_of
from runtime.checkpoint import Checkpoint, check_names, fill, hf_name, is_quantized, scale_names
from runtime.config import read_config
from runtime.data import Chats, MicroBatch, decode_images, micro_batches
from runtime.files import UserError, write_json, writing
from runtime.launch import Parser, gather_objects, new_folder, together
from runtime.lora import merged
from runtime.memory import cpu_memory
from runtime.optimizer import held_tensors
from runtime.tokenizer import load_tokenizer
from vision import build_model

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
    place, layers = model.place, parts_of(model)
    owned = [t for t in held_tensors(model) if t.owner and place.dp_rank == 0 and (".adapter." in t.name) == adapters]
    holders = gather_objects({t.name: t.part for t in owned})  # of every rank, the parts that come from it
    shapes = {name: part.shape for parts in holders for name, part in parts.items()}

    def piece(name: str) -> torch.Tensor:
        return merged(*layers[name], model.dtype).cpu().contiguous()

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


def convert(source: str, target: str, to_fp8: bool, chats: str | None) -> None:
    """Rewrite the checkpoint in `source` as `target`, in the HF layout; one shard is in memory at a time.

    The decoder's linears become E4M3 with a float32 scale (those that are FP8 already keep weight and scales), or BF16;
    everything else becomes BF16. Raises UserError.
    """
    checkpoint = Checkpoint(source)
    config = checkpoint.fit(read_config(source))
    model = build_model(config)
    check_names(checkpoint, model)
    parts = {name: part.slice for name, (_, part) in parts_of(model).items()}
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


def measure_inputs(model: MistralMedium, batches: Iterable[MicroBatch]) -> dict[str, torch.Tensor]:
    """Static activation scales: the largest input of every decoder linear over `batches`, over 448. By weight name."""
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(module, inputs):
            amax = inputs[0].abs().amax().float()
            largest[name] = torch.maximum(largest.get(name, amax), amax)

        return hook

    quantized = [(name, layer) for name, (layer, _) in parts_of(model).items() if is_quantized(name)]
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in quantized]
    with torch.inference_mode():
        for batch in batches:
            features = model.vision(batch.pixels) if batch.pixels else None
            model(model.embed(batch.tokens, features))
    for handle in handles:
        handle.remove()
    return {name: fp8.scale_of(amax) for name, amax in largest.items()}


def calibrate(directory: str, chats_file: str, config: Config, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Run the checkpoint, dequantized to BF16, over the chats of a file; see `measure_inputs`."""
    model = build_model(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > (room := cpu_memory()):
        raise UserError(f"the weights take {size / 1e9:.1f} GB, but {room / 1e9:.1f} GB are free: no --calibrate here")
    chats = Chats(chats_file, load_tokenizer(directory, config), config, config.max_position_embeddings, Place())
    fill(model, checkpoint)

    def decoded() -> Iterator:
        for batch in micro_batches(chats.samples, 1, 0):
            decode_images([batch], chats.base, config.vision, torch.bfloat16)
            yield batch
            batch.pixels = []

    return measure_inputs(model, decoded())


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
