"""Whole runs of train.py: that diverge, that validate, what they export, and mistakes."""

import json
import os
import random
import re
from functools import partial

import pytest
import torch
from helpers import load, log_probabilities, write_json, write_tekken
from processes import run
from safetensors.torch import load_file
from train_cases import TEXT, arguments, metrics, run_to_its_end, train_on_ranks, trained, trainer

import train
from parallel import parts_of
from runtime import checkpoint
from runtime.checkpoint import Checkpoint
from runtime.config import read_config
from runtime.files import UserError
from runtime.run import start_metrics


def test_metrics_after_a_kill(tmp_path):
    """A line that was cut off goes, and so do the steps that will be taken again; any other damage is named."""
    path, whole = tmp_path / "metrics.jsonl", [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(whole) + '\n{"step": 4, "lo')
    assert [line["step"] for line in start_metrics(str(tmp_path), 9)] == [1, 2, 3]
    assert path.read_text().splitlines() == whole
    steps = [line["step"] for line in start_metrics(str(tmp_path), 2)]
    assert steps == [1, 2] == [line["step"] for line in metrics(tmp_path)]
    path.write_text("\n".join([whole[0], "{", whole[1]]))
    with pytest.raises(UserError, match="metrics.jsonl line 2: not JSON"):
        start_metrics(str(tmp_path), 9)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        start_metrics(str(tmp_path / "file"), 0)


# ------------------------------------------------------------------------------------------------ not a number


def poison(byte: str) -> None:
    """From here on, the embedding of `byte` becomes NaN once a model is loaded (a checkpoint with NaN is refused)."""
    load_weights = checkpoint.fill

    def fill(model, *arguments):
        load_weights(model, *arguments)
        layer, part = parts_of(model).get("embed_tokens.weight", (None, None))
        if layer and part.slice.start <= 40 + ord(byte) < part.slice.stop:
            layer.weight.data[40 + ord(byte) - part.slice.start] = float("nan")

    checkpoint.fill = train.fill = fill


def chats_with(path, texts: list[str]) -> str:
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


@pytest.mark.parametrize("topology", [(1, 1, 1), (1, 2, 2)])
def test_a_loss_that_is_not_a_number(topology, images, tmp_path, monkeypatch):
    ckpt = images[0]
    data = chats_with(tmp_path / "chats.jsonl", ["a", "b", "c", "d", "e", "f ~", "g", "h"])
    options = {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 5, "save_every": 1, "no_shuffle": True}
    options["freeze"] = ["embeddings"]
    errors = train_on_ranks(
        arguments(ckpt, data, tmp_path / "out", **options), topology, status=1, prepare=partial(poison, "~")
    )
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert re.search(r"step 2: the loss is nan, from .*chats.jsonl line 6; the step was not taken, .*step-1;", line)
    assert [step for step, *_ in trained(tmp_path / "out")] == [1]
    assert os.listdir(tmp_path / "out" / "checkpoints") == ["step-1"]
    data = chats_with(tmp_path / "chats.jsonl", ["a", "b", "c", "d", "e", "f ~", "g", "h"])
    for module in (checkpoint, train):
        monkeypatch.setattr(module, "fill", module.fill)  # so that it is put back
    poison("~")
    with pytest.raises(UserError, match="step 2"):  # what was saved can be resumed, to the same end
        train.main(arguments(ckpt, data, tmp_path / "out", resume=True, **options))


def test_a_gradient_that_is_not_finite(text, tmp_path, monkeypatch):
    """The loss is still finite: then all samples of the step are named."""
    run = trainer(text, tmp_path, global_batch_size=3)
    monkeypatch.setattr(run.optimizer, "squared_norm", lambda: torch.tensor(float("inf"), dtype=torch.float64))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(UserError, match=r"step 1: the gradient norm is inf, from .* line \d+, \d+, \d+; .*no check"):
        run.step(1, run.upcoming(1))
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


# ------------------------------------------------------------------------------------------------------- export


def test_export_is_the_trained_model(images, program, tmp_path):
    """In generate.py's engine and, where it is installed, in transformers."""
    options = {"max_steps": 3, "dtype": "bfloat16"}
    run = trainer(images, tmp_path, **options)
    run_to_its_end(run)
    exported = str(tmp_path / "model")
    model, tokens = load(exported), torch.randint(14, 300, (40,)).tolist()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(run.model.named_parameters())[name].float()), name
    options = ("--raw", "--prompt", "the other", "--max-new-tokens", 0, "--json", "--logprobs", "--dtype", "bfloat16")
    status, out, err = program("--ckpt", exported, *options)
    answer = json.loads(out)
    hidden = run.model(run.model.embed(torch.tensor([answer["prompt_tokens"]])))
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
    train_on_ranks(argv, topology)
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
    write_json(tmp_path / "config.json", TEXT.raw)
    for out, topology in (("one", (1, 1, 1)), ("four", (2, 2, 1))):
        argv = arguments("x", text[1], tmp_path / out, max_steps=1, global_batch_size=2, lr=0, min_lr=0, seed=5)
        argv[:2] = ["--init", str(tmp_path / "config.json"), "--tokenizer", str(tmp_path / "tokenizer")]
        train_on_ranks(argv, topology)
    one, four = (load_file(tmp_path / out / "model" / "model.safetensors") for out in ("one", "four"))
    assert set(one) == set(four) and all(torch.equal(one[name], four[name]) for name in one)
    weights = one["model.layers.1.mlp.up_proj.weight"].float()
    assert abs(weights.std() - 0.02) < 1e-3 and abs(weights.mean()) < 2e-3
    assert not torch.equal(weights, one["model.layers.2.mlp.up_proj.weight"].float())
    assert (one["model.norm.weight"] == 1).all()


# -------------------------------------------------------------------------------------------------- validation


def test_lengths_go_together(text, tmp_path, monkeypatch):
    """No other way to cut a step into micro-batches has less padding, and the largest micro-batch comes first."""
    steps, cut = [], train.micro_batches
    monkeypatch.setattr(train, "micro_batches", lambda *args: steps.append(cut(*args)) or steps[-1])
    train.main(arguments(*text, tmp_path, max_steps=2, global_batch_size=8, micro_batch_size=3))
    assert len(steps) == 2
    for batches in steps:
        lengths = sorted((int((row != 11).sum()) for batch in batches for row in batch.tokens), reverse=True)
        assert [batch.shape[1] for batch in batches] == lengths[::3] and len(set(lengths)) > 3


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
    train_on_ranks(arguments(images[0], data, tmp_path, **options), (1, 2, 2))
    assert metrics(tmp_path)[-1]["val_exact"] == 1.0
    options = {"max_steps": 1, "lr": 0, "min_lr": 0, "val": data, "val_generate": True}
    train.main(arguments(images[0], data, tmp_path / "untrained", **options))
    assert metrics(tmp_path / "untrained")[-1]["val_exact"] == 0.0
    with open(data, "a", encoding="utf-8") as file:  # a chat whose last answer does not count, which nobody can miss
        turns = [("user", "who"), ("assistant", "them"), ("user", "where"), ("assistant", "in")]
        messages = [{"role": role, "content": content} for role, content in turns]
        file.write(json.dumps({"messages": [*messages[:3], {**messages[3], "weight": 0}]}) + "\n")
    train.main(arguments(images[0], data, tmp_path / "weightless", **options))
    assert metrics(tmp_path / "weightless")[-1]["val_exact"] == 0.0


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"freeze": ["language_model"]}, "--freeze leaves nothing to train"),
        ({"freeze": ["tower"]}, "invalid choice: 'tower'"),
        ({"val_every": 3}, "--val-every and --val-generate need --val"),
        ({"tokenizer": "x"}, "start from --ckpt DIR, or from --init"),
        ({"lr": "nan"}, "argument --lr"),
        ({"eps": 0}, "argument --eps"),
        ({"lora_rank": 2, "lora_alpha": 0}, "argument --lora-alpha"),
        ({"min_lr": 1.0}, "--min-lr must not exceed"),
        ({"lr": 1e-7}, "--min-lr must not exceed --lr: 1e-06 is more than 1e-07"),
        ({"betas": [0.9, 1]}, "--betas must lie below 1"),
        ({"tp": 2}, "start with torchrun --nproc-per-node 2"),
        ({"max_length": 99999}, "--max-length goes up to 4096"),
        ({"tp": 3}, "does not divide the number of processes, 1"),
    ],
)
def test_options(change, message, text, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):  # a topology is refused by layers that know no users
        train.main(arguments(*text, tmp_path, **change))


@pytest.mark.parametrize("option", ["eps", "weight_decay", "max_grad_norm", "betas", "lora_alpha"])
def test_numbers_are_refused_or_can_be_trained_with(option, images, tmp_path):
    """However small or large: an update is never 0 / 0, as it could be for rows of the embedding that nobody used."""
    sizes = ["0", "-0", "1e-320", "1e-300", "1e-46", "1e-40", "1e-30", "1e-12", "0.5", "1", "1.0000001", "1e6", "-1e-9"]
    more, trained, draw = {"lora_rank": 2} if option == "lora_alpha" else {}, 0, random.Random(3)
    for i, size in enumerate(sizes):
        value, out = [size, draw.choice(sizes)] if option == "betas" else size, tmp_path / str(i)
        try:
            train.main(arguments(*images, out, max_steps=1, lr=1e-9, min_lr=0, **{option: value, **more}))
        except UserError as error:
            assert option.replace("_", "-") in str(error), value
        else:
            trained += 1
            weights = load_file(out / "model" / "model.safetensors")
            assert all(tensor.isfinite().all() for tensor in weights.values()), value
    assert 3 < trained < len(sizes)


@pytest.mark.parametrize("name", ["config.json", "no/where.json", "params.json"])
def test_a_config_that_is_not_there(name, text, tmp_path):
    argv = arguments("x", text[1], tmp_path / "out")
    argv[:2] = ["--init", str(tmp_path / name), "--tokenizer", text[0]]
    with pytest.raises(UserError, match=f"{name}: no such file$"):
        train.main(argv)


def test_bad_data_is_one_line_and_status_2(text, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    status, _, errors = run("train.py", *arguments(text[0], str(data), tmp_path / "out"))
    assert status == 2 and errors.startswith(f"error: {data} line 1: messages end with role user")
    assert errors.count("\n") == 1 and not (tmp_path / "out").exists()
