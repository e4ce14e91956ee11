"""LoRA: small adapters beside the decoder's linears learn, and the model itself stays frozen (arXiv:2106.09685).

A linear of weight W gets two factors of rank r and computes W x + (alpha / r) · B A x. Only A and B have gradients and
optimizer state, so W may stay FP8 in memory: what a rank needs is little more than for inference.
"""

import os

import torch
from safetensors.torch import save_file
from torch import nn

import fp8
from checkpoint import draw, is_quantized, layers_with_slices, write_json
from parallel import Linear, Place, Slice


class Adapter(nn.Module):
    """(..., in) -> (..., out): (alpha / rank) · B A x.

    Of the two factors the one on the side where W is cut is cut with it, and the other is whole on every rank: A beside
    a column-parallel W, B beside a row-parallel one, where partial sums pass through it before they are added up.
    Either way each rank finds its own share of the whole factor's gradient, as it does for a shared key/value head.
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
    for name, layer in list(model.named_modules()):
        if is_quantized(f"{name}.weight"):
            layer.adapter = Adapter(layer, rank, alpha, model.place, model.dtype)


def initialize_adapters(model: nn.Module, seed: int) -> None:
    """A is random, with the deviation of PyTorch's own linears, and B zero: at first the adapters change nothing."""
    for name, (layer, part) in layers_with_slices(model).items():
        if name.endswith("lora_A.weight"):
            weight = draw(name, part, seed, (3 * part.shape[1]) ** -0.5)
        elif name.endswith("lora_B.weight"):
            weight = torch.zeros(part.local_shape)
        else:
            continue
        layer.weight = nn.Parameter(weight.to(model.place.device, model.dtype))


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
