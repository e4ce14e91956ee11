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

import argparse
import fcntl
import glob
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from checkpoint import Held, held_tensors, writing
from config import UserError, read_json, write_json
from launch import gather_objects, together
from parallel import Place

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


# ------------------------------------------------------------------------------------------------ the run's state


def save_state(directory: str, step: int, optimizer: Optimizer, settings: dict, keep: int) -> None:
    """Write `directory`/step-N with every rank's part of the run's state; all ranks call this together.

    Replicas hold the same state and share the writing. The folder has another name until it is whole and on the disk;
    only then are all but the `keep` newest states removed.
    Raises UserError, on all ranks, if any of them cannot write; then nothing new is left behind.
    """
    place, final = optimizer.place, os.path.join(directory, f"step-{step}")
    partial, rank = f"{final}.partial", optimizer.place.rank

    def make_folder() -> None:
        if rank == 0:
            remove_state(partial)
            os.makedirs(partial, exist_ok=True)

    def write_part() -> None:
        path = os.path.join(partial, f"rank-{rank:05d}.safetensors")
        tensors, slices = {}, {}
        owned = [entry for entry in optimizer.parts if entry[0].owner]
        for tensor, views in owned[place.dp_rank :: place.dp_size]:
            part = tensor.part  # written without its padding, which depends on the topology
            slices[tensor.name] = [part.start, part.start + part.length]
            for kind in STATE:
                tensors[f"{tensor.name}/{kind}"] = views[kind].narrow(part.dim, 0, part.length).contiguous().cpu()
        save_file(tensors, path, metadata={"slices": json.dumps(slices)})
        flush_to_disk(path)

    def finish() -> None:
        if rank == 0:
            write_json(os.path.join(partial, "state.json"), {"step": step, "ranks": place.world_size, **settings})
            flush_to_disk(partial)
            os.rename(partial, final)
            flush_to_disk(directory)

    def explained(phase) -> None:
        with writing(final, "earlier checkpoints are whole: make room, then --resume"):
            phase()

    try:
        for phase in (make_folder, write_part, finish):
            together(lambda: explained(phase))
    except UserError:
        if rank == 0:
            remove_state(partial)
        raise
    if rank == 0:
        newest = sorted((found for name in os.listdir(directory) if (found := step_of(name))), reverse=True)[:keep]
        for name in os.listdir(directory):
            if step_of(name.removesuffix(".partial")) and step_of(name) not in newest:
                remove_state(os.path.join(directory, name))


def remove_state(path: str) -> None:
    """Remove a saved state, or part of one: the files that `save_state` writes, and the folder unless it holds others.

    It loses its name first, so that whoever is killed here leaves no state that looks whole. What cannot be removed
    stays: that is no reason to stop a run.
    """
    partial = path if path.endswith(".partial") else f"{path}.partial"
    with suppress(OSError):
        os.rename(path, partial)
        for name in os.listdir(partial):  # .tmp and six characters: what safetensors has not finished
            if re.fullmatch(r"rank-\d{5,}\.safetensors|\.tmp\w{6}|state\.json(\.partial)?", name):
                os.remove(os.path.join(partial, name))
        os.rmdir(partial)


def flush_to_disk(path: str) -> None:
    """A file's contents, or a folder's names, survive a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def step_of(name: str) -> int:
    """12, of the folder's name "step-12"; 0 if it is not the name of a saved state."""
    match = re.fullmatch(r"step-([1-9]\d{0,11})", name)
    return int(match[1]) if match else 0


def newest_state(directory: str) -> str | None:
    """The folder of the latest step, or None. What was not finished has another name."""
    newest = max(map(step_of, os.listdir(directory)), default=0) if os.path.isdir(directory) else 0
    return os.path.join(directory, f"step-{newest}") if newest else None


def load_state(path: str, optimizer: Optimizer, settings: dict, data: str) -> int:
    """Fill the optimizer and the model's weights from a state that any topology wrote; returns its step.

    `settings` are those of this run; the ones that decide what a step computes must be those of the state. The one
    named "data" is a digest of the samples in the file `data`. The files may hold anything: whatever that breaks, here
    or in a library, is a UserError that names the file.
    """
    file_name = os.path.join(path, "state.json")
    try:
        facts = read_json(file_name)
        for name, value in settings.items():
            if name == "data" and facts[name] != value:
                raise UserError(f"{path}: was made with other data than {data}; resume with the data it began with")
            if facts[name] != value:
                raise UserError(f"{path}: was made with {name} = {str(facts[name])[:80]}, but this run has {value}")
        step, ranks = facts["step"], facts["ranks"]
        if type(step) is not int or type(ranks) is not int or step != step_of(os.path.basename(path)):
            raise ValueError(f"step {step!r} of {ranks!r} ranks")
        pieces: dict[str, list] = {}  # name -> (start, stop, file name, file) of every rank that wrote a part of it
        for rank in range(ranks):
            file_name = os.path.join(path, f"rank-{rank:05d}.safetensors")
            if not os.path.isfile(file_name):
                raise ValueError("no such file")
            file = safe_open(file_name, framework="pt")
            for name, (start, stop) in json.loads(file.metadata()["slices"]).items():
                pieces.setdefault(name, []).append((start, stop, file_name, file))
        with torch.no_grad():
            for tensor, views in optimizer.parts:
                done = tensor.part.start
                for start, stop, file_name, file in sorted(pieces.get(tensor.name, []), key=lambda piece: piece[:2]):
                    done = read_piece(tensor, views, file, start, stop, done)
                if done < tensor.part.start + tensor.part.length:
                    file_name = path
                    raise ValueError(f"holds no whole {tensor.name}")
    except Exception as error:
        if isinstance(error, UserError) and not str(error).startswith(file_name):
            raise
        reason = str(error).removeprefix(f"{file_name}: ")[:160]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{file_name}: cannot be read ({kind}{reason}); remove {path} to resume from before") from None
    optimizer.steps = step
    optimizer.write_weights()
    return step


def read_piece(tensor: Held, views: dict[str, torch.Tensor], file: safe_open, start: int, stop: int, done: int) -> int:
    """Copy what this rank needs out of a piece [start, stop) of a tensor, cut along the same dimension by other ranks.

    The part is filled up to `done` so far, in rows of the whole tensor; returns how far it is then.
    """
    part = tensor.part
    low, high = max(start, part.start), min(stop, part.start + part.length)
    if low >= high:
        return done
    if low > done:
        raise ValueError(f"{tensor.name} lacks {done} to {low}")
    index = (slice(None),) * part.dim + (slice(low - start, high - start),)
    for kind in STATE:
        source = file.get_slice(f"{tensor.name}/{kind}")[index]
        target = views[kind].narrow(part.dim, low - part.start, high - low)
        if source.shape != target.shape or source.dtype != target.dtype or not source.isfinite().all():
            raise ValueError(f"{tensor.name}/{kind} is not {list(target.shape)} finite float32 numbers")
        target.copy_(source)
    return max(done, high)


# --------------------------------------------------------------------------------------- the folder of a run

RECORD, STAGED = "run.json", ".partial"  # says whose folder this is; what is not finished yet


def read_record(out: str) -> dict | None:
    """What `run.json` says of the run in the folder `out`, or None if that is empty. UserError if it holds no run."""
    names = set(os.listdir(out)) if os.path.isdir(out) else set()
    if RECORD in names:
        record = read_json(os.path.join(out, RECORD))
        if isinstance(record, dict) and record.get("program") == "train.py":
            return record
    elif not names:
        return None
    elif "metrics.jsonl" in names and "checkpoints" in names:  # older runs have no run.json
        return {"finished": os.path.exists(os.path.join(out, "model", "config.json"))}
    raise UserError(f"{out}: holds {min(names)!r}, but no run of train.py; choose a new or an empty folder")


@contextmanager
def claimed(args: argparse.Namespace, decides: dict, rank: int) -> Iterator[bool]:
    """Take the folder `args.out` for this run alone while the block lasts, or raise UserError; all ranks come here.

    Only rank 0 looks, and locks the folder; if the process is killed, the kernel releases it. `decides`: the options
    that decide with what the run ends. Yields whether it is finished already; then nothing was touched.
    """
    out, finished, is_new = args.out, False, not os.path.exists(args.out)

    def claim() -> None:
        nonlocal finished
        for flag in ("ckpt", "init", "tokenizer", "data", "val"):
            path, real = getattr(args, flag), os.path.realpath(out)
            if path and os.path.commonpath([os.path.realpath(path), real]) == real:
                raise UserError(f"--{flag} {path} lies inside --out {out}; choose another --out")
        with writing(out):
            finished = may_go_on()
            if finished and not os.path.exists(os.path.join(out, STAGED)):  # else it was killed in its last moment
                return
            os.makedirs(out, exist_ok=True)
            folder = os.open(out, os.O_RDONLY)
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{out}: another run is writing there; choose another, or wait for its end") from None
            except OSError:
                pass  # a file system without locks
            finished = may_go_on()  # that run may have ended just now
            shutil.rmtree(os.path.join(out, STAGED), ignore_errors=True)

    def may_go_on() -> bool:
        record = read_record(out)
        if record is None:
            return False
        if not args.resume:
            raise UserError(f"{out}: holds a run already; --resume goes on with it, or choose another --out")
        model, ended = os.path.join(out, "model"), record.get("finished")
        if os.path.exists(model) and not ended:
            raise UserError(f"{model}: was not written by the run in {out}, which is not finished; move it away")
        # With other options, or when its last states were removed, a run goes on; without any state it cannot.
        states = glob.glob(os.path.join(glob.escape(out), "checkpoints", "step-*[0-9]"))
        same = ended is True
        if isinstance(ended, dict):
            same = ended == decides | {"step": ended.get("step")}
            same = same and any(os.path.basename(state) == f"step-{ended['step']}" for state in states)
        return os.path.exists(model) and (same or not states)

    with ExitStack() as stack:
        try:
            together(claim if rank == 0 else lambda: None)
            yield gather_objects(finished)[0]
        finally:
            if rank == 0 and is_new:
                with suppress(OSError):
                    os.rmdir(out)  # if nothing was written


def write_record(out: str, finished: dict | None = None) -> None:
    """`finished`: what decided the end of a run whose model is about to be put into its place, and its last step."""
    with writing(out):
        os.makedirs(out, exist_ok=True)
        write_json(os.path.join(out, RECORD), {"program": "train.py", "finished": finished})
