"""The project on GPUs, without one: what dry_run.py sees of the 128B at full size.

Numbers of kernels are budgets: a change that needs more should be worth it, and say so here.
"""

from collections.abc import Iterator

import pytest
from dry_run import Process, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

GB = 1_000_000_000


@pytest.fixture(scope="module")
def dry() -> Iterator[Process]:
    process = Process()
    yield process
    process.end()


def check(report: dict, kernels: int, syncs: dict[tuple[str, str], int]) -> None:
    """Nothing would fail on hardware; at most so many kernels, and of each kind and place of host syncs."""
    assert report["faults"] == []
    assert report["kernels"] <= kernels, report["kernel_names"]
    for what, line, function, count in report["syncs"]:
        assert count <= syncs.get((what, function), 0), f"{count} × {what} at {line}"


# ------------------------------------------------------------------------------------------ that it sees mistakes


def test_what_is_seen(dry):
    """One mistake of each kind."""
    seen = dry("mistakes")
    for name in ("right", "right, by rows", "right, one row", "lower right"):
        assert not seen[name]["faults"] and not seen[name]["syncs"] and "raised" not in seen[name], seen[name]
    assert "same device" in seen["devices"]["raised"]
    faults = {
        "group": "allgather_ of tensors on cpu and cuda",
        "sizes": "no multiples of 16",
        "layout": "not row-major by column-major",
        "scales": "one scale per tensor and one per row",
        "scale's shape": "scale_a of shape (1, 32)",
        "scale's stride": "last stride is not 1",
        "result": "not BF16",
    }
    for name, text in faults.items():
        assert text in "".join(seen[name]["faults"]), name
    syncs = dict.fromkeys(("item", "truth", "list"), "item") | {"nonzero": "nonzero", "bool": "index by bool"}
    syncs |= {"to the host": "copy to the host", "to the GPU": "copy to the GPU", "from a list": "copy to the GPU"}
    for name, what in syncs.items():
        assert {sync[0] for sync in seen[name]["syncs"]} == {what}, name
    kinds = {"mask": "efficient", "lower right": "flash", "not square": "efficient", "float32": "efficient"}
    assert {name: list(seen[name]["attention"]) for name in kinds} == {name: [kind] for name, kind in kinds.items()}
    assert [name for name in kinds if seen[name]["masks"]] == ["mask"]


# --------------------------------------------------------------------------------------------------------- filling


def check_filling(report: dict) -> None:
    """At no moment more than 0.3 GB beyond the weights are there."""
    assert report["faults"] == []
    assert report["peak"] - report["after"] < 0.3 * GB, report["peak_at"]


@pytest.mark.parametrize("keep_fp8", [True, False])
def test_filling(dry, keep_fp8):
    """Embedding, head and tower, and two layers."""
    check_filling(dry("filling", layers=2, keep_fp8=keep_fp8))


@pytest.mark.slow
def test_filling_everything(dry):
    """All 128B on one GPU: 133.6 GB."""
    report = dry("filling")
    check_filling(report)
    assert 133.5 * GB < report["after"] < 133.7 * GB


# -------------------------------------------------------------------------------------------------------- training


def training_syncs(micro_batches: int) -> dict[tuple[str, str], int]:
    """Where the host may wait in a step."""
    return {
        # Per micro-batch: what the data says goes to the GPU. The GPU has the backward pass of the micro-batch before
        # still in its queue, hence does not run dry.
        ("copy to the GPU", "train.py embed"): micro_batches,  # token ids
        ("copy to the GPU", "train.py targets"): micro_batches,  # where they are, and which
        ("copy to the GPU", "vision.py forward"): micro_batches,  # pixels
        # Per step: nobody may go on before it is known that no gradient is NaN, and how long they are together.
        ("item", "train.py step"): 1,
        ("item", "train.py totals"): 1,  # the loss
        ("allreduce_ on the host", "train.py over_ranks"): 2,  # loss and norm; memory and signals
    }


# Rank, images, other options; kernels.
STEPS = [
    (0, True, [], 490),
    (0, True, ["--sequence-parallel"], 540),
    (28, False, [], 335),
    (63, False, [], 425),
    (63, False, ["--sequence-parallel"], 480),
]


@pytest.mark.parametrize("rank, images, more, kernels", STEPS)
def test_a_training_step(dry, rank, images, more, kernels):
    """The published recipe, TP=8 × PP=8: two micro-batches on the first stage, one in the middle and the last, of two
    layers each."""
    report = dry("training_step", rank=rank, micro_batches=2, layers=16, images=images, more=more)
    check(report, kernels, training_syncs(2))
    assert set(report["attention"]) == {"flash"} and report["masks"] == []
    assert report["after"] - report["before"] < 1e6  # a step leaves nothing behind


def test_lora_on_fp8(dry):
    """TP=4: FP8 weights as they are stored, adapters beside them, two layers."""
    report = dry("training_step", rank=1, micro_batches=1, layers=2, tp=4, pp=1, more=["--lora-rank", "8"])
    check(report, 455, training_syncs(1))
    assert set(report["attention"]) == {"flash"} and report["masks"] == []
    # Five a layer: two forward, two forward again less one that is not needed, two backward. The embedding's, three of
    # the loss; loss and norm, memory and signals; and one for all shares of the adapters' gradients.
    assert report["collectives"]["allreduce_"] == 2 * 5 + 1 + 2 + 2 + 1


def test_a_draft_learns(dry):
    """TP=4: a head of two layers beside two of the model, frozen in FP8."""
    options = ["--tp", "4", "--draft-layers", "2", "--activation-checkpointing"]
    report = dry("training_step", rank=1, micro_batches=2, layers=2, images=True, instead=options)
    check(report, 790, training_syncs(2))
    assert set(report["attention"]) == {"flash"} and report["masks"] == []


@pytest.mark.slow
@pytest.mark.time_limit(400)
@pytest.mark.parametrize("rank, beyond", [(0, 4.96), (28, 3.35), (63, 1.23)])
def test_the_memory_of_a_whole_step(dry, rank, beyond):
    """All layers of the stage and 8 micro-batches, most of them of an image: GB beyond weights, gradients and Adam's
    state. A stage holds the activations of as many micro-batches as there are stages from it to the end."""
    report = dry("training_step", rank=rank, micro_batches=8, images=True)
    assert report["held"] == 8 - rank // 8
    assert (report["peak"] - report["before"]) / GB == pytest.approx(beyond, rel=0.01)


# ------------------------------------------------------------------------------------------------------- inference

# Where the host may wait, in a prefill, in a step and between them.
ANSWERING = {
    "prefill": {
        ("copy to the GPU", "generate.py run_stage"),  # token ids
        ("copy to the GPU", "vision.py forward"),  # pixels
        ("copy to the GPU", "draft.py read"),  # token ids again
    },
    "decode": set(),
    "rest": {("item", "generate.py pick_up")},  # sampled tokens, for whoever asked
}


def check_answering(phases: list, kernels: int) -> None:
    """`kernels`: of a step of decoding, at most."""
    assert {name for name, _ in phases} == {"prefill", "decode", "rest"}
    for name, report in phases:
        assert report["faults"] == []
        for what, line, function, _ in report["syncs"]:
            assert (what, function) in ANSWERING[name], f"{name}: {what} at {line}"
        if name == "prefill":
            assert set(report["attention"]) == {"flash"} and report["masks"] == []
        if name == "decode":
            assert report["kernels"] <= kernels, report["kernel_names"]
    # Whatever comes and goes, weights and cache stay as they are; tokens and the like are small.
    assert phases[-1][1]["after"] - phases[0][1]["after"] < 1e6


ONE, SIXTEEN = [700], [200 + 7 * (i // 8) for i in range(16)]


@pytest.mark.parametrize(
    "rank, tp, pp, prompts, options, kernels",
    [
        (0, 1, 1, ONE, dict(keep_fp8=False, images=True), 80),
        (7, 8, 1, ONE, dict(), 110),
        (0, 8, 1, SIXTEEN, dict(temperature=1.0), 165),
        (0, 8, 8, SIXTEEN, dict(images=True), 58),
        (28, 8, 8, SIXTEEN, dict(keep_fp8=False), 37),
        (63, 8, 8, SIXTEEN, dict(), 70),
    ],
)  # fmt: skip
def test_answering(dry, rank, tp, pp, prompts, options, kernels):
    """One row and sixteen of different lengths; two layers, or one a stage."""
    phases = dry("answering", rank=rank, tp=tp, pp=pp, prompts=prompts, layers=max(2, pp), tokens=2, **options)
    check_answering(phases, kernels)


def kernels_per_step(dry: Process, prompts: list[int], flash: bool = True, draft_tokens: int = 0) -> int:
    """Of the 88 layers at TP=8, from two and three of them. Nothing in a step comes from the host, or waits for it."""
    kernels = []
    for layers in (2, 3):
        options = dict(layers=layers, tokens=2 + 2 * draft_tokens, draft_tokens=draft_tokens, flash_decoding=flash)
        phases = dry("answering", rank=0, tp=8, pp=1, prompts=prompts, **options)
        check_answering(phases, 500)
        steps = [report for name, report in phases if name == "decode"]
        times = layers + 2 * draft_tokens  # the head has two
        assert all(step["attention"] == ({"flash-decoding": times} if flash else {}) for step in steps)
        kernels.append(max(step["kernels"] for step in steps))
    return kernels[0] + 86 * (kernels[1] - kernels[0])


@pytest.mark.parametrize("prompts, flash, budget", [
    (ONE, True, 1_804), (SIXTEEN, True, 1_980), (ONE, False, 2_068), (SIXTEEN, False, 2_244),
])  # fmt: skip
def test_kernels_per_token(dry, prompts, flash, budget):
    """Attention by flash-decoding, and as products."""
    assert kernels_per_step(dry, prompts, flash) <= budget


@pytest.mark.parametrize("prompts, guess, more", [(ONE, 110, 300), (SIXTEEN, 114, 120)])
def test_kernels_with_a_draft(dry, prompts, guess, more):
    """`guess`: of each guess, by a head of two layers; `more`: what the model's step takes more than without a draft.

    Of several tokens a row, one row has to be told apart from others, so that it costs what 16 rows do.
    """
    without, one, three = (kernels_per_step(dry, prompts, draft_tokens=count) for count in (0, 1, 3))
    each = (three - one) // 2  # a guess by two layers, and sampling it
    print(f"without a draft {without} kernels a step, with one guess {one}, with three {three}: {each} for each")
    assert each <= guess and one - each - without <= more


@pytest.mark.parametrize("prompts, kernels", [(ONE, 92), (SIXTEEN, 94)])
def test_without_fp8_units(dry, prompts, kernels):
    """Weights are converted and sums scaled: 8 kernels of a layer instead of 4, and none that would fail."""
    phases = dry("answering", rank=0, tp=8, pp=1, prompts=prompts, layers=2, tokens=2, units=False)
    check_answering(phases, kernels)


def test_later_chunks(dry):
    """No chunk of a long prompt has a mask: flash takes all."""
    phases = dry("answering", rank=0, tp=8, pp=1, prompts=[10_000], layers=2, tokens=2)
    check_answering(phases, 110)
