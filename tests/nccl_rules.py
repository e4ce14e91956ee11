"""Do all ranks come to their end under the rules of NCCL and CUDA? Without either.

A rank's real code is run by itself, inside `Recorder`, which notes what it asks of torch.distributed: what arrives in a
message never decides what is asked next. `standing_still` then runs the traces of all ranks together:

- A host puts operations into its GPU's streams and goes on. The operations of a stream run in their order.
- Kernels, and collectives without `async_op`, are on the compute stream. What else there is has a stream for each
  communicator: a broadcast that of its process group, a send or receive that of its process group and the two ranks.
- An operation waits for all that the compute stream had when it was posted; `work.wait()` makes the compute stream wait
  for the operation.
- A send ends when its receive runs, as that of a message larger than NCCL's buffers; a collective when all run it.
- A host waits for its compute stream where it reads a number, and for the other hosts where all meet through Gloo.

The order in which ranks are looked at makes no difference: nothing that could go on is ever stopped by another's step.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

COMPUTE = "compute"


@dataclass(frozen=True, eq=False)
class Operation:
    """One that a host puts into a stream of its GPU."""

    stream: object = COMPUTE  # or a process group, or with two ranks of it a tuple
    meeting: object = None  # what it has in common with those of other ranks that it ends together with
    members: int = 1  # how many they are, with it

    @property
    def is_message(self) -> bool:
        """Between two ranks, whose communicator is made at the first."""
        return isinstance(self.stream, tuple)


class Step(NamedTuple):
    """What a host does next."""

    kind: str  # "post", "wait", "read" or "meet"
    operation: Operation | None = None


class Recorder:
    """In a `with` block, `trace` notes the steps of the code that runs, which believes to be rank `rank` of `world`.

    Process groups are numbers, in the order in which they were made. `gathered`: what an all-gather finds on the ranks.
    """

    def __init__(self, rank: int, world: int, gathered: list | None = None):
        self.rank, self.world, self.gathered = rank, world, gathered or [1] * world
        self.trace: list[Step] = []
        self.pairs: set[tuple] = set()  # (process group, the lower rank, the higher rank) that exchanged a message
        self.counts, self.groups = Counter(), 0
        names = "send isend recv broadcast all_reduce all_gather all_gather_object new_subgroups_by_enumeration".split()
        replaced = {name: getattr(self, name) for name in names}
        replaced |= dict(get_rank=lambda: rank, get_world_size=lambda group=None: world, is_initialized=lambda: True)
        self.patches = [
            mock.patch.multiple(dist, **replaced),
            mock.patch.multiple(torch.Tensor, tolist=lambda x: self.tolist(x)),
        ]

    def __enter__(self) -> "Recorder":
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error) -> None:
        for patch in self.patches:
            patch.stop()

    def kernel(self) -> None:
        self.post(Operation())

    def post(self, operation: Operation) -> mock.Mock:
        self.trace.append(Step("post", operation))
        return mock.Mock(wait=lambda: self.trace.append(Step("wait", operation)))

    def message(self, group: int, source: int, target: int) -> mock.Mock:
        pair = (group, min(source, target), max(source, target))
        self.pairs.add(pair)
        self.counts[group, source, target] += 1
        number = self.counts[group, source, target]
        return self.post(Operation(pair, (group, source, target, number), 2))

    def collective(self, group: int | None, async_op: bool = False) -> mock.Mock | None:
        if group is None:  # of all ranks, on the host
            self.trace.append(Step("meet"))
            return None
        self.counts[group] += 1
        stream = group if async_op else COMPUTE
        return self.post(Operation(stream, (group, self.counts[group]), self.world))

    # --- what torch.distributed and a tensor would do

    def isend(self, x, group, group_dst):
        return self.message(group, self.rank, group_dst)

    def send(self, x, group, group_dst):
        self.isend(x, group, group_dst).wait()

    def recv(self, x, group, group_src):
        x.zero_()
        self.message(group, group_src, self.rank).wait()

    def broadcast(self, x, src=None, group=None, group_src=None, async_op=False):
        x.zero_()
        return self.collective(group, async_op)

    def all_reduce(self, x, operation=None, group=None):
        self.collective(group)

    def all_gather(self, out, x, group):
        for tensor, value in zip(out, self.gathered):
            tensor.fill_(value)
        self.collective(group)

    def all_gather_object(self, values, value):
        values[:] = [value] * self.world
        self.collective(None)

    def new_subgroups_by_enumeration(self, members, timeout):
        assert members == [list(range(self.world))]  # those of a pipeline alone
        self.groups += 1
        return self.groups, None

    def tolist(self, x: torch.Tensor) -> list:
        self.trace.append(Step("read"))
        return x.numpy().tolist()


class Rank:
    """A host with its GPU, on the way through `trace`."""

    def __init__(self, trace: list[Step], one_queue: bool):
        self.trace, self.at, self.one_queue = trace, 0, one_queue
        self.last: dict[object, Operation] = {}  # the newest operation of each stream
        self.before: dict[Operation, list[Operation | None]] = {}  # what has to be done before one may start
        self.pending: list[Operation] = []  # in the order of posting
        self.started: set[Operation] = set()
        self.done: set[Operation | None] = {None}

    def post(self, operation: Operation, *before: Operation) -> None:
        self.before[operation] = [self.last.get(operation.stream), self.last.get(COMPUTE), *before]
        self.last[operation.stream] = operation
        self.pending.append(operation)

    def start(self) -> list[Operation]:
        """Start what may start, and return it."""
        new = []
        for operation in self.pending:
            if operation in self.started:
                continue
            if self.done.issuperset(self.before[operation]):
                new.append(operation)
            elif self.one_queue:  # nothing passes the first that has to wait
                break
        self.started.update(new)
        return new

    def finish(self, operation: Operation) -> None:
        self.pending.remove(operation)
        self.done.add(operation)


def standing_still(traces: list[list[Step]], drained: bool = False, one_queue: bool = False) -> list[str]:
    """What each rank that never comes to its end waits for; empty if all do.

    drained: at the first message of two ranks, where their communicator is made, a host waits for the other, and for
    its own GPU to be idle. one_queue: a GPU has one queue for all streams, where what waits blocks what was posted
    later (CUDA_DEVICE_MAX_CONNECTIONS=1).
    """
    ranks = [Rank(trace, one_queue) for trace in traces]
    at_first: dict[object, set[Rank]] = defaultdict(set)  # who came to a communicator's first message
    connected: set[tuple[object, Rank]] = set()
    arrived: dict[int, set[Rank]] = defaultdict(set)  # who came to the n-th meeting
    meetings: Counter = Counter()  # of each rank so far
    running: dict[object, list[tuple[Rank, Operation]]] = defaultdict(list)  # who started an operation of several

    def may_go_on(rank: Rank, step: Step) -> bool:
        if step.kind == "read":
            return rank.last.get(COMPUTE) in rank.done
        if step.kind == "meet":
            arrived[meetings[rank]].add(rank)
            return len(arrived[meetings[rank]]) == len(ranks)
        if drained and step.kind == "post" and step.operation.is_message:
            communicator = step.operation.stream
            at_first[communicator].add(rank)
            if len(at_first[communicator]) == 2 and not rank.pending:
                connected.add((communicator, rank))
            return (communicator, rank) in connected
        return True

    def walk(rank: Rank) -> bool:
        """The host does what it can."""
        before = rank.at
        while rank.at < len(rank.trace) and may_go_on(rank, step := rank.trace[rank.at]):
            if step.kind == "post":
                rank.post(step.operation)
            elif step.kind == "wait":
                rank.post(Operation(), step.operation)
            meetings[rank] += step.kind == "meet"
            rank.at += 1
        return rank.at > before

    def work(rank: Rank) -> bool:
        """The GPU does."""
        new = rank.start()
        for operation in new:
            together = running[operation.meeting or operation]
            together.append((rank, operation))
            if len(together) == operation.members:
                for member, part in together:
                    member.finish(part)
        return bool(new)

    while any(walk(rank) or work(rank) for rank in ranks):
        pass
    ends = [(number, rank.trace[rank.at :], rank.pending) for number, rank in enumerate(ranks)]
    return [f"rank {n}: {(rest or pending)[0]}" for n, rest, pending in ends if rest or pending]
