"""How a program runs on many ranks: what is agreed among them, and how all of them end when one of them must.

The rules: a user error prints exactly one line, and every rank exits with status 2; anything else that goes wrong on
one rank prints one line with its cause and ends the job; no rank waits for ever for one that is gone.
"""

import argparse
import fcntl
import glob
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import IO

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from config import TopologyError, UserError, read_json, write_json
from parallel import Place

LOST_SECONDS = 10  # a rank that lost another one waits so long before it says so: the cause should be said first

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; the end of a job; Slurm's warning that it is near

# What every program calls the flags that a TopologyError is about; the layers that raise it know of no flags.
WHAT_TO_DO = "choose other --tp and --pp; their product, times the data-parallel replicas, is the number of processes"


# --------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Raises UserError for mistakes on the command line, where argparse would print its usage too."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


def number(kind: type, low: float, high: float, above: bool = False):
    """An argparse type: a finite number between `low` (itself allowed unless `above`) and `high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value or (value == low and not above)) or value > high:
            raise argparse.ArgumentTypeError(
                f"{text!r} should be a number {'above' if above else 'from'} {low} to {high}"
            )
        return value

    return parse


COUNT, SIZE = number(int, 0, 1 << 40), number(int, 1, 1 << 40)


class Progress:
    """A line on stderr, once a second, while a large checkpoint loads."""

    def __init__(self, checkpoint, place: Place):
        self.checkpoint, self.shown = checkpoint, place.rank == 0
        self.started = self.last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.shown and (now - self.last > 1 or (done == total and self.last > self.started)):
            self.last, read = now, self.checkpoint.bytes_read / 1e9
            rate = read / (now - self.started)
            print(f"loading: {100 * done // total} %, {read:.1f} GB read, {rate:.2f} GB/s", file=sys.stderr)


def peak_memory(place: Place) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took on a CPU."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated(place.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------- many ranks


def start_world() -> None:
    """Join the processes that torchrun started, if it did: NCCL on GPUs, Gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        gpu, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(minutes=30))
        if gpus:
            crowded = torch.tensor(int(gpu >= gpus))
            dist.all_reduce(crowded, dist.ReduceOp.MAX)
            if crowded:
                raise UserError(f"more processes than the {gpus} GPUs of a machine; lower --nproc-per-node")
            torch.cuda.set_device(gpu)


def find_place(tp: int | None, pp: int | None) -> Place:
    """This rank's place in a grid of pp × dp × tp; without sizes, all ranks are tensor-parallel.

    `answer_group` repeats `pp_group`: sampled tokens and gradients travel against the hidden states, and on one NCCL
    communicator a send of the one could wait for ever behind a send of the other.
    """
    start_world()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pp = pp or 1
    tp = tp or max(1, world // pp)
    if world % (tp * pp):
        raise TopologyError(
            f"tensor-parallel size {tp} × pipeline-parallel size {pp} does not divide the number of processes, {world}"
        )
    dp = world // (tp * pp)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    pp_rank, dp_rank, tp_rank = rank // (dp * tp), rank // tp % dp, rank % tp
    grid = torch.arange(world).view(pp, dp, tp)

    def groups(members: torch.Tensor) -> dist.ProcessGroup | None:
        """A group of each row of `members` (groups, ranks); returns this rank's, or None if a group is one rank.

        Every rank has to make every group, in the same order, also those it is not part of: torch counts them.
        """
        return dist.new_subgroups_by_enumeration(members.tolist())[0] if members.shape[1] > 1 else None

    columns = grid.permute(1, 2, 0).reshape(-1, pp)  # the ranks that differ in their stage only
    return Place(
        *(rank, tp_rank, tp, pp_rank, pp, dp_rank, dp),
        tp_group=groups(grid.reshape(-1, tp)),
        pp_group=groups(columns),
        dp_group=groups(grid.permute(0, 2, 1).reshape(-1, dp)),
        answer_group=groups(columns),
        device=device,
    )


def gather_objects(value) -> list:
    """The (picklable) `value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable):
    """Run `action` on every rank and return its result; a UserError of any rank is raised on all.

    A mistake that only one rank can see (a damaged shard, a file missing on its machine) would otherwise end that rank
    alone, and the others would wait in their next collective for a peer that is gone. So no rank leaves here before all
    have said how they fared. It is a collective itself: all ranks have to come here.
    """
    error, result = None, None
    try:
        result = action()
    except UserError as mistake:
        error = mistake
    for error in gather_objects(error):
        if error is not None:
            raise error
    return result


def run_program(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)` on every rank, then exit: with status 0, or with one line in all that says what went wrong.

    A user error is raised on all ranks (see `together`), and their status is 2. Anything else that one rank meets ends
    the whole job with status 1: its connections break, and the ranks that notice keep quiet for LOST_SECONDS, in which
    the launcher ends them or the one that failed says why. One process alone shows the traceback, for what is then a
    bug.
    """
    status, line, all_know = 0, None, False
    try:
        start_world()
        main(sys.argv[1:])
        sys.stdout.flush()
        if dist.is_initialized():
            dist.barrier()  # a rank that exits early breaks its peers' connections
            dist.destroy_process_group()
    except UserError as error:
        status, line, all_know = error.status, f"error: {error}", True
        if isinstance(error, TopologyError):
            line += f"; {WHAT_TO_DO}"
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output went away; Python's exit must not try to flush it once more
        status = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if "RANK" not in os.environ:
            raise
        file, number, *_ = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())
        where = f"{os.path.basename(file)} line {number}"
        status, line = 1, f"error: rank {os.environ['RANK']}: {type(error).__name__}: {reason} ({where})"
        # A broken connection is not the cause but its echo: another rank failed, and has the better line to print.
        if isinstance(error, dist.DistError) or "gloo" in reason or "NCCL" in reason:
            await_cause()
    alone = not dist.is_initialized()  # or done
    # Many ranks may come here with a line; the first to raise the counter is the only one to print.
    if line is not None and (alone or count("spoken", 1) <= 1):
        print(line, file=sys.stderr, flush=True)
    if alone:
        sys.exit(status)
    sys.stdout.flush()
    if all_know:
        wait_for_all()
    os._exit(status)  # tidying up could wait for ever, for ranks that are not there any more


@contextmanager
def caught(handler: Callable) -> Iterator[dict]:
    """Inside the block a signal calls `handler(number, frame)`; yields what it would have called before, by number."""
    before = {number: signal.signal(number, handler) or signal.SIG_DFL for number in SIGNALS}
    try:
        yield before
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def count(name: str, more: int) -> int:
    """Add to a counter that all ranks share, in the store at which they met; 0 if it went down with rank 0.

    The store is a small server beside the collectives, so it still answers when those hang or have failed.
    """
    try:
        return dist.distributed_c10d._get_default_store().add(name, more)
    except RuntimeError:
        return 0


def await_cause() -> None:
    """This rank lost another one. Give that one, or the launcher, LOST_SECONDS to say why and to end the job."""
    deadline = time.monotonic() + LOST_SECONDS
    while count("spoken", 0) == 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)  # the rank that spoke should be seen to end first


def wait_for_all() -> None:
    """Return when all ranks are about to exit, each with the same status.

    A launcher kills the other ranks as soon as one exits with an error, and their status would be a signal's instead of
    2. So each rank says in the store that it is leaving, and waits until all have. Rank 0 waits for one thing more:
    that the others have looked there for the last time, because the store may live in its process.
    """
    world, rank, deadline = dist.get_world_size(), dist.get_rank(), time.monotonic() + LOST_SECONDS
    here = count("leaving", 1)
    while 0 < here < world and time.monotonic() < deadline:
        time.sleep(0.02)
        here = count("leaving", 0)
    count("left", 1)
    while rank == 0 and count("left", 0) < world and time.monotonic() < deadline:
        time.sleep(0.02)


# --------------------------------------------------------------------------------------- the folder of a run

RECORD, LOCK, STAGED = "run.json", "run.lock", ".partial"  # what the run is; held while it goes on; its unfinished ends


def read_record(out: str) -> dict | None:
    """What `run.json` says of the run in the folder `out`, or None if that is empty. UserError if it holds no run."""
    names = set(os.listdir(out)) if os.path.isdir(out) else set()
    if RECORD in names:
        record = read_json(os.path.join(out, RECORD))
        if isinstance(record, dict) and record.get("program") == "train.py":
            return record
    elif not names - {LOCK}:
        return None
    elif "metrics.jsonl" in names and "checkpoints" in names:  # older runs have no run.json
        return {"finished": os.path.exists(os.path.join(out, "model", "config.json"))}
    raise UserError(f"{out}: holds {min(names - {LOCK})!r}, but no run of train.py; choose a new or an empty folder")


@contextmanager
def claimed(args: argparse.Namespace, rank: int) -> Iterator[bool]:
    """Take the folder `args.out` for this run alone while the block lasts, or raise UserError; all ranks come here.

    Only rank 0 looks and keeps the lock, which the kernel releases if the process is killed. Yields whether the run is
    finished already; then nothing was touched.
    """
    out, lock, finished = args.out, None, False
    is_new = not os.path.exists(out)

    def claim() -> None:
        nonlocal lock, finished
        for flag in ("ckpt", "init", "tokenizer", "data", "val"):
            path, real = getattr(args, flag), os.path.realpath(out)
            if path and os.path.commonpath([os.path.realpath(path), real]) == real:
                raise UserError(f"--{flag} {path} lies inside --out {out}; choose another --out")
        with writing(out):
            finished = may_go_on()
            if finished:
                return
            os.makedirs(out, exist_ok=True)
            lock = stack.enter_context(open(os.path.join(out, LOCK), "a"))
            if not lock_file(lock):
                lock = None
                raise UserError(f"{out}: another run is writing to this folder; choose another, or wait for its end")
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
            same = ended == what_decides(args) | {"step": ended.get("step")}
            same = same and any(os.path.basename(state) == f"step-{ended['step']}" for state in states)
        return os.path.exists(model) and (same or not states)

    with ExitStack() as stack:
        try:
            together(claim if rank == 0 else lambda: None)
            yield gather_objects(finished)[0]
        finally:
            with suppress(OSError):
                if lock:
                    os.remove(lock.name)
                    if is_new:
                        os.rmdir(out)  # if nothing was written


def lock_file(file: IO) -> bool:
    """Whether this process has the lock on an open `file` now; where the file system has no locks, it has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    # Whoever had the lock until now has removed the file: a lock on what has no name any more protects nothing.
    return os.path.exists(file.name) and os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))


def what_decides(args: argparse.Namespace) -> dict:
    """The options that decide with what a run ends."""
    names = "max_steps epochs seed shuffle global_batch_size optimizer freeze lora_rank lora_alpha export".split()
    return {"data": os.path.realpath(args.data)} | {name: getattr(args, name) for name in names}


def write_record(out: str, finished: dict | None = None) -> None:
    """`finished`: what decided the end of a run whose model is about to be put into its place, and its last step."""
    with writing(out):
        os.makedirs(out, exist_ok=True)
        write_json(os.path.join(out, RECORD), {"program": "train.py", "finished": finished})


@contextmanager
def writing(path: str, advice: str = "make room, or choose another place") -> Iterator[None]:
    """What goes wrong in the block, where `path` is written, becomes a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); {advice}") from None
