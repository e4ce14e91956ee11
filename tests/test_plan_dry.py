"""The plan against the dry run (dry_run.py): what it says activations take, and what tensors of a GPU's took."""

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from dry_cases import real_config, recipe
from dry_run import Process, why_not

import train
from runtime import plan

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


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


def check(said: int, measured: int, at: str, most: float = 1.1) -> None:
    """Never less than what is needed, and at most a tenth more."""
    print(f"plan {said / 1e6:.2f} MB, dry run {measured / 1e6:.2f} MB at {at}, {said / measured:.4f}")
    assert 1 <= said / measured <= most


# Whole steps take minutes; two layers of a stage and few micro-batches, all of full size, are as exact.
@pytest.mark.parametrize(
    "rank, layers, micro_batches, more",
    [
        (0, 16, 3, []),
        (28, 16, 3, []),
        (63, 16, 3, []),
        (0, 16, 2, ["--sequence-parallel"]),
        (28, 16, 2, ["--sequence-parallel"]),
        (63, 16, 2, ["--sequence-parallel"]),
        (1, 3, 1, ["--lora-rank", "8", "--tp", "4", "--pp", "1"]),
        pytest.param(0, None, 8, [], marks=[pytest.mark.slow, pytest.mark.time_limit(400)]),
        pytest.param(28, None, 8, [], marks=[pytest.mark.slow, pytest.mark.time_limit(400)]),
        pytest.param(63, None, 8, [], marks=[pytest.mark.slow, pytest.mark.time_limit(400)]),
    ],
)
def test_the_recipe(dry, rank, layers, micro_batches, more):
    """A step of the published recipe with the options `more`."""
    sizes = {name: int(more[more.index(f"--{name}") + 1]) for name in ("tp", "pp") if f"--{name}" in more}
    options = [x for x in more if x not in ("--tp", "--pp", *map(str, sizes.values()))]
    report = dry(
        "training_step", rank=rank, micro_batches=micro_batches, layers=layers, images=True, more=options, **sizes
    )
    argv = [*recipe(), *more, "--global-batch-size", str(micro_batches)]
    said = planned(argv, rank, real_config(layers), keep_fp8="--lora-rank" in more)
    check(said, report["peak"] - report["before"], report["peak_at"])


@pytest.mark.parametrize(
    "rank, layers, options",
    [
        (1, 3, ["--tp", "4", "--lora-rank", "8", "--activation-checkpointing"]),
        (1, 3, ["--tp", "4", "--lora-rank", "8"]),
        (0, 2, ["--tp", "8", "--freeze", "vision_tower"]),
        (0, 4, ["--tp", "8", "--pp", "2", "--freeze", "vision_tower", "projector", "embeddings"]),
        (8, 8, ["--tp", "8", "--pp", "4"]),
        (1, 3, ["--tp", "4", "--draft-layers", "2"]),
        (1, 3, ["--tp", "4", "--draft-layers", "2", "--activation-checkpointing"]),
    ],
)
def test_other_fine_tuning(dry, rank, layers, options):
    """Adapters, or a draft's head, beside weights in FP8 and in BF16, and all weights without checkpointing."""
    options = [*options, "--global-batch-size", "3"]
    for fp8 in [False, True] if {"--lora-rank", "--draft-layers"} & set(options) else [False]:
        report = dry("training_step", rank=rank, micro_batches=3, layers=layers, images=True, instead=options, fp8=fp8)
        check(planned(options, rank, real_config(layers), fp8), report["peak"] - report["before"], report["peak_at"])


def drawn_sizes(rng: random.Random, pp: int, rare: bool) -> dict:
    """Of a model that any topology here divides; not round, with or without a tower."""
    head_dim, group = rng.choice([64, 96, 128]), rng.choice([1, 2, 3, 6])
    heads = group * 4 * rng.choice([1, 2, 3])
    width = int(heads * head_dim * rng.choice([0.75, 1, 1.25])) // 32 * 32
    tower = dict(num_attention_heads=4, num_hidden_layers=rng.randint(1, 4), hidden_size=4 * rng.choice([32, 64, 104]))
    tower["intermediate_size"] = int(tower["hidden_size"] * rng.uniform(2, 5)) // 16 * 16
    return dict(
        hidden_size=width, intermediate_size=int(width * rng.uniform(2, 3.5)) // 16 * 16, num_attention_heads=heads,
        num_key_value_heads=heads // group, head_dim=head_dim, num_hidden_layers=rng.randint(2 * pp, 4 * pp),
        vocab_size=rng.choice([5003, 33001] if rare else [1000, 20000, 33000]), vision=rng.choice([None, tower]),
    )  # fmt: skip


def drawn_options(rng: random.Random, tp: int, pp: int, batch: tuple[int, int], sees: bool, rare: bool) -> list[str]:
    """Of train.py, for micro-batches of `batch` (B, how many)."""
    length = rng.choice([256, 300, 512, 1100, 2048])
    options = ["--tp", tp, "--pp", pp, "--max-length", -(-length // tp) * tp, "--micro-batch-size", batch[0]]
    options += ["--global-batch-size", batch[0] * batch[1]]
    lora = rng.random() < 0.3
    if (lora and not rare) or rng.random() < 0.5:
        options += ["--activation-checkpointing"]
    if tp > 1 and (rare or batch[0] > 1) and rng.random() < 0.4:
        options += ["--sequence-parallel"]
    if lora:
        return [*options, "--lora-rank", rng.choice([4, 8, 32])]
    frozen = [part for part in ("projector", "embeddings") if rng.random() < 0.4]
    if not rare or rng.random() < 0.4:
        frozen = ["vision_tower", *frozen]
    if sees and rare and rng.random() < 0.2:
        frozen = ["language_model", *rng.choice([[], ["vision_tower"], ["projector"]])]
    return [*options, "--freeze", *frozen] if frozen else options


def draw(dry, seed: int, rare: bool = False) -> tuple[int, int, str]:
    """What the plan says, what a step took, and where."""
    rng = random.Random(seed)
    tp, pp = rng.choice([1, 1, 2, 4]), rng.choice([1, 1, 2, 3, 4])
    batch = rng.choice([1, 1, 2, 3]), rng.randint(1, 5)
    sizes, rank, fp8 = drawn_sizes(rng, pp, rare), rng.randrange(tp * pp), rng.random() < 0.6
    sees = sizes["vision"] is not None
    options = [str(x) for x in drawn_options(rng, tp, pp, batch, sees, rare)]
    print(seed, rank, batch, options, sizes)
    report = dry("training_step", rank=rank, micro_batches=batch[1], images=sees, sizes=sizes, instead=options, fp8=fp8)
    said = planned(options, rank, real_config(None, sizes), fp8 and "--lora-rank" in options)
    return said, report["peak"] - report["before"], report["peak_at"]


@pytest.mark.parametrize("seeds", [range(12), *(slow(range(i, i + 12)) for i in range(12, 216, 12))], ids=str)
def test_drawn_training_steps(dry, seeds):
    """Models of usual proportions: a change of the model that keeps more than the formula says shows here."""
    for seed in seeds:
        check(*draw(dry, seed))


@pytest.mark.parametrize("seeds", [range(12), *(slow(range(i, i + 12)) for i in range(12, 180, 12))], ids=str)
def test_rare_training_steps(dry, seeds):
    """Rare combinations are never planned with too little, but with up to a quarter too much: a trained tower, a frozen
    decoder, a padded vocabulary, adapters without checkpointing, sequence parallelism with one sample.
    """
    for seed in seeds:
        check(*draw(dry, seed, rare=True), most=1.25)


@pytest.mark.parametrize(
    "rank, tp, pp, prompts, options",
    [
        (0, 8, 1, [9000], {}),
        (0, 1, 1, [9000], {}),
        (3, 2, 2, [9000], {}),
        (0, 8, 1, [700], {}),
        (0, 8, 1, [50, 9000], {}),
        (0, 1, 1, [9000], dict(keep_fp8=False)),
        (0, 1, 1, [9000], dict(units=False)),
        (0, 8, 1, [9000], dict(units=False)),
        (3, 2, 2, [700], dict(units=False)),
        (0, 4, 1, [3000], dict(images=True)),
        (0, 2, 2, [9000], {}),
    ],
)
def test_a_prefill(dry, rank, tp, pp, prompts, options):
    """In chunks. A short prompt that shares the first chunk of a long one keeps none of its states."""
    config = real_config(2 * pp)
    if not options.get("images"):
        config = replace(config, vision=None)
    phases = dry(
        "answering", rank=rank, tp=tp, pp=pp, prompts=prompts, layers=2 * pp, tokens=2, logprobs=True, **options
    )
    worst = max(
        (report for name, report in phases if name == "prefill"), key=lambda seen: seen["peak"] - seen["before"]
    )
    gpu = "h100" if options.get("units", True) else "a100"
    said = ["--inference", "--max-context", str(prompts[-1]), "--gpu", gpu]
    args = plan.parse_args(["--plan", "--config", "-", *said])
    place = plan.places(tp, pp)[rank // tp][rank % tp]
    said = plan.plan_rank(config, place, args, keep_fp8=options.get("keep_fp8", True))[0].activation_bytes
    check(said, worst["peak"] - worst["before"], worst["peak_at"])


def test_the_flagship(dry):
    """The benchmark of the 128B runs on a GPU's tensors, and nothing in it would fail on hardware."""
    report = dry("flagship", layers=2)
    assert report["faults"] == [] and report["masks"] == []
    assert len(report["rows"]) == 5 and all("scaled to all layers" in row for row in report["rows"][1:])
