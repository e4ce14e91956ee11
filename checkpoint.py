"""Checkpoints: any layout in, exactly the slices a rank needs; the HF layout out.

The model is built first, on `meta`, and every parallel layer says in `slices` which part of which tensor it holds.
`fill` then walks the safetensors files once, reads those parts and nothing else, and turns each into the run dtype on
its device before it reads the next: no process ever holds a tensor that is not its own, nor two copies of one that is.

Names inside this project are the HF ones without their prefixes: `layers.0.self_attn.q_proj.weight`,
`embed_tokens.weight`, `norm.weight`, `lm_head.weight`, `vision_tower.…`, `multi_modal_projector.…`.
"""

import glob
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import fp8
from config import Config, UserError, read_json
from parallel import Slice

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": fp8.E4M3}

RANDOM_BLOCK = 1 << 24  # random weights are drawn this many at a time

HF_PREFIXES = [  # the three spellings in use; see canonical_name
    (r"^model\.language_model\.", ""),
    (r"^language_model\.model\.", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"\1."),
]

NATIVE_NAMES = [
    (r"^tok_embeddings\.", "embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^vision_encoder\.", "vision_tower."),
    (r"^patch_merger\.", "multi_modal_projector.patch_merger."),
    (r"^pre_mm_projector_norm\.", "multi_modal_projector.norm."),
    (r"^vision_language_adapter\.w_in\.", "multi_modal_projector.linear_1."),
    (r"^vision_language_adapter\.w_out\.", "multi_modal_projector.linear_2."),
    (r"^layers\.(\d+)\.attention\.", r"layers.\1.self_attn."),
    (r"^layers\.(\d+)\.feed_forward\.", r"layers.\1.mlp."),
    (r"^layers\.(\d+)\.attention_norm\.", r"layers.\1.input_layernorm."),
    (r"^layers\.(\d+)\.ffn_norm\.", r"layers.\1.post_attention_layernorm."),
    (r"\.w([qkvo])\.", r".\1_proj."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"\.qscale_weight$", ".weight_scale_inv"),
    (r"\.qscale_act$", ".activation_scale"),
]


def canonical_name(name: str, native: bool) -> str:
    """A checkpoint's name -> the project's."""
    for pattern, replacement in NATIVE_NAMES if native else HF_PREFIXES:
        name = re.sub(pattern, replacement, name)
    return name


def hf_name(name: str, config: Config) -> str:
    """The project's name -> the one written: this model's spelling, or the text-only one where there is no tower."""
    if name.startswith("lm_head."):
        return name
    if name.startswith(("vision_tower.", "multi_modal_projector.")) or config.vision is None:
        return f"model.{name}"
    return f"model.language_model.{name}"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file and its name there."""

    file: str
    key: str


class Checkpoint:
    """The tensors of a directory by canonical name, and how many of their bytes were read."""

    def __init__(self, directory: str):
        self.directory = directory
        if not os.path.isdir(directory):
            raise UserError(f"{directory}: no such directory; --ckpt takes the folder that holds the checkpoint")
        self.bytes_read = 0
        self._open = {}
        files, self.native = self._files()
        self.tensors: dict[str, Stored] = {}
        for file, keys in files.items():
            for key in keys:
                name = canonical_name(key, self.native)
                if name in self.tensors:
                    raise UserError(f"{directory}: holds {name} twice, as {self.tensors[name].key} and {key}")
                self.tensors[name] = Stored(file, key)

    def _files(self) -> tuple[dict[str, list[str]], bool]:
        """File -> names in it, from an index where there is one; and whether the layout is the native one."""
        for stem, native in (("model", False), ("consolidated", True)):
            index = os.path.join(self.directory, f"{stem}.safetensors.index.json")
            if os.path.isfile(index):
                weight_map = read_json(index)
                weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
                if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                    raise UserError(f"{index}: has no weight_map from tensor names to file names")
                files: dict[str, list[str]] = {}
                for key, file in weight_map.items():
                    files.setdefault(os.path.join(self.directory, os.path.basename(file)), []).append(key)
                if missing := sorted(f for f in files if not os.path.isfile(f)):
                    raise UserError(f"{missing[0]}: missing, though {os.path.basename(index)} lists it; download it")
                return files, native
            if paths := sorted(glob.glob(os.path.join(glob.escape(self.directory), f"{stem}*.safetensors"))):
                return {path: list(self.file(path).keys()) for path in paths}, native
        raise UserError(f"{self.directory}: holds no model*.safetensors and no consolidated*.safetensors")

    def is_fp8(self) -> bool:
        """Whether the decoder's linears are stored in FP8."""
        return any(name.endswith(".weight_scale_inv") for name in self.tensors)

    def file(self, path: str):
        """The open file (a memory map; no pickle anywhere), with errors that name it."""
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None
        return self._open[path]

    def close(self) -> None:
        self._open.clear()

    def stored(self, name: str):
        """The tensor as a slice that was not read yet, its shape and its stored dtype."""
        at = self.tensors[name]
        try:
            lazy = self.file(at.file).get_slice(at.key)
        except SafetensorError:
            raise UserError(f"{at.file}: does not hold {at.key}, though the index says so") from None
        if lazy.get_dtype() not in DTYPES:
            raise UserError(f"{at.file}: {at.key} is stored as {lazy.get_dtype()}; known are {', '.join(DTYPES)}")
        return lazy, tuple(lazy.get_shape()), DTYPES[lazy.get_dtype()]

    def read(self, name: str, part: Slice) -> torch.Tensor:
        """The part `part` of a tensor, in its stored dtype, on the CPU; shorter than asked where `part` is padded."""
        lazy, shape, _ = self.stored(name)
        if shape != part.shape:
            at = self.tensors[name]
            raise UserError(f"{at.file}: {at.key} has shape {list(shape)}, but the config asks for {list(part.shape)}")
        start, stop = (min(i, shape[part.dim]) for i in (part.start, part.stop))
        tensor = lazy[(slice(None),) * part.dim + (slice(start, stop),)]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def scale(self, name: str) -> torch.Tensor:
        """A 0-d float32 scale, stored as a scalar or as one element."""
        at = self.tensors[name]
        _, shape, _ = self.stored(name)
        scale = self.file(at.file).get_tensor(at.key).float().reshape(-1)
        if shape not in ((), (1,)) or not (scale.isfinite() & (scale > 0)).all():
            raise UserError(f"{at.file}: {at.key} should be one finite number above 0, found shape {list(shape)}")
        self.bytes_read += 4
        return scale.reshape(())

    def weight(self, name: str, part: Slice, config: Config) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The part `part` of a weight, rotary pairs in the HF order; and its scale where it is FP8, else None."""
        weight, scale = self.read(name, part), scale_name(name)
        if self.native and name.endswith(("q_proj.weight", "k_proj.weight")):
            head_dim = config.vision.head_dim if name.startswith("vision_tower.") else config.head_dim
            weight = half_split(weight, head_dim)
        if (weight.dtype == fp8.E4M3) != (scale in self.tensors):
            what = (
                f"is FP8, but {scale} is missing" if weight.dtype == fp8.E4M3 else f"is not FP8, but {scale} is there"
            )
            raise UserError(f"{self.tensors[name].file}: {name} {what}")
        return weight, self.scale(scale) if scale in self.tensors else None


def is_quantized(name: str) -> bool:
    """Whether an FP8 checkpoint stores the weight of this name in FP8: the decoder's seven linears a layer."""
    return re.fullmatch(r"layers\..*_proj\.weight", name) is not None


def scale_name(name: str) -> str:
    return f"{name.removesuffix('.weight')}.weight_scale_inv"


def layers_with_slices(model: nn.Module) -> dict[str, tuple[nn.Module, Slice]]:
    """Canonical tensor name -> (the layer that holds a part of it, that part), for every parameter of `model`."""
    return {
        f"{prefix}.{name}": (layer, part)
        for prefix, layer in model.named_modules()
        for name, part in getattr(layer, "slices", {}).items()
    }


def half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a native q or k projection (heads · D, in), rotary pairs (2i, 2i+1), to the HF order (i, i + D/2)."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_names(checkpoint: Checkpoint, config: Config, whole_model: nn.Module) -> None:
    """Every tensor of the whole model is in the checkpoint, with a scale where it has one, and nothing else is."""
    expected = set(layers_with_slices(whole_model))
    here = set(checkpoint.tensors)
    if config.tie_word_embeddings:
        expected.discard("lm_head.weight")
        if "lm_head.weight" in here:
            raise UserError(
                f"{checkpoint.directory}: holds an lm_head, but its config says (or leaves it to the default) that the "
                "head is tied to the embeddings; set tie_word_embeddings to false in it"
            )
    scales = {name for name in here if name.endswith((".weight_scale_inv", ".activation_scale"))}
    if missing := expected - here:
        raise UserError(f"{checkpoint.directory}: {len(missing)} tensors are missing: {some(missing)}")
    owned = {f"{n.removesuffix('.weight')}.{s}" for n in expected for s in ("weight_scale_inv", "activation_scale")}
    if surplus := here - expected - (scales & owned):
        surplus = [checkpoint.tensors[name].key for name in surplus]
        raise UserError(f"{checkpoint.directory}: {len(surplus)} tensors have no place in the model: {some(surplus)}")


def fill(model: nn.Module, checkpoint: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None):
    """Give every parameter of `model` (one rank's part, on `meta`) its values, file by file.

    FP8 weights are dequantized to the layer's dtype, or stay FP8 where the layer keeps them. `progress(done, total)`
    is called with tensors filled so far. Raises UserError for anything missing, surplus, misshapen or damaged.
    """
    config, device = model.config, model.place.device
    check_names(checkpoint, config, type(model)(config))
    wanted: dict[str, list[tuple[str, nn.Module, Slice]]] = {}
    layers = layers_with_slices(model)
    for name, (layer, part) in layers.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            if "embed_tokens.weight" in layers:
                continue
            name = "embed_tokens.weight"
        wanted.setdefault(checkpoint.tensors[name].file, []).append((name, layer, part))
    done, total = 0, sum(map(len, wanted.values()))
    for path, entries in sorted(wanted.items()):
        listed = {at.key for at in checkpoint.tensors.values() if at.file == path}
        if strangers := set(checkpoint.file(path).keys()) - listed:
            raise UserError(f"{path}: holds {some(strangers)}, which the index does not list")
        for name, layer, part in entries:
            layer.weight = nn.Parameter(
                prepare(checkpoint, name, layer, part, config, device), layer.weight.requires_grad
            )
            done += 1
            progress(done, total)
    if config.tie_word_embeddings and model.place.first_stage and model.place.last_stage:
        model.lm_head.weight = model.embed_tokens.weight
    checkpoint.close()


def prepare(checkpoint: Checkpoint, name: str, layer: nn.Module, part: Slice, config: Config, device) -> torch.Tensor:
    """One parameter as its layer holds it: read, reordered, dequantized or cast, padded, on its device."""
    weight, scale = checkpoint.weight(name, part, config)
    weight = weight.to(device)
    keep_fp8 = getattr(layer, "weight_scale", None) is not None
    if keep_fp8 and scale is None:
        raise UserError(f"{checkpoint.tensors[name].file}: {name} is not FP8; run with --weights dequantized")
    if keep_fp8:
        layer.weight_scale = scale.to(device)
        if (inputs := name.replace(".weight", ".activation_scale")) in checkpoint.tensors:
            layer.activation_scale = checkpoint.scale(inputs).to(device)
    elif scale is not None:
        return fp8.dequantize(weight, scale.to(device), layer.weight.dtype)  # these are never padded
    # Always a copy: what was read is a view of the mapped file, which somebody may truncate while the program runs.
    out = torch.zeros(part.local_shape, dtype=layer.weight.dtype, device=device)
    out[tuple(slice(0, n) for n in weight.shape)] = weight
    return out


def initialize(model: nn.Module, seed: int) -> None:
    """Give every parameter of `model` random values: norms are 1, all else is normal with the config's deviation."""
    config = model.config
    for name, (layer, part) in layers_with_slices(model).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            if model.place.first_stage:
                layer.weight = model.embed_tokens.weight
                continue
            name = "embed_tokens.weight"
        one = len(part.shape) == 1
        weight = torch.ones(part.local_shape) if one else draw(name, part, seed, config.initializer_range)
        layer.weight = nn.Parameter(weight.to(model.place.device, layer.weight.dtype))


def draw(name: str, part: Slice, seed: int, deviation: float) -> torch.Tensor:
    """The part `part` of the random tensor `name`, normal, float32.

    A tensor is drawn in blocks of rows, and each block has a generator of its own, seeded with the tensor's name and
    the block's number: every topology holds slices of the same model, and no rank draws much more than its part.
    """
    weight = torch.zeros(part.local_shape)
    rows = max(1, RANDOM_BLOCK // math.prod(part.shape[1:]))
    first, last = (part.start, min(part.stop, part.shape[0])) if part.dim == 0 else (0, part.shape[0])
    for block in range(first // rows, -(-last // rows)):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {block}".encode()))
        top = block * rows
        drawn = torch.randn(min(rows, part.shape[0] - top), *part.shape[1:], generator=generator)
        low, high = max(first, top), min(last, top + len(drawn))
        drawn = drawn[low - top : high - top]
        if part.dim == 1:
            drawn = drawn[:, part.start : part.stop]
        weight[low - first : high - first] = drawn.mul_(deviation)
    return weight


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
