"""How much memory is free on this machine, and how much this process took."""

import contextlib
import math
import os
import resource

import torch

from parallel import Place


def cpu_memory() -> float:
    """Bytes that are free on this machine, within the limits that Slurm or a container sets (control groups)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = sum(1024 * int(line.split()[1]) for line in file if line.startswith(("MemAvailable", "SwapFree")))
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return math.inf
    for _, kind, path in groups:
        if kind in ("", "memory"):  # version 2 and version 1
            folder, name = f"/sys/fs/cgroup/{kind}{path}", "memory.limit_in_bytes" if kind else "memory.max"
            while len(folder) >= len("/sys/fs/cgroup"):
                with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, name)) as file:
                    free = min(free, int(file.read()))  # ValueError: "max", no limit
                folder = os.path.dirname(folder)
    return free


def peak_memory(place: Place) -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took on a CPU."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated(place.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
