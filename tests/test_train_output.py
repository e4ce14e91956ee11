"""What a training run says: what it will do, a line a step, sampled answers, how it went; and its picture."""

import os
import random
import re

import pytest
from PIL import Image
from terminal import Terminal
from train_cases import arguments, train_on_ranks, trainer

import train
from runtime.curve import draw_loss

OPTIONS = {"max_steps": 12, "micro_batch_size": 3, "warmup_steps": 3}


def test_what_it_says(text, tmp_path, capsys):
    train.main(arguments(*text, tmp_path / "my run", **OPTIONS, val=text[1], val_every=6, save_every=4, lora_rank=2))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and re.search(r"17 samples, 0 dropped .*; [\d,]+ tokens, [\d,]+ of them targets", lines[0])
    start = "\n".join(lines[2:5])
    assert "steps 1 to 12, 6 samples each: 4.24 times through the data" in start
    trained, every = (int(n.replace(",", "")) for n in re.search(r"trains ([\d,]+) of ([\d,]+) par", start).groups())
    assert 0 < trained < every / 2 and "by the plan this takes at most " in start
    assert "every 4 steps in" in start and "the newest 2 stay" in start
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        *(f"{i}/12" for i in range(1, 7)), "6:", *(f"{i}/12" for i in range(7, 13)), "12:",
    ]  # fmt: skip
    assert lines.index(next(x for x in lines if x.startswith("after ten steps: 0:00:"))) > 5
    assert len([x for x in lines if x.startswith("  expected '")]) == 6  # three each time
    assert len([x for x in lines if x.startswith("  answered '")]) == 6
    assert re.search(r"done in 0:\d\d:\d\d: loss \d\.\d+ in the first step, \d\.\d+ in the last; ", lines[-2])
    assert lines[-1] == f"try it: python generate.py --ckpt '{tmp_path}/my run/model'"


@pytest.mark.parametrize("batch, steps", [(1, 1), (1, 2), (2, 1), (3, 20)])
def test_one_and_many(batch, steps, text, tmp_path, capsys):
    """Counts and their nouns agree."""
    with open(text[1], encoding="utf-8") as file:
        (tmp_path / "chats.jsonl").write_text("".join(file.readlines()[:batch]))
    options = {"max_steps": steps, "global_batch_size": batch, "save_every": steps}
    train.main(arguments(text[0], str(tmp_path / "chats.jsonl"), tmp_path / "run", **options))
    said = capsys.readouterr().err
    assert not re.search(r"\b1 (samples|steps|minutes)\b|\b([02-9]|\d\d+) (sample|step|minute)\b", said), said
    assert ("in the first step, " in said) == (steps < 20)


def test_replicas_show_answers_once(text, tmp_path):
    said = train_on_ranks(arguments(*text, tmp_path, **OPTIONS, val=text[1], val_generate=True), (1, 1, 2))
    assert said.count("  expected") == said.count("  answered") == 3 and said.count("trains ") == 1
    assert "val_exact" in said


@pytest.mark.parametrize("stopped", [False, True])
def test_in_a_terminal(stopped, text, tmp_path):
    """A line a step; the first Ctrl-C stops the run after a step, and says so."""
    steps = 400 if stopped else 12
    run = Terminal("train.py", *arguments(*text, tmp_path / "run", **{**OPTIONS, "max_steps": steps}), home=tmp_path)
    run.see("step 2/")
    if stopped:
        run.press("\x03")
    assert run.end() == (130 if stopped else 0)
    screen = run.shown.replace("\r\n", "\n").replace("^C", "").split("\n")
    assert stopped or sum(line.startswith("step ") for line in screen) == 12
    assert sum(line.startswith("stopping after this step") for line in screen) == stopped
    assert any(line.startswith("error: SIGINT" if stopped else "done in") for line in screen), screen


def test_steps_without_end(text, tmp_path, capsys):
    """No calendar goes as far as these would take."""
    folder = trainer(text, tmp_path / "out").folder
    folder.total = 10**18
    for step in range(1, 12):
        folder.say_step({"step": step, "loss": 1.0, "grad_norm": 1.0, "tokens_per_s": 1.0, "step_s": 250.0})
    assert capsys.readouterr().err.count("left") == 12


def test_the_picture(tmp_path):
    """Both curves, between the axes."""
    rng, lines = random.Random(1), []
    for step in range(1, 101):
        lines.append({"step": step, "loss": 2 + rng.uniform(-0.5, 0.5), "lr": 1e-5 * step})
        lines += [{"step": step, "val_loss": 2.0}] if step % 20 == 0 else []
    draw_loss(str(tmp_path / "loss.png"), lines)
    picture = Image.open(tmp_path / "loss.png")
    colors = [color for _, color in picture.getcolors(100_000)]
    for wanted in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        assert wanted in colors
    blue = [y for x in range(900) for y in range(500) if picture.getpixel((x, y)) == (0x1F, 0x77, 0xB4)]
    assert 58 <= min(blue) < 65 and 435 < max(blue) <= 442
    for strange in ([{"step": 1, "loss": 1e29}], [{"step": 1, "loss": -3.0, "lr": 0.0}, {"step": 2, "loss": -3.0}]):
        draw_loss(str(tmp_path / "loss.png"), strange)
    assert os.path.getsize(tmp_path / "loss.png") > 500
