"""The plan against the dry run (dry_run.py): what it says activations take, and what tensors of a GPU's took."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import pytest
from dry_cases import real_config, recipe
from dry_run import Process, why_not

import train
from runtime import plan

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def dry() -> Iterator[Process]:
    process = Process()
    yield process
    process.end()


def planned(argv: list[str], rank: int, config, keep_fp8: bool = False) -> int:
    """Bytes of activations that the plan says for this rank."""
    given = vars(train.parse_args(["--ckpt", "x", "--data", "x", "--out", "x", "--val", "x", *argv]))
    args = argparse.Namespace(**{**vars(plan.parse_args(["--plan", "--config", "-"])), **given})
    args.inference = False
    stage, tp_rank = divmod(rank, args.tp)
    place = plan.places(args.tp, args.pp, 1, args.sequence_parallel)[stage][tp_rank]
    return plan.plan_rank(config, place, args, keep_fp8)[0].activation_bytes


# Whole steps take minutes; two layers of a stage and few micro-batches, all of full size, are as exact.
@pytest.mark.parametrize(
    "rank, layers, micro_batches, more",
    [
        (0, 16, 3, []),
        (28, 16, 3, []),
        (63, 16, 3, []),
        (0, 16, 2, ["--sequence-parallel"]),
        (28, 16, 2, ["--sequence-parallel"]),
        (1, 3, 1, ["--lora-rank", "8", "--tp", "4", "--pp", "1"]),
        pytest.param(0, None, 8, [], marks=[pytest.mark.slow, pytest.mark.time_limit(400)]),
        pytest.param(28, None, 8, [], marks=[pytest.mark.slow, pytest.mark.time_limit(400)]),
        pytest.param(63, None, 8, [], marks=[pytest.mark.slow, pytest.mark.time_limit(400)]),
    ],
)
def test_a_training_step(dry, rank, layers, micro_batches, more):
    """The published recipe with the options `more`: never less than what is needed, and at most 3 % more."""
    sizes = {name: int(more[more.index(f"--{name}") + 1]) for name in ("tp", "pp") if f"--{name}" in more}
    options = [x for x in more if x not in ("--tp", "--pp", *map(str, sizes.values()))]
    # Images where the tower is: the plan takes every token for one of theirs.
    report = dry(
        "training_step", rank=rank, micro_batches=micro_batches, layers=layers, images=True, more=options, **sizes
    )
    argv = [*recipe(), *more, "--global-batch-size", str(micro_batches)]
    said = planned(argv, rank, real_config(layers), keep_fp8="--lora-rank" in more)
    measured = report["peak"] - report["before"]
    print(f"plan {said / 1e9:.3f} GB, dry run {measured / 1e9:.3f} GB at {report['peak_at']}, {said / measured:.4f}")
    assert 1 <= said / measured <= 1.03


@pytest.mark.parametrize(
    "rank, tp, pp, prompts",
    [(0, 8, 1, [9000]), (0, 1, 1, [9000]), (3, 2, 2, [9000]), (0, 8, 1, [700]), (0, 8, 1, [50, 9000])],
)
def test_a_prefill(dry, rank, tp, pp, prompts):
    """FP8, text in chunks. A short prompt that shares the first chunk of a long one keeps none of its states."""
    config = replace(real_config(2 * pp), vision=None)
    phases = dry("answering", rank=rank, tp=tp, pp=pp, prompts=prompts, layers=2 * pp, tokens=2, logprobs=True)
    measured = max(report["peak"] - report["before"] for name, report in phases if name == "prefill")
    args = plan.parse_args(["--plan", "--config", "-", "--inference", "--max-context", str(prompts[-1])])
    place = plan.places(tp, pp)[rank // tp][rank % tp]
    said = plan.plan_rank(config, place, args, keep_fp8=True)[0].activation_bytes
    print(f"plan {said / 1e9:.4f} GB, dry run {measured / 1e9:.4f} GB, {said / measured:.4f}")
    assert 1 <= said / measured <= 1.03


def test_the_flagship(dry):
    """The benchmark of the 128B runs on a GPU's tensors, and nothing in it would fail on hardware."""
    report = dry("flagship", layers=2)
    assert report["faults"] == [] and report["masks"] == []
    assert len(report["rows"]) == 5 and all("scaled to all layers" in row for row in report["rows"][1:])
