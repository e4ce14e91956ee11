"""LoRA adapters beside the decoder's linears, and the form in which peft reads them."""

import os
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import fp8
from parallel import Linear, Part, Place, Slice, parts_of
from runtime.checkpoint import Checkpoint, Stored, allocate, canonical_name, draw
from runtime.files import Fields, find_folder, read_json, reading, require


class Adapter(nn.Module):
    """LoRA (arXiv:2106.09685): beside a frozen W, a product of two small factors learns. (..., in) -> (..., out).

    The linear then computes W x + (alpha / rank) · B A x, with A (rank, in) and B (out, rank). Only A and B have
    gradients and optimizer state, so W may stay FP8: training needs little more memory than inference. Beside a linear
    of several matrices (q, k, v) each has factors of its own: their A lie below each other, and so do their B.

    Under tensor parallelism the factor on the side where W is cut is cut with it, and the other one is whole on every
    rank: A beside a column-parallel W; B beside a row-parallel one, where partial sums pass through it before they are
    added up. Either way a rank finds only its share of the whole factor's gradient, as with a shared key/value head.
    """

    def __init__(self, linear: Linear, rank: int, alpha: float, place: Place, dtype: torch.dtype):
        super().__init__()
        self.rank, self.scale, tp = rank, alpha / rank, place.tp_size
        down, up = [], []
        for i, part in enumerate(linear.parts):
            cut, (rows, columns) = part.slice, part.slice.shape
            a, b = Slice((rank, columns), 0, 0, rank), Slice((rows, rank), 0, 0, rows)
            by_rows = cut.dim == 0
            if by_rows:
                b = replace(b, start=cut.start, stop=cut.stop)
            else:
                a = replace(a, dim=1, start=cut.start, stop=cut.stop)
            down.append(Part(a, part.name, i * rank, sharers=tp if by_rows else part.sharers))
            up.append(Part(b, part.name, part.start, sharers=part.sharers if by_rows else tp))
        self.lora_A, self.lora_B = Linear(down, dtype), Linear(up, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.lora_A(x).split(self.rank, dim=-1)  # (..., rank) for each matrix
        parts = [F.linear(y, part.rows_of(self.lora_B.weight)) for y, part in zip(narrow, self.lora_B.parts)]
        return torch.cat(parts, dim=-1) * self.scale


def add_adapters(model: nn.Module, rank: int, alpha: float) -> None:
    """Freeze `model` and put an adapter, still on `meta`, beside each of its decoder's linears."""
    model.requires_grad_(False)
    for layer in list(model.layers.modules()):
        if isinstance(layer, Linear):
            layer.adapter = Adapter(layer, rank, alpha, model.place, model.dtype)


def initialize_adapters(model: nn.Module, seed: int) -> None:
    """A is random, with the deviation of PyTorch's own linears, and B zero: at first the adapters change nothing."""
    for name, (layer, part) in parts_of(model).items():
        if ".adapter." in name:
            allocate(layer, model.place.device)
            random = name.endswith("lora_A.weight")
            values = draw(name, part.slice, seed, (3 * part.slice.shape[1]) ** -0.5) if random else torch.zeros(())
            part.rows_of(layer.weight.data).copy_(values)


# What peft's adapter_config.json may say without changing what is computed here; of other keys, that they are off.
HARMLESS = set(
    "r lora_alpha task_type auto_mapping peft_version base_model_name_or_path revision inference_mode".split()
)
HARMLESS |= set("target_modules exclude_modules lora_dropout layers_to_transform layers_pattern eva_config".split())
HARMLESS |= {"megatron_core", "qalora_group_size"}
# Other ways to initialize (pissa, olora, …) change the base beside which the adapters belong.
ONLY = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}


def read_adapters(directory: str, checkpoint: Checkpoint) -> tuple[int, float]:
    """Adds adapters in peft's form, as train.py exports them, to the tensors of `checkpoint`; (rank, alpha)."""
    path, file = (
        os.path.join(find_folder(directory), f"adapter_{name}") for name in ("config.json", "model.safetensors")
    )
    with reading(path, "adapter config", "--lora takes plain adapters, as train.py exports them"):
        fields = Fields(read_json(path), path)
        rank, alpha = fields.positive("r", int, largest=1 << 16), fields.get("lora_alpha", float)
        fields.only(**ONLY)
        strangers = fields.strangers(HARMLESS | set(ONLY))
        require(not strangers, f"{strangers} is not supported")
    for key in checkpoint.file(file).keys():
        name = canonical_name(key.removeprefix("base_model.model."), native=False)
        checkpoint.tensors[name.replace(".lora_", ".adapter.lora_")] = Stored(file, key)
    checkpoint.title += f" with {directory}"  # where a tensor is missing, or has no place, in either
    return rank, alpha


@torch.no_grad()
def merged(layer: nn.Module, part: Part, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of `layer`, with its adapter added if it has one: summed in float32, rounded once to `dtype`."""
    adapter, scale, weight = getattr(layer, "adapter", None), getattr(layer, "weight_scale", None), layer.weight.data
    weight = part.rows_of(weight)
    if scale is not None:
        weight = fp8.dequantize(weight, part.rows_of(scale), torch.float32 if adapter else dtype)
    if adapter is None:
        return weight
    i = layer.parts.index(part)
    a, b = (factor.parts[i].rows_of(factor.weight).float() for factor in (adapter.lora_A, adapter.lora_B))
    return torch.addmm(weight.float(), b, a, alpha=adapter.scale).to(dtype)
