"""How a program starts on many ranks, and how all of them end when one of them must.

**Errors.** A user error prints one line, and every rank exits with status 2. Whatever else ends the job prints one line
with its cause, from one rank. No rank waits for ever for one that is gone.

**Signals.** One rule for SIGINT, SIGTERM, SIGUSR1 and SIGHUP, which `run_program` puts in force:

- a signal raises `SystemExit(128 + number)` in the main thread, so `finally` blocks and context managers tidy up;
- in a `with Postponed() as signals:` block it is only noted, as `signals.number`, and comes again after the block;
- a main thread that waits in C, for a collective say, runs no Python: then the thread of `Watch` ends the process after
  GRACE seconds, and removes the folders that were half written.

Before `run_program`, while torch is imported, the kernel's default ends the process.

**Ranks.** Rank 0 has a connection to every other rank, and the watching threads at its ends send each other a
message a second. When it closes, the other process has ended; when it is silent for --timeout seconds, the process is
stopped, or its machine cut off.
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
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from parallel import Place, TopologyError
from runtime.files import UNFINISHED, UserError, require

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # SIGUSR1 is Slurm's warning of the end

GRACE = 5  # seconds that the main thread has to tidy up after a signal

MOMENT = 0.5  # seconds that rank 0 has to print why another rank ends, before a launcher sees that and kills all

LOST_SECONDS = 10  # a rank whose collective failed waits this long before it says so: others know the cause

HUNG = timedelta(minutes=30)  # for one collective, among ranks that are all there

PATIENT = timedelta(days=30)  # ranks rightly wait for a disk, or a person; `Watch` ends a wait for one that is gone

ALIVE = "\n"  # what ranks send each other, besides the line that says why the job ends

# What every program calls the flags that a TopologyError is about; the layers that raise it know of no flags.
WHAT_TO_DO = "choose other --tp and --pp; their product, times the data-parallel replicas, is the number of processes"

OUT_OF_MEMORY = "can't allocate memory|Cannot allocate memory|bad_alloc|out of memory"

MORE_MEMORY = "use more processes with --tp or --pp, fewer or shorter requests or samples at once, or more memory"


# ----------------------------------------------------------------------------------------------------- the command line


class Help(argparse.RawDescriptionHelpFormatter):
    """--help for 80 columns, with every default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=80)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "default" in text or action.required or action.nargs == 0:
            return text
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text}; default {'none' if default in (None, '') else default}".removeprefix("; ")


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


# --------------------------------------------------------------------------------- signals, and the ends of other ranks


class Postponed:
    """A block in which signals (`numbers`; without, all) are only noted. What `number` still says then comes again.

    `number`: the signal that came, or 0. While `waiting` is set, a signal also ends the wait, by KeyboardInterrupt.
    `tell` is for a block that goes on for long: it is called at once, by the watching thread, and a second Ctrl-C ends
    the program.
    """

    def __init__(self, *numbers: int, tell: Callable[[], None] | None = None):
        self.numbers, self.tell, self.number, self.waiting = numbers or SIGNALS, tell, 0, False
        self.heard: list[int] = []  # by the watching thread

    def __enter__(self) -> "Postponed":
        BLOCKS.append(self)
        return self

    def __exit__(self, error: type | None, *_) -> None:
        BLOCKS.remove(self)
        if self.number and error is None:
            signal.raise_signal(self.number)


BLOCKS: list[Postponed] = []  # the open ones

LEAVING = Postponed()  # the last block of a program: what comes while it tidies up must not interrupt that


def block_for(number: int) -> Postponed | None:
    return next((block for block in reversed(BLOCKS) if number in block.numbers), None)


def on_signal(number: int, frame) -> None:
    """The one handler."""
    block = block_for(number)
    if block is None:
        BLOCKS.append(LEAVING)
        raise SystemExit(128 + number)
    block.number = number
    if block.waiting:
        raise KeyboardInterrupt


class Watch:
    """A thread that hears signals and the other ranks, and ends the process while the main thread waits in C.

    Ranks send each other ALIVE, and why the job ends: a line, or "" if nothing has to be said. Rank 0 prints the first,
    and passes it on.
    """

    def __init__(self, patience: float):
        self.patience, self.rank, self.speaks = patience, 0, True
        self.peers: dict[Connection, int] = {}  # whose connections: on rank 0 all others, elsewhere rank 0
        self.silent: dict[Connection, int] = {}  # seconds since the last message, of those that are open
        self.reason = threading.Lock()  # held once it is known why the job ends
        self.limit = (math.inf, 0, "")  # end at this time, with this status and line
        self.leaving = False
        self.terminal = termios.tcgetattr(0) if os.isatty(0) else None  # a chat changes how it reads keys
        self.ear, self.mouth = socket.socketpair()  # Python writes the number of each signal that comes
        self.mouth.setblocking(False)
        signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, on_signal)
        threading.Thread(target=self.run, daemon=True).start()

    def join(self, store: dist.Store, rank: int, world: int) -> None:
        """Connect rank 0 with the others; they find its port in the store."""
        if rank == 0:
            ipv6 = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
            with socket.create_server(("", 0), backlog=world, **ipv6) as server:
                store.set("watch", str(server.getsockname()[1]))
                accepted = [Connection(server.accept()[0].detach()) for _ in range(1, world)]
            self.peers = {peer: int(peer.recv_bytes()) for peer in accepted}
        else:
            address = os.environ["MASTER_ADDR"], int(store.get("watch"))
            peer = Connection(socket.create_connection(address).detach())
            peer.send_bytes(str(rank).encode())
            self.peers = {peer: 0}
        self.rank, self.speaks, self.limit = rank, rank == 0, (math.inf, 0, "")
        self.silent = dict.fromkeys(self.peers, 0)

    def run(self) -> None:
        """Handle what comes, and once a second look for what does not come.

        Seconds of silence are counted, not timed: if the whole job was stopped for an hour, no rank is to blame.
        """
        due = 0.0
        while not self.leaving:
            for source in select.select([self.ear, *self.silent], [], [], 0.1)[0]:
                self.hear(source.recv(1)[0]) if source is self.ear else self.listen(source)
            if time.monotonic() >= due:
                due = time.monotonic() + 1
                self.look()

    def hear(self, number: int) -> None:
        """A signal came. Its handler runs in the main thread, once that is back from C."""
        block = block_for(number)
        if number in SIGNALS and block in (None, LEAVING):
            self.limit = min(self.limit, (time.monotonic() + GRACE, 128 + number, stopped_by(number)))
        elif block and block.tell:
            block.heard.append(number)
            if block.heard == [number]:
                with contextlib.suppress(OSError):  # nobody reads that any more
                    block.tell()
            elif block.heard.count(signal.SIGINT) == 2:
                self.end(128 + number, stopped_by(number))

    def listen(self, peer: Connection) -> None:
        """Another rank sent something, or its process ended."""
        try:
            message, self.silent[peer] = peer.recv_bytes().decode(), 0
        except (EOFError, OSError):
            del self.silent[peer]
            self.lose(f"rank {self.peers[peer]} was killed, or crashed; the kernel's log (dmesg) may say why")
        else:
            if message != ALIVE:
                self.speak(message)

    def look(self) -> None:
        if time.monotonic() > self.limit[0]:
            self.end(*self.limit[1:])
        self.tell(ALIVE)
        for peer in self.silent:
            self.silent[peer] += 1
            if self.silent[peer] >= self.patience - 1:
                who = "rank 0, where all ranks meet," if self.rank else f"rank {self.peers[peer]}"
                self.lose(f"{who} gave no sign of life for {self.patience:g} s (--timeout); it is stopped or cut off")

    def lose(self, line: str) -> None:
        """Without another rank, this one ends, too: by itself, if it comes to its own end soon."""
        self.speaks |= self.rank == 1  # what it lost is rank 0
        self.speak(line)
        self.limit = min(self.limit, (time.monotonic() + GRACE, 1, ""))

    def tell(self, message: str) -> None:
        for peer in self.peers:
            with contextlib.suppress(OSError):  # it is gone
                peer.send_bytes(message.encode())

    def speak(self, line: str) -> None:
        """Say, in one line of printable characters, why the job ends, if no rank has yet."""
        if not self.reason.acquire(blocking=False):
            return
        self.tell(line)
        if self.speaks and line:
            line = "".join(c if c.isprintable() else " " for c in line)
            line = line if len(line) <= 490 else f"{line[:290]} … {line[-190:]}"
            with contextlib.suppress(OSError):
                print(f"error: {line}", file=sys.stderr, flush=True)

    def end(self, status: int, line: str) -> None:
        """End the process."""
        self.speak(line)
        for path in list(UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(termios.error):  # that terminal was closed
            if self.terminal:
                termios.tcsetattr(0, termios.TCSANOW, self.terminal)
        time.sleep(MOMENT)
        os._exit(status)


def stopped_by(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}" if "RANK" in os.environ else ""  # alone, one knows


# ------------------------------------------------------------------------------------------------------------ the start


def start_world(watch: Watch | None = None) -> None:
    """Join the processes that torchrun started, if it did: NCCL on GPUs, Gloo on CPUs. Raises UserError."""
    world = variable("WORLD_SIZE", 1, 1 << 20, 1)
    rank = variable("RANK", 0, world - 1, 0 if world == 1 else None)
    gpu, gpus = variable("LOCAL_RANK", 0, world - 1, 0), torch.cuda.device_count()
    if world == 1 or dist.is_initialized():
        return
    address, port = os.environ.get("MASTER_ADDR", ""), variable("MASTER_PORT", 1, 65535)
    where, patience = f"MASTER_ADDR {address!r}, MASTER_PORT {port}", watch.patience if watch else 300.0
    try:
        socket.getaddrinfo(address or "?", port)
        if watch:  # torch waits without end for one that takes the connection and says nothing
            watch.limit = time.monotonic() + patience - 1, 2, f"{where}: no answer within {patience:g} s (--timeout)"
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience - 2)))[0]
        if watch:
            watch.join(store, rank, world)
    except (OSError, ValueError, dist.DistError) as error:
        used = "EADDRINUSE" in str(error)
        what = "in use on this machine; set a free one" if used else f"not all ranks came to meet here ({error})"
        raise UserError(f"{where}: {what}") from None
    if gpu < gpus:
        torch.cuda.set_device(gpu)  # before NCCL exists: what it does first should not be on GPU 0
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENT)
    if gpus:
        with all_or_none():
            require(gpu < gpus, f"more processes than the {gpus} GPUs of a machine; lower --nproc-per-node")


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
        advice = "" if dist.is_initialized() else f"; start with torchrun --nproc-per-node {tp * pp}"
        raise TopologyError(f"{sizes} does not divide the number of processes, {world}{advice}")
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
    connect_stages(place)
    return place


def connect_stages(place: Place) -> None:
    """Let every two stages that will send each other something do so once, in each group, before weights are read.

    NCCL connects two ranks of a group at their first message, where the host of one waits for the other, and not for
    long (`--timeout`): with stages that read their weights at different speeds the first real message would be too
    late. The pairs are a ring: neighbours, and the two ends, which share a tied embedding. Even stages send first,
    so that nobody waits for one that waits.
    """
    element, p = torch.zeros(1, device=place.device), place.pp_size
    for group in filter(None, (place.pp_group, place.answer_group)):
        for sends in (True, False) if place.pp_rank % 2 == 0 else (False, True):
            if sends:
                dist.send(element, group=group, group_dst=(place.pp_rank + 1) % p)
            else:
                dist.recv(element, group=group, group_src=(place.pp_rank - 1) % p)


def gather_objects(value) -> list:
    """The (picklable) `value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A block that all ranks come to, and that succeeds on all, or fails on all with the error of one.

    A mistake that only one rank can see (a damaged shard) would otherwise end that rank alone, while the others wait in
    their next collective. So no rank leaves here before all have said how they fared.
    """
    error = None
    try:
        yield
    except (UserError, TopologyError) as mistake:
        error = mistake
    for mistake in filter(None, gather_objects(error)):
        raise mistake


def together(action: Callable):
    """Run `action` on every rank and return its result; a UserError of any rank is raised on all."""
    with all_or_none():
        return action()


# -------------------------------------------------------------------------------------------------------------- the end


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


def run_program(main: Callable[[list[str]], None], alone: bool = False) -> None:
    """Run `main(arguments)` on every rank, then exit: with status 0, or with one line in all that says what went wrong.

    A program that runs `alone` takes no notice of a launcher's variables, which a shell inside a job may have.
    """
    open_streams()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if alone else ():
        os.environ.pop(name, None)
    early = Parser(add_help=False)  # ranks wait for each other before `main` knows its options
    early.add_argument("--timeout", type=number(float, 5, 1e9), default=300.0)
    args = argparse.Namespace(timeout=300.0)
    with contextlib.suppress(UserError):  # `main` will raise it again
        early.parse_known_args(sys.argv[1:], args)
    watch = Watch(args.timeout)
    try:
        start_world(watch)
        main(sys.argv[1:])
        sys.stdout.flush()
        if dist.is_initialized():
            dist.barrier()  # watched, too: this may take as long as the slowest rank does
        ending = 0, ""
    except BaseException as error:
        BLOCKS.append(LEAVING)
        ending = explain(error)
        if isinstance(error, RuntimeError) and re.search("^Dist|gloo|NCCL", f"{type(error).__name__}: {error}"):
            time.sleep(LOST_SECONDS)  # a broken connection is not the cause: another rank failed
    finish(watch, *ending)


def explain(error: BaseException) -> tuple[int, str]:
    """(exit status, the line to print). A bug of one process alone is raised."""
    reason, many = " ".join(str(error).split()), "RANK" in os.environ
    if isinstance(error, UserError):
        return error.status, str(error)
    if isinstance(error, TopologyError):
        return 2, f"{error}; {WHAT_TO_DO}"
    if isinstance(error, SystemExit):  # by a signal, or --help
        status = error.code or 0
        return status, stopped_by(status - 128) if status > 128 else ""
    if isinstance(error, BrokenPipeError):  # the reader of our output went away, and knows
        return 1, "the reader of the output went away" if many else ""
    status, line = 2, machine_failure(error, reason)
    if not line and not many:
        raise error
    if not line:
        file, at, *_ = traceback.extract_tb(error.__traceback__)[-1]
        status, line = 1, f"{type(error).__name__}: {reason} ({os.path.basename(file)} line {at})"
    return status, f"rank {dist.get_rank()}: {line}" if dist.is_initialized() else line


def machine_failure(error: BaseException, reason: str) -> str:
    """The line for what the machine refused: memory, or a file."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(OUT_OF_MEMORY, reason):
        return f"out of memory; {MORE_MEMORY} ({reason[:200]})"
    if isinstance(error, OSError):
        return f"{error.filename or 'standard output, or a file'}: {error.strerror or reason}"
    return ""


def finish(watch: Watch, status: int, line: str) -> None:
    """Say what is to be said and exit."""
    BLOCKS.append(LEAVING)  # again, or first: of a program that went well
    signal.set_wakeup_fd(-1)
    watch.leaving = True
    watch.speak(line)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try it once more when it exits, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not dist.is_initialized():
        sys.exit(status)
    if status:
        time.sleep(MOMENT)
        os._exit(status)  # tidying up could wait for ever, for ranks that are not there any more
    dist.destroy_process_group()
    sys.exit(0)
