"""What is trained and in which precision; runs that are killed and resumed, or meet a full disk while they save."""

import math
import os
import random
import re
import resource
import shutil
import time

import pytest
import torch
from helpers import whole
from processes import kill, run, start
from train_cases import (
    RECIPE,
    arguments,
    make_chats,
    metrics,
    on,
    train_on_ranks,
    trained,
    trainer,
    worst,
)

import train
from model import run_layer
from runtime.files import UserError
from runtime.run import newest_state

# ------------------------------------------------------------------------------------------------- what is trained


def test_frozen_weights_cost_nothing(cases, tmp_path, monkeypatch):
    """No gradient, no optimizer state, no change, and no graph through the tower."""
    run = trainer(cases["images"], tmp_path, max_steps=2, **RECIPE)
    before = {name: p.detach().clone() for name, p in whole(run.model).items()}
    graphs = []

    def watched(layer, recompute, *inputs):
        out = run_layer(layer, recompute, *inputs)
        graphs.append(out.requires_grad)
        return out

    monkeypatch.setattr("vision.run_layer", watched)
    for step in (1, 2):
        run.step(step, run.upcoming(step))
    assert graphs and not any(graphs)
    trained = {t.name for t, _ in run.optimizer.parts}
    for name, parameter in whole(run.model).items():
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
    master = {t.name: views["masters"] for t, views in run.optimizer.parts}["norm.weight"]
    moved = (master - before.float()).abs()
    assert 2e-4 < moved.median() < 7e-4  # 30 steps of about 2e-5; near 1, BF16 has steps of 39e-4 and 78e-4
    assert torch.equal(run.model.norm.weight, master.bfloat16())


# ----------------------------------------------------------------------------------------- killed and resumed


def kill_after(argv: list[str], topology: tuple[int, int, int], step: int, delay: float = 0.0) -> bool:
    """Start a run, wait for the line of `step` (or any later one) and SIGKILL it; False if it ended before that."""
    process = start("train.py", *on(argv, topology), ranks=math.prod(topology))
    for line in process.stderr:
        if (match := re.match(r"step (\d+)/", line)) and int(match[1]) >= step:
            time.sleep(delay)
            break
    alive = process.poll() is None
    kill(process)
    process.communicate()
    return alive


def test_resuming_after_a_kill(text, tmp_path):
    """Exactly as if nothing had happened on the same topology; another one goes on too."""
    options = {"max_steps": 18, "micro_batch_size": 2}
    train.main(arguments(*text, tmp_path / "whole", **options))
    assert kill_after(arguments(*text, tmp_path / "cut", save_every=3, **options), (1, 1, 1), 7)
    checkpoints = tmp_path / "cut" / "checkpoints"
    shutil.copytree(
        newest_state(str(checkpoints)), checkpoints / "step-999.partial-01234567"
    )  # as a kill while saving leaves it
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    train.main(arguments(*text, tmp_path / "cut", resume=True, save_every=1000, **options))
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")
    argv = on(arguments(*text, tmp_path / "other", resume=True, **options), (1, 2, 1))
    ended = run("train.py", *argv, ranks=2)
    assert ended.status == 0 and re.search(r"resumed after step (6|9|\d\d) ", ended.err), ended.err
    for name in ("loss", "grad_norm"):
        assert worst(metrics(tmp_path / "other"), metrics(tmp_path / "whole"), name) < 1e-4


@pytest.mark.slow
@pytest.mark.time_limit(900)
@pytest.mark.parametrize(
    "topologies", [[(1, 1, 1)], [(2, 1, 1)], [(1, 2, 1), (1, 1, 2), (2, 1, 1), (1, 1, 1)]], ids=["alone", "tp", "mixed"]
)
def test_twenty_kills(topologies, text, tmp_path):
    """At random moments, a save after every step; each time the run goes on from what is there.

    Bit for bit on one topology. On others the order of sums differs, and 220 steps would let that grow at a high
    learning rate: with whole runs just the same.
    """
    options = {"max_steps": 220, "global_batch_size": 4, "save_every": 1, "lr": 1e-4}
    draw, kills, moments = random.Random(len(topologies)), 0, []
    train_on_ranks(arguments(*text, tmp_path / "whole", **{**options, "save_every": 220}), topologies[-1])
    argv = arguments(*text, tmp_path / "cut", resume=True, **options)
    while kills < 20:
        newest = newest_state(str(tmp_path / "cut" / "checkpoints"))
        done = int(newest.rsplit("-", 1)[1]) if newest else 0
        topology = topologies[kills % len(topologies)]
        assert kill_after(argv, topology, done + draw.randint(1, 6), draw.random() * 0.1), "the run ended too early"
        kills += 1
        moments.append(sorted(os.listdir(tmp_path / "cut" / "checkpoints"))[-1])
    train_on_ranks(argv, topologies[0])
    ours, theirs = trained(tmp_path / "cut"), trained(tmp_path / "whole")
    if len(topologies) == 1:
        assert ours == theirs
    else:
        for name in ("loss", "grad_norm"):
            assert worst(metrics(tmp_path / "cut"), metrics(tmp_path / "whole"), name) < 1e-4
    print("killed with these checkpoints:", moments)


def test_resume_is_exact_on_the_same_topology(images, tmp_path):
    """Two ranks: the losses of an uninterrupted run, bit for bit."""
    options = {"max_steps": 4, "save_every": 2, "freeze": ["vision_tower"]}
    for out in ("whole", "cut"):
        train_on_ranks(arguments(*images, tmp_path / out, **options), (2, 1, 1))
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")
    for gone in ("checkpoints/step-4", "model"):
        shutil.rmtree(tmp_path / "cut" / gone)
    said = train_on_ranks(arguments(*images, tmp_path / "cut", resume=True, **options), (2, 1, 1))
    assert "resumed after step 2" in said
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")


def test_checkpoints_that_do_not_fit(text, tmp_path):
    options, out = {"max_steps": 2, "save_every": 1}, tmp_path / "out"
    train.main(arguments(*text, out, **options))
    shutil.rmtree(out / "model")  # else the run is finished
    with pytest.raises(UserError, match="holds a run already; --resume goes on"):
        train.main(arguments(*text, out, **options))
    with pytest.raises(UserError, match="seed = 0, but this run has 7"):
        train.main(arguments(*text, out, resume=True, seed=7, **options))
    other = make_chats(tmp_path / "others", False, seed=1)
    with pytest.raises(UserError, match=rf"step-2: was made with other data than {other}; resume with"):
        train.main(arguments(text[0], other, out, resume=True, **options))
    file = out / "checkpoints" / "step-2" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"rank-00000.safetensors: not a valid safetensors.* remove .*step-2 to resume from"
    ):
        train.main(arguments(*text, out, resume=True, **options))
    shutil.rmtree(out / "checkpoints" / "step-2")
    train.main(arguments(*text, out, resume=True, **options))
    assert [step for step, *_ in trained(out)] == [1, 2]


def full_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.parametrize("topology", [(1, 1, 1), (1, 2, 1)])
def test_full_disk(topology, text, tmp_path):
    """A file may not grow beyond a limit, as on a full disk; the checkpoint before stays, no part of the new one."""
    argv = arguments(*text, tmp_path, max_steps=3, save_every=1)
    train.main([*argv, "--max-steps", "1"])
    shutil.rmtree(tmp_path / "model")
    errors = train_on_ranks([*argv, "--resume"], topology, status=2, prepare=full_disk)
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert re.search(r"step-2: cannot be written \(.*(too large|os error 27).*\); earlier checkpoints are whole", line)
    assert "Traceback" not in errors
    assert os.listdir(tmp_path / "checkpoints") == ["step-1"]
    train.main([*argv, "--resume"])
    assert [step for step, *_ in trained(tmp_path)] == [1, 2, 3]
