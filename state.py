"""What a training run leaves on disk: checkpoints to resume from, and the model at the end.

A checkpoint `step-N/` holds one safetensors file a rank: FP32 masters and moments of trained weights, each as the slice
of the whole tensor that the rank had, with a note in the file's header which slice that is. A run on another topology
reads from each file just the parts that it needs. Frozen weights are not in it; they come from where the run started.

The folder is written as `step-N.partial` and renamed when all ranks are done: a folder with the final name is whole.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import fp8
from checkpoint import export_config, is_quantized, layers_with_slices, save, scale_name, write_json
from config import UserError, read_json
from launch import gather_objects, together
from lora import merged, save_adapters
from optimizer import Optimizer, Trained, held_tensors
from parallel import Slice

# -------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(directory: str, step: int, optimizer: Optimizer, settings: dict) -> None:
    """Write `directory`/step-N with every rank's part of the state; all ranks call this together.

    Replicas hold the same state and share the writing. Raises UserError, on all ranks, if any of them cannot write;
    then nothing new is left behind.
    """
    place, final = optimizer.place, os.path.join(directory, f"step-{step}")
    partial, rank = f"{final}.partial", optimizer.place.rank

    def prepare() -> None:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial)

    def write_part() -> None:
        path = os.path.join(partial, f"rank-{rank:05d}.safetensors")
        tensors, slices = {}, {}
        owned = [entry for entry in optimizer.state() if entry[0].owner]
        for tensor, views in owned[place.dp_rank :: place.dp_size]:
            part, length = tensor.part, len_inside(tensor.part)
            slices[tensor.name] = [part.start, part.start + length]
            for kind, view in views.items():
                tensors[f"{tensor.name}/{kind}"] = view.narrow(part.dim, 0, length).contiguous().cpu()
        save_file(tensors, path, metadata={"slices": json.dumps(slices)})
        flush_to_disk(path)

    def finish() -> None:
        if rank == 0:
            write_json(os.path.join(partial, "state.json"), {"step": step, "ranks": place.world_size, **settings})
            flush_to_disk(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            flush_to_disk(directory)

    try:
        for phase in (prepare, write_part, finish):
            together(lambda: explained(phase, final))
    except UserError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def explained(action, path: str) -> None:
    """Run `action`; a full disk and its like become a UserError."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot be written ({reason}); earlier checkpoints are whole: make room, then --resume"
        ) from None


def flush_to_disk(path: str) -> None:
    """A file's contents, or a folder's names, survive a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def len_inside(part: Slice) -> int:
    """How much of a slice lies inside the tensor and is not padding."""
    return max(0, min(part.stop, part.shape[part.dim]) - part.start)


def newest_checkpoint(directory: str) -> str | None:
    """The checkpoint of the latest step, or None. What was not finished has another name."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name))]
    return os.path.join(directory, f"step-{max(steps)}") if steps else None


def load_checkpoint(path: str, optimizer: Optimizer, settings: dict) -> int:
    """Fill the optimizer's state and the model's weights from a checkpoint of any topology; returns its step.

    `settings` are those of this run; the ones that decide what a step computes must be those of the checkpoint.
    """
    facts = read_json(os.path.join(path, "state.json"))
    for name, value in settings.items():
        if facts.get(name) != value:
            raise UserError(f"{path}: was made with {name} = {facts.get(name)!r}, but this run has {value!r}")
    pieces: dict[str, list] = {}
    for rank in range(facts["ranks"]):
        file_name = os.path.join(path, f"rank-{rank:05d}.safetensors")
        try:
            file = safe_open(file_name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file_name}: cannot be read ({error}); remove {path} to resume from before") from None
        for name, (start, stop) in json.loads(file.metadata()["slices"]).items():
            pieces.setdefault(name, []).append((file, start, stop))
    with torch.no_grad():
        for tensor, views in optimizer.state():
            read_part(tensor, views, pieces.get(tensor.name, []), path)
    optimizer.steps = facts["step"]
    optimizer.write_weights()
    return facts["step"]


def read_part(tensor: Trained, views: dict[str, torch.Tensor], pieces: list, path: str) -> None:
    """Copy what this rank needs of a tensor out of the pieces that other ranks wrote."""
    part, missing = tensor.part, len_inside(tensor.part)
    for file, start, stop in pieces:
        low, high = max(start, part.start), min(stop, part.stop)
        if low < high:
            index = (slice(None),) * part.dim + (slice(low - start, high - start),)
            for kind, view in views.items():
                source = file.get_slice(f"{tensor.name}/{kind}")
                view.narrow(part.dim, low - part.start, high - low).copy_(source[index])
            missing -= high - low
    if missing:
        raise UserError(f"{path}: holds no whole {tensor.name}; remove the folder to resume from before")


# ------------------------------------------------------------------------------------------------------- export


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


def export_adapters(directory: str, model: nn.Module, rank: int, alpha: float) -> None:
    """Write the adapters, as they are, for the peft library; all ranks call this together."""
    mine = {name: part.shape for name, (_, part) in layers_with_slices(model).items() if ".adapter." in name}
    whole = {name: shape for part in gather_objects(mine) for name, shape in part.items()}
    tensors = dict(collect(model, whole))
    together(lambda: None if model.place.rank else save_adapters(directory, tensors, model, rank, alpha))


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
