"""How the tests start processes: functions and whole programs on ranks that find torch imported already, joined by
Gloo; and programs as a user starts them, alone or under torchrun.

A new interpreter takes seconds to import torch, so tests use it only where it, or torchrun, is the point.
"""

import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import NamedTuple

import torch
import torch.distributed as dist

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # tiny models gain nothing from threads


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The program's own lines on stderr, without torchrun's report."""
        return [line for line in self.err.splitlines() if line.startswith(("error:", "caution:"))]


# ------------------------------------------------------------------------------------------------- forked ranks


def run_ranks(work: Callable, world: int, *arguments, seconds: float = 110) -> list:
    """What `work(*arguments)` returns on each of `world` ranks; it finds its place with `find_place`.

    A rank that fails, or is not done after `seconds`, ends all of them.
    """
    pipes, results, deadline = [], {}, time.monotonic() + seconds
    port, processes = free_port(), []
    for rank in range(world):
        mine, theirs = context().Pipe(duplex=False)
        processes.append(fork(_answer, theirs, rank, world, port, work, arguments))
        theirs.close()
        pipes.append(mine)
    try:
        while len(results) < world:
            ready = wait([p for i, p in enumerate(pipes) if i not in results], deadline - time.monotonic())
            assert ready, f"ranks {sorted(set(range(world)) - set(results))} were not done after {seconds} s"
            for pipe in ready:
                good, value = pickle.loads(pipe.recv_bytes())  # EOFError: the rank was killed
                assert good, f"rank {pipes.index(pipe)}:\n{value}"
                results[pipes.index(pipe)] = value
    finally:
        for process in processes:
            if len(results) < world:
                process.kill()
            process.join(10)
    return [results[rank] for rank in range(world)]


def run_on_ranks(
    world: int, program: str, *arguments, prepare: Callable | None = None, seconds: float = 110
) -> list[Ended]:
    """How each of `world` ranks of a program ended, with no launcher that would end the others after the first.

    `program` is a path, or a file's name in the repository; each rank calls `prepare` before it.
    """
    port, deadline = free_port(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        command = [os.path.join(ROOT, program), *map(str, arguments)]
        processes = [fork(_program, folder, rank, world, port, command, prepare) for rank in range(world)]
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in late:
            processes[rank].kill()
        assert not late, f"ranks {late} were not done after {seconds} s"
        ended = []
        for rank, process in enumerate(processes):
            out, err = (read(os.path.join(folder, f"{rank}.{name}")) for name in ("out", "err"))
            ended.append(Ended(process.exitcode, out, err))
        return ended


def context():
    """Processes forked from a server that has imported everything already, with the repository on its path."""
    made, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    made.set_forkserver_preload(["preload"])
    os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return made


def fork(work: Callable, *arguments) -> multiprocessing.Process:
    process = context().Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def _become(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(ENVIRONMENT)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _answer(pipe, rank: int, world: int, port: int, work: Callable, arguments: tuple) -> None:
    _become(rank, world, port)
    try:
        answer = (True, work(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    if answer[0] and dist.is_initialized():
        dist.barrier()
    pipe.send_bytes(pickle.dumps(answer))  # by value; torch's own pickler would share memory that is gone too soon
    pipe.close()
    os._exit(0)


def _program(folder: str, rank: int, world: int, port: int, command: list[str], prepare: Callable | None) -> None:
    _become(rank, world, port)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, f"{rank}.{name}"), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = command
    if prepare:
        prepare()
    runpy.run_path(command[0], run_name="__main__")


# ------------------------------------------------------------------------------------------------ new interpreters


def start(program: str, *arguments, ranks: int = 1, **popen) -> subprocess.Popen:
    """`python program …`, or `torchrun … program …` for several ranks. `program` may also be "-c" or "-m"."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    command += [program if program.startswith("-") else os.path.join(ROOT, program)]
    popen = {"env": {**os.environ, **ENVIRONMENT}, "cwd": ROOT, "text": True, **popen}
    if program == "-c":  # a script of the tests' own, which may use their modules
        popen["env"] = {**popen["env"], "PYTHONPATH": os.path.join(ROOT, "tests")}
    command += [argument if isinstance(argument, bytes) else str(argument) for argument in arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def run(program: str, *arguments, ranks: int = 1, stdin: str | bytes = "", seconds: float = 110, **popen) -> Ended:
    """Start a program, give it `stdin`, and wait for its end."""
    if isinstance(stdin, bytes):
        popen["text"] = False
    process = start(program, *arguments, ranks=ranks, stdin=subprocess.PIPE, **popen)
    try:
        out, err = process.communicate(stdin, timeout=seconds)
    finally:
        if process.poll() is None:
            kill(process)
    return Ended(process.returncode, *(text if isinstance(text, str) else text.decode() for text in (out, err)))


def kill(process: subprocess.Popen) -> None:
    """SIGKILL a run with all its ranks; torchrun, which would tell them to stop, is halted first."""
    try:
        os.kill(process.pid, signal.SIGSTOP)
    except ProcessLookupError:
        return
    family = [process.pid]
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/stat", encoding="utf-8") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == process.pid:
            family.insert(0, int(entry))
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
