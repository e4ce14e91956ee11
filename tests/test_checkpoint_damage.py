"""Files that are no checkpoint, are damaged, or do not fit the config: each is one clear line."""

import dataclasses
import json
import os
import random
import shutil

import pytest
import torch
from helpers import (
    layout_config,
    layout_tensors,
    load,
    log_probabilities,
    make_eyes,
    random_state,
    random_tokens,
    spelled,
    text_fields,
    to_fp8,
    whole,
    write_checkpoint,
    write_files,
    write_json,
)
from safetensors.torch import load_file, save_file

from parallel import Place
from runtime.checkpoint import Checkpoint, fill
from runtime.config import parse_config, read_config
from runtime.export import to_hf
from runtime.files import UserError
from vision import build_model

LAYOUTS = ("text", "new", "old", "native")


def refusal(directory, keep_fp8: bool = False) -> str:
    """What loading the directory says, which must be a UserError of one line."""
    with pytest.raises(UserError) as error:
        load(directory, keep_fp8=keep_fp8)
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def good(tmp_path):
    """(directory, fields, state) of a checkpoint that loads."""
    fields = text_fields(num_hidden_layers=1)
    state = random_state(fields)
    return write_checkpoint(tmp_path / "ckpt", fields, state), fields, state


def test_no_checkpoint(good, tmp_path):
    directory = good[0]
    os.remove(f"{directory}/model.safetensors")
    assert "model*.safetensors" in refusal(directory)
    shutil.rmtree(directory)
    assert directory in refusal(directory)
    os.mkdir(directory)
    assert directory in refusal(directory)
    with pytest.raises(UserError, match="no such directory"):
        Checkpoint(directory + "/deeper")


@pytest.mark.parametrize("layout", ["text", "native"])
@pytest.mark.parametrize("shards", [0, 3])
def test_damaged_files(shards, layout, good):
    """Cut anywhere, empty, overwritten, grown: the file is named."""
    _, fields, state = good
    directory = write_checkpoint(good[0] + "2", fields, state, layout, shards)
    path = sorted(f"{directory}/{name}" for name in os.listdir(directory) if name.endswith(".safetensors"))[-1]
    with open(path, "rb") as file:
        whole = file.read()
    header = int.from_bytes(whole[:8], "little")
    cuts = [0, 4, 8, 8 + header // 2, 8 + header, len(whole) // 2, len(whole) - 1]
    broken = [whole[:cut] for cut in cuts] + [whole + b"x", b"\xff" * 100, b"<html>Not Found</html>" * 9]
    broken.append((1 << 62).to_bytes(8, "little") + whole[8:])
    for contents in broken:
        with open(path, "wb") as file:
            file.write(contents)
        assert path in refusal(directory)


def test_no_pickle(good):
    """Neither a PyTorch file beside the weights nor one under their name is ever opened."""
    directory, _, state = good
    torch.save(state, f"{directory}/pytorch_model.bin")
    torch.save(state, f"{directory}/consolidated.00.pth")
    load(directory)
    torch.save(state, f"{directory}/model.safetensors")
    assert "model.safetensors" in refusal(directory)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_that_do_not_fit(layout, good):
    _, fields, state = good
    for name in ("embed_tokens.weight", "norm.weight", "layers.0.mlp.up_proj.weight"):
        rest = {k: v for k, v in state.items() if k != name}
        message = refusal(write_checkpoint(good[0] + "3", fields, rest, layout))
        assert "missing" in message and name in message
    more = state | {"layers.1.mlp.up_proj.weight": torch.zeros(2), "layers.0.self_attn.q_proj.bias": torch.zeros(2)}
    message = refusal(write_checkpoint(good[0] + "3", fields, more, layout))
    assert "no place" in message
    for name in ("layers.1.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias"):
        assert spelled(name, layout) in message
    few = refusal(write_checkpoint(good[0] + "3", fields, {"norm.weight": state["norm.weight"]}, layout))
    assert "11 tensors are missing" in few and len(few) < 400 + len(good[0])


@pytest.mark.parametrize("tied", [False, True])
def test_every_stray_tensor_is_seen_by_some_stage(tied, tmp_path):
    """A rank builds its own part only, and judges by it what other stages may hold; together they miss nothing."""
    fields = text_fields(tie_word_embeddings=tied, num_hidden_layers=3)
    state = random_state(fields)

    def refusals(state: dict) -> list[str]:
        directory, said = write_checkpoint(tmp_path / "ckpt", fields, state), []
        for pp_rank in range(3):
            try:
                fill(build_model(read_config(directory), Place(pp_rank=pp_rank, pp_size=3)), Checkpoint(directory))
            except UserError as error:
                said.append(str(error))
        shutil.rmtree(directory)
        return said

    assert refusals(state) == []
    strays = ["layers.3.mlp.up_proj.weight", "layers.01.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias"]
    strays += ["norm.bias", "embed_tokens.bias", "stranger", "stranger.weight_scale_inv"]
    for name in strays + ["lm_head.weight"] * tied:
        said = refusals(state | {name: torch.zeros(2)})
        assert said and all("no place" in message and name in message for message in said), name
    for name in state:
        said = refusals({key: tensor for key, tensor in state.items() if key != name})
        assert said and all("missing" in message and name in message for message in said), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_shapes(layout, good):
    _, fields, state = good
    for name, wrong in [
        ("layers.0.self_attn.k_proj.weight", torch.zeros(42, 28)),
        ("layers.0.self_attn.q_proj.weight", torch.zeros(84 * 42)),
        ("embed_tokens.weight", torch.zeros(300, 42)),
        ("layers.0.input_layernorm.weight", torch.zeros(43)),
        ("norm.weight", torch.zeros(42, 1)),
        ("lm_head.weight", torch.zeros(())),
    ]:
        if layout == "native" and wrong.shape == (84 * 42,):
            continue
        message = refusal(write_checkpoint(good[0] + "4", fields, state | {name: wrong}, layout))
        assert spelled(name, layout) in message and "shape" in message


@pytest.mark.parametrize("keep_fp8", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_scales(layout, keep_fp8, good):
    _, fields, state = good
    stored, _ = to_fp8(state, static=True)
    name = "layers.0.mlp.down_proj"
    write = lambda tensors: write_checkpoint(good[0] + "5", fields, tensors, layout, fp8="static")  # noqa: E731
    load(write(stored), keep_fp8=keep_fp8)
    for shape in ((1,), (1, 1)):
        load(write(stored | {f"{name}.weight_scale_inv": torch.full(shape, 0.5)}), keep_fp8=keep_fp8)
    missing = {k: v for k, v in stored.items() if k != f"{name}.weight_scale_inv"}
    assert name in refusal(write(missing), keep_fp8)
    bad = [torch.tensor(x) for x in (0.0, -0.5, 1e37, float("nan"), float("inf"))]  # 448 · 1e37 is infinite
    for scale in [*bad, torch.ones(2), torch.ones(0), torch.ones(48, dtype=torch.bfloat16)]:
        message = refusal(write(stored | {f"{name}.weight_scale_inv": scale}), keep_fp8)
        assert spelled(f"{name}.weight_scale_inv", layout) in message
        assert message.endswith(f"found {scale.item()}" if scale.numel() == 1 else f"shape {list(scale.shape)}")
        if keep_fp8:
            message = refusal(write(stored | {f"{name}.activation_scale": scale}), keep_fp8)
            assert spelled(f"{name}.activation_scale", layout) in message
    message = refusal(write(stored | {"layers.0.mlp.scale": torch.ones(1)}), keep_fp8)
    assert "no place" in message
    if keep_fp8:
        plain = {k: v for k, v in stored.items() if not k.startswith(name)} | {
            f"{name}.weight": state[f"{name}.weight"]
        }
        assert name in refusal(write(plain), keep_fp8)


def test_a_scale_beside_a_weight_that_is_not_fp8(good):
    """Nobody knows whether it was applied, so it is refused."""
    directory, fields, state = good
    name = "layers.0.mlp.up_proj.weight"
    write_checkpoint(directory, fields, state | {f"{name}_scale_inv": torch.tensor(0.5)})
    assert f"{name}_scale_inv" in refusal(directory)


def test_dtypes(good):
    directory, fields, state = good
    name = "layers.0.mlp.up_proj.weight"
    for dtype in (torch.bfloat16, torch.float16):
        write_checkpoint(directory, fields, state | {name: state[name].to(dtype)})
        model = load(directory)
        assert torch.equal(whole(model)[name], state[name].to(dtype).float())
    for dtype in (torch.float64, torch.int32, torch.int8, torch.float8_e5m2, torch.bool):
        write_checkpoint(directory, fields, state | {name: state[name].to(dtype)})
        assert name in refusal(directory) and "stored as" in refusal(directory)


def test_duplicates(good):
    directory, fields, state = good
    save_file({"model.norm.weight": state["norm.weight"]}, f"{directory}/model-2.safetensors")
    assert "norm.weight twice" in refusal(directory)
    os.remove(f"{directory}/model-2.safetensors")
    tensors = load_file(f"{directory}/model.safetensors")
    save_file(tensors | {"language_model.model.norm.weight": torch.ones(42)}, f"{directory}/model.safetensors")
    message = refusal(directory)
    assert "language_model.model.norm.weight" in message and "model.norm.weight" in message


@pytest.mark.parametrize("layout", ["text", "native"])
def test_index_and_files_disagree(layout, good):
    _, fields, state = good
    directory = write_checkpoint(good[0] + "6", fields, state, layout, shards=3)
    stem = "consolidated" if layout == "native" else "model"
    index, second = f"{directory}/{stem}.safetensors.index.json", f"{directory}/{stem}-00002-of-00003.safetensors"
    with open(index) as file:
        right = json.load(file)
    load(directory)
    name, key = "layers.0.mlp.up_proj.weight", spelled("layers.0.mlp.up_proj.weight", layout)

    third = (
        f"{stem}-00003-of-00003.safetensors"
        if right["weight_map"][key] != f"{stem}-00003-of-00003.safetensors"
        else f"{stem}-00001-of-00003.safetensors"
    )
    write_json(index, {"weight_map": right["weight_map"] | {key: third}})
    assert key in refusal(directory)  # the index lists it where it is not

    write_json(index, right)
    tensors = load_file(second)
    save_file(tensors | {"stranger": torch.zeros(2)}, second)
    assert "stranger" in refusal(directory) and second in refusal(directory)  # the file holds one the index lacks

    os.rename(second, second + ".partial")
    assert second in refusal(directory)  # a missing shard
    os.rename(second + ".partial", second)
    for wrong in ({}, [], {"weight_map": []}, {"weight_map": {key: 3}}, {"weight_map": None}):
        write_json(index, wrong)
        assert index in refusal(directory)
    write_json(index, {"weight_map": {k: v for k, v in right["weight_map"].items() if k != key}})
    assert name in refusal(directory)
    with open(index, "w") as file:
        file.write('{"weight_map": {')
    assert index in refusal(directory)
    whole = f"{directory}/{stem}.safetensors"  # beside an index of other files nobody knows which ones are meant
    write_json(index, right)
    save_file(tensors, whole)
    assert whole in (message := refusal(directory)) and index in message
    os.remove(whole)
    os.remove(index)
    os.remove(second)
    assert "missing" in refusal(directory)  # no index: the names that are not there tell


def test_a_stranger_in_a_shard_that_this_rank_does_not_need(good):
    """Every rank sees the same mistakes where it reads; no rank loads a checkpoint whose own files are wrong."""
    _, fields, state = good
    directory = write_checkpoint(good[0] + "7", fields, state, shards=2)
    path = f"{directory}/model-00002-of-00002.safetensors"
    save_file(load_file(path) | {"stranger": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="stranger"):
        fill(build_model(read_config(directory)), Checkpoint(directory))


@pytest.mark.parametrize("layout", ["text", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_what_is_not_finite(dtype, layout, good):
    """Anywhere in a tensor, NaN or either infinity, in every dtype; but large values are not taken for it."""
    _, fields, state = good
    state, fp8 = {name: tensor.bfloat16() for name, tensor in state.items()}, None
    name = "layers.0.mlp.down_proj.weight"
    if dtype == torch.float8_e4m3fn:
        (state, _), fp8 = to_fp8(state, static=False), "dynamic"
        values = [torch.tensor([byte], dtype=torch.uint8).view(dtype)[0] for byte in (0x7F, 0xFF)]
    else:
        values = [torch.tensor(value, dtype=dtype) for value in (float("nan"), float("inf"), float("-inf"))]
    for i, value in enumerate(values):
        tensor = state[name].to(dtype).clone()
        tensor.view(-1)[[0, 1000, -1][i]] = value
        directory = write_checkpoint(good[0] + "8", fields, state | {name: tensor}, layout, fp8=fp8)
        message = refusal(directory, keep_fp8=fp8 is not None)
        assert spelled(name, layout) in message and "NaN or infinity" in message
    largest = torch.full_like(state[name], torch.finfo(dtype).max, dtype=dtype)
    load(write_checkpoint(good[0] + "8", fields, state | {name: largest}, layout, fp8=fp8), keep_fp8=fp8 is not None)


@pytest.mark.parametrize("layout", ["text", "new", "native"])
def test_the_file_decides_whether_the_head_is_tied(layout, good, capsys):
    _, fields, state = good
    directory = good[0] + "9"
    for tied, own_head, expected in [(True, True, False), (False, True, False), (True, False, True)]:
        tensors = {name: tensor for name, tensor in state.items() if own_head or name != "lm_head.weight"}
        shutil.rmtree(directory, ignore_errors=True)
        write_checkpoint(directory, dict(fields, tie_word_embeddings=tied), tensors, layout)
        config = read_config(directory)
        capsys.readouterr()
        fitted = Checkpoint(directory).fit(config)
        said = capsys.readouterr().err
        assert fitted.tie_word_embeddings == expected
        assert (said.count("\n") == 1 and "tie_word_embeddings" in said) if tied and own_head else said == ""
        assert to_hf(fitted)["tie_word_embeddings"] == expected and parse_config(to_hf(fitted)) == fitted
        model = build_model(fitted, dtype=torch.float32)
        fill(model, Checkpoint(directory))
    if layout == "new":  # no flag at all: transformers' default is tied, and there is nothing to warn of
        write_checkpoint(directory, fields, state, layout)
        raw = layout_config(fields, layout)[1]
        del raw["tie_word_embeddings"], raw["text_config"]["tie_word_embeddings"]
        write_json(f"{directory}/config.json", raw)
        config = read_config(directory)
        assert config.tie_word_embeddings and not Checkpoint(directory).fit(config).tie_word_embeddings
        assert capsys.readouterr().err == ""


def test_tensors_that_are_passed_over(good, capsys, monkeypatch):
    directory, fields, state = good
    extra = [f"model.layers.0.self_attn.{name}" for name in ("k_scale", "v_scale", "k_proj.k_scale")]
    write_files(directory, layout_tensors(state, fields, "text") | {name: torch.ones(1) for name in extra})
    load(directory)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(name in said for name in extra)
    monkeypatch.setenv("RANK", "1")
    load(directory)
    assert capsys.readouterr().err == ""
    native = [f"layers.0.attention.{name}_fake_quantizer.qscale_act" for name in "kqv"]
    native.append("layers.0.attention.fake_quantizer.qscale_act")
    directory = write_checkpoint(good[0] + "10", fields, state, "native", shards=2)
    path = f"{directory}/consolidated-00001-of-00002.safetensors"
    save_file(load_file(path) | {name: torch.ones(1) for name in native}, path)  # though the index has none of them
    monkeypatch.delenv("RANK")
    load(directory)
    assert (
        "4 tensors of no use here passed over: layers.0.attention.fake_quantizer.qscale_act" in capsys.readouterr().err
    )
    write_files(good[0], layout_tensors(state, fields, "text") | {"model.layers.0.self_attn.scale": torch.ones(1)})
    assert "no place" in refusal(good[0])


@pytest.mark.parametrize("seed", range(8))
def test_what_nothing_is_read_from_is_named(seed, good, capsys):
    """Shards that the index does not list, and frequencies, listed or not, in any layout: one line each."""
    draw, (_, fields, state) = random.Random(seed), good
    layout, shards = draw.choice(LAYOUTS), draw.choice((0, 2, 3))
    directory = write_checkpoint(f"{good[0]}-{seed}", fields, state, layout, shards)
    stem = "consolidated" if layout == "native" else "model"
    names = sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))
    where = draw.choice(("layers.1.self_attn.rotary_emb.", "rotary_emb.", "layers.0.attention.", "model.rotary_emb."))
    path = f"{directory}/{draw.choice(names)}"
    save_file(load_file(path) | {f"{where}inv_freq": torch.ones(3)}, path)
    if shards:
        other = f"{stem}-{draw.choice(('00004-of-00004', 'old', '00001-of-00009'))}.safetensors"
        save_file({"anything": torch.ones(1)}, f"{directory}/{other}")
    load(directory)
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"WARNING: {directory}") for line in said)
    assert [line for line in said if line.endswith(f"1 tensor of no use here passed over: {where}inv_freq")]
    assert len(said) == (2 if shards else 1)
    assert not shards or f"does not list {other}," in said[0]


@pytest.mark.parametrize("seed", range(10))
def test_zeros(seed, tmp_path):
    """A hole in a file: any weight that is all zeros is named; some zeros, and tensors of a few numbers, are not."""
    draw, fields = random.Random(seed), text_fields(num_hidden_layers=2)
    state, fp8 = random_state(fields, seed=seed), draw.choice([None, "static"])
    stored = to_fp8(state, static=True)[0] if fp8 else state
    name = draw.choice([name for name in stored if name.endswith(".weight")])
    holed = {**stored, name: torch.zeros(stored[name].shape).to(stored[name].dtype)}
    said = refusal(write_checkpoint(tmp_path / "all", fields, holed, fp8=fp8), bool(fp8) and draw.random() < 0.5)
    assert name in said and "all zeros" in said
    one = holed[name].float()
    one.view(-1)[draw.randrange(one.numel())] = 1.0
    load(write_checkpoint(tmp_path / "one", fields, {**stored, name: one.to(stored[name].dtype)}, fp8=fp8))


def test_a_tied_model_with_the_head_alone(tmp_path):
    """safetensors' save_model keeps one of the two names of a shared tensor."""
    fields = text_fields(tie_word_embeddings=True)
    state = random_state(fields)
    whole_model = load(write_checkpoint(tmp_path / "usual", fields, state))
    state["lm_head.weight"] = state.pop("embed_tokens.weight")
    directory = write_checkpoint(tmp_path / "head", fields, state)
    checkpoint = Checkpoint(directory)
    model = build_model(checkpoint.fit(read_config(directory)), dtype=torch.float32)
    fill(model, checkpoint)
    tokens = random_tokens(20, fields["vocab_size"])
    assert torch.equal(log_probabilities(model, tokens), log_probabilities(whole_model, tokens))


WRONG_SIZES = dict(
    vocab_size=302, hidden_size=40, intermediate_size=51, num_hidden_layers=1000, num_attention_heads=4, head_dim=28,
)  # fmt: skip


@pytest.mark.parametrize("name", WRONG_SIZES)
def test_sizes_are_compared(name, good):
    directory, fields, _ = good
    load(directory)
    write_json(f"{directory}/config.json", fields | {name: WRONG_SIZES[name]})
    says = "tensors are missing: layers.1.input" if name == "num_hidden_layers" else "the config asks for"
    assert says in refusal(directory)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_hidden_layers", "patch_size"])
def test_sizes_of_the_tower_are_compared(name, tmp_path):
    directory = make_eyes(tmp_path, "new", None, {})
    config = Checkpoint(directory).fit(read_config(directory))
    vision = dataclasses.replace(config.vision, **{name: getattr(config.vision, name) + 8})
    for wrong in (vision, dataclasses.replace(config.vision, spatial_merge_size=3)):
        model = build_model(dataclasses.replace(config, vision=wrong))
        with pytest.raises(UserError, match="(vision_tower|multi_modal).* has shape|missing: vision_tower"):
            fill(model, Checkpoint(directory))


def test_what_is_no_file(good):
    """Pipes and devices are not waited for, and a Git LFS pointer is called so."""
    directory = good[0]
    path = f"{directory}/model.safetensors"
    os.remove(path)
    os.mkfifo(path)
    assert path in (message := refusal(directory)) and "pipe" in message
    os.remove(path)
    with open(path, "w") as file:
        file.write("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert path in (message := refusal(directory)) and "git lfs pull" in message
    with pytest.raises(UserError, match="is a file; give the folder"):
        Checkpoint(path)
    with pytest.raises(UserError, match="hf download mistralai/Mistral-Medium --local-dir"):
        Checkpoint("mistralai/Mistral-Medium")
