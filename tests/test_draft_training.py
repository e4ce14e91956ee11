"""Training a draft's head: against transformers and float64, itself on other topologies, and what generate.py reads."""

import json
import os
import random
import shutil

import pytest
import torch
from helpers import ROPES, answers, interleaved, load, make_checkpoint, spelled, text_fields, vision_fields, whole
from safetensors.torch import load_file
from train_cases import arguments, make_chats, metrics, run_to_its_end, train_on_ranks, trainer, worst

import fp8
import train
from generate import TINY
from runtime.checkpoint import is_quantized
from runtime.config import parse_config, read_config
from runtime.data import micro_batches
from runtime.draft import read_draft
from runtime.export import main as convert
from runtime.files import UserError

OPTIONS = {"draft_layers": 2, "lr": 1e-2, "micro_batch_size": 4, "max_steps": 4}

# Rotary settings that both params.json and transformers' Ministral 3 can say.
SAID = [ROPES[name] for name in ("plain, scaled queries", "yarn", "yarn, short")]


def random_fields(draw: random.Random, vision: bool) -> dict:
    """Of a model's config, with sizes that nobody listed."""
    kv, group = draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
    sizes = dict(
        vocab_size=draw.randint(302, 330), hidden_size=draw.randint(17, 40), intermediate_size=draw.randint(20, 60),
        num_hidden_layers=draw.randint(1, 3), num_attention_heads=kv * group, num_key_value_heads=kv,
        head_dim=2 * draw.randint(3, 8), tie_word_embeddings=draw.random() < 0.5,
        rms_norm_eps=draw.choice((1e-5, 1e-2)),
        rope_parameters=dict(draw.choice(SAID)),
    )  # fmt: skip
    tower = dict(
        hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=2, patch_size=3, image_size=30
    )
    fields = text_fields(**sizes)
    if not vision:
        return fields
    more = dict(model_type="mistral3", text_config=fields, vision_config=vision_fields(**tower), image_token_index=10)
    return more | dict(spatial_merge_size=2, tie_word_embeddings=sizes["tie_word_embeddings"])


def expected(peer, linear: torch.Tensor, run: train.Trainer, samples: list) -> torch.Tensor:
    """The loss of a step, 0-d float64, sample by sample and place by place, from the states of the run's model.

    `peer` is the head's layers and norm in transformers.
    """
    W, losses = run.model.lm_head.holder[0].weight.double(), []
    for sample in samples:
        (batch,) = micro_batches([sample], 1, 0)
        run.thread.submit(train.decode_images, [batch], run.data.base, run.config.vision, torch.float32).result()
        with torch.no_grad():
            e = run.embed(batch)
            h = run.model.norm(run.model(e))[0].double()
        x = torch.cat((e[0, 1:].double(), h[:-1]), dim=-1) @ linear.T
        guessed = peer(inputs_embeds=x[None]).last_hidden_state[0]
        for place in range(1, len(h)):  # its next token is ids[place + 1]
            if sample.targets[place + 1]:
                own, theirs = guessed[place - 1], h[place]
                difference = (own - theirs).abs()
                smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
                p, q = torch.softmax(W @ theirs, 0), torch.log_softmax(W @ own, 0)
                losses.append(1.0 * smooth - 0.1 * (p * q).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("seed", range(6))
def test_the_loss_and_its_gradients(seed, tmp_path):
    """Equal those of transformers' layers in float64, at sizes nobody listed."""
    transformers = pytest.importorskip("transformers")
    draw = random.Random(seed)
    fields, layers = random_fields(draw, vision=seed % 2 == 1), draw.randint(1, 2)
    ckpt = make_checkpoint(tmp_path / "ckpt", parse_config(fields), seed)
    data = make_chats(tmp_path / "data", seed % 2 == 1, count=5, seed=seed)
    options = dict(micro_batch_size=draw.randint(1, 5), global_batch_size=5, activation_checkpointing=seed % 3 == 0)
    run = trainer((ckpt, data), tmp_path / "out", **OPTIONS | options | dict(draft_layers=layers, seed=seed))
    torch.manual_seed(seed)
    for parameter in run.learner.parameters():  # norms that are not 1, and inputs that count
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    text = fields.get("text_config", fields)
    peer = transformers.Ministral3Model(transformers.Ministral3Config(**{**text, "num_hidden_layers": layers})).double()
    weights = {name: tensor.detach().double() for name, tensor in whole(run.learner).items()}
    linear = weights.pop("eagle_linear.weight").requires_grad_()
    kept = peer.load_state_dict(weights, strict=False)
    assert kept.missing_keys == ["embed_tokens.weight"] and not kept.unexpected_keys

    loss = expected(peer, linear, run, run.data.samples)
    loss.backward()
    line = run.step(1, run.upcoming(1))
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()} | {
        "eagle_linear.weight": linear.grad
    }
    scale = min(1.0, 1 / (line["grad_norm"] + 1e-6))  # `step` has clipped them
    assert len(run.optimizer.parts) == 9 * layers + 2
    for tensor, views in run.optimizer.parts:
        want = theirs[tensor.name] * scale
        torch.testing.assert_close(views["grads"].double(), want, atol=2e-5 * want.abs().max().item(), rtol=1e-3)


@pytest.fixture(scope="module")
def cases(text, images, tmp_path_factory):
    """A checkpoint and chats each: images in FP8, text in FP32 with a tied head, of which tp = 2 has a padded half."""
    quantized = str(tmp_path_factory.mktemp("draft") / "fp8")
    convert([images[0], quantized])
    return {"images": (quantized, images[1]), "text": text}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_head_learns(dtype, cases, tmp_path):
    """The model stays as it is, in FP8 where it is stored so, and the head comes nearer to it."""
    run = trainer(
        cases["images"],
        tmp_path,
        **OPTIONS | {"global_batch_size": 17, "micro_batch_size": 17, "max_steps": 8, "dtype": dtype},
    )
    before = {name: p.detach().clone() for name, p in whole(run.model).items()}
    losses = [run.step(step, run.upcoming(step))["loss"] for step in range(1, 9)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for parameter in run.model.parameters())
    for name, parameter in whole(run.model).items():
        same = torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8))
        assert same and parameter.dtype == (fp8.E4M3 if is_quantized(name) else run.model.dtype), name


def check_topology(case, topology, folder, **options) -> None:
    """The same losses, validations and head as on one process in one micro-batch."""
    options = {**OPTIONS, **options, "val": case[1], "val_every": 2}
    train.main(arguments(*case, folder / "one", **{**options, "micro_batch_size": 6}))
    if topology:
        train_on_ranks(arguments(*case, folder / "many", **options), topology)
    else:
        train.main(arguments(*case, folder / "many", **options))
    ours, theirs = ([line for line in metrics(folder / out) if "loss" in line] for out in ("many", "one"))
    assert worst(ours, theirs, "loss") < 1e-4 and worst(ours, theirs, "grad_norm") < 1e-4
    ours, theirs = ([line for line in metrics(folder / out) if "val_loss" in line] for out in ("many", "one"))
    assert len(ours) == 2 and worst(ours, theirs, "val_loss") < 1e-4
    assert [line["val_agreed"] for line in ours] == pytest.approx([line["val_agreed"] for line in theirs], abs=0.01)
    one, many = (load_file(folder / out / "draft" / "consolidated.safetensors") for out in ("one", "many"))
    assert set(one) == set(many)
    for name, tensor in one.items():
        torch.testing.assert_close(many[name].float(), tensor.float(), atol=0.02 * tensor.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["images", "text"])
def test_a_split_changes_nothing(name, cases, tmp_path):
    check_topology(cases[name], None, tmp_path, micro_batch_size=1, activation_checkpointing=True)


@pytest.mark.time_limit(300)
def test_two_by_two(cases, tmp_path):
    check_topology(cases["images"], (2, 1, 2), tmp_path, activation_checkpointing=True)


@pytest.mark.slow
@pytest.mark.time_limit(600)
@pytest.mark.parametrize("topology", [(2, 1, 1), (4, 1, 1), (1, 1, 2), (2, 1, 2), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("name", ["images", "text"])
def test_all_topologies(name, topology, cases, tmp_path):
    check_topology(cases[name], topology, tmp_path)


def test_resuming(cases, tmp_path, capsys):
    """A run that was cut ends where the whole one does, and one that lost what it wrote writes it again."""
    options = dict(OPTIONS, save_every=2, val=cases["text"][1])
    train.main(arguments(*cases["text"], tmp_path, **options))
    whole_run, draft = metrics(tmp_path), load_file(tmp_path / "draft" / "consolidated.safetensors")
    shutil.rmtree(tmp_path / "checkpoints" / "step-4")
    shutil.rmtree(tmp_path / "draft")
    train.main(arguments(*cases["text"], tmp_path, **options, resume=True))
    assert [line.get("loss") for line in metrics(tmp_path)] == [line.get("loss") for line in whole_run]
    os.remove(tmp_path / "draft" / "consolidated.safetensors")
    train.main(arguments(*cases["text"], tmp_path, **options, resume=True))
    again = load_file(tmp_path / "draft" / "consolidated.safetensors")
    assert set(again) == set(draft) and all(torch.equal(again[name], draft[name]) for name in draft)
    steps = trained_steps(tmp_path)
    capsys.readouterr()
    train.main(arguments(*cases["text"], tmp_path, **options, resume=True))
    assert "this run is finished; its draft is" in capsys.readouterr().err
    assert trained_steps(tmp_path) == steps == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / "draft")
    for changes in ({"draft_layers": 1}, {"draft_layers": False}):
        with pytest.raises(UserError, match="draft_layers = 2"):
            train.main(arguments(*cases["text"], tmp_path, **{**options, **changes}, resume=True))


def trained_steps(out) -> list[int]:
    return [line["step"] for line in metrics(out) if "loss" in line]


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
@pytest.mark.parametrize("name", ["images", "text"])
def test_what_is_written(name, precision, cases, tmp_path):
    """The published layout: its names, the order of its rows, sizes that say the same; and it is read back."""
    run = trainer(cases[name], tmp_path, **OPTIONS, export=precision)
    run_to_its_end(run)
    D = run.config.head_dim
    stored = load_file(tmp_path / "draft" / "consolidated.safetensors")
    with torch.no_grad():
        for canonical, tensor in whole(run.learner).items():
            rows = interleaved(tensor, D) if canonical.endswith(("q_proj.weight", "k_proj.weight")) else tensor
            key, meant = spelled(canonical, "native"), rows.bfloat16()
            found = stored.pop(key)
            if precision == "fp8" and is_quantized(canonical):
                scale = stored.pop(key.replace(".weight", ".qscale_weight"))
                assert found.dtype == fp8.E4M3 and scale.dtype == torch.float32 and scale.shape == ()
                torch.testing.assert_close(
                    found.float() * scale, meant.float(), atol=scale.item() * 16.1, rtol=0
                )  # half a step below 448
                meant = (found.float() * scale).to(torch.float32)
            else:
                assert torch.equal(found, meant), key
            rows.copy_(meant) if rows is tensor else tensor.copy_(halves(meant.float(), D))
    assert not stored and set(os.listdir(tmp_path / "draft")) == {"consolidated.safetensors", "params.json"}
    params = json.loads((tmp_path / "draft" / "params.json").read_text())
    assert params["n_layers"] == 2 and ("quantization" in params) == (precision == "fp8")
    assert not {"vision_encoder", "moe"} & set(params)

    model = load(cases[name][0])
    head = read_draft(str(tmp_path / "draft"), model)
    assert read_config(str(tmp_path / "draft")).rope == run.learner.config.rope == run.config.rope
    x, states = torch.randn(2, 3, 31, run.config.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(head.predict(x, states), run.learner.predict(x, states), atol=1e-5, rtol=1e-5)


def halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows in the native order, as here: the first of each pair, then the second ones."""
    return torch.cat([torch.cat((head[::2], head[1::2])) for head in weight.split(head_dim)])


@pytest.mark.parametrize("name", ["images", "text"])
def test_generating_with_it(name, cases, program, tmp_path):
    """generate.py takes the folder, and answers as without it."""
    train.main(arguments(*cases[name], tmp_path, **{**OPTIONS, "max_steps": 12}))
    common = ("--ckpt", cases[name][0], "--dtype", "float32", "--raw", "the other thing in her", "--json")
    common += ("--max-new-tokens", 40)
    (plain,) = answers(program(*common))
    (drafted,) = answers(program(*common, "--draft", tmp_path / "draft"))
    assert drafted["tokens"] == plain["tokens"] and drafted["stats"]["tokens_per_step"] >= 1


@pytest.mark.skipif(not os.path.isdir(TINY), reason="the repository holds no checkpoint yet")
def test_the_small_model_has_one(program):
    """A head of at most 2 MB, with which a step brings at least 2.5 tokens of an answer with thoughts."""
    draft = os.path.join(TINY, "draft")
    assert sum(os.path.getsize(os.path.join(draft, file)) for file in os.listdir(draft)) <= 2_000_000
    question = ("--image", os.path.join(TINY, "picture.png"), "--reasoning-effort", "high", "--temperature", 0)
    question += ("--json", "How many circles are there, plus two?")
    (plain,), (drafted,) = answers(program(*question)), answers(program(*question, "--draft", draft))
    assert drafted["tokens"] == plain["tokens"] and drafted["stats"]["tokens_per_step"] >= 2.5


@pytest.mark.parametrize(
    "flag, more",
    [
        ("--pp", ["--pp", "2"]),
        ("--sequence-parallel", ["--sequence-parallel", "--tp", "2"]),
        ("--lora-rank", ["--lora-rank", "4"]),
        ("--freeze", ["--freeze", "projector"]),
        ("--init", ["--tokenizer", "x"]),
        ("--draft-layers", ["--draft-layers", "0"]),
    ],
)
def test_what_does_not_go_with_it(flag, more, cases, tmp_path):
    argv = arguments(*cases["text"], tmp_path / "out", draft_layers=1)
    if flag == "--init":
        argv[0] = flag
    with pytest.raises(UserError) as error:
        train.main([*argv, *more])
    assert flag in str(error.value) and "\n" not in str(error.value) and error.value.status == 2
    assert not os.path.exists(tmp_path / "out")
