"""Checkpoints: any layout in, exactly the slices a rank needs.

The model is built first, on `meta`, and every parallel layer says in `parts` which slices of which tensors it holds.
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
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from safetensors import safe_open
from torch import nn

import fp8
from model import Config
from parallel import Part, Slice, parts_of
from runtime.files import UserError, find_folder, plural, read_file, read_json, reading, warn
from runtime.native import NATIVE_NAMES, half_split
from vision import build_model

DTYPES = ("BF16", "F16", "F32", "F8_E4M3")  # those that a tensor may be stored in, in safetensors' words

MAPPED = 1 << 26  # bytes read from a file before it is opened anew

BLOCK = 1 << 24  # elements that are checked, converted or drawn at a time: bounds a float32 copy to 64 MiB

PIECE = re.compile(r"(.+)@(\d{1,12}):(\d{1,12})")  # NAME@START:STOP, a piece of a tensor: see `Checkpoint.fill_part`

# In the files' own words: scales of an FP8 cache and of fake quantization, and frequencies that the config gives, too.
# They change nothing that is computed here.
PASSED_OVER = re.compile(r"\.[kv]_scale$|fake_quantizer\.qscale_act$|\.inv_freq$")

# What may stand beside a weight.
BESIDE = re.compile(r"\.(weight_scale_inv|activation_scale|adapter\.lora_[AB]\.weight)$")

# The three HF spellings in use put different prefixes before the same names: model.layers.…, model.language_model.… or
# language_model.model.…; model.vision_tower.… or vision_tower.…; lm_head.… or language_model.lm_head.…
HF_NAMES = [(r"^(model\.|language_model\.)+", "")]


def canonical_name(name: str, native: bool) -> str:
    """A checkpoint's name -> the project's."""
    for pattern, replacement in NATIVE_NAMES if native else HF_NAMES:
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
        self.directory = self.title = find_folder(directory)  # the title is what messages call it
        self.bytes_read = 0
        self._open = {}
        files, self.native = self._files()
        self.tensors: dict[str, Stored] = {}
        self.passed_over: set[str] = set()
        useless = set()
        for file, keys in files.items():
            for key in keys:
                name = canonical_name(key, self.native)
                if name in self.tensors:
                    raise UserError(f"{directory}: holds {name} twice, as {self.tensors[name].key} and {key}")
                if PASSED_OVER.search(key):
                    useless.add(key)
                else:
                    self.tensors[name] = Stored(file, key)
        self.pass_over(useless)

    def pass_over(self, keys: set[str]) -> None:
        """Say of each once that it is of no use here."""
        keys = keys - self.passed_over
        self.passed_over |= keys
        if keys:
            what = f"{plural(len(keys), 'tensor')} of no use here passed over"
            warn(f"{self.directory}: {what}: {some(keys)}")

    def unlisted(self, path: str) -> set[str]:
        """The tensors in a file that are of no use here. Raises UserError for one that only the index does not list."""
        keys = set(self.file(path).keys()) - {at.key for at in self.tensors.values() if at.file == path}
        useless = {key for key in keys if PASSED_OVER.search(key)}
        if strangers := keys - useless:
            raise UserError(f"{path}: holds {some(strangers)}, which the index does not list")
        return useless

    def _files(self) -> tuple[dict[str, list[str]], bool]:
        """File -> names in it, from an index where there is one; and whether the layout is the native one."""
        for stem, native in (("model", False), ("consolidated", True), ("state", False)):  # "state": see `fill_part`
            whole = os.path.join(self.directory, f"{stem}.safetensors")
            paths = sorted(glob.glob(os.path.join(glob.escape(self.directory), f"{stem}*.safetensors")))
            if os.path.exists(index := f"{whole}.index.json"):
                files: dict[str, list[str]] = {}
                with reading(index, "index"):
                    for key, file in read_json(index)["weight_map"].items():
                        # basename: an index cannot lead out of its folder
                        files.setdefault(os.path.join(self.directory, os.path.basename(file)), []).append(key)
                if os.path.exists(whole) and whole not in files:
                    raise UserError(f"{whole}: is not what {index} lists; remove the one of them that is out of date")
                if missing := sorted(f for f in files if not os.path.exists(f)):
                    raise UserError(f"{missing[0]}: missing, though {os.path.basename(index)} lists it; download it")
                if more := set(paths) - set(files):
                    warn(f"{index}: does not list {some(map(os.path.basename, more))}, which nothing is read from")
                return files, native
            if paths:
                return {path: list(self.file(path).keys()) for path in paths}, native
        raise UserError(f"{self.directory}: holds no model*.safetensors and no consolidated*.safetensors")

    def fit(self, config: Config) -> Config:
        """`config` with what the file says of it: whether there is a head of its own, as in transformers."""
        has_head = config.tie_word_embeddings and "lm_head.weight" in self.tensors
        if has_head and "embed_tokens.weight" not in self.tensors:
            # safetensors' save_model keeps one of the two names of a shared tensor.
            self.tensors["embed_tokens.weight"] = self.tensors.pop("lm_head.weight")
        elif has_head:
            sections = config.raw, config.raw.get("text_config") or {}
            if any(section.get("tie_word_embeddings") for section in sections):
                what = "tie_word_embeddings is true in the config, but the file has a head: it is used"
                warn(f"{self.directory}: {what}")
            config = replace(config, tie_word_embeddings=False)
        return config

    def is_fp8(self) -> bool:
        """Whether the decoder's linears are stored in FP8."""
        return any(name.endswith(".weight_scale_inv") for name in self.tensors)

    def file(self, path: str):
        """The open file (a memory map; no pickle anywhere), with errors that name it."""
        if path not in self._open:
            read_file(path)  # refuses a pipe, which would be waited for
            with reading(path, "safetensors file; copy or download it again"):
                self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def close(self) -> None:
        self._open.clear()

    def stored(self, name: str, shape: tuple[int, ...] | None = None):
        """A tensor as a slice that has not been read yet, and its shape, which should be `shape`."""
        at = self.tensors[name]
        with reading(at.file, "home of all tensors that the index promises"):
            lazy = self.file(at.file).get_slice(at.key)
        if lazy.get_dtype() not in DTYPES:
            raise UserError(f"{at.file}: {at.key} is stored as {lazy.get_dtype()}; known are {', '.join(DTYPES)}")
        found = tuple(lazy.get_shape())
        if shape not in (None, found):
            raise UserError(f"{at.file}: {at.key} has shape {list(found)}, but the config asks for {list(shape)}")
        return lazy, found

    def read(self, name: str, part: Slice) -> torch.Tensor:
        """The part `part` of a tensor, in its stored dtype, on the CPU; shorter than asked where `part` is padded."""
        lazy, shape = self.stored(name, part.shape)
        start = min(part.start, shape[part.dim])
        tensor = lazy[(slice(None),) * part.dim + (slice(start, start + part.length),)]
        self.bytes_read += tensor.nbytes
        largest = [largest_of(block) for block in tensor.flatten().split(BLOCK)]
        at = self.tensors[name]
        if not all(map(math.isfinite, largest)):
            raise UserError(f"{at.file}: {at.key} holds NaN or infinity; copy or download the file again")
        # What an interrupted download leaves. (An adapter's B, and Adam's moments, may rightly be zeros.)
        if name.endswith(".weight") and ".adapter." not in name and tensor.numel() and max(largest) == 0:
            raise UserError(f"{at.file}: {at.key} is all zeros; copy or download the file again")
        return tensor

    @cached_property
    def pieces(self) -> dict[str, list[tuple[int, int, str]]]:
        """Of each tensor that lies in pieces: (start, stop, the piece's name)."""
        found = {}
        for key in self.tensors:
            if match := PIECE.fullmatch(key):
                found.setdefault(match[1], []).append((int(match[2]), int(match[3]), key))
        return found

    def fill_part(self, name: str, part: Slice, out: torch.Tensor) -> None:
        """Copy the part `part` of a tensor that lies in pieces along `part.dim` into `out`, which has no padding.

        The ranks of a run save its state like this; their topology may have been another one.
        """
        done = 0
        for start, stop, key in sorted(self.pieces.get(name, ())):
            low, high = max(start, part.start), min(stop, part.start + part.length)
            if low < high:
                shape = Slice(part.shape, part.dim, start, stop).local_shape
                values = self.read(key, Slice(shape, part.dim, low - start, high - start))
                if values.dtype != out.dtype:
                    raise UserError(f"{self.tensors[key].file}: {key} is stored as {values.dtype}, not {out.dtype}")
                out.narrow(part.dim, low - part.start, high - low).copy_(values)
            done = stop if start == done else done
        if done != part.shape[part.dim]:
            raise UserError(f"{self.directory}: holds no whole {name}")

    def scale(self, name: str) -> torch.Tensor | None:
        """A 0-d float32 scale, stored as one element of any shape; None where there is none of this name."""
        if name not in self.tensors:
            return None
        at, (_, shape) = self.tensors[name], self.stored(name)
        if math.prod(shape) != 1:
            raise UserError(f"{at.file}: {at.key} should be one number, found shape {list(shape)}")
        scale = self.file(at.file).get_tensor(at.key).float().reshape(())
        if not (scale > 0 and (scale * fp8.E4M3_MAX).isfinite()):
            raise UserError(f"{at.file}: {at.key} should be a finite number above 0, found {scale.item()}")
        self.bytes_read += 4
        return scale

    def weight(self, name: str, part: Slice, config: Config) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The part `part` of a weight, rotary pairs in the HF order; and its scale where it is FP8, else None."""
        weight, (scale_name, _) = self.read(name, part), scale_names(name)
        scale = self.scale(scale_name)
        if self.native and name.endswith(("q_proj.weight", "k_proj.weight")):
            head_dim = config.vision.head_dim if name.startswith("vision_tower.") else config.head_dim
            weight = half_split(weight, head_dim)
        if weight.dtype == fp8.E4M3 and scale is None:
            raise UserError(f"{self.tensors[name].file}: {name} is FP8, but {scale_name} is missing")
        if weight.dtype != fp8.E4M3 and scale is not None:
            raise UserError(f"{self.tensors[name].file}: {name} is not FP8, but {scale_name} is there")
        return weight, scale


def largest_of(values: torch.Tensor) -> float:
    """A number that is 0 if all `values` are, and not finite if one of them is not; else their largest magnitude."""
    if values.numel() == 0:
        return 0.0
    if values.dtype == fp8.E4M3:  # it has no infinity, and its two NaNs are the bytes 7F and FF
        code = int((values.view(torch.uint8) & 0x7F).amax())  # in the order of the magnitudes
        return math.nan if code == 0x7F else float(code)
    low, high = values.aminmax()  # NaN if one is; one pass without temporaries
    return max(-float(low), float(high)) if low == low else math.nan


def is_quantized(name: str) -> bool:
    """Whether an FP8 checkpoint stores the weight of this name in FP8: the decoder's seven linears per layer."""
    return re.fullmatch(r"layers\..*_proj\.weight", name) is not None


def scale_names(name: str) -> tuple[str, str]:
    """The names of a weight's two scales: its own, and the static one of the linear's input."""
    return name.replace(".weight", ".weight_scale_inv"), name.replace(".weight", ".activation_scale")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of this rank's parameters, FP8 scales and other buffers, each counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_names(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Every tensor of this rank's `model` is in the checkpoint, and nothing else that the whole model has no place for.

    Scales of inputs are there for all quantized weights or for none: without one a linear would measure its own.
    """
    own, known, here = set(parts_of(model)), set(parts_of(build_model(model.config))), checkpoint.tensors
    if missing := own - set(here):
        raise UserError(f"{checkpoint.title}: {len(missing)} tensors are missing: {some(missing)}")
    strangers = [at.key for name, at in here.items() if BESIDE.sub(".weight", name) not in known | own]
    if strangers:
        raise UserError(f"{checkpoint.title}: {len(strangers)} tensors have no place in the model: {some(strangers)}")
    inputs = {scale_names(name)[1] for name in known if scale_names(name)[0] in here}
    if (lacking := inputs - set(here)) and lacking != inputs:
        raise UserError(f"{checkpoint.title}: {len(lacking)} activation scales are missing: {some(lacking)}")


def fill(model: nn.Module, checkpoint: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None):
    """Give every parameter of `model` (one rank's part, on `meta`) its values.

    FP8 weights are dequantized to the layer's dtype, or stay FP8 where the layer keeps them. `progress(done, total)`
    is called with tensors filled so far. Raises UserError for anything missing, surplus, misshapen or damaged.
    """
    check_names(checkpoint, model)
    parts = parts_of(model)
    # File by file, in the same order on every rank: the disk, or the network file system, reads each shard from front
    # to back once, and what one rank has read the others on its machine find in the page cache.
    wanted: dict[str, list[str]] = {}
    for name in parts:
        wanted.setdefault(checkpoint.tensors[name].file, []).append(name)
    done, read, useless = 0, 0, set()
    for path, names in sorted(wanted.items()):
        useless |= checkpoint.unlisted(path)
        for name in names:
            layer, part = parts[name]
            allocate(layer, model.place.device)
            target = part.rows_of(layer.weight.data)
            fill_part(target, checkpoint, name, layer, part, model)
            done, read = done + 1, read + target.nbytes
            progress(done, len(parts))
            if read > MAPPED:  # what was read of a mapped file counts as this process's memory until it is closed
                checkpoint.close()
                read = 0
    checkpoint.pass_over(useless)
    checkpoint.close()


def allocate(layer: nn.Module, device: torch.device) -> None:
    """Memory for the weight of `layer`, and for its scale where it keeps FP8, if they are still on `meta`.

    A new Parameter, since one on `meta` cannot be given memory on another device. (Not `empty_like`: of a tensor on
    `meta` it imports sympy, which takes a second.)
    """
    weight = layer.weight
    if weight.is_meta:
        memory = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        layer.weight = nn.Parameter(memory, weight.requires_grad)
        if keeps_fp8(layer):
            layer.weight_scale = torch.empty(layer.weight_scale.shape, device=device)


def keeps_fp8(layer: nn.Module) -> bool:
    return getattr(layer, "weight_scale", None) is not None


def fill_part(
    target: torch.Tensor, checkpoint: Checkpoint, name: str, layer: nn.Module, part: Part, model: nn.Module
) -> None:
    """One tensor as its layer holds it, into `target`, its rows of the parameter: read, dequantized or cast, padded."""
    weight, scale = checkpoint.weight(name, part.slice, model.config)
    if keeps_fp8(layer):
        if scale is None:
            raise UserError(f"{checkpoint.tensors[name].file}: {name} is not FP8; run with --weights dequantized")
        part.rows_of(layer.weight_scale).fill_(scale)
        input_scale = checkpoint.scale(scale_names(name)[1])
        if input_scale is not None:
            layer.activation_scale = largest(layer.activation_scale, input_scale.to(target.device))
        scale = None
    # Always a copy: what was read is a view of the mapped file, and if somebody truncates that while the program runs,
    # touching the view kills the process. Padding must be zero: the head's backward pass multiplies these rows, too, by
    # their (zero) gradients, uninitialized memory may hold NaN, and 0 times NaN is NaN.
    if weight.shape != target.shape:
        target.zero_()
    inside = target[tuple(slice(0, n) for n in weight.shape)]
    # Some rows at a time: the largest weight, the head, has 3.2 GB, and must not be on the device, or converted, twice.
    rows = max(1, BLOCK // max(1, weight[:1].numel()))
    for source, out in zip(weight.split(rows), inside.split(rows)):
        source = source.to(target.device)
        out.copy_(source if scale is None else fp8.dequantize(source, scale.to(target.device), target.dtype))


def largest(known: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """Of several scales for the common input of a linear's matrices the largest counts."""
    return scale if known is None else torch.maximum(known, scale)


# -------------------------------------------------------------------------------------------------- random values


def initialize(model: nn.Module, seed: int) -> None:
    """Give every parameter of `model` random values: norms are 1, all else is normal with the config's deviation."""
    for name, (layer, part) in parts_of(model).items():
        allocate(layer, model.place.device)
        norm = len(part.slice.shape) == 1
        values = 1.0 if norm else draw(name, part.slice, seed, model.config.initializer_range)
        part.rows_of(layer.weight.data).copy_(torch.as_tensor(values))


def draw(name: str, part: Slice, seed: int, deviation: float) -> torch.Tensor:
    """The part `part` of the random tensor `name`, normal, float32.

    Every topology must hold slices of the same tensor, and a generator yields its numbers only in order: to have the
    last rows, a rank would draw all before them. So a tensor is drawn in blocks of rows, and each block has a generator
    of its own, seeded with the tensor's name and the block's number: no rank draws much more than its part.
    """
    weight = torch.zeros(part.local_shape)
    rows = max(1, BLOCK // math.prod(part.shape[1:]))
    first, last = (part.start, part.start + part.length) if part.dim == 0 else (0, part.shape[0])
    for top in range(first // rows * rows, last, rows):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {top // rows}".encode()))
        block = torch.randn(min(rows, part.shape[0] - top), *part.shape[1:], generator=generator)
        low, high = max(first, top), min(last, top + rows)
        block = block[low - top : high - top]
        if part.dim == 1:
            block = block[:, part.start : part.stop]
        weight[low - first : high - first] = block.mul_(deviation)
    return weight
