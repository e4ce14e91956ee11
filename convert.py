"""Rewrite a checkpoint of any layout in the HF layout, in FP8 or BF16, one shard in memory at a time.

    python fp8.py IN OUT [--to fp8|bfloat16] [--calibrate CHATS.jsonl]

FP8 weights get one float32 scale each. With --calibrate the model is run over some chats first, and the largest input
that each linear saw becomes its static activation scale; without, activations are scaled dynamically.
"""

import math
from collections.abc import Iterable, Iterator

import torch

import fp8
from checkpoint import Checkpoint, check_names, export_config, fill, is_quantized, layers_with_slices, save, scale_name
from config import Config, UserError, read_config
from data import Chats, ImageReader, MicroBatch, micro_batches
from parallel import Place
from terminal import Parser
from tokenizer import load_tokenizer
from vision import MistralMedium


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
    batches, reader = micro_batches(chats.samples, 1, 0), ImageReader(config, torch.bfloat16)

    def decoded() -> Iterator:
        for batch in batches:
            reader.start([batch], chats.base)()
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
