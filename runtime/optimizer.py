"""Adam in mixed precision: BF16 weights for the model, everything that adds up in FP32.

A BF16 number has 8 bits of mantissa: an update of 0.001 to a weight of 1 is rounded away. The optimizer therefore keeps
an FP32 *master* of every trained weight and rounds it to the model's BF16 copy after each step. Gradients of many
micro-batches are summed in FP32 for the same reason, and BF16 gradients never exist for more than a layer or so. That
takes a hook, the only kind in training: autograd calls it with each parameter's gradient, and it moves the gradient
into its FP32 sum at once. The forward pass and the model know nothing of it.

Parameters live in *buckets*: one flat tensor each for masters, gradients and the two moments. A bucket is what
data-parallel replicas all-reduce in one go, and what Adam updates with one kernel. A rank's memory is 2 + 4·4 = 18
bytes for each of its trained weights (16 in float32, where the model's weights are views of the masters).

What tensor and pipeline parallelism add: key/value heads shared by several ranks, whose gradients must be summed; an
embedding of which the last stage has a copy; and a norm over all ranks that counts each parameter once.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from parallel import Part, Place, Slice, parts_of
from runtime.launch import gather_objects

BUCKET = 1 << 25  # elements; a larger parameter has a bucket of its own
STATE = ("masters", "exp_avg", "exp_avg_sq")  # FP32 numbers per trained weight that outlive a step

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
    """A tensor of the checkpoint, or this rank's slice of it: some rows of a parameter."""

    name: str  # canonical, of the whole tensor
    parameter: nn.Parameter
    rows: Part
    owner: bool  # of all the ranks (of one replica) that hold the same slice, one owns it: counts it, and saves it

    @property
    def part(self) -> Slice:
        return self.rows.slice

    @property
    def sharers(self) -> int:
        """Tensor-parallel neighbours that hold the same slice and find a share of its gradient each."""
        return self.rows.sharers

    @property
    def size(self) -> int:
        return math.prod(self.part.local_shape)


def held_tensors(model: nn.Module) -> list[Held]:
    """Every tensor of this rank's `model` once, trained or not, in the order of the model.

    Three ways to hold a slice, and who owns it:

    - A slice of a cut matrix, held by this rank alone: it is the owner.
    - A whole tensor on every tensor-parallel rank (norms, the patch convolution). All see the same inputs and find the
      same gradient, so nothing has to be summed, and rank 0 owns it.
    - A slice with `sharers`, of which each finds only a share of the gradient: key/value heads fewer than the ranks, of
      which neighbours hold the same one; norms under sequence parallelism; the whole factor of an adapter. The first
      of the sharers owns it.

    The copy of a tensor that another stage has (a tied head) is owned there.
    """
    place, held = model.place, []
    for name, (layer, part) in parts_of(model).items():
        whole = part.slice.local_shape == part.slice.shape
        alike = part.sharers if part.sharers > 1 else place.tp_size if whole else 1  # ranks that hold this same slice
        owner = place.tp_rank % alike == 0 and not hasattr(layer, "copy_of")
        held.append(Held(name, layer.weight, part, owner))
    return held


class Bucket:
    """Some parameters, with flat FP32 tensors of what belongs to them, and views of each parameter's share."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        sizes, device = [p.numel() for p in parameters], parameters[0].device
        self.grads, self.masters, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(sum(sizes), dtype=torch.float32, device=device) for _ in range(4)
        )
        self.untouched: set[int] = set()  # parameters without a gradient so far, in this step
        flat = {name: getattr(self, name).split(sizes) for name in ("grads", *STATE)}
        # Each parameter's share of the flat tensors, in the parameter's shape.
        self.views = [
            {name: shares[i].view(parameter.shape) for name, shares in flat.items()}
            for i, parameter in enumerate(parameters)
        ]
        for i, (parameter, views) in enumerate(zip(parameters, self.views)):
            views["masters"].copy_(parameter.data)
            if parameter.dtype == torch.float32:
                parameter.data = views["masters"]
            parameter.register_post_accumulate_grad_hook(self._hook(i))

    def _hook(self, i: int) -> Callable[[nn.Parameter], None]:
        """What autograd calls when a backward pass has found the whole gradient of parameter `i`, and put it in .grad.

        The step's first gradient is copied over what the step before left, which is cheaper than zeros and a sum.
        """
        grad = self.views[i]["grads"]

        def move(parameter: nn.Parameter) -> None:
            if i in self.untouched:
                self.untouched.remove(i)
                grad.copy_(parameter.grad)
            else:
                grad.add_(parameter.grad)
            parameter.grad = None  # frees it, before the next layer has its own

        return move


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
    """torch's Adam (arXiv:1412.6980) or, with `decoupled` weight decay, AdamW (arXiv:1711.05101), on FP32 masters.

    Every parameter of `model` with `requires_grad` is trained. All ranks make theirs together. The calls of a step, in
    order: `start`, backward passes, `reduce`, `squared_norm`, `step`.
    """

    def __init__(self, model: nn.Module, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool):
        self.place: Place = model.place
        held = [tensor for tensor in held_tensors(model) if tensor.parameter.requires_grad]
        parameters = list({id(tensor.parameter): tensor.parameter for tensor in held}.values())
        self.buckets = [Bucket(group) for group in in_buckets(parameters, torch.Tensor.numel)]
        names = gather_objects({tensor.name for tensor in held})
        # What the first and the last stage hold both; ranks are numbered stage by stage.
        self.at_both_ends = names[0] & names[-1] if self.place.pp_size > 1 else set()
        self.parts = [(tensor, self.views_of(tensor)) for tensor in held]
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        masters = [nn.Parameter(bucket.masters) for bucket in self.buckets]
        options = dict(betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.adam = kind(masters, **options) if masters else None  # a stage may have nothing to train
        for master, bucket in zip(masters, self.buckets):
            count = torch.zeros((), device=master.device)
            self.adam.state[master] = dict(step=count, exp_avg=bucket.exp_avg, exp_avg_sq=bucket.exp_avg_sq)
            master.grad = bucket.grads

    def views_of(self, tensor: Held) -> dict[str, torch.Tensor]:
        """The rows of `tensor` in the flat tensors, by their names."""
        pairs = [pair for bucket in self.buckets for pair in zip(bucket.parameters, bucket.views)]
        (views,) = [views for parameter, views in pairs if parameter is tensor.parameter]
        return {name: tensor.rows.rows_of(view) for name, view in views.items()}

    def start(self) -> None:
        """Forget the last step's gradients."""
        for bucket in self.buckets:
            bucket.untouched = set(range(len(bucket.parameters)))

    def reduce(self) -> None:
        """Make every rank's gradients complete: the sum over replicas, sharers and the two ends of the pipeline."""
        for bucket in self.buckets:
            for i in bucket.untouched:  # no micro-batch of this replica used these: they hold the last step's gradients
                bucket.views[i]["grads"].zero_()
            if self.place.dp_group is not None:
                dist.all_reduce(bucket.grads, group=self.place.dp_group)
        # A group for every set of sharers would be many; whole tensors, zero outside the own slice, are small. They go
        # many at a time: LoRA has 616 of them, and each message would cost more than its bytes.
        shared = [(tensor.part, views["grads"]) for tensor, views in self.parts if tensor.sharers > 1]
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
        if self.adam is None:
            return
        for bucket in self.buckets:
            bucket.grads.mul_(scale)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.write_weights()

    @torch.no_grad()
    def resume(self, step: int) -> None:
        """Go on after `step`, once the tensors of `parts` were filled with the state that it left."""
        for state in self.adam.state.values() if self.adam else ():
            state["step"].fill_(step)
        self.write_weights()

    def write_weights(self) -> None:
        """Round the masters to the model's weights, where these are not the masters themselves."""
        for bucket in self.buckets:
            for parameter, views in zip(bucket.parameters, bucket.views):
                if parameter.dtype != torch.float32:
                    parameter.copy_(views["masters"])
