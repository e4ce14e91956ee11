"""Nothing is lost: whose folder --out is, runs that signals, a full disk or a damaged state end, and that go on."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from functools import partial

import pytest
import torch
from PIL import Image
from processes import run_on_ranks, start
from safetensors.torch import load_file, save_file
from train_cases import arguments, metrics, on, train_on_ranks, trained, trainer

import train
from parallel import Slice
from runtime import export, launch, run
from runtime.checkpoint import Checkpoint
from runtime.curve import draw_loss
from runtime.files import UserError, new_folder
from runtime.run import INDEX, load_state, save_state

SHORT = {"max_steps": 3, "global_batch_size": 2}


def files(folder) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder) -> list[str]:
    return [str(path) for path in folder.rglob("*") if "partial" in path.name]


def refused(argv: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        train.main(argv)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.fixture(scope="module")
def ended(text, tmp_path_factory):
    """The folder of a finished run; tests copy it."""
    out = tmp_path_factory.mktemp("ended") / "out"
    train.main(arguments(*text, out, **SHORT))
    return out


@pytest.fixture
def out(ended, tmp_path):
    shutil.copytree(ended, tmp_path / "out")
    return tmp_path / "out"


# ------------------------------------------------------------------------------------------------- whose folder


@pytest.mark.parametrize(
    "names", [["notes.txt"], ["model/weights"], ["run.json"], ["metrics.jsonl"], ["checkpoints/step-1/state.json", "a"]]
)
@pytest.mark.parametrize("resume", [False, True])
def test_what_is_no_run_is_refused(names, resume, text, tmp_path):
    for name in names:
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    before = files(tmp_path)
    refused(arguments(*text, tmp_path / "out", resume=resume, **SHORT), "holds '.*', but no run of train.py; choose")
    assert files(tmp_path) == before


def test_a_run_is_refused_without_resume_and_a_finished_one_says_so(out, text, capsys):
    before = files(out)
    refused(arguments(*text, out, **SHORT), "holds a run already; --resume goes on")
    capsys.readouterr()
    train.main(arguments(*text, out, resume=True, **SHORT))
    said = f"{out}: this run is finished; its model is {out}/model; move it away to take more steps\n"
    assert capsys.readouterr().err == said
    shutil.rmtree(out / "checkpoints")  # they are large, and nobody needs them any more
    train.main(arguments(*text, out, resume=True, **SHORT))
    assert files(out) == {name: data for name, data in before.items() if not name.startswith("checkpoints")}


@pytest.mark.parametrize("flag", ["ckpt", "data", "val"])
def test_inputs_inside_out_are_refused(flag, text, tmp_path):
    """By their real path: through a link, too."""
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "out", tmp_path / "link")
    inside = {flag: str(tmp_path / "link" / "model")}
    argv = arguments(inside.pop("ckpt", text[0]), inside.pop("data", text[1]), tmp_path / "out", **inside, **SHORT)
    refused(argv, f"--{flag} .*model lies inside --out")
    assert not os.listdir(tmp_path / "out")


def test_a_mistake_leaves_no_folder(text, tmp_path):
    refused(arguments(*text, tmp_path / "new", max_length=99999), "--max-length goes up to")
    (tmp_path / "file").write_text("")
    refused(arguments(*text, tmp_path / "file"), "file: cannot be written")
    assert os.listdir(tmp_path) == ["file"]


def test_one_run_per_folder(text, tmp_path):
    argv = arguments(*text, tmp_path / "out", **SHORT)
    args = train.parse_args(argv)
    with train.RunFolder(args, train.find_place(1, 1)):
        refused(argv, "another run is writing there")
        assert os.listdir(tmp_path / "out") == []
    train.main(argv)


def test_killed_in_its_first_moment(text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json.partial").write_text('{"prog')
    train.main(arguments(*text, tmp_path / "out", **{**SHORT, "max_steps": 1}))
    assert not leftovers(tmp_path) and (tmp_path / "out" / "model").exists()


def test_a_folder_that_is_there_gets_the_files_one_by_one(tmp_path, monkeypatch):
    """Whoever is killed in between leaves a model without config.json, which counts as none."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: seen.append(os.path.basename(paths[1])) or replace(*paths))
    with export.staged(str(tmp_path / "model")) as folder:
        for name in ("config.json", "tekken.json", "a.safetensors"):
            with open(os.path.join(folder, name), "w") as file:
                file.write(name)
    assert seen == ["a.safetensors", "tekken.json", "config.json"]
    assert set(files(tmp_path / "model")) == {"notes.txt", *seen} and os.listdir(tmp_path) == ["model"]


def test_killed_in_its_last_moment(out, text):
    """Its last step is saved, and its model nearly written: it is written again. What others stage in there stays."""
    model = files(out / "model")
    os.rename(out / "model", out / "model.partial-0a1b2c3d")
    (out / "checkpoints" / "step-2.partial-3d4e5f67").mkdir()
    (out / "fp8.partial-01234567").mkdir()  # of fp8.py
    train.main(arguments(*text, out, resume=True, **SHORT))
    assert leftovers(out) == [str(out / "fp8.partial-01234567")] and files(out / "model") == model


def test_a_finished_run_goes_on_once_its_model_is_moved_away(out, text):
    """It says so, whatever the options are by now. Files of the user's stay."""
    model = files(out / "model")
    train.main(arguments(*text, out, resume=True, **{**SHORT, "max_steps": 4}))
    assert files(out / "model") == model
    os.rename(out / "model", out / "first")
    os.mkdir(out / "model")
    (out / "model" / "notes.txt").write_text("mine")
    train.main(arguments(*text, out, resume=True, **{**SHORT, "max_steps": 4}))
    again = files(out / "model")
    assert again.pop("notes.txt") == b"mine" and set(again) == set(model) and not leftovers(out)
    assert again["model.safetensors"] != model["model.safetensors"] and files(out / "first") == model


@pytest.mark.parametrize("seed", range(8))
def test_resumed_after_files_were_removed(seed, out, text, capsys):
    """States, or some of the model: it is said, and "finished" is said of nothing that is not whole."""
    draw = random.Random(seed)
    no_states, half, more = (draw.random() < 0.5 for _ in range(3))
    before = files(out / "model")
    if no_states:
        shutil.rmtree(out / "checkpoints")
    if half:
        weights = out / "model" / "model.safetensors"
        cut = weights.read_bytes()[: draw.randrange(weights.stat().st_size)]
        weights.unlink()
        if draw.random() < 0.5:
            weights.write_bytes(cut)
        else:
            draw.choice([os.remove, os.path.getsize])(out / "model" / "model.safetensors.index.json")
    argv = arguments(*text, out, resume=True, **{**SHORT, "max_steps": 5 if more else 3})
    capsys.readouterr()
    if no_states and (half or more):
        refused(argv, "no saved state is left" if half else "its saved states are gone: start from this model")
        return
    train.main(argv)
    said = capsys.readouterr().err
    assert ("it is written again" in said) == half and ("this run is finished" in said) != half
    assert ("its saved states are gone" in said) == no_states
    assert half and more or files(out / "model") == before


@pytest.mark.parametrize("seed", range(6))
def test_links_are_not_followed(seed, text, tmp_path, ended):
    """Where a run writes or removes, links to what is not its own: they go, what is behind them stays as it is."""
    draw, out, behind = random.Random(seed), tmp_path / "out", tmp_path / "behind"
    shutil.copytree(ended / "checkpoints" / "step-3", behind / "step-3")
    shutil.copytree(ended / "model", behind / "model")
    (behind / "file").write_text("mine")
    before = files(behind)
    shutil.copytree(ended, out)
    shutil.rmtree(out / "model")
    links = {"checkpoints/step-1": "step-3", "checkpoints/step-4": "nowhere", "model": "model", "adapters": "nowhere"}
    links |= {"metrics.jsonl.partial": "file", "loss.png": "file", "checkpoints/step-2": "step-3"}
    links |= {"checkpoints/step-3.partial-01234567": "step-3", "model.partial-01234567": "model"}
    for name, to in draw.sample(sorted(links.items()), 6):
        if name != "model":  # a whole model there would be the end
            (out / name).unlink(missing_ok=True)
            (out / name).symlink_to(behind / to)
    if draw.random() < 0.5:
        (behind / "model" / "config.json").rename(behind / "config.json")
        (out / "model").symlink_to(behind / "model")
        before = files(behind)
    argv = arguments(*text, out, resume=True, keep=1, **{**SHORT, "max_steps": 4, "lora_rank": False})
    train.main(argv)
    assert files(behind) == before and not leftovers(out)
    assert os.listdir(out / "checkpoints") == ["step-4"]
    assert not [path for path in out.rglob("*") if path.is_symlink() and path.name != "adapters"]


def test_a_state_from_before_there_were_heads(out, text, capsys):
    shutil.rmtree(out / "model")
    path = out / "checkpoints" / "step-3" / INDEX
    index = json.loads(path.read_text())
    assert index["metadata"].pop("draft_layers", 0) is None
    path.write_text(json.dumps(index))
    train.main(arguments(*text, out, resume=True, **{**SHORT, "max_steps": 4}))
    assert "resumed after step 3" in capsys.readouterr().err


def test_states_behind_a_link(out, text, tmp_path):
    (out / "checkpoints").rename(tmp_path / "behind")
    (out / "checkpoints").symlink_to(tmp_path / "behind")
    before = files(tmp_path / "behind")
    refused(arguments(*text, out, resume=True, **SHORT), "checkpoints: is a link")
    assert files(tmp_path / "behind") == before


@pytest.mark.parametrize(
    "names", [["model.old"], ["model.partial-0a1b2c3d", "metrics.jsonl.partial", "run.json.partial"]]
)
def test_leftovers_never_block(names, out, text):
    shutil.rmtree(out / "model")
    for name in names:
        (out / name / "deep").mkdir(parents=True)
    train.main(arguments(*text, out, resume=True, **{**SHORT, "max_steps": 4}))
    assert (out / "model" / "config.json").exists() and (out / "model.old").exists() == (names == ["model.old"])


# ------------------------------------------------------------------------------------- when a run saves, and what


@pytest.mark.parametrize(
    "options, kept", [({}, [4, 5]), ({"keep": 1}, [5]), ({"keep": 9}, [1, 2, 3, 4, 5]), ({"save_every": 2}, [4, 5])]
)
def test_saved_by_the_clock(options, kept, text, tmp_path, monkeypatch):
    """The newest few stay. With --save-every the clock does not count."""
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    train.main(arguments(*text, tmp_path / "out", **{**SHORT, "max_steps": 5, **options}))
    assert sorted(os.listdir(tmp_path / "out" / "checkpoints")) == [f"step-{step}" for step in kept]


def test_removing_old_states_spares_other_files(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train.main(arguments(*text, out, **SHORT))
    assert os.listdir(out / "checkpoints") == ["step-3"]  # the clock is far from ten minutes
    (out / "checkpoints" / "step-3" / "notes.txt").write_text("mine")
    shutil.rmtree(out / "model")
    train.main(arguments(*text, out, resume=True, save_every=1, **{**SHORT, "max_steps": 6}))
    assert sorted(os.listdir(out / "checkpoints")) == ["step-3", "step-5", "step-6"]
    assert files(out / "checkpoints" / "step-3") == {"notes.txt": b"mine"}


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves(number, text, tmp_path, monkeypatch, ended):
    step = train.Trainer.step

    def signalled(self, at, upcoming):
        if at == 2:
            os.kill(os.getpid(), number)
        return step(self, at, upcoming)

    out = tmp_path / "out"
    signal.signal(number, launch.on_signal)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", signalled)
        with pytest.raises(UserError, match=f"^{number.name}: stopped after step 2, .* --resume goes on$") as caught:
            train.main(arguments(*text, out, **SHORT))
    assert caught.value.status == 128 + number and not launch.BLOCKS
    assert os.listdir(out / "checkpoints") == ["step-2"] and not leftovers(out)
    train.main(arguments(*text, out, resume=True, **SHORT))
    assert trained(out) == trained(ended)
    assert files(out / "model") == files(ended / "model")


def signal_later(out: str, number: int) -> None:
    """Signal this process, if it is rank 1 of several, when the first step is taken."""

    def wait() -> None:
        while not os.path.exists(f"{out}/metrics.jsonl") or not os.path.getsize(f"{out}/metrics.jsonl"):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    if os.environ.get("RANK") == "1":
        threading.Thread(target=wait, daemon=True).start()


def test_a_signal_to_one_rank_stops_all(text, tmp_path):
    out = tmp_path / "out"
    argv = on(arguments(*text, out, max_steps=10000), (1, 2, 1))
    ranks = run_on_ranks(2, "train.py", *argv, prepare=partial(signal_later, str(out), signal.SIGTERM))
    assert [rank.status for rank in ranks] == [143, 143]
    (line,) = [line for rank in ranks for line in rank.errors]
    step = int(re.match(r"error: SIGTERM: stopped after step (\d+), which is saved", line)[1])
    assert os.listdir(out / "checkpoints") == [f"step-{step}"]
    assert trained(out)[-1][0] == step


def blind(rank: str) -> None:
    if os.environ.get("RANK") == rank:
        run.newest_state = lambda directory: None


@pytest.mark.parametrize("rank", "01")
def test_a_rank_that_does_not_see_the_state(rank, text, tmp_path):
    """A folder listed late, as over NFS: all ranks go on from the newest state that one of them sees."""
    argv = on(arguments(*text, tmp_path / "out", max_steps=2), (1, 2, 1))
    assert [rank.status for rank in run_on_ranks(2, "train.py", *argv)] == [0, 0]
    shutil.rmtree(tmp_path / "out" / "model")
    argv = on(arguments(*text, tmp_path / "out", max_steps=3, resume=True), (1, 2, 1))
    ranks = run_on_ranks(2, "train.py", *argv, prepare=partial(blind, rank), seconds=60)
    assert [rank.status for rank in ranks] == [0, 0] and "resumed after step 2" in ranks[0].err


def test_a_signal_while_a_folder_is_written(tmp_path):
    """It ends the program, and the unfinished folder is gone."""
    signal.signal(signal.SIGTERM, launch.on_signal)
    with pytest.raises(SystemExit) as end, new_folder(str(tmp_path / "new")):
        assert os.listdir(tmp_path) == ["new"]
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143 and os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------- another run, or not

OPTIONS = {
    "lr": 2e-3, "min_lr": 1e-7, "warmup_steps": 2, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.1,
    "max_grad_norm": 0.5, "max_steps": 6,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_changed_options_are_said(seed, out, text, capsys):
    """And the run goes on with them."""
    draw = random.Random(seed)
    shutil.rmtree(out / "model")
    changes = dict(draw.sample(sorted(OPTIONS.items()), draw.randint(0, 4)))
    before = {"lr": 1e-3, "min_lr": 1e-6, "warmup_steps": 0, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    before |= {"max_grad_norm": 1.0, "max_steps": 3}
    capsys.readouterr()
    train.main(arguments(*text, out, resume=True, **{**SHORT, **changes}))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed from here on: ")]
    assert len(lines) == bool(changes)
    said = {f"--{name.replace('_', '-')} from {before[name]} to {value}" for name, value in changes.items()}
    assert said == set(re.split(r", (?=--)", lines[0].removeprefix("changed from here on: "))) if lines else not said
    assert trained(out)[-1][0] == changes.get("max_steps", 3)


@pytest.mark.parametrize("seed", range(8))
def test_another_run_is_refused(seed, images, tmp_path):
    """Other targets, another picture, other frozen weights: one line that says which. Elsewhere they are the same."""
    draw, folder = random.Random(seed), tmp_path / "data"
    shutil.copytree(os.path.dirname(images[1]), folder)
    ckpt = shutil.copytree(images[0], tmp_path / "ckpt", ignore=shutil.ignore_patterns("data"))
    case, options = (str(ckpt), str(folder / "chats.jsonl")), {**SHORT, "max_steps": draw.randint(1, 2)}
    options |= draw.choice([{}, {"lora_rank": 2}, {"freeze": ["vision_tower"]}])
    train.main(arguments(*case, tmp_path / "out", **options))
    shutil.rmtree(tmp_path / "out" / "model")
    what = ["targets", "picture", "weights", "moved"][seed % 4]
    if what == "targets":
        chats = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
        several = [chat for chat in chats if len(chat["messages"]) > 2]
        draw.choice(several)["messages"][1]["weight"] = 0
        (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        words = "was made with other data than"
    elif what == "picture":
        path = draw.choice(sorted(folder.glob("*.png")))
        with Image.open(path) as picture:
            Image.new("RGB", picture.size, "red").save(path)
        words = rf"other pictures in .*chats.jsonl line {int(path.name.split('-')[0]) + 1};"
    elif what == "weights":
        tensors = load_file(ckpt / "model.safetensors")
        tensors[draw.choice(sorted(tensors))].view(-1)[-1] += 0.5
        save_file(tensors, ckpt / "model.safetensors")
        words = "was made with another --ckpt"
    else:
        for name in ("ckpt", "data"):
            os.rename(tmp_path / name, tmp_path / f"{name} elsewhere")
        case = str(tmp_path / "ckpt elsewhere"), str(tmp_path / "data elsewhere" / "chats.jsonl")
    argv = arguments(*case, tmp_path / "out", resume=True, **{**options, "max_steps": 3})
    if what == "moved":
        train.main(argv)
    else:
        refused(argv, words)


# ------------------------------------------------------------------------------------- errors that lose nothing


@pytest.mark.time_limit(200)
@pytest.mark.parametrize("where", ["data", "val"])
@pytest.mark.parametrize(
    "topology, seed", [((1, 1, 1), 0), ((1, 1, 1), 1), ((1, 1, 1), 2), ((1, 2, 1), 3), ((1, 1, 2), 4)]
)
def test_a_picture_that_breaks_off(where, topology, seed, images, tmp_path):
    """Its header is whole, so nobody sees it before its step. What was done until then is saved, and once the picture
    is mended, the run ends as if nothing had been."""
    draw = random.Random(f"{seed} {where}")
    shutil.copytree(os.path.dirname(images[1]), tmp_path / "data")
    case, val = (images[0], str(tmp_path / "data" / "chats.jsonl")), str(tmp_path / "data" / "val.jsonl")
    lines = (tmp_path / "data" / "chats.jsonl").read_text().splitlines()
    line = draw.choice([at for at, text in enumerate(lines, 1) if ".png" in text])
    picture = tmp_path / "data" / f"{line - 1}-0.png"
    if where == "val":
        shutil.copy(picture, tmp_path / "data" / "val.png")
        chosen = lines[line - 1].replace(picture.name, "val.png")
        picture, line = tmp_path / "data" / "val.png", draw.randint(1, 4)
        (tmp_path / "data" / "val.jsonl").write_text("\n" * (line - 1) + chosen + "\n")
    options = {"global_batch_size": 3, "max_steps": 6, "seed": seed, "micro_batch_size": draw.randint(1, 3)}
    options |= {"val": val, "val_every": draw.randint(1, 6)} if where == "val" else {}
    whole = picture.read_bytes()
    train.main(arguments(*case, tmp_path / "whole", **options))
    picture.write_bytes(whole[: len(whole) - draw.randint(30, 60)])
    said = train_on_ranks(arguments(*case, tmp_path / "out", **options), topology, status=2)
    (error,) = [text for text in said.splitlines() if text.startswith("error:")]
    step = int(re.search(rf"step (\d+): .*{'val' if where == 'val' else 'chats'}.jsonl: line {line}: ", error)[1])
    taken = step - 1 if where == "data" else step
    assert [x["step"] for x in metrics(tmp_path / "out")][-1:] == [taken][:taken]
    saved = os.listdir(tmp_path / "out" / "checkpoints") if taken else []
    assert saved == [f"step-{taken}"][:taken] and (f"after step {taken}, which is saved" in error) == bool(taken), error
    picture.write_bytes(whole)
    train.main(arguments(*case, tmp_path / "out", resume=True, **options))
    ours, theirs = ([x["loss"] for x in metrics(tmp_path / name) if "loss" in x] for name in ("out", "whole"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    if topology == (1, 1, 1):
        assert files(tmp_path / "out" / "model") == files(tmp_path / "whole" / "model")


def lose_stderr(out: str, step: int, full: bool) -> None:
    """Once `step` is taken, rank 0's stderr becomes a full disk, or a pipe that nobody reads."""

    def wait() -> None:
        while not os.path.exists(f"{out}/metrics.jsonl") or len(open(f"{out}/metrics.jsonl").readlines()) < step:
            time.sleep(0.005)
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(os.open("/dev/full", os.O_WRONLY) if full else writer, 2)

    if os.environ.get("RANK", "0") == "0":
        threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("topology", [(1, 1, 1), (1, 2, 1)])
def test_nobody_reads_what_it_says(topology, full, text, tmp_path):
    """It saves, and ends: `2>&1 | head` wants no more, and on a full disk nothing will be seen."""
    drawn, out = random.Random(f"{topology} {full}").randint(1, 9), tmp_path / "out"
    argv = on(arguments(*text, out, max_steps=10000), topology)
    ranks = run_on_ranks(topology[1], "train.py", *argv, prepare=partial(lose_stderr, str(out), drawn, full))
    assert [rank.status for rank in ranks] == [1] * topology[1]
    last = trained(out)[-1][0]
    assert last >= drawn and os.listdir(out / "checkpoints") == [f"step-{last}"]
    assert not [line for rank in ranks for line in rank.errors] and "Traceback" not in "".join(r.err for r in ranks)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_ends_the_steps(seed, text, tmp_path, monkeypatch):
    """An error at a drawn step, after it or before it: what was taken is saved; a loss that is no number included."""
    draw, out, taken = random.Random(seed), tmp_path / "out", 0
    at, what = draw.randint(2, 5), draw.choice(["metrics", "loss"])
    append, norm = run.append_line, train.Optimizer.squared_norm

    def fail(path, line):
        if line["step"] == at:
            raise UserError("metrics.jsonl: cannot be written")
        append(path, line)

    def bad_norm(self):
        nonlocal taken
        taken += 1
        return norm(self) * (float("inf") if taken == at else 1)

    monkeypatch.setattr(
        *(run, "append_line", fail) if what == "metrics" else (train.Optimizer, "squared_norm", bad_norm)
    )
    last = at if what == "metrics" else at - 1
    refused(
        arguments(*text, out, **{**SHORT, "max_steps": 6}),
        rf"step.{last}, which is saved|last checkpoint is .*-{last};",
    )
    assert os.listdir(out / "checkpoints") == [f"step-{last}"]


# --------------------------------------------------------------------------------------- states that are damaged


def damaged(draw: random.Random, folder) -> str:
    """Damage one file of a saved state; says how."""
    index, weights = folder / INDEX, folder / "rank-00000.safetensors"
    strange = [None, True, -1, 0, 10**400, 1e400, float("nan"), "", "1", [], {}, [[1]], {"a": 1}]
    how = draw.choice(["lost", "garbage", "cut", "key", "value", "nested", "folder", "piece", "file", "tensor"])
    if how in ("lost", "garbage", "cut", "folder"):
        path = draw.choice([index, weights])
        data = path.read_bytes()
        path.unlink()
        if how == "garbage":
            path.write_bytes(draw.randbytes(draw.randrange(3000)))
        elif how == "cut":
            path.write_bytes(data[: draw.randrange(len(data) - 1)])
        elif how == "folder":
            path.mkdir()
    elif how == "nested":
        index.write_text("[" * 100_000 + "]" * 100_000)
    elif how == "tensor":
        tensors = load_file(weights)
        key = draw.choice(list(tensors))
        change = draw.choice([None, lambda t: t[:1], lambda t: t.bfloat16(), lambda t: t * float("nan")])
        tensor = tensors.pop(key)
        if change:
            tensors[key] = change(tensor).contiguous()
        save_file(tensors, weights, metadata={"step": "3"})
    else:
        contents = json.loads(index.read_text())
        facts, pieces = contents["metadata"], contents["weight_map"]
        name, key = draw.choice(list(facts)), draw.choice(list(pieces))
        if how == "key":
            del facts[name]
        elif how == "value":
            others = [value for value in strange if value != facts[name] or type(value) is not type(facts[name])]
            facts[name] = draw.choice(others)
        elif how == "file":
            pieces[key] = draw.choice([*strange, "rank-00001.safetensors", INDEX])
        else:
            whole, piece = key.split("@")
            strange = [
                "1:9",
                "-1:9",
                "0:",
                "a",
                "0:" + "9" * 5000,
                "9" * 12 + ":0",
                "0@0:1",
                "0:" + "9" * 12,
                "0:1",
                "0:0",
            ]
            pieces[f"{whole}@{draw.choice([other for other in strange if other != piece])}"] = pieces.pop(key)
        index.write_text(json.dumps(contents))
    return how


@pytest.mark.parametrize("seed", range(4))
def test_damaged_states(seed, ended, text, tmp_path):
    """One line that names the file and what to do, whatever is wrong with it."""
    job, draw, seen = trainer(text, tmp_path / "out", **SHORT), random.Random(seed), set()
    for i in range(25):
        folder = tmp_path / str(i) / "step-3"
        shutil.copytree(ended / "checkpoints" / "step-3", folder)
        seen.add(how := damaged(draw, folder))
        with pytest.raises(UserError) as caught:
            load_state(str(folder), job.optimizer, job.settings(), "chats.jsonl")
            pytest.fail(f"{how} was not noticed")
        line = str(caught.value)
        assert line.startswith(str(folder)) and line.isprintable() and len(line) < 500, (how, line)
        assert f"remove {folder} to resume" in line or "was made with" in line, (how, line)
        shutil.rmtree(folder)
    assert len(seen) > 5
    assert load_state(str(ended / "checkpoints" / "step-3"), job.optimizer, job.settings(), "") == 3


def test_files_of_another_state(text, tmp_path):
    """Copied from one state into another they would be a mixture of both."""
    job = trainer(text, tmp_path / "out", **SHORT)
    save = partial(save_state, str(tmp_path), optimizer=job.optimizer, settings=job.settings())
    for step in (2, 3):
        save(step)
        assert load_state(str(tmp_path / f"step-{step}"), job.optimizer, job.settings(), "") == step
    shutil.copy(tmp_path / "step-2" / "rank-00000.safetensors", tmp_path / "step-3")
    says = "step-3/rank-00000.safetensors: is of the state after step 2; remove .*/step-3 to"
    with pytest.raises(UserError, match=says):
        load_state(str(tmp_path / "step-3"), job.optimizer, job.settings(), "")


@pytest.mark.parametrize("dim", [0, 1])
def test_a_tensor_in_pieces(dim, tmp_path):
    """Any slice of it, padded or not; and none of it without all of its pieces."""
    whole = torch.randn(11, 11)
    cuts = [(0, 4), (4, 5), (5, 11), (12, 12)]  # the last rank had nothing but padding
    pieces = {f"x@{a}:{b}": whole.narrow(dim, min(a, 11), b - a).contiguous() for a, b in cuts}
    for missing in (None, *pieces):
        kept = {name: piece for name, piece in pieces.items() if name != missing}
        save_file(kept, tmp_path / "file.safetensors")
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(kept, "file.safetensors")}))
        state = Checkpoint(str(tmp_path))
        for first, stop in [(0, 11), (3, 6), (4, 5), (7, 14), (12, 14)]:
            part = Slice((11, 11), dim, first, stop)
            out = torch.zeros(part.local_shape).narrow(dim, 0, part.length)
            if missing in (None, "x@12:12"):
                state.fill_part("x", part, out)
                assert torch.equal(out, whole.narrow(dim, min(first, 11), part.length))
            else:
                with pytest.raises(UserError, match="holds no whole x"):
                    state.fill_part("x", part, out)


@pytest.mark.parametrize(
    "text_, words", [("x\n{}\n", "line 1: not JSON"), ("[]\n{}\n", "line 1: should be"), ("{}\n", "no step")]
)
def test_damaged_metrics(text_, words, out, text):  # fmt: skip
    shutil.rmtree(out / "model")
    (out / "metrics.jsonl").write_text(text_)
    refused(arguments(*text, out, resume=True, **{**SHORT, "max_steps": 4}), rf"metrics.jsonl.*{words}")
    os.remove(out / "metrics.jsonl")
    os.mkdir(out / "metrics.jsonl")
    refused(arguments(*text, out, resume=True, **{**SHORT, "max_steps": 4}), "metrics.jsonl: ")


def test_losses_that_cannot_be_drawn(tmp_path):
    strange = [{"step": 1}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": "a"}, {"step": 4, "val_loss": None}]
    draw_loss(str(tmp_path / "loss.png"), [*strange, {"step": 5, "loss": 10**400}])
    draw_loss(str(tmp_path / "loss.png"), [])
    with pytest.raises(UserError, match="nowhere/loss.png: cannot be written"):
        draw_loss(str(tmp_path / "nowhere" / "loss.png"), [])


# ------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.time_limit(300)
def test_two_runs_at_once(text, tmp_path):
    for i in range(5):
        argv = arguments(*text, tmp_path / str(i), **SHORT)
        runs = [start("train.py", *argv) for _ in range(2)]
        said = [process.communicate(timeout=60)[1] for process in runs]
        assert sorted(process.returncode for process in runs) == [0, 2], said
        (line,) = [err for process, err in zip(runs, said) if process.returncode]
        assert re.fullmatch(r"error: .*(another run is writing|holds a run already).*\n", line)
        assert len(trained(tmp_path / str(i))) == 3


def at_random(draw: random.Random, number: int, program: str, argv: list[str], seconds: float) -> tuple[int, str]:
    """Signal a program at a random moment of the `seconds` that it takes; (its status, stderr)."""
    process = start(program, *argv)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(draw.random() * seconds)
    process.send_signal(number)
    return process.wait(60), process.communicate()[1]


@pytest.mark.slow
@pytest.mark.time_limit(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_twenty_signals_while_training(number, text, tmp_path):
    draw, options, statuses = random.Random(number), {**SHORT, "max_steps": 30}, []
    train.main(arguments(*text, tmp_path / "whole", **options))
    began = time.monotonic()
    train_alone = start("train.py", *arguments(*text, tmp_path / "timed", **options))
    assert train_alone.wait(60) == 0
    seconds = time.monotonic() - began
    for i in range(20):
        out = tmp_path / str(i)
        status, said = at_random(draw, number, "train.py", arguments(*text, out, **options), seconds)
        statuses.append(status)
        # Before Python's first line the kernel ends it.
        assert status in (0, 128 + number, -number), said
        assert "Traceback" not in said
        if out.exists():
            assert number == signal.SIGKILL or not leftovers(out), os.listdir(out)
            (out / "notes.txt").write_text("mine")
        if not out.exists() or os.listdir(out) == ["notes.txt"]:
            shutil.rmtree(out, ignore_errors=True)
        train.main(arguments(*text, out, resume=True, **options))
        assert trained(out) == trained(tmp_path / "whole") and not leftovers(out)
        assert files(out / "model") == files(tmp_path / "whole" / "model")
    print(statuses)


@pytest.mark.slow
@pytest.mark.time_limit(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_twenty_signals_while_converting(number, text, tmp_path):
    draw, statuses, argv = random.Random(number), [], [text[0], str(tmp_path / "whole")]
    began = time.monotonic()
    assert start("fp8.py", *argv).wait(60) == 0
    seconds = time.monotonic() - began
    source = files(tmp_path.parent / text[0])
    for i in range(20):
        folder = tmp_path / str(i)
        folder.mkdir()
        status, said = at_random(draw, number, "fp8.py", [text[0], str(folder / "out")], seconds)
        statuses.append(status)
        assert status in (0, 128 + number, -number) and "Traceback" not in said, (status, said)
        assert number == signal.SIGKILL or not leftovers(folder)
        if not (folder / "out").exists():
            export.main([text[0], str(folder / "out")])
        assert files(folder / "out") == files(tmp_path / "whole")
    assert files(tmp_path.parent / text[0]) == source
    print(statuses)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many KiB, or resizes it; its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(size: int):
        mounted = os.path.ismount(disk)
        how = f"{'remount,' if mounted else ''}size={size}k"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
        return disk

    yield resize
    subprocess.run(["umount", disk], capture_output=True)


@pytest.mark.slow
@pytest.mark.time_limit(600)
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}])
def test_a_full_disk_while_training(lora, text, tmp_path, small_disk):
    """At each write, from the first file to the model."""
    options = {**SHORT, "save_every": 1, "keep": 1, **lora}
    train.main(arguments(*text, tmp_path / "whole", **options))
    needed = sum(map(len, files(tmp_path / "whole").values())) // 1024
    reached = set()
    for size in [4, 8, 12, 16, 24, 32, *range(64, 3 * needed, needed // 8)]:
        out = small_disk(size) / str(size)
        try:
            train.main(arguments(*text, out, **options))
        except UserError as error:
            reached.add(
                re.search(r"([\w.-]+): cannot be written \(.*No space left on device.*make room", str(error))[1]
            )
            assert not leftovers(small_disk(size)), size
        small_disk(64 * 1024)
        train.main(arguments(*text, out, resume=True, **options))
        assert trained(out) == trained(tmp_path / "whole")
        assert files(out / "model") == files(tmp_path / "whole" / "model")
        shutil.rmtree(out)
    assert len(reached) > 2, reached


@pytest.mark.slow
@pytest.mark.time_limit(300)
def test_a_full_disk_while_converting(text, tmp_path, small_disk):
    export.main([text[0], str(tmp_path / "whole")])
    needed = sum(map(len, files(tmp_path / "whole").values())) // 1024
    for size in range(4, needed, max(1, needed // 16)):
        with pytest.raises(UserError, match="out: cannot be written .*No space left"):
            export.main([text[0], str(small_disk(size) / "out")])
        assert not os.listdir(small_disk(size))
