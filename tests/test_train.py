"""train.py against transformers and torch's Adam, and against itself on other topologies."""

import json
import os
import sys

import pytest
from helpers import make_checkpoint
from processes import ROOT
from train_cases import IMAGES, RECIPE, TEXT, arguments, make_chats, metrics, train_on_ranks, worst

import train

sys.path.append(os.path.join(ROOT, "tests", "golden"))
from make_train_golden import CASES, reference  # noqa: E402

with open(os.path.join(ROOT, "tests", "golden", "train.json"), encoding="utf-8") as golden:
    GOLDEN = json.load(golden)


def assert_parity(ours: list[dict], theirs: list[dict], bound: float = 1e-4) -> None:
    for name in ("loss", "grad_norm"):
        assert worst(ours, theirs, name) < bound, name


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("name", CASES)
def test_stored_losses_of_transformers(name, cases, tmp_path):
    config, options = CASES[name]
    ckpt, data = cases["text" if config is TEXT else "images"]
    train.main(arguments(ckpt, data, tmp_path, no_shuffle=True, **{"micro_batch_size": 2, **options}))
    assert_parity(metrics(tmp_path), GOLDEN[name])


@pytest.mark.parametrize("name", ["text", "images", "images, the recipe's freezing"])
def test_live_losses_of_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    config, options = CASES[name]
    ckpt = make_checkpoint(tmp_path / "ckpt", config, seed=3)
    data = make_chats(tmp_path / "data", config is IMAGES, count=11, seed=3)
    options = {**options, "activation_checkpointing": True, "micro_batch_size": 5, "max_steps": 8}
    train.main(arguments(ckpt, data, tmp_path / "out", no_shuffle=True, **options))
    assert_parity(metrics(tmp_path / "out"), reference(ckpt, data, options, steps=8))


# ---------------------------------------------------------------------------------------------------- topologies


TOPOLOGIES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 4, 1), (4, 2, 1)]


def check_topology(case: tuple[str, str], topology: tuple[int, int, int], folder, **options) -> None:
    """The same steps as on one process. Micro-batches of odd sizes, and a last one that is smaller."""
    options = {"micro_batch_size": 4, "global_batch_size": 7, "max_steps": 4, **options}
    train.main(arguments(*case, folder / "one", **options))
    train_on_ranks(arguments(*case, folder / "many", **options), topology)
    assert_parity(metrics(folder / "many"), metrics(folder / "one"))


@pytest.mark.time_limit(300)
@pytest.mark.parametrize(
    "topology, name, options",
    [
        ((2, 2, 1), "text", {"activation_checkpointing": True, "micro_batch_size": 1}),  # tied over the stages
        ((1, 2, 2), "images", RECIPE),
        ((2, 2, 1), "images", {"sequence_parallel": True, "activation_checkpointing": True}),
    ],
)
def test_other_topologies(topology, name, options, cases, tmp_path):
    check_topology(cases[name], topology, tmp_path, **options)


@pytest.mark.slow
@pytest.mark.time_limit(600)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["text", "images"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_all_topologies(topology, name, checkpointing, cases, tmp_path):
    check_topology(cases[name], topology, tmp_path, activation_checkpointing=checkpointing, max_steps=20)


@pytest.mark.slow
@pytest.mark.time_limit(600)
@pytest.mark.parametrize(
    "topology, options",
    [
        ((1, 2, 1), {"freeze": ["language_model"]}),  # nothing is trained on the last stage
        ((1, 4, 1), {"freeze": ["vision_tower", "projector"]}),
        ((2, 2, 1), {"freeze": ["language_model", "vision_tower"], "max_grad_norm": 0}),
        ((1, 2, 2), {"global_batch_size": 1, "micro_batch_size": 1}),  # a replica without micro-batches
        ((4, 1, 1), {"optimizer": "adamw", "weight_decay": 0.1}),  # two ranks share a key/value head
        ((8, 1, 1), {"freeze": ["vision_tower", "projector"]}),
        ((4, 1, 1), {"sequence_parallel": True}),
        ((2, 1, 2), {"sequence_parallel": True, "freeze": ["embeddings"]}),
        ((2, 2, 1), {"sequence_parallel": True, "lora_rank": 3}),
    ],
)
def test_topologies_with_options(topology, options, cases, tmp_path):
    check_topology(cases["text" if topology[0] == 8 else "images"], topology, tmp_path, **options)


# ------------------------------------------------------------------------------------------------- the recipe


def test_learning_rate():
    rates = [train.learning_rate(step, 10, 1.0, 0.1, 2) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.55)  # half way from the end of the warm-up
    assert all(a > b for a, b in zip(rates[2:], rates[3:])) and rates[-1] > 0.1


def test_defaults_are_the_recipe():
    args = train.parse_args(["--ckpt", "x", "--data", "y", "--out", "z"])
    assert (args.optimizer, args.betas, args.eps, args.weight_decay) == ("adam", [0.9, 0.999], 1e-8, 0.0)
    assert (args.lr, args.min_lr, args.max_grad_norm, args.max_length) == (1e-5, 1e-6, 1.0, 2048)
    assert (args.micro_batch_size, args.global_batch_size, args.dtype) == (1, 64, "bfloat16")
