"""LoRA adapters beside the decoder's linears, and the form in which peft reads them."""

import math
import os

import torch
from torch import nn

import fp8
from parallel import Linear, Place, Slice
from runtime.checkpoint import Checkpoint, Stored, canonical_name, draw, layers_with_slices
from runtime.files import UserError, find_folder, read_json, reading


class Adapter(nn.Module):
    """LoRA (arXiv:2106.09685): beside a frozen W, a product of two small factors learns. (..., in) -> (..., out).

    The linear then computes W x + (alpha / rank) · B A x, with A (rank, in) and B (out, rank). Only A and B have
    gradients and optimizer state, so W may stay FP8: training needs little more memory than inference.

    Under tensor parallelism the factor on the side where W is cut is cut with it, and the other one is whole on every
    rank: A beside a column-parallel W; B beside a row-parallel one, where partial sums pass through it before they are
    added up. Either way a rank finds only its share of the whole factor's gradient, as with a shared key/value head.
    """

    def __init__(self, linear: Linear, rank: int, alpha: float, place: Place, dtype: torch.dtype):
        super().__init__()
        part, self.scale = linear.slices["weight"], alpha / rank
        rows, columns = part.shape
        down, up = Slice((rank, columns), 0, 0, rank), Slice((rows, rank), 0, 0, rows)
        if part.dim == 0:
            up = Slice((rows, rank), 0, part.start, part.stop)
        else:
            down = Slice((rank, columns), 1, part.start, part.stop)
        self.lora_A, self.lora_B = Linear(down, dtype), Linear(up, dtype)
        cut, whole = (self.lora_B, self.lora_A) if part.dim == 0 else (self.lora_A, self.lora_B)
        cut.sharers, whole.sharers = getattr(linear, "sharers", 1), place.tp_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_B(self.lora_A(x)) * self.scale


def add_adapters(model: nn.Module, rank: int, alpha: float) -> None:
    """Freeze `model` and put an adapter, still on `meta`, beside each of its decoder's linears."""
    model.requires_grad_(False)
    for layer in list(model.layers.modules()):
        if isinstance(layer, Linear):
            layer.adapter = Adapter(layer, rank, alpha, model.place, model.dtype)


def initialize_adapters(model: nn.Module, seed: int) -> None:
    """A is random, with the deviation of PyTorch's own linears, and B zero: at first the adapters change nothing."""
    for name, (layer, part) in layers_with_slices(model).items():
        if ".adapter." in name:
            a = name.endswith("lora_A.weight")
            weight = draw(name, part, seed, (3 * part.shape[1]) ** -0.5) if a else torch.zeros(part.local_shape)
            layer.weight = nn.Parameter(weight.to(model.place.device, layer.weight.dtype))


def read_adapters(directory: str, checkpoint: Checkpoint) -> tuple[int, float]:
    """Adds adapters in peft's form, as train.py exports them, to the tensors of `checkpoint`; (rank, alpha)."""
    path, file = (
        os.path.join(find_folder(directory), f"adapter_{name}") for name in ("config.json", "model.safetensors")
    )
    fields = read_json(path)
    with reading(path, "adapter config"):
        rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
        if not (0 < rank <= 1 << 16 and math.isfinite(alpha)):
            raise UserError(f"rank {rank} and alpha {alpha} cannot be; r should be above 0 and lora_alpha finite")
        for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
            if fields.get(name):
                raise UserError(f"{name} is not supported; --lora takes what train.py exports")
    for key in checkpoint.file(file).keys():
        name = canonical_name(key.removeprefix("base_model.model."), native=False)
        checkpoint.tensors[name.replace(".lora_", ".adapter.lora_")] = Stored(file, key)
    checkpoint.title += f" with {directory}"  # where a tensor is missing, or has no place, in either
    return rank, alpha


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
