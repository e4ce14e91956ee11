"""Adapters: on every topology the same, merged right, beside a base that stays as it is. Parity is in test_train.py."""

import json
import math
import os
import random
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import load, log_probabilities, whole
from processes import run_on_ranks
from safetensors.torch import load_file, save_file
from train_cases import IMAGES, arguments, metrics, run_to_its_end, train_on_ranks, trainer, worst

import train
from runtime.checkpoint import is_quantized
from runtime.export import main as convert
from runtime.files import UserError
from runtime.lora import merged, read_adapters

OPTIONS = {"lora_rank": 3, "lora_alpha": 10.0, "lr": 1e-2, "micro_batch_size": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def cases(text, images, tmp_path_factory):
    """A checkpoint and chats each: images in FP8, text in FP32."""
    fp8 = str(tmp_path_factory.mktemp("lora") / "fp8")
    convert([images[0], fp8])
    return {"images": (fp8, images[1]), "text": text}


def test_the_base_stays_frozen_and_fp8(cases, tmp_path):
    run = trainer(cases["images"], tmp_path, **OPTIONS)
    before = {name: p.detach().clone() for name, p in whole(run.model).items()}
    for step in (1, 2):
        run.step(step, run.upcoming(step))
    trained = {tensor.name for tensor, _ in run.optimizer.parts}
    assert len(trained) == 2 * 7 * IMAGES.num_hidden_layers
    for name, parameter in whole(run.model).items():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
        assert (parameter.dtype == torch.float8_e4m3fn) == is_quantized(name), name


@pytest.mark.parametrize("name", ["images", "text"])
def test_what_is_written(name, cases, tmp_path):
    """model/ is the base with the adapters merged; adapters/ is what was added, in peft's names."""
    run = trainer(cases[name], tmp_path, **OPTIONS, export="bfloat16")
    run_to_its_end(run)
    base, after = load(cases[name][0]), load(str(tmp_path / "model"))
    added = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    inside = "model.language_model" if name == "images" else "model"
    changed = 0
    for key, old in whole(base).items():
        new, expected = whole(after)[key], old.bfloat16().float()
        path = f"base_model.model.{inside}.{key.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in added:
            a, b = (added[f"{path}.lora_{x}.weight"].double() for x in "AB")
            expected = (old.double() + 10.0 / 3 * b @ a).float()
            changed += not torch.equal(new, old)
        torch.testing.assert_close(new, expected, atol=0.02 * expected.abs().max().item(), rtol=0)
    assert changed == 35 and len(added) == 70
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (3, 10.0, "LORA")
    tokens = torch.randint(14, 300, (30,)).tolist()
    with torch.no_grad():
        ids = torch.tensor([tokens])
        adapted = run.model.logits(run.model(run.model.embed(ids)))[0].log_softmax(-1)
    assert (log_probabilities(after, tokens) - adapted).abs().mean() < 0.05  # BF16 weights
    assert (log_probabilities(base, tokens) - adapted).abs().mean() > 0.2

    transformers = pytest.importorskip("transformers")
    kind = "Mistral3ForConditionalGeneration" if name == "images" else "Ministral3ForCausalLM"
    with torch.device("meta"):
        peer = getattr(transformers, kind)(transformers.AutoConfig.from_pretrained(str(tmp_path / "model")))
    modules = {f"base_model.model.{path}" for path, _ in peer.named_modules()}
    assert {path.split(".lora_")[0] for path in added} <= modules
    ends = tuple(f".{name}" for name in settings["target_modules"])  # a list, since SGLang takes no pattern
    named = {path for path, _ in peer.named_modules() if path.endswith(ends)}
    assert {f"base_model.model.{path}" for path in named} == {path.split(".lora_")[0] for path in added}


def test_the_file_decides_what_is_fp8(text, tmp_path):
    """A config may speak of FP8 where the weights are BF16; whoever may read the model may read the adapters."""
    folder = shutil.copytree(text[0], tmp_path / "ckpt")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
    (folder / "config.json").write_text(json.dumps(config))
    train.main(arguments(str(folder), text[1], tmp_path / "run", **{**OPTIONS, "max_steps": 1}))
    modes = [os.stat(path).st_mode & 0o777 for path in (tmp_path / "run" / "adapters").iterdir()]
    assert len(modes) == 2 and all(mode & 0o044 == 0o044 for mode in modes), modes


@pytest.mark.parametrize("name", ["text", "images"])
def test_peft_loads_them(name, request, tmp_path):
    """The modules that were trained and no others, with these values, and without a warning."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    case = request.getfixturevalue(name)
    train.main(arguments(*case, tmp_path, **{**OPTIONS, "max_steps": 1}))
    with open(tmp_path / "adapters" / "adapter_config.json") as file:
        base = json.load(file)["base_model_name_or_path"]
    assert os.path.samefile(base, case[0])
    kind = "AutoModelForImageTextToText" if name == "images" else "AutoModelForCausalLM"
    peer = getattr(transformers, kind).from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(peer, str(tmp_path / "adapters"))
    added = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    theirs = {key.replace(".default", ""): t for key, t in model.named_parameters() if ".lora_" in key}
    assert set(theirs) == set(added)
    for key, tensor in added.items():
        assert torch.equal(theirs[key].to(tensor.dtype), tensor)


def test_merging_is_the_sum(cases, tmp_path):
    run = trainer(cases["images"], tmp_path, **OPTIONS)
    run.step(1, run.upcoming(1))
    layer = run.model.layers["2"].mlp.down_proj
    x = torch.randn(5, 56)
    with torch.no_grad():
        torch.testing.assert_close(x @ merged(layer, layer.parts[0], torch.float32).t(), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.time_limit(300)
@pytest.mark.parametrize("name, weights", [("text", "dequantized"), ("images", "fp8")])
def test_answering_with_them(name, weights, cases, tmp_path):
    """generate.py --lora beside the base, FP8 or not, on one rank and on 2: as with the adapters merged in float32."""
    train.main(arguments(*cases[name], tmp_path / "run", **{**OPTIONS, "max_steps": 2}))
    added = load_file(tmp_path / "run" / "adapters" / "adapter_model.safetensors")
    merged_model, inside = load(cases[name][0]), "model.language_model" if name == "images" else "model"
    base, tokens = load(cases[name][0]), None
    with torch.no_grad():
        for path, weight in whole(merged_model).items():
            stem = f"base_model.model.{inside}.{path.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in added:
                a, b = (added[f"{stem}.lora_{x}.weight"].float() for x in "AB")
                weight += 10.0 / 3 * b @ a
    common = ("--ckpt", cases[name][0], "--dtype", "float32", "--weights", weights, "--raw", "the other thing in her")
    common += ("--json", "--max-new-tokens", 0, "--lora", tmp_path / "run" / "adapters")
    for more in ((), ("--tp", 2), ("--pp", 2)):
        first, *others = run_on_ranks(2 if more else 1, "generate.py", *common, *more)
        assert [first.status, *(other.status for other in others)] == [0] * (1 + len(others)), first.err
        answer = json.loads(first.out)
        tokens = answer["prompt_tokens"]
        after, before = (log_probabilities(model, tokens) for model in (merged_model, base))
        expected, plain = ([float(x[i, id]) for i, id in enumerate(tokens[1:])] for x in (after, before))
        assert answer["prompt_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        assert answer["prompt_logprobs"][1:] != pytest.approx(plain, abs=1e-2)


HARMLESS = {
    "lora_dropout": 0.3, "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian", "inference_mode": True,
    "peft_version": "0.21.2", "revision": "main", "qalora_group_size": 16, "megatron_core": "megatron.core",
    "eva_config": {"rho": 2.0}, "exclude_modules": ["lm_head"], "use_dora": False, "rank_pattern": {}, "bias": "none",
}  # fmt: skip
OTHERS = {
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "", 7, {"a": 1}],
    "peft_type": ["VERA", "ADALORA", "lora", "IA3"], "bias": ["all", "lora_only"], "use_qalora": [True],
    "alora_invocation_tokens": [[1, 2]], "use_dora": [True, "yes"], "use_rslora": [True], "lora_bias": [True, 1],
    "modules_to_save": [["lm_head"]], "rank_pattern": [{"q_proj": 4}], "alpha_pattern": [{"q_proj": 4}],
    "fan_in_fan_out": [True], "layer_replication": [[[0, 2]]], "trainable_token_indices": [[5]], "r": [2.5, True, "3"],
    "target_parameters": [["x"]], "kasa_config": [{"a": 1}], "a_key_of_next_year": ["on", 1, [0]],
}  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_other_kinds_of_adapters(seed, tmp_path):
    """Known harmless keys pass; whatever else is not off is refused by its name."""
    draw = random.Random(seed)
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 10.0, "target_modules": ["q_proj"]}
    fields |= dict(draw.sample(sorted(HARMLESS.items()), draw.randint(0, len(HARMLESS))))
    save_file({}, tmp_path / "adapter_model.safetensors")
    base = SimpleNamespace(tensors={}, title="base", file=lambda path: {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert read_adapters(str(tmp_path), base) == (3, 10.0)
    name = draw.choice(sorted(OTHERS))
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {name: draw.choice(OTHERS[name])}))
    with pytest.raises(UserError, match=rf"adapter_config.json: {name}\b"):
        read_adapters(str(tmp_path), base)


def test_adapters_that_do_not_fit(text, program, tmp_path):
    train.main(arguments(*text, tmp_path / "run", **{**OPTIONS, "max_steps": 1}))
    folder = tmp_path / "run" / "adapters"
    with open(folder / "adapter_config.json") as file:
        fields = json.load(file)
    for change, says in (
        ({"r": 4}, "has shape"),
        ({"use_dora": True}, "use_dora"),
        ({"r": "x"}, "adapter_config.json"),
        ({"r": 0}, "adapter_config.json"),
        ({"r": -3}, "adapter_config.json"),
        ({"lora_alpha": math.nan}, "adapter_config.json"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(fields | change))
        status, out, err = program("--ckpt", text[0], "--lora", folder, "hi")
        assert status == 2 and out == "" and err.count("\n") == 1 and says in err, err
    status, _, err = program("--ckpt", text[0], "--lora", tmp_path / "none", "hi")
    assert status == 2 and "no such directory" in err
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in random.Random(2).sample(sorted(tensors), 5):
        save_file({key: x for key, x in tensors.items() if key != name}, folder / "adapter_model.safetensors")
        status, out, err = program("--ckpt", text[0], "--lora", folder, "hi")
        assert status == 2 and out == "" and f"{folder}: 1 tensors are missing" in err, err


def check_topology(case, topology, folder, **options) -> None:
    """The same losses, and the same adapters, as on one process."""
    options = {**OPTIONS, **options}
    train.main(arguments(*case, folder / "one", **options))
    train_on_ranks(arguments(*case, folder / "many", **options), topology)
    for name in ("loss", "grad_norm"):
        assert worst(metrics(folder / "many"), metrics(folder / "one"), name) < 1e-4
    one, many = (load_file(folder / out / "adapters" / "adapter_model.safetensors") for out in ("one", "many"))
    assert set(one) == set(many)
    for name, tensor in one.items():
        torch.testing.assert_close(many[name].float(), tensor.float(), atol=0.02 * tensor.abs().max().item(), rtol=0)


@pytest.mark.time_limit(300)
def test_two_by_two(cases, tmp_path):
    check_topology(cases["images"], (2, 2, 1), tmp_path, activation_checkpointing=True, max_steps=3)


@pytest.mark.slow
@pytest.mark.time_limit(600)
@pytest.mark.parametrize("topology", [(2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("name", ["images", "text"])
def test_all_topologies(name, topology, cases, tmp_path):
    check_topology(cases[name], topology, tmp_path)


def test_resuming(cases, tmp_path):
    """A run that was cut, and goes on with two stages, ends where the whole one does."""
    train.main(arguments(*cases["images"], tmp_path, **OPTIONS, save_every=2))
    whole = metrics(tmp_path)
    for gone in ("checkpoints/step-6", "model"):
        shutil.rmtree(tmp_path / gone)
    said = train_on_ranks(arguments(*cases["images"], tmp_path, **OPTIONS, resume=True), (1, 2, 1))
    assert "resumed after step 4" in said
    assert worst(metrics(tmp_path), whole, "loss") < 1e-4
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match="lora"):
        train.main(arguments(*cases["images"], tmp_path, **{**OPTIONS, "lora_rank": 4}, resume=True))


def test_alpha_needs_a_rank(cases, tmp_path):
    with pytest.raises(UserError, match="--lora-rank"):
        train.main(arguments(*cases["text"], tmp_path, lora_alpha=8))
    assert not os.listdir(tmp_path)
