"""train.py against transformers and torch's Adam, and against itself on other topologies."""

import json
import os
import sys

import pytest
import torch
from train_cases import IMAGES, ROOT, TEXT, arguments, launch, make_chats, make_checkpoint, metrics, worst

import train
from parallel import run_layer

sys.path.append(os.path.join(ROOT, "tests", "golden"))
from make_train_golden import CASES, reference  # noqa: E402

with open(os.path.join(ROOT, "tests", "golden", "train.json"), encoding="utf-8") as golden:
    GOLDEN = json.load(golden)

RECIPE = {"freeze": ["vision_tower", "projector", "embeddings"]}


def assert_parity(ours: list[dict], theirs: list[dict], bound: float = 1e-4) -> None:
    for name in ("loss", "grad_norm"):
        assert worst(ours, theirs, name) < bound, name


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Image chats and text chats, each with a model for them: {"images": (ckpt, data), "text": …}."""
    made = {}
    for name, config in (("images", IMAGES), ("text", TEXT)):
        folder = tmp_path_factory.mktemp(name)
        made[name] = make_checkpoint(folder, config), make_chats(folder / "data", name == "images")
    return made


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("name", CASES)
def test_stored_losses_of_transformers(name, cases, tmp_path):
    config, options = CASES[name]
    ckpt, data = cases["text" if config is TEXT else "images"]
    train.main(arguments(ckpt, data, tmp_path, no_shuffle=True, **options))
    assert_parity(metrics(tmp_path), GOLDEN[name])


@pytest.mark.parametrize("name", ["text", "images", "images, the recipe's freezing"])
def test_live_losses_of_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    config, options = CASES[name]
    ckpt = make_checkpoint(tmp_path / "ckpt", config, seed=3)
    data = make_chats(tmp_path / "data", config is IMAGES, count=11, seed=3)
    options = {**options, "activation_checkpointing": True, "micro_batch_size": 5}
    train.main(arguments(ckpt, data, tmp_path / "out", no_shuffle=True, **options))
    assert_parity(metrics(tmp_path / "out"), reference(ckpt, data, options))


# ---------------------------------------------------------------------------------------------------- topologies


TOPOLOGIES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 4, 1), (4, 2, 1)]


def check_topology(case: tuple[str, str], topology: tuple[int, int, int], folder, **options) -> None:
    """The same 20 steps as on one process. Micro-batches of odd sizes, and a last one that is smaller."""
    options = {"micro_batch_size": 4, "global_batch_size": 7, **options}
    train.main(arguments(*case, folder / "one", **options))
    status, errors = launch(arguments(*case, folder / "many", **options), topology)
    assert status == 0, errors
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
    check_topology(cases[name], topology, tmp_path, activation_checkpointing=checkpointing)


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


# ------------------------------------------------------------------------------------------------- what is frozen


def trainer(case: tuple[str, str], out, **options) -> train.Trainer:
    return train.Trainer(train.parse_args(arguments(*case, out, **options)), train.find_place(1, 1))


def test_frozen_weights_cost_nothing(cases, tmp_path, monkeypatch):
    """No gradient, no optimizer state, no change, and no graph through the tower."""
    run = trainer(cases["images"], tmp_path, max_steps=2, **RECIPE)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    graphs = []

    def watched(layer, recompute, *inputs):
        out = run_layer(layer, recompute, *inputs)
        graphs.append(out.requires_grad)
        return out

    monkeypatch.setattr("vision.run_layer", watched)
    for step in (1, 2):
        run.step(step, run.upcoming(step))
    assert graphs and not any(graphs)
    trained = {t.name for bucket in run.optimizer.buckets for t in bucket.tensors}
    for name, parameter in run.model.named_parameters():
        frozen = name.startswith(("vision_tower.", "multi_modal_projector.", "embed_tokens."))
        assert frozen == torch.equal(parameter, before[name]) == (name not in trained), name
        assert parameter.grad is None


def test_bfloat16_adds_up_in_float32(cases, tmp_path):
    """Many updates, each below half a unit in the last place of the BF16 weights, still move them."""
    run = trainer(cases["text"], tmp_path, dtype="bfloat16", global_batch_size=2, lr=2e-5, min_lr=2e-5, max_steps=30)
    before = run.model.norm.weight.detach().clone()
    assert before.dtype == torch.bfloat16
    for step in range(1, 31):
        run.step(step, run.upcoming(step))
    master = {t.name: views["masters"] for t, views in run.optimizer.state()}["norm.weight"]
    moved = (master - before.float()).abs()
    assert 2e-4 < moved.median() < 7e-4  # 30 steps of about 2e-5; near 1, BF16 has steps of 39e-4 and 78e-4
    assert torch.equal(run.model.norm.weight, master.bfloat16())


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
