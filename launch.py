"""How a program runs on many ranks: what is agreed among them, and how all of them end when one of them must.

The rules: a mistake of the user's is one line in all and exit status 2 on every rank; anything else that goes wrong on
one rank is one line with its cause and ends the job; nobody waits for ever for a rank that is gone.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from config import UserError
from parallel import start_world

LOST_SECONDS = 10  # a rank that lost another one waits so long before it says so: the cause should be said first


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
