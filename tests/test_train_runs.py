"""Whole runs: killed and resumed, out of disk, without numbers, validated, exported."""

import json
import os
import random
import re
import resource
import shutil
import sys
import time

import pytest
import torch
from helpers import load, log_probabilities, write_json, write_tekken
from safetensors.torch import load_file, save_file
from train_cases import IMAGES, ROOT, TEXT, arguments, kill, launch, make_chats, make_checkpoint, metrics, start, worst

import train
from checkpoint import Checkpoint
from config import UserError, read_config, to_hf
from optimizer import newest_checkpoint


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return make_checkpoint(folder, TEXT), make_chats(folder / "data", False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return make_checkpoint(folder, IMAGES), make_chats(folder / "data", True)


def trained(out) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in metrics(out)]


def kill_after(argv: list[str], topology: tuple[int, int, int], step: int, delay: float = 0.0) -> bool:
    """Start a run, wait for the line of `step` (or any later one) and SIGKILL it; False if it ended before that."""
    process = start(argv, topology)
    for line in process.stderr:
        if (match := re.match(r"step (\d+)/", line)) and int(match[1]) >= step:
            time.sleep(delay)
            break
    alive = process.poll() is None
    kill(process)
    process.communicate()
    return alive


# -------------------------------------------------------------------------------------------- killed and resumed


def test_resuming_after_a_kill(text, tmp_path):
    """Exactly as if nothing had happened on the same topology; another one goes on too."""
    options = {"max_steps": 40, "micro_batch_size": 2}
    train.main(arguments(*text, tmp_path / "whole", **options))
    assert kill_after(arguments(*text, tmp_path / "cut", save_every=3, **options), (1, 1, 1), 7)
    checkpoints = tmp_path / "cut" / "checkpoints"
    shutil.copytree(checkpoints / "step-3", checkpoints / "step-999.partial")  # as a kill while saving leaves it
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    train.main(arguments(*text, tmp_path / "cut", resume=True, save_every=1000, **options))
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")
    status, errors = launch(arguments(*text, tmp_path / "other", resume=True, **options), (2, 2, 1))
    assert status == 0, errors
    assert re.search(r"resumed after step (6|9|\d\d) ", errors)
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
    status, errors = launch(arguments(*text, tmp_path / "whole", **{**options, "save_every": 220}), topologies[-1])
    assert status == 0, errors
    argv = arguments(*text, tmp_path / "cut", resume=True, **options)
    while kills < 20:
        newest = newest_checkpoint(str(tmp_path / "cut" / "checkpoints"))
        done = int(newest.rsplit("-", 1)[1]) if newest else 0
        topology = topologies[kills % len(topologies)]
        assert kill_after(argv, topology, done + draw.randint(1, 6), draw.random() * 0.1), "the run ended too early"
        kills += 1
        moments.append(sorted(os.listdir(tmp_path / "cut" / "checkpoints"))[-1])
    assert launch(argv, topologies[0])[0] == 0
    ours, theirs = trained(tmp_path / "cut"), trained(tmp_path / "whole")
    if len(topologies) == 1:
        assert ours == theirs
    else:
        for name in ("loss", "grad_norm"):
            assert worst(metrics(tmp_path / "cut"), metrics(tmp_path / "whole"), name) < 1e-4
    print("killed with these checkpoints:", moments)


def test_metrics_after_a_kill(tmp_path):
    """A line that was cut off goes, and so do the steps that will be taken again; any other damage is named."""
    path, whole = tmp_path / "metrics.jsonl", [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(whole) + '\n{"step": 4, "lo')
    assert [line["step"] for line in train.Metrics(str(tmp_path), 9, 9).lines] == [1, 2, 3]
    assert path.read_text().splitlines() == whole
    assert (
        [line["step"] for line in train.Metrics(str(tmp_path), 2, 9).lines]
        == [1, 2]
        == [line["step"] for line in metrics(tmp_path)]
    )
    path.write_text("\n".join([whole[0], "{", whole[1]]))
    with pytest.raises(UserError, match="metrics.jsonl line 2: not JSON"):
        train.Metrics(str(tmp_path), 9, 9)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        train.Metrics(str(tmp_path / "file"), 0, 9)


def test_resume_is_exact_on_the_same_topology(images, tmp_path):
    """Two ranks: the losses of an uninterrupted run, bit for bit."""
    options = {"max_steps": 6, "save_every": 3, "freeze": ["vision_tower"]}
    for out in ("whole", "cut"):
        status, errors = launch(arguments(*images, tmp_path / out, **options), (2, 1, 1))
        assert status == 0, errors
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-6")
    status, errors = launch(arguments(*images, tmp_path / "cut", resume=True, **options), (2, 1, 1))
    assert status == 0 and "resumed after step 3" in errors
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")


def test_checkpoints_that_do_not_fit(text, tmp_path):
    options = {"max_steps": 2, "save_every": 1}
    train.main(arguments(*text, tmp_path, **options))
    with pytest.raises(UserError, match="holds a run already; --resume goes on"):
        train.main(arguments(*text, tmp_path, **options))
    with pytest.raises(UserError, match="seed = 0, but this run has 7"):
        train.main(arguments(*text, tmp_path, resume=True, seed=7, **options))
    other = make_chats(tmp_path / "others", False, seed=1)
    with pytest.raises(UserError, match="was made with data = "):
        train.main(arguments(text[0], other, tmp_path, resume=True, **options))
    file = tmp_path / "checkpoints" / "step-2" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"rank-00000.safetensors: cannot be read .* remove .*step-2 to resume from"):
        train.main(arguments(*text, tmp_path, resume=True, **options))
    shutil.rmtree(tmp_path / "checkpoints" / "step-2")
    train.main(arguments(*text, tmp_path, resume=True, **options))
    assert [step for step, *_ in trained(tmp_path)] == [1, 2]


@pytest.mark.parametrize("topology", [(1, 1, 1), (1, 2, 1)])
def test_full_disk(topology, text, tmp_path):
    """A file may not grow beyond a limit, as on a full disk; the checkpoint before stays, no part of the new one."""
    argv = arguments(*text, tmp_path, max_steps=3, save_every=1)
    assert launch([*argv, "--max-steps", "1"])[0] == 0
    shutil.rmtree(tmp_path / "model")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    status, errors = launch([*argv, "--resume"], topology, preexec_fn=limit)
    assert status == (2 if topology == (1, 1, 1) else 1)  # torchrun has a status of its own
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert re.search(r"step-2: cannot be written \(.*(too large|os error 27).*\); earlier checkpoints are whole", line)
    assert "Traceback" not in errors or topology != (1, 1, 1)
    assert os.listdir(tmp_path / "checkpoints") == ["step-1"]
    assert launch([*argv, "--resume"])[0] == 0
    assert [step for step, *_ in trained(tmp_path)] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ not a number


def poisoned(folder, case, byte: str, value: float) -> str:
    """A checkpoint whose embedding of one byte is `value`."""
    shutil.copytree(case[0], folder)
    file = os.path.join(folder, "model.safetensors")
    tensors = load_file(file)
    tensors["model.language_model.embed_tokens.weight"][40 + ord(byte)] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


def chats_with(path, texts: list[str]) -> str:
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


@pytest.mark.parametrize("topology", [(1, 1, 1), (1, 2, 2)])
def test_a_loss_that_is_not_a_number(topology, images, tmp_path):
    ckpt = poisoned(tmp_path / "ckpt", images, "~", float("nan"))
    data = chats_with(tmp_path / "chats.jsonl", ["a", "b", "c", "d", "e", "f ~", "g", "h"])
    options = {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 5, "save_every": 1, "no_shuffle": True}
    status, errors = launch(arguments(ckpt, data, tmp_path / "out", **options), topology)
    assert status == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert re.search(r"step 2: the loss is nan, from .*chats.jsonl line 6; the step was not taken, .*step-1;", line)
    assert [step for step, *_ in trained(tmp_path / "out")] == [1]
    assert os.listdir(tmp_path / "out" / "checkpoints") == ["step-1"]
    data = chats_with(tmp_path / "chats.jsonl", ["a", "b", "c", "d", "e", "f ~", "g", "h"])
    with pytest.raises(train.Diverged, match="step 2"):  # what was saved can be resumed, to the same end
        train.main(arguments(ckpt, data, tmp_path / "out", resume=True, **options))


def test_a_gradient_that_is_not_finite(text, tmp_path, monkeypatch):
    """The loss is still finite: then all samples of the step are named."""
    run = train.Trainer(train.parse_args(arguments(*text, tmp_path, global_batch_size=3)), train.find_place(1, 1))
    monkeypatch.setattr(run.optimizer, "squared_norm", lambda: torch.tensor(float("inf"), dtype=torch.float64))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(
        train.Diverged, match=r"step 1: the gradient norm is inf, from .* line \d+, \d+, \d+; .*no check"
    ):
        run.step(1, run.upcoming(1))
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


# ------------------------------------------------------------------------------------------------------- export


def test_export_is_the_trained_model(images, tmp_path):
    """In generate.py's engine and, where it is installed, in transformers."""
    options = {"max_steps": 3, "dtype": "bfloat16"}
    run = train.Trainer(train.parse_args(arguments(*images, tmp_path, **options)), train.find_place(1, 1))
    run.run()
    exported = str(tmp_path / "model")
    model, tokens = load(exported), torch.randint(14, 300, (40,)).tolist()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(run.model.named_parameters())[name].float()), name
    answer = run_generate(exported, "the other", dtype="bfloat16")
    hidden = run.model(run.model.embed(torch.tensor([answer["prompt_tokens"]])), [0])
    expected = run.model.logits(hidden)[0].log_softmax(-1)
    expected = expected[torch.arange(len(expected) - 1), answer["prompt_tokens"][1:]]
    torch.testing.assert_close(torch.tensor(answer["prompt_logprobs"][1:]), expected.detach(), atol=0.05, rtol=0)

    transformers = pytest.importorskip("transformers")
    peer, info = transformers.Mistral3ForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.dtype == torch.bfloat16
    with torch.no_grad():
        theirs = peer.float()(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    torch.testing.assert_close(log_probabilities(model, tokens), theirs, atol=1e-4, rtol=1e-4)


def run_generate(ckpt: str, prompt: str, dtype: str) -> dict:
    import subprocess

    command = [sys.executable, os.path.join(ROOT, "generate.py"), "--ckpt", ckpt, "--raw", "--prompt", prompt]
    command += ["--max-new-tokens", "0", "--json", "--logprobs", "--dtype", dtype]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=100).stdout)


@pytest.mark.parametrize("name, topology", [("text", (4, 2, 1)), ("images", (2, 2, 2))])
@pytest.mark.slow
@pytest.mark.time_limit(300)
def test_export_from_many_ranks(name, topology, text, images, tmp_path):
    check_export(text if name == "text" else images, topology, tmp_path)


def test_export_from_two_stages(text, tmp_path):
    check_export(text, (1, 2, 1), tmp_path)


def check_export(case, topology, folder) -> None:
    """A run that changes nothing writes what it read, rounded to BF16."""
    argv = arguments(*case, folder / "out", max_steps=1, global_batch_size=2, lr=0, min_lr=0)
    status, errors = launch(argv, topology)
    assert status == 0, errors
    ours, theirs = (load(path).state_dict() for path in (str(folder / "out" / "model"), case[0]))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.bfloat16().float()), name
    names = set(os.listdir(folder / "out" / "model"))
    assert names == {"config.json", "model.safetensors", "model.safetensors.index.json", "tekken.json"}
    assert json.loads((folder / "out" / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_in_fp8(images, tmp_path):
    train.main(arguments(*images, tmp_path, max_steps=1, global_batch_size=2, lr=0, min_lr=0, export="fp8"))
    exported = str(tmp_path / "model")
    config = read_config(exported)
    assert config.fp8 and config.activation_scheme == "dynamic" and Checkpoint(exported).is_fp8()
    ours, theirs = load(exported).state_dict(), load(images[0]).state_dict()
    for name, tensor in theirs.items():
        if re.fullmatch(r"layers\..*_proj\.weight", name):
            tensor = tensor.bfloat16().float()
            bound = tensor.abs() / 16 + tensor.abs().max() / 448 / 512 * 1.01  # half a unit of E4M3, also the smallest
            assert ((ours[name] - tensor).abs() <= bound).all() and not torch.equal(ours[name], tensor), name
        else:
            assert torch.equal(ours[name], tensor.bfloat16().float()), name


@pytest.mark.time_limit(200)
def test_random_weights_are_the_same_everywhere(text, tmp_path):
    os.makedirs(tmp_path / "tokenizer")
    write_tekken(tmp_path / "tokenizer")
    write_json(tmp_path / "config.json", to_hf(TEXT))
    for out, topology in (("one", (1, 1, 1)), ("four", (2, 2, 1))):
        argv = arguments("x", text[1], tmp_path / out, max_steps=1, global_batch_size=2, lr=0, min_lr=0, seed=5)
        argv[:2] = ["--init", str(tmp_path / "config.json"), "--tokenizer", str(tmp_path / "tokenizer")]
        status, errors = launch(argv, topology)
        assert status == 0, errors
    one, four = (load_file(tmp_path / out / "model" / "model.safetensors") for out in ("one", "four"))
    assert set(one) == set(four) and all(torch.equal(one[name], four[name]) for name in one)
    weights = one["model.layers.1.mlp.up_proj.weight"].float()
    assert abs(weights.std() - 0.02) < 1e-3 and abs(weights.mean()) < 2e-3
    assert not torch.equal(weights, one["model.layers.2.mlp.up_proj.weight"].float())
    assert (one["model.norm.weight"] == 1).all()


# -------------------------------------------------------------------------------------------------- validation


def test_validation_loss_is_the_loss(images, tmp_path):
    """A step over the whole file, without a change, and the validation of the same file."""
    options = {"max_steps": 2, "global_batch_size": 17, "lr": 0, "min_lr": 0, "val": images[1], "val_every": 1}
    train.main(arguments(*images, tmp_path, micro_batch_size=3, **options))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    assert lines[1]["val_loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    assert "val_exact" not in lines[1]
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.time_limit(200)
def test_answers_that_become_exact(images, tmp_path):
    """Three chats learned by heart; on four ranks, and with images."""
    folder = os.path.dirname(images[1])
    parts = [{"type": "image_url", "image_url": {"url": "1-0.png"}}, {"type": "text", "text": "what"}]
    with open(os.path.join(folder, "three.jsonl"), "w", encoding="utf-8") as file:
        for content, answer in ((parts, "a cat"), ("who", "them"), ("where", "in the inn")):
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    data = os.path.join(folder, "three.jsonl")
    options = {"max_steps": 40, "global_batch_size": 3, "lr": 5e-3, "val": data, "val_every": 39, "val_generate": True}
    status, errors = launch(arguments(images[0], data, tmp_path, **options), (1, 2, 2))
    assert status == 0, errors
    assert metrics(tmp_path)[-1]["val_exact"] == 1.0
    options = {"max_steps": 1, "lr": 0, "min_lr": 0, "val": data, "val_generate": True}
    train.main(arguments(images[0], data, tmp_path / "untrained", **options))
    assert metrics(tmp_path / "untrained")[-1]["val_exact"] == 0.0


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"freeze": ["language_model"]}, "--freeze leaves nothing to train"),
        ({"freeze": ["tower"]}, "invalid choice: 'tower'"),
        ({"val_every": 3}, "--val-every and --val-generate need --val"),
        ({"tokenizer": "x"}, "start from --ckpt DIR, or from --init"),
        ({"lr": "nan"}, "argument --lr"),
        ({"min_lr": 1.0}, "--min-lr must not exceed"),
        ({"max_length": 99999}, "--max-length goes up to 4096"),
        ({"tp": 3}, "does not divide the 1 processes"),
    ],
)
def test_options(change, message, text, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        train.main(arguments(*text, tmp_path, **change))


def test_bad_data_is_one_line_and_status_2(text, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    status, errors = launch(arguments(text[0], str(data), tmp_path / "out"))
    assert status == 2 and errors.startswith(f"error: {data} line 1: messages end with role user")
    assert errors.count("\n") == 1 and not (tmp_path / "out").exists()
