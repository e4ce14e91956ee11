"""Checkpoints: exactly the slices asked for, and every damaged file one clear line."""

import dataclasses
import json
import os
import shutil
import textwrap

import pytest
import torch
from helpers import (
    PROJECTIONS,
    interleaved,
    layout_config,
    layout_tensors,
    load,
    make_eyes,
    random_state,
    spelled,
    text_fields,
    to_fp8,
    write_checkpoint,
    write_files,
    write_json,
)
from processes import run
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import Checkpoint, canonical_name, fill, held_tensors
from config import UserError, parse_config, read_config
from export import to_hf
from model import MistralMedium
from parallel import Place, Slice

LAYOUTS = ("text", "new", "old", "native")


def refusal(directory, keep_fp8: bool = False) -> str:
    """What loading the directory says, which must be a UserError of one line."""
    with pytest.raises(UserError) as error:
        load(directory, keep_fp8=keep_fp8)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names(layout):
    """Canonical name -> the layout's -> canonical, for the decoder, its scales, the tower and the projector."""
    names = ["embed_tokens.weight", "norm.weight", "lm_head.weight"]
    for i in (0, 87):
        names += [f"layers.{i}.input_layernorm.weight", f"layers.{i}.post_attention_layernorm.weight"]
        for projection in PROJECTIONS:
            names += [f"layers.{i}.{projection}.{s}" for s in ("weight", "weight_scale_inv", "activation_scale")]
    if layout != "text":
        block = "vision_tower.transformer.layers.11"
        names += [f"{block}.attention.{n}_proj.weight" for n in "qkvo"]
        names += [f"{block}.feed_forward.{n}_proj.weight" for n in ("gate", "up", "down")]
        names += [f"{block}.{n}.weight" for n in ("attention_norm", "ffn_norm")]
        names += ["vision_tower.patch_conv.weight", "vision_tower.ln_pre.weight"]
        projector = ("norm", "patch_merger.merging_layer", "linear_1", "linear_2")
        names += [f"multi_modal_projector.{n}.weight" for n in projector]
    stored = [spelled(name, layout) for name in names]
    assert len(set(stored)) == len(names)
    assert [canonical_name(name, layout == "native") for name in stored] == names


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (6, 1), (1, 3), (2, 2), (3, 1)])
def test_every_rank_reads_its_part(tp, pp, layout, tmp_path):
    """The values of each rank's slices, and exactly their bytes: no rank reads what is not its own."""
    sizes = dict(num_attention_heads=6, num_key_value_heads=6 if tp == 3 else 2, intermediate_size=54, vocab_size=299)
    fields = text_fields("yarn, short", **sizes)
    state = {name: weight.bfloat16() for name, weight in random_state(fields).items()}
    directory = write_checkpoint(tmp_path, fields, state, layout, shards=2)
    config = read_config(directory)
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            place = Place(tp_rank=tp_rank, tp_size=tp, pp_rank=pp_rank, pp_size=pp)
            model, opened, seen = MistralMedium(config, place, torch.float32), Checkpoint(directory), []
            fill(model, opened, lambda done, total: seen.append((done, total)))
            expected_bytes = 0
            for name, parameter in model.named_parameters():
                part = model.get_submodule(name.removesuffix(".weight")).slices["weight"]
                whole = state[name].float().movedim(part.dim, 0)[part.start : part.stop]
                expected_bytes += 2 * whole.numel()
                padded = torch.zeros(part.stop - part.start, *whole.shape[1:])
                padded[: len(whole)] = whole
                assert torch.equal(parameter, padded.movedim(0, part.dim)), name
                assert part.local_shape == parameter.shape
            assert opened.bytes_read == expected_bytes
            assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
            assert len(seen) == len(list(model.named_parameters()))


def test_tied(tmp_path):
    """One tensor where embedding and head are on one rank; the same values where they are not; read once a rank."""
    fields = text_fields(tie_word_embeddings=True)
    state = random_state(fields)
    directory = write_checkpoint(tmp_path, fields, state)
    config = read_config(directory)
    opened, model = Checkpoint(directory), MistralMedium(config, dtype=torch.float32)
    assert model.lm_head.weight is None  # parameters count once
    fill(model, opened)
    x = torch.randn(5, fields["hidden_size"])
    assert torch.equal(model.lm_head(x), x @ model.embed_tokens.weight.t())
    assert opened.bytes_read == sum(4 * t.numel() for t in state.values())
    last = MistralMedium(config, Place(pp_rank=1, pp_size=2), torch.float32)
    fill(last, Checkpoint(directory))
    assert torch.equal(last.lm_head.weight, state["embed_tokens.weight"])
    assert not hasattr(last, "embed_tokens")
    assert [t.owner for t in held_tensors(last) if t.name == "embed_tokens.weight"] == [False]
    assert sorted(t.name for t in held_tensors(model)) == sorted(state)


def test_fp8_bytes(tmp_path):
    """An FP8 checkpoint is read in its own size: a byte a weight and four a scale."""
    fields = text_fields()
    stored, _ = to_fp8(random_state(fields), static=True)
    directory = write_checkpoint(tmp_path, fields, stored, fp8="static")
    for keep_fp8 in (False, True):
        opened = Checkpoint(directory)
        fill(MistralMedium(read_config(directory), dtype=torch.bfloat16, keep_fp8=keep_fp8), opened)
        scales = sum(not t.dim() for t in stored.values()) // (1 if keep_fp8 else 2)  # inputs' scales: only if kept
        assert opened.bytes_read == sum(t.numel() * t.element_size() for t in stored.values() if t.dim()) + 4 * scales


def test_read(tmp_path):
    """`read` takes a slice along any dimension, cut off where it is padded; other shapes are refused."""
    tensor = torch.arange(7 * 5 * 3, dtype=torch.float32).view(7, 5, 3)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    opened = Checkpoint(str(tmp_path))
    assert torch.equal(opened.read("x", Slice((7, 5, 3), 1, 2, 4)), tensor[:, 2:4])
    assert torch.equal(opened.read("x", Slice((7, 5, 3), 2, 1, 9)), tensor[:, :, 1:])
    assert opened.read("x", Slice((7, 5, 3), 0, 8, 10)).shape == (0, 5, 3)
    assert opened.bytes_read == 4 * (7 * 2 * 3 + 7 * 5 * 2)
    with pytest.raises(UserError, match=r"\[7, 5, 3\].*\[5, 7, 3\]"):
        opened.read("x", Slice((5, 7, 3), 0, 0, 5))


def test_half_split():
    weight = torch.randn(6 * 14, 11)
    assert torch.equal(checkpoint.half_split(interleaved(weight, 14), 14), weight)
    assert not torch.equal(interleaved(weight, 14), weight)


# ----------------------------------------------------------------------------------------------------- bad files


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
                fill(MistralMedium(read_config(directory), Place(pp_rank=pp_rank, pp_size=3)), Checkpoint(directory))
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
        assert torch.equal(model.layers["0"].mlp.up_proj.weight, state[name].to(dtype).float())
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
        fill(MistralMedium(read_config(directory)), Checkpoint(directory))


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
        model = MistralMedium(fitted, dtype=torch.float32)
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
    load(directory)
    write_files(good[0], layout_tensors(state, fields, "text") | {"model.layers.0.self_attn.scale": torch.ones(1)})
    assert "no place" in refusal(good[0])


WRONG_SIZES = dict(
    vocab_size=302, hidden_size=40, intermediate_size=51, num_hidden_layers=1000, num_attention_heads=4, head_dim=28,
)  # fmt: skip


@pytest.mark.parametrize("name", WRONG_SIZES)
def test_sizes_are_compared_before_a_model_is_built(name, good, monkeypatch):
    directory, fields, _ = good
    Checkpoint(directory).fit(read_config(directory))
    write_json(f"{directory}/config.json", fields | {name: WRONG_SIZES[name]})
    with pytest.raises(UserError, match="layers.999" if name == "num_hidden_layers" else "the config asks for"):
        Checkpoint(directory).fit(read_config(directory))


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_hidden_layers", "patch_size"])
def test_sizes_of_the_tower_are_compared(name, tmp_path):
    directory = make_eyes(tmp_path, "new", None, {})
    config = Checkpoint(directory).fit(read_config(directory))
    vision = dataclasses.replace(config.vision, **{name: getattr(config.vision, name) + 8})
    for wrong in (vision, dataclasses.replace(config.vision, spatial_merge_size=3)):
        with pytest.raises(
            UserError, match="the config asks for .*(vision_tower|multi_modal)|vision_tower.*shape|merging"
        ):
            Checkpoint(directory).fit(dataclasses.replace(config, vision=wrong))


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


# -------------------------------------------------------------------------------------------------------- memory

LOADER = """
    import sys, threading, time
    import torch
    from checkpoint import Checkpoint, fill
    from config import read_config
    from model import MistralMedium

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    peak, stop = 0, False
    def watch():
        global peak
        while not stop:
            peak = max(peak, anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    model = MistralMedium(read_config(sys.argv[1]), dtype=getattr(torch, sys.argv[2]), keep_fp8=sys.argv[3] == "kept")
    fill(model, Checkpoint(sys.argv[1]))
    stop = True
    thread.join()
    sizes = [t.numel() * t.element_size() for t in model.parameters()]
    print(peak, sum(sizes), max(sizes))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 1.1 GB in BF16, and the same in FP8."""
    root = tmp_path_factory.mktemp("large")
    fields = text_fields(
        "yarn", vocab_size=40_000, hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, num_hidden_layers=30,
    )  # fmt: skip
    tiny = random_state(text_fields("yarn", num_hidden_layers=30))
    model = MistralMedium(read_config(write_checkpoint(root / "shape", fields, {"x": torch.zeros(1)})))
    state = {}
    for name in tiny:
        shape = model.get_parameter(name).shape
        state[name] = torch.full(shape, 0.01, dtype=torch.bfloat16)
    write_checkpoint(root / "bf16", fields, state, shards=3)
    for name in [name for name in state if name.removesuffix(".weight").endswith(PROJECTIONS)]:
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = torch.tensor(0.5)
    write_checkpoint(root / "fp8", fields, state, "native", shards=1, fp8="dynamic")
    del state
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.time_limit(300)
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("stored, dtype, weights", [
    ("bf16", "bfloat16", "dequantized"), ("bf16", "float32", "dequantized"), ("fp8", "bfloat16", "dequantized"),
    ("fp8", "bfloat16", "kept"),
])  # fmt: skip
def test_memory_of_loading(stored, dtype, weights, large):
    """Peak anonymous memory: the weights in the run dtype, the largest tensor, and 400 MB for Python and PyTorch."""
    ended = run("-c", textwrap.dedent(LOADER), large / stored, dtype, weights, seconds=250)
    assert ended.status == 0, ended.err
    peak, total, largest = map(int, ended.out.split())
    print(f"peak {peak / 1e6:.0f} MB, weights {total / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
    assert total > 5e8 and peak > 5e7  # BF16 weights may stay mapped from the file, which is not anonymous
    assert peak <= total + largest + 400e6
