"""How a program runs on many ranks: what is agreed among them, and how all of them end when one of them must.

The rules: a user error prints exactly one line, and every rank exits with status 2; anything else that ends the job
prints one line with its cause, from one rank; no rank waits for ever for one that is gone.

All that ranks agree on outside the model's own collectives is a few counters in a store, a small server beside them (in
the launcher, or in rank 0 where there is none), so it still answers when collectives hang or have failed.
"""

import argparse
import contextlib
import io
import math
import os
import re
import select
import shutil
import signal
import socket
import sys
import termios
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel import Place, TopologyError
from runtime.files import UserError

LOST_SECONDS = 10  # a rank that lost another one waits so long before it says so: the cause should be said first

HUNG = timedelta(minutes=30)  # for one collective, among ranks that are all there

PATIENT = timedelta(days=30)  # ranks rightly wait for a disk, or a person; `Watch` ends a wait for one that is gone

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; the end of a job; Slurm's warning that it is near

# What every program calls the flags that a TopologyError is about; the layers that raise it know of no flags.
WHAT_TO_DO = "choose other --tp and --pp; their product, times the data-parallel replicas, is the number of processes"

OUT_OF_MEMORY = "can't allocate memory|Cannot allocate memory|bad_alloc|out of memory"

MORE_MEMORY = "use more processes with --tp or --pp, fewer or shorter requests or samples at once, or more memory"


class Help(argparse.RawDescriptionHelpFormatter):
    """--help for 80 columns, with every default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=80)

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", action.default
        if "default" in said or action.required or action.nargs == 0:
            return said
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{said}; default {'none' if default in (None, '') else default}".removeprefix("; ")


class Parser(argparse.ArgumentParser):
    """Options, between a docstring's first two paragraphs: a line, and examples. Raises UserError for mistakes."""

    def __init__(self, doc: str = "", **more):
        line, examples, *_ = f"{doc}\n\n".split("\n\n")
        more = dict(description=textwrap.fill(line, 80), epilog=examples and f"examples:\n{examples}") | more
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False, **more})

    def parse_known_args(self, *more):
        args, rest = super().parse_known_args(*more)
        for name, value in vars(args).items():  # the name of a file: "$UNSET" should not mean another one
            if "" in (value if isinstance(value, list) else [value]) and name not in ("question", "prompt", "system"):
                self.error(f"{name} is empty")
        return args, rest

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
            raise argparse.ArgumentTypeError(f"{text!r} is no number {'above' if above else 'from'} {low} to {high}")
        return value

    return parse


COUNT, SIZE = number(int, 0, 1 << 40), number(int, 1, 1 << 40)


def variable(name: str, low: int, high: int, default: int | None = None) -> int:
    """An environment variable that a launcher sets."""
    try:
        return number(int, low, high)(os.environ.get(name, default))
    except (argparse.ArgumentTypeError, TypeError) as error:
        reason = "it is not set" if name not in os.environ else error
        raise UserError(f"environment variable {name}: {reason}; start with torchrun, which sets it") from None


def start_world(patience: float = 300.0, met: Callable[[dist.Store, int, int], None] | None = None) -> None:
    """Join the processes that torchrun started, if it did: NCCL on GPUs, Gloo on CPUs.

    Within `patience` seconds they meet at a store; `met(store, rank, world)` is called before they connect otherwise.
    """
    world = variable("WORLD_SIZE", 1, 1 << 20, 1)
    rank = variable("RANK", 0, world - 1, 0 if world == 1 else None)
    gpu, gpus = variable("LOCAL_RANK", 0, world - 1, 0), torch.cuda.device_count()
    if world == 1 or dist.is_initialized():
        return
    address, port = os.environ.get("MASTER_ADDR", ""), variable("MASTER_PORT", 1, 65535)
    try:
        socket.getaddrinfo(address or "?", port)
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))[0]
        if met is not None:
            met(store, rank, world)
    except (OSError, ValueError, dist.DistError) as error:
        used = "EADDRINUSE" in str(error)
        what = "in use on this machine; set a free one" if used else f"not all ranks came to meet here ({error})"
        raise UserError(f"MASTER_ADDR {address!r}, MASTER_PORT {port}: {what}") from None
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENT)
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
        sizes = f"tensor-parallel size {tp} × pipeline-parallel size {pp}"
        raise TopologyError(f"{sizes} does not divide the number of processes, {world}")
    dp = world // (tp * pp)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    # cuDNN's attention would be the first choice on Hopper, and plans 20 to 400 ms for each new shape: each new token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    pp_rank, dp_rank, tp_rank = rank // (dp * tp), rank // tp % dp, rank % tp
    grid = torch.arange(world).view(pp, dp, tp)

    def groups(members: torch.Tensor) -> dist.ProcessGroup | None:
        """A group of each row of `members` (groups, ranks); returns this rank's, or None if a group is one rank.

        Every rank has to make every group, in the same order, also those it is not part of: torch counts them.
        """
        if members.shape[1] == 1:
            return None
        group, _ = dist.new_subgroups_by_enumeration(members.tolist(), HUNG)
        # NCCL connects a group at its first collective, where each host waits for all members. This is the first: all
        # come in the same order, and a network fault shows before the weights are read. (`device_id` would do it, too,
        # but queue a pair's sends with the collectives of the whole group.)
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        return group

    columns = grid.permute(1, 2, 0).reshape(-1, pp)  # the ranks that differ in their stage only
    place = Place(
        *(rank, tp_rank, tp, pp_rank, pp, dp_rank, dp),
        tp_group=groups(grid.reshape(-1, tp)),
        pp_group=groups(columns),
        dp_group=groups(grid.permute(0, 2, 1).reshape(-1, dp)),
        answer_group=groups(columns),
        device=device,
    )
    keep_alive()
    return place


def keep_alive() -> None:
    """Let the kernel break every idle connection of this process whose other machine does not answer for 40 seconds.

    A machine that lost its network or its power closes no connection, and those who wait for it would go on waiting.
    A process that is only stopped is different: its kernel still answers. TCP_USER_TIMEOUT would break it, too.
    """
    for name in os.listdir("/proc/self/fd") if dist.is_initialized() and sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # not a socket, or not of TCP
            connection = socket.socket(fileno=int(name))
            try:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in (("KEEPIDLE", 10), ("KEEPINTVL", 10), ("KEEPCNT", 3)):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)
            finally:
                connection.detach()  # it is not ours to close


def gather_objects(value) -> list:
    """The (picklable) `value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable):
    """Run `action` on every rank and return its result; a UserError of any rank is raised on all.

    A mistake that only one rank can see (a damaged shard) would otherwise end that rank alone, while the others wait in
    their next collective. So no rank leaves here before all have said how they fared: all have to come here.
    """
    error, result = None, None
    try:
        result = action()
    except (UserError, TopologyError) as mistake:
        error = mistake
    for mistake in filter(None, gather_objects(error)):
        raise mistake
    return result


class Watch:
    """Watches the other ranks while this one works, and ends this process when one of them is gone.

    A rank that waits in a collective hears no signal, and learns of another's end only if a connection to it breaks. So
    two threads look out, whatever the main thread does. What they notice:

    - a process on this machine that ended: at once, before a launcher can say so and stop this one;
    - a rank that gave no sign of life for `patience` seconds, which is stopped, or its machine is cut off. Every rank
      counts its beats in the store, one a second;
    - SIGINT and SIGTERM, unless the program has set handlers of its own.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, patience: float):
        self.rank, self.store, self.patience, self.leaving = rank, store.clone(), patience, threading.Event()
        self.names = [f"beats of rank {each}" for each in range(world)]
        self.store.add(self.names[rank], 1)
        # Processes see each other where they have the same host and the same numbering of processes.
        machine = f"{socket.gethostname()} {os.path.basename(os.path.realpath('/proc/self/ns/pid'))}"
        self.store.set(f"process {rank}", f"{machine}\n{os.getpid()}")
        self.processes: dict[int, int] = {}  # file descriptor that becomes readable when a rank's process ends -> rank
        for each, process in enumerate(self.store.multi_get([f"process {each}" for each in range(world)])):
            where, pid = process.decode().split("\n")
            if where == machine and each != rank:
                with contextlib.suppress(OSError, AttributeError):  # not every system has pidfd_open
                    self.processes[os.pidfd_open(int(pid))] = each
        # Of every rank; None: the store is gone. Read here, since a rank may be stopped before the thread's first look.
        self.beats: list[bytes] | None = self.store.multi_get(self.names)
        self.signals, written = os.pipe()  # the number of each signal that comes
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, left_to_watch)
        self.terminal = termios.tcgetattr(0) if os.isatty(0) else None  # a chat changes how it reads keys
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.beat, self.look)]
        for thread in self.threads:
            thread.start()

    def beat(self) -> None:
        """In a thread of its own, because a store that is stopped lets its callers wait for ever."""
        try:
            while not self.leaving.wait(1.0):
                self.store.add(self.names[self.rank], 1)
                self.beats = self.store.multi_get(self.names)
        except RuntimeError:
            self.beats = None

    def look(self) -> None:
        # Silence is counted in looks, not by the clock: if the whole job was stopped for an hour, nobody is to blame.
        before, silent = self.beats, [0] * len(self.names)
        while not self.leaving.is_set():
            events = select.select([*self.processes, self.signals], [], [], 1.0)[0]
            beats = self.beats
            for event in events:
                if (rank := self.processes.get(event)) is not None:
                    self.end(f"rank {rank} was killed, or crashed; the kernel's log (dmesg) may say why")
                elif signal.getsignal(number := os.read(event, 1)[0]) is left_to_watch:
                    self.end(f"stopped by {signal.Signals(number).name}", 128 + number)
            if beats is None:
                self.end("rank 0, or the launcher, is gone, and with it the place where ranks meet", ask=False)
            if events:
                continue
            silent = [count + 1 if now == then else 0 for count, now, then in zip(silent, beats, before)]
            before = beats
            if max(silent) >= max(2, self.patience - 2):  # 2: a beat, and a look
                gone = [rank for rank, count in enumerate(silent) if count > max(silent) / 2]
                stuck = self.rank in gone  # not even this rank's own beats arrive
                who = "rank 0, where all ranks meet," if stuck else f"rank {', '.join(map(str, gone))}"
                line = f"{who} gave no sign of life for {self.patience:g} s (--timeout); it is stopped or cut off"
                self.end(line, ask=not stuck)

    def end(self, line: str, status: int = 1, ask: bool = True) -> None:
        if not self.leaving.is_set():
            if not ask or Counters(self.store).add("spoken", 1) <= 1:
                say(line)
            time.sleep(1)  # a launcher should see the rank that is the cause end first
            if self.terminal:
                termios.tcsetattr(0, termios.TCSANOW, self.terminal)
            os._exit(status)


@contextlib.contextmanager
def caught(handler: Callable) -> Iterator[dict]:
    """Inside the block a signal calls `handler(number, frame)`; yields what it would have called before, by number."""
    before = {number: signal.signal(number, handler) or signal.SIG_DFL for number in SIGNALS}
    try:
        yield before
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[None]:
    """A folder for the block to fill and to rename. Whatever ends the block early, a signal too, removes it again."""

    def remove(number: int, frame) -> None:
        shutil.rmtree(path, ignore_errors=True)
        if not callable(before[number]):
            os._exit(128 + number)
        signal.signal(number, before[number])
        signal.raise_signal(number)

    with caught(remove) as before:
        os.makedirs(path)
        try:
            yield
        finally:
            shutil.rmtree(path, ignore_errors=True)


def left_to_watch(number: int, frame) -> None:
    """The handler of a signal that `Watch` reads from a pipe: Python would run it only when the main thread is free."""


def say(line: str) -> None:
    """Print an error in one line of printable characters."""
    line = "".join(c if c.isprintable() else " " for c in f"error: {line}")
    with contextlib.suppress(OSError):
        print(line if len(line) <= 500 else f"{line[:300]} … {line[-190:]}", file=sys.stderr, flush=True)


class Counters:
    """Counters that all ranks share; 0 where there is one process, or once the store went down with rank 0."""

    def __init__(self, store: dist.Store | None = None):
        self.store = store

    def add(self, name: str, more: int) -> int:
        try:
            return self.store.add(name, more) if self.store else 0
        except RuntimeError:
            self.store = None
            return 0


def open_streams() -> None:
    """Make the three standard streams usable, whatever this process was given."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed: the next file opened would take its place
        pass
    os.close(file)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    sys.stdout = sys.stdout or open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # so that writing fails
    if isinstance(sys.stdout, io.TextIOWrapper):
        # JSON is UTF-8 whatever the locale says. A lone surrogate becomes \udxxx, its own escape in JSON.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def run_program(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)` on every rank, then exit: with status 0, or with one line in all that says what went wrong.

    A user error is raised on all ranks (see `together`), and their status is 2. Anything else that one rank meets ends
    the job with status 1: the others notice that it is gone. One process alone shows the traceback of what is a bug.
    """
    status, line, all_know, patience, watch, counters = 0, None, True, 300.0, None, Counters()
    early = Parser(add_help=False)  # ranks wait for each other before `main` knows its options
    early.add_argument("--timeout", type=number(float, 5, 1e9), default=patience)

    def met(store: dist.Store, rank: int, world: int) -> None:
        nonlocal watch, counters
        watch, counters = Watch(store, rank, world, patience), Counters(store)

    try:
        open_streams()
        with contextlib.suppress(UserError):  # `main` will raise it again
            patience = early.parse_known_args(sys.argv[1:])[0].timeout
        start_world(patience, met)
        main(sys.argv[1:])
        sys.stdout.flush()
        if dist.is_initialized():
            dist.barrier()  # watched, too: this may take as long as the slowest rank does
    except TopologyError as error:
        status, line = 2, f"{error}; {WHAT_TO_DO}"
    except UserError as error:
        status, line = error.status, str(error)
    except SystemExit as stop:  # --help
        status = stop.code or 0
    except KeyboardInterrupt:  # of one process alone
        status = 130
    except BrokenPipeError:  # the reader of our output went away, and knows
        status, all_know = 1, False
        line = "the reader of the output went away" if dist.is_initialized() else None
    except Exception as error:
        all_know, status, reason = False, 2, " ".join(str(error).split())
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(OUT_OF_MEMORY, reason):
            line = f"out of memory; {MORE_MEMORY} ({reason[:200]})"
        elif isinstance(error, OSError):
            line = f"{error.filename or 'standard output, or a file'}: {error.strerror or reason}"
        elif "RANK" not in os.environ:
            raise
        else:
            file, at, *_ = traceback.extract_tb(error.__traceback__)[-1]
            status, line = 1, f"{type(error).__name__}: {reason} ({os.path.basename(file)} line {at})"
        # A broken connection is not the cause but its echo: another rank failed, and has the better line to print.
        if isinstance(error, dist.DistError) or "gloo" in reason or "NCCL" in reason:
            await_cause(counters)
        line = f"rank {dist.get_rank()}: {line}" if dist.is_initialized() else line
    if watch is not None:
        watch.leaving.set()
    if line is not None and counters.add("spoken", 1) <= 1:  # many ranks may come here with a line
        say(line)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try it once more when it exits, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not dist.is_initialized():
        sys.exit(status)
    if all_know:
        wait_for_all(counters)  # a rank that exits early breaks its peers' connections
    if status == 0:
        dist.destroy_process_group()
        for thread in watch.threads if watch else ():
            thread.join(2)
        sys.exit(0)
    os._exit(status)  # tidying up could wait for ever, for ranks that are not there any more


def await_cause(counters: Counters) -> None:
    """This rank lost another one. Give `Watch`, or that rank, LOST_SECONDS to say why and to end the job."""
    deadline = time.monotonic() + LOST_SECONDS
    while counters.add("spoken", 0) == 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)  # the rank that spoke should be seen to end first


def wait_for_all(counters: Counters) -> None:
    """Return when all ranks are about to exit, each with the same status.

    A launcher kills the other ranks as soon as one exits with an error: their status would be a signal's. So each says
    in the store that it is leaving, and waits for all. Rank 0, where the store may live, waits until all have left it.
    """
    world, rank, deadline = dist.get_world_size(), dist.get_rank(), time.monotonic() + LOST_SECONDS
    here = counters.add("leaving", 1)
    while 0 < here < world and time.monotonic() < deadline:
        time.sleep(0.02)
        here = counters.add("leaving", 0)
    counters.add("left", 1)
    while rank == 0 and counters.add("left", 0) < world and time.monotonic() < deadline:
        time.sleep(0.02)
