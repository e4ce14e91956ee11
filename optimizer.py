"""Adam in mixed precision: BF16 weights for the model, everything that adds up in FP32.

A BF16 number has 8 bits of mantissa, so that a weight of 1 does not notice an update of 0.001. The optimizer therefore
keeps an FP32 *master* of every trained weight and rounds it to the model's BF16 copy after each step. Gradients of
many micro-batches are summed in FP32 for the same reason: a hook moves each parameter's gradient into its FP32 sum as
soon as the backward pass has it, and BF16 gradients never exist for more than a layer or so.

Parameters live in *buckets*: one flat tensor each for masters, gradients and the two moments. A bucket is what
data-parallel replicas all-reduce in one go, as soon as the last micro-batch's backward pass has filled it, and what
Adam updates with a handful of kernels. A rank's memory is 2 + 4·4 = 18 bytes for each of its trained weights (16 in
float32, where the model's weights are views of the masters).

What tensor and pipeline parallelism add: key/value heads shared by several ranks, whose gradients must be summed; an
embedding tied to the head of another stage; and a norm over all ranks that counts each parameter once.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from checkpoint import layers_with_slices
from config import UserError, read_json, write_json
from launch import together
from parallel import Place, Slice

BUCKET = 1 << 25  # elements; a larger parameter has a bucket of its own

CPU_CHUNK = 1 << 16  # elements that Adam updates at a time on a CPU, so that they are still in its cache

FREEZABLE = {  # --freeze NAME -> how its parameters' names begin
    "vision_tower": ("vision_tower.",),
    "projector": ("multi_modal_projector.",),
    "embeddings": ("embed_tokens.",),
    "language_model": ("embed_tokens.", "layers.", "norm.", "lm_head."),
}


@dataclass
class Trained:
    """A trained parameter, or rather this rank's part of it."""

    name: str  # canonical, of the whole tensor
    parameter: nn.Parameter
    part: Slice
    sharers: int  # tensor-parallel neighbours that hold the same part and find a share of its gradient each
    owner: bool  # of all the ranks (of one replica) that hold the same part, one owns it: counts it, and saves it


def held_tensors(model: nn.Module) -> list[Trained]:
    """Every parameter of this rank's `model` once, trained or not, in the order of the model."""
    place, tied = model.place, model.config.tie_word_embeddings
    held = []
    for name, (layer, part) in layers_with_slices(model).items():
        copy = tied and name == "lm_head.weight"
        if copy and place.first_stage:
            continue  # it is the embedding itself
        sharers = getattr(layer, "sharers", 1)
        whole = part.local_shape == part.shape
        owner = not copy and (place.tp_rank % sharers == 0 if sharers > 1 else place.tp_rank == 0 or not whole)
        held.append(Trained("embed_tokens.weight" if copy else name, layer.weight, part, sharers, owner))
    return held


class Bucket:
    """Some parameters, with flat FP32 tensors of what belongs to them, and views of each parameter's share."""

    def __init__(self, tensors: list[Trained]):
        self.tensors = tensors
        device = tensors[0].parameter.device
        sizes = [t.parameter.numel() for t in tensors]
        self.grads, self.masters, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(sum(sizes), dtype=torch.float32, device=device) for _ in range(4)
        )
        shapes = [t.parameter.shape for t in tensors]
        self.views = {
            name: [x.view(shape) for x, shape in zip(getattr(self, name).split(sizes), shapes)]
            for name in ("grads", "masters", "exp_avg", "exp_avg_sq")
        }
        for tensor, master in zip(tensors, self.views["masters"]):
            master.copy_(tensor.parameter.data)
            if tensor.parameter.dtype == torch.float32:
                tensor.parameter.data = master
        self.missing = 0  # parameters without a gradient so far, in the last micro-batch
        self.empty: set[int] = set()  # parameters without a gradient so far, in this step
        self.reduction: dist.Work | None = None


class Optimizer:
    """Adam (arXiv:1412.6980) or, with `decoupled` weight decay, AdamW (arXiv:1711.05101); `torch.optim`'s arithmetic.

    Every parameter of `model` with `requires_grad` is trained. The calls of a step, in order: `start`, backward passes
    (before the last of them `before_last_backward`), `reduce`, `squared_norm`, `step`.
    """

    def __init__(self, model: nn.Module, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool):
        self.place: Place = model.place
        self.betas, self.eps, self.weight_decay, self.decoupled = betas, eps, weight_decay, decoupled
        self.steps, self.last = 0, False
        self.tied = model.config.tie_word_embeddings and self.place.pp_size > 1
        groups: list[list[Trained]] = []
        size = BUCKET
        for tensor in reversed([t for t in held_tensors(model) if t.parameter.requires_grad]):
            count = tensor.parameter.numel()  # reversed: about the order in which the backward pass reaches them
            if size + count > BUCKET:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size += count
        self.buckets = [Bucket(group) for group in groups]
        self.launched = 0
        for bucket in self.buckets:
            for i, tensor in enumerate(bucket.tensors):
                tensor.parameter.register_post_accumulate_grad_hook(self._hook(bucket, i))

    def _hook(self, bucket: Bucket, i: int):
        grad = bucket.views["grads"][i]

        def move(parameter: nn.Parameter) -> None:
            if i in bucket.empty:
                bucket.empty.remove(i)
                grad.copy_(parameter.grad)
            else:
                grad.add_(parameter.grad)
            parameter.grad = None
            if self.last:
                bucket.missing -= 1
                self._launch(only_filled=True)

        return move

    def start(self) -> None:
        """Forget the last step's gradients."""
        self.last, self.launched = False, 0
        for bucket in self.buckets:
            bucket.missing, bucket.reduction = len(bucket.tensors), None
            bucket.empty = set(range(len(bucket.tensors)))

    def before_last_backward(self) -> None:
        self.last = True

    def _launch(self, only_filled: bool) -> None:
        """All-reduce the next buckets over the replicas: always in the same order, since collectives match by order."""
        while self.launched < len(self.buckets) and not (only_filled and self.buckets[self.launched].missing):
            bucket = self.buckets[self.launched]
            for i in bucket.empty:
                bucket.views["grads"][i].zero_()
            if self.place.dp_group is not None:
                bucket.reduction = dist.all_reduce(bucket.grads, group=self.place.dp_group, async_op=True)
            self.launched += 1

    def reduce(self) -> None:
        """Make every rank's gradients complete: the sum over replicas, sharers and the two ends of a tied embedding."""
        self._launch(only_filled=False)
        for bucket in self.buckets:
            if bucket.reduction is not None:
                bucket.reduction.wait()
        for tensor, grad in self._each("grads"):
            if tensor.sharers > 1:
                whole = torch.zeros(tensor.part.shape, device=grad.device)
                rows = whole[tensor.part.start : tensor.part.stop]
                rows.copy_(grad)
                dist.all_reduce(whole, group=self.place.tp_group)
                grad.copy_(rows)
            if self.tied and tensor.name == "embed_tokens.weight":
                self._add_other_end(grad)

    def _add_other_end(self, grad: torch.Tensor) -> None:
        """First and last stage exchange the gradients of a tied embedding: one direction after the other, on both."""
        place, other = self.place, torch.empty_like(grad)
        if place.first_stage:
            work = dist.isend(grad, group=place.pp_group, group_dst=place.pp_size - 1)
            dist.recv(other, group=place.answer_group, group_src=place.pp_size - 1)
        else:
            dist.recv(other, group=place.pp_group, group_src=0)
            work = dist.isend(grad, group=place.answer_group, group_dst=0)
        work.wait()
        grad.add_(other)

    def _each(self, name: str) -> list[tuple[Trained, torch.Tensor]]:
        return [pair for bucket in self.buckets for pair in zip(bucket.tensors, bucket.views[name])]

    def squared_norm(self) -> torch.Tensor:
        """The squared length of the gradients that this rank owns, 0-d float64; a replica's ranks add theirs up."""
        norms = [torch.linalg.vector_norm(grad).double() for tensor, grad in self._each("grads") if tensor.owner]
        return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def step(self, lr: float, scale: float) -> None:
        """One update with the gradients times `scale`."""
        self.steps += 1
        (b1, b2), decay = self.betas, self.weight_decay
        correction1, correction2 = 1 - b1**self.steps, 1 - b2**self.steps
        chunk = CPU_CHUNK if self.place.device.type == "cpu" else BUCKET
        flat = [(b.grads, b.masters, b.exp_avg, b.exp_avg_sq) for b in self.buckets]
        for grads, masters, exp_avg, exp_avg_sq in (c for f in flat for c in zip(*(x.split(chunk) for x in f))):
            if scale != 1:
                grads.mul_(scale)
            if decay and self.decoupled:
                masters.mul_(1 - lr * decay)
            elif decay:
                grads.add_(masters, alpha=decay)
            exp_avg.lerp_(grads, 1 - b1)
            exp_avg_sq.mul_(b2).addcmul_(grads, grads, value=1 - b2)
            spread = exp_avg_sq.sqrt().div_(correction2**0.5).add_(self.eps)
            masters.addcdiv_(exp_avg, spread, value=-lr / correction1)
        self.write_weights()

    @torch.no_grad()
    def write_weights(self) -> None:
        """Round the masters to the model's weights, where these are not the masters themselves."""
        for tensor, master in self._each("masters"):
            if tensor.parameter.dtype != torch.float32:
                tensor.parameter.copy_(master)

    def state(self) -> list[tuple[Trained, dict[str, torch.Tensor]]]:
        """What a checkpoint holds of each parameter: views, so that reading one back is copying into them."""
        names = ("masters", "exp_avg", "exp_avg_sq")
        return [
            (tensor, {name: bucket.views[name][i] for name in names})
            for bucket in self.buckets
            for i, tensor in enumerate(bucket.tensors)
        ]


# ----------------------------------------------------------------------------------------------- save and resume


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
