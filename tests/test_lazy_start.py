"""No deadlock on NCCL, which connects ranks only when they first talk, tried on Gloo.

NCCL makes a group's communicator at the group's first collective, and a pair's at its first send or receive. The host
stands still there until all of them have come, even where the operation itself would run in the background. Gloo knows
nothing of the kind, so a schedule in which two ranks wait for each other to come would pass every other test.
"""

import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks, run_ranks
from train_cases import arguments, metrics, train_on_ranks

from runtime import launch

SECONDS = 40  # a run takes three; one that is stuck is ended then
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "reduce_scatter")


def start_lazily() -> None:
    """Before the first operation of a group, or of a pair in it, all of them meet.

    `find_place` connects all groups. That is forgotten here: the schedules should be right without.
    """
    met = set()

    def before(operation: Callable, arrive: Callable) -> Callable:
        def call(*arguments, group=None, **options):
            peer = options.get("group_dst", options.get("group_src")) if arrive is meet_peer else None
            # What concerns all ranks (group None) is on the CPU, and there it is Gloo's on a GPU, too.
            if group is not None and (group, peer) not in met:
                met.add((group, peer))
                arrive(group, peer)
            return operation(*arguments, group=group, **options)

        return call

    barrier, send, receive = dist.barrier, dist.send, dist.recv

    def meet_all(group: dist.ProcessGroup, peer: None) -> None:
        barrier(group=group)

    def meet_peer(group: dist.ProcessGroup, peer: int) -> None:
        there = partial(send, torch.zeros(1), group=group, group_dst=peer)
        back = partial(receive, torch.zeros(1), group=group, group_src=peer)
        for half in (there, back) if dist.get_rank(group) < peer else (back, there):
            half()

    for name in COLLECTIVES:
        setattr(dist, name, before(getattr(dist, name), meet_all))
    for name in ("send", "isend", "recv", "irecv"):
        setattr(dist, name, before(getattr(dist, name), meet_peer))
    find_place = launch.find_place

    def forgetting(*sizes):
        place = find_place(*sizes)
        met.clear()
        return place

    launch.find_place = forgetting


@pytest.mark.parametrize("topology", [(1, 2), (1, 4), (2, 2)])
def test_sixteen_requests(topology, text, tmp_path):
    """More prompts than a stage may have in flight go down the pipeline before the first token comes back."""
    tp, pp = topology
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps({"raw": "the " * n, "max_new_tokens": 3}) + "\n" for n in range(1, 17)))
    options = ("--ckpt", text[0], "--raw", "--requests", path, "--json", "--dtype", "float32", "--tp", tp, "--pp", pp)
    first, *others = run_on_ranks(tp * pp, "generate.py", *options, prepare=start_lazily, seconds=SECONDS)
    assert first.status == 0, first.err + "".join(rank.err for rank in others)
    assert len(first.out.splitlines()) == 16


@pytest.mark.parametrize("topology", [(1, 2, 1), (1, 4, 1), (1, 2, 2), (2, 2, 1)])
def test_training(topology, text, tmp_path):
    """Two steps with tied embeddings, whose gradients the ends of the pipeline exchange, and validation."""
    options = {"max_steps": 2, "global_batch_size": 8, "val": text[1], "val_every": 1, "val_generate": True}
    argv = arguments(*text, tmp_path / "out", **options)
    train_on_ranks(argv, topology, prepare=start_lazily, seconds=SECONDS)
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 1, 2, 2]


def groups_touched(tp: int, pp: int) -> list[str]:
    """Which groups of this rank had a collective while they were made, in order."""
    real, touched = dist.all_reduce, []

    def all_reduce(x, *arguments, group=None, **options):
        touched.append(group)
        return real(x, *arguments, group=group, **options)

    dist.all_reduce = all_reduce
    place = launch.find_place(tp, pp)
    names = {getattr(place, f"{name}_group"): name for name in ("tp", "pp", "dp", "answer")}
    return [names[group] for group in touched]


def test_all_groups_are_connected_at_the_start():
    """In the same order on all ranks: none waits for another that waits for it."""
    assert run_ranks(groups_touched, 8, 2, 2) == [["tp", "pp", "dp", "answer"]] * 8
    assert run_ranks(groups_touched, 2, 2, 1) == [["tp"]] * 2
