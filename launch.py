"""How a program runs on many ranks: what is agreed among them, and how all of them end when one of them must.

The rules: a mistake of the user's is one line in all and exit status 2 on every rank; anything else that goes wrong on
one rank is one line with its cause and ends the job; nobody waits for ever for a rank that is gone.
"""

import argparse
import math
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from config import UserError
from parallel import Place

LOST_SECONDS = 10  # a rank that lost another one waits so long before it says so: the cause should be said first


# --------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one line, like all others."""

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


def check_utf8(text: str, where: str) -> None:
    """Bytes that are not UTF-8 come from the command line and the terminal as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not UTF-8 text; check the encoding of the terminal or script") from None


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


def start_world() -> int:
    """Join the processes that torchrun started (NCCL on GPUs, Gloo on CPUs); returns this one's rank, 0 if alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        gpu, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(minutes=30))
        if gpus:
            crowded = torch.tensor(int(gpu >= gpus))
            dist.all_reduce(crowded, dist.ReduceOp.MAX)
            if crowded:
                raise UserError(f"more processes than the {gpus} GPUs of a machine; lower --nproc-per-node")
            torch.cuda.set_device(gpu)
    return dist.get_rank() if dist.is_initialized() else 0


def find_place(tp: int | None, pp: int | None) -> Place:
    """This rank's place in a grid of pp × dp × tp; without sizes, all ranks are tensor-parallel.

    `answer_group` repeats `pp_group`: sampled tokens travel against the hidden states, and on one NCCL communicator a
    send of the one could wait for ever behind a send of the other.
    """
    rank = start_world()
    world = dist.get_world_size() if dist.is_initialized() else 1
    pp = pp or 1
    tp = tp or max(1, world // pp)
    if tp < 1 or pp < 1 or world % (tp * pp):
        raise UserError(
            f"--tp {tp} × --pp {pp} does not divide the {world} processes; start tp × pp of them with torchrun"
        )
    dp = world // (tp * pp)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    pp_rank, dp_rank, tp_rank = rank // (dp * tp), rank // tp % dp, rank % tp
    grid = torch.arange(world).view(pp, dp, tp)

    def groups(members: torch.Tensor) -> dist.ProcessGroup | None:
        """One group for each row of `members`, made on every rank in the same order; this rank's, if it has company."""
        mine = None
        for row in members.tolist() if members.shape[1] > 1 else []:
            group = dist.new_group(row)
            mine = group if rank in row else mine
        return mine

    columns = grid.permute(1, 2, 0).reshape(-1, pp)
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
    """Run `action` on every rank; a mistake that only one rank can see (a damaged shard, say) is raised on all."""
    error, result = None, None
    try:
        result = action()
    except UserError as mistake:
        error = str(mistake)
    error = next((e for e in gather_objects(error) if e is not None), None)
    if error is not None:
        raise UserError(error)
    return result


def run_program(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)` on every rank, then exit: with status 0, or with one line in all that says what went wrong.

    A mistake of the user's is raised on all ranks (see `together`), and their status is 2. Anything else that one rank
    meets ends the whole job with status 1: its connections break, and whoever notices keeps quiet until the launcher
    ends it, for LOST_SECONDS. One process alone shows the traceback, for what is then a bug.
    """
    status, line, meet = 0, None, False
    try:
        start_world()
        main(sys.argv[1:])
        if dist.is_initialized():
            dist.barrier()  # who leaves early takes the others' connections along
    except UserError as error:
        status, line, meet = error.status, f"error: {error}", True
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output went away
        status = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        rank = os.environ.get("RANK")
        if rank is None:
            raise
        file, number, *_ = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())
        line = f"error: rank {rank}: {type(error).__name__}: {reason} ({os.path.basename(file)} line {number})"
        status = 1
        if isinstance(error, dist.DistError) or "gloo" in reason or "NCCL" in reason:
            await_cause()
    if not dist.is_initialized():
        if line is not None:
            print(line, file=sys.stderr, flush=True)
        sys.exit(status)
    sys.stdout.flush()
    if status == 0:
        dist.destroy_process_group()
        sys.exit(0)
    if line is not None and count("spoken", 1) <= 1:  # the first rank to say something is the only one
        print(line, file=sys.stderr, flush=True)
    if meet:
        wait_for_all()
    os._exit(status)  # tidying up could wait for ever, for ranks that are not there any more


def count(name: str, more: int) -> int:
    """Add to a counter that all ranks share, in the store at which they met; 0 if it went down with rank 0."""
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
    """Return when all ranks are about to leave, so that no launcher kills the others for the first one's exit.

    Rank 0, which may keep the store, leaves when the others have looked there for the last time.
    """
    world, deadline = dist.get_world_size(), time.monotonic() + LOST_SECONDS
    here = count("leaving", 1)
    while 0 < here < world and time.monotonic() < deadline:
        time.sleep(0.02)
        here = count("leaving", 0)
    if dist.get_rank() > 0:
        count("left", 1)
    while dist.get_rank() == 0 and count("left", 0) < world - 1 and time.monotonic() < deadline:
        time.sleep(0.02)
