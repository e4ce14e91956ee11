"""Adam in mixed precision: BF16 weights for the model, everything that adds up in FP32.

A BF16 number has 8 bits of mantissa: an update of 0.001 to a weight of 1 is rounded away. The optimizer therefore keeps
an FP32 *master* of every trained weight and rounds it to the model's BF16 copy after each step. Gradients of many
micro-batches are summed in FP32 for the same reason, and BF16 gradients never exist for more than a layer or so. That
takes a hook, the only kind in training: autograd calls it with each parameter's gradient, and it moves the gradient
into its FP32 sum at once. The forward pass and the model know nothing of it.

Parameters live in *buckets*: one flat tensor each for masters, gradients and the two moments. A bucket is what
data-parallel replicas all-reduce in one go, as soon as the last micro-batch's backward pass has filled it, and what
Adam updates with a handful of kernels. A rank's memory is 2 + 4·4 = 18 bytes for each of its trained weights (16 in
float32, where the model's weights are views of the masters).

What tensor and pipeline parallelism add: key/value heads shared by several ranks, whose gradients must be summed; an
embedding of which the last stage has a copy; and a norm over all ranks that counts each parameter once.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from parallel import Place, Slice
from runtime.checkpoint import layers_with_slices
from runtime.launch import gather_objects

FREEZABLE = {  # --freeze NAME -> how its parameters' names begin
    "vision_tower": ("vision_tower.",),
    "projector": ("multi_modal_projector.",),
    "embeddings": ("embed_tokens.",),
    "language_model": ("embed_tokens.", "layers.", "norm.", "lm_head."),
}


def is_trained(name: str, freeze: Iterable[str]) -> bool:
    """Whether the tensor `name` (not of an adapter) is trained when the parts `freeze` of the model are frozen."""
    return not name.startswith(tuple(prefix for part in freeze for prefix in FREEZABLE[part]))


@dataclass
class Held:
    """A parameter of this rank: its part of a tensor of the whole model."""

    name: str  # canonical, of the whole tensor
    parameter: nn.Parameter
    part: Slice
    sharers: int  # tensor-parallel neighbours that hold the same part and find a share of its gradient each
    owner: bool  # of all the ranks (of one replica) that hold the same part, one owns it: counts it, and saves it


def held_tensors(model: nn.Module) -> list[Held]:
    """Every parameter of this rank's `model` once, trained or not, in the order of the model.

    Three ways to hold a part, and who owns it:

    - A part of a cut matrix, held by this rank alone: it is the owner.
    - A whole tensor on every tensor-parallel rank (norms, the patch convolution). All see the same inputs and find the
      same gradient, so nothing has to be summed, and rank 0 owns it.
    - A part with `sharers`, of which each finds only a share of the gradient: key/value heads fewer than the ranks, of
      which neighbours hold the same one; norms under sequence parallelism; the whole factor of an adapter. The first
      of the sharers owns it.

    The copy of a tensor that another stage has (a tied head) is owned there.
    """
    place, held = model.place, []
    for name, (layer, part) in layers_with_slices(model).items():
        sharers, whole = getattr(layer, "sharers", 1), part.local_shape == part.shape
        alike = sharers if sharers > 1 else place.tp_size if whole else 1  # neighbours that hold this same part
        owner = place.tp_rank % alike == 0 and not hasattr(layer, "copy_of")
        held.append(Held(name, layer.weight, part, sharers, owner))
    return held


BUCKET = 1 << 25  # elements; a larger parameter has a bucket of its own

CPU_CHUNK = 1 << 16  # elements that Adam updates at a time on a CPU, so that they are still in its cache

STATE = ("masters", "exp_avg", "exp_avg_sq")  # FP32 numbers per trained weight that outlive a step


class Bucket:
    """Some parameters, with flat FP32 tensors of what belongs to them, and views of each parameter's share."""

    def __init__(self, tensors: list[Held]):
        self.tensors = tensors
        sizes, device = [t.parameter.numel() for t in tensors], tensors[0].parameter.device
        self.grads, self.masters, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(sum(sizes), dtype=torch.float32, device=device) for _ in range(4)
        )
        shares = {name: getattr(self, name).split(sizes) for name in ("grads", *STATE)}
        self.views = [
            {name: share[i].view(tensor.parameter.shape) for name, share in shares.items()}
            for i, tensor in enumerate(tensors)
        ]
        for tensor, views in zip(tensors, self.views):
            views["masters"].copy_(tensor.parameter.data)
            if tensor.parameter.dtype == torch.float32:
                tensor.parameter.data = views["masters"]
        self.missing = 0  # parameters without a gradient so far, in the last micro-batch
        self.empty: set[int] = set()  # parameters without a gradient so far, in this step
        self.reduction: dist.Work | None = None


def in_buckets(items: list, size: Callable) -> list[list]:
    """`items` in runs of at most BUCKET elements together; a larger one goes alone. `size` says how many one has."""
    runs, filled = [], BUCKET
    for item in items:
        filled += size(item)
        if filled > BUCKET:
            runs.append([])
            filled = size(item)
        runs[-1].append(item)
    return runs


class Optimizer:
    """Adam (arXiv:1412.6980) or, with `decoupled` weight decay, AdamW (arXiv:1711.05101); `torch.optim`'s arithmetic.

    Every parameter of `model` with `requires_grad` is trained. All ranks make theirs together. The calls of a step, in
    order: `start`, backward passes (before the last of them `before_last_backward`), `reduce`, `squared_norm`, `step`.
    """

    def __init__(self, model: nn.Module, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool):
        self.place: Place = model.place
        self.betas, self.eps, self.weight_decay, self.decoupled = betas, eps, weight_decay, decoupled
        self.steps, self.last, self.launched = 0, False, 0
        # The backward pass reaches the last layers first. Buckets in about that order fill up one after the other, and
        # the first of them are all-reduced while the backward pass still works on the rest.
        trained = [t for t in reversed(held_tensors(model)) if t.parameter.requires_grad]
        self.buckets = [Bucket(group) for group in in_buckets(trained, lambda t: t.parameter.numel())]
        names = gather_objects({t.name for t in trained})
        # What the first and the last stage hold both; ranks are numbered stage by stage.
        self.at_both_ends = names[0] & names[-1] if self.place.pp_size > 1 else set()
        self.parts = [pair for bucket in self.buckets for pair in zip(bucket.tensors, bucket.views)]
        for bucket in self.buckets:
            for i, tensor in enumerate(bucket.tensors):
                tensor.parameter.register_post_accumulate_grad_hook(self._hook(bucket, i))

    def _hook(self, bucket: Bucket, i: int):
        """What autograd calls when a backward pass has found the whole gradient of parameter `i`, and put it in .grad.

        The step's first gradient is copied over what the step before left, which is cheaper than zeros and a sum.
        """
        grad = bucket.views[i]["grads"]

        def move(parameter: nn.Parameter) -> None:
            if i in bucket.empty:
                bucket.empty.remove(i)
                grad.copy_(parameter.grad)
            else:
                grad.add_(parameter.grad)
            parameter.grad = None  # frees it, before the next layer has its own
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
        """All-reduce the next buckets over the replicas.

        Collectives match by order, and gradients need not arrive in the same order on all replicas (a micro-batch
        without images leaves the tower out): a bucket that is full waits for those before it.
        """
        while self.launched < len(self.buckets) and not (only_filled and self.buckets[self.launched].missing):
            bucket = self.buckets[self.launched]
            for i in bucket.empty:  # no micro-batch of this replica used these; they hold the last step's gradients
                bucket.views[i]["grads"].zero_()
            if self.place.dp_group is not None:
                bucket.reduction = dist.all_reduce(bucket.grads, group=self.place.dp_group, async_op=True)
            self.launched += 1

    def reduce(self) -> None:
        """Make every rank's gradients complete: the sum over replicas, sharers and the two ends of the pipeline."""
        self._launch(only_filled=False)
        for bucket in self.buckets:
            if bucket.reduction is not None:
                bucket.reduction.wait()
        # A group for every set of sharers would be many; whole tensors, zero outside the own part, are small. They go
        # many at a time: LoRA has 616 of them, and each message would cost more than its bytes.
        shared = [(t.part, views["grads"]) for t, views in self.parts if t.sharers > 1]
        for bucket in in_buckets(shared, lambda pair: math.prod(pair[0].shape)):
            sizes = [math.prod(part.shape) for part, _ in bucket]
            flat = torch.zeros(sum(sizes), device=self.place.device)
            rows = [x.view(p.shape)[p.start : p.stop] for x, (p, _) in zip(flat.split(sizes), bucket)]
            torch._foreach_copy_(rows, [grad for _, grad in bucket])
            dist.all_reduce(flat, group=self.place.tp_group)
            torch._foreach_copy_([grad for _, grad in bucket], rows)
        for tensor, views in self.parts:
            if tensor.name in self.at_both_ends:
                self._add_other_end(views["grads"])

    def _add_other_end(self, grad: torch.Tensor) -> None:
        """First and last stage exchange gradients of the same tensor, one direction after the other. Both find the same
        sums to the bit, and so the same masters after the step: the copy never drifts."""
        place, other = self.place, torch.empty_like(grad)
        if place.first_stage:
            work = dist.isend(grad, group=place.pp_group, group_dst=place.pp_size - 1)
            dist.recv(other, group=place.answer_group, group_src=place.pp_size - 1)
        else:
            dist.recv(other, group=place.pp_group, group_src=0)
            work = dist.isend(grad, group=place.answer_group, group_dst=0)
        work.wait()
        grad.add_(other)

    def squared_norm(self) -> torch.Tensor:
        """The squared length of the gradients that this rank owns, 0-d float64; a replica's ranks add theirs up."""
        norms = [torch.linalg.vector_norm(views["grads"]).double() for tensor, views in self.parts if tensor.owner]
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
        for tensor, views in self.parts:
            if tensor.parameter.dtype != torch.float32:
                tensor.parameter.copy_(views["masters"])
