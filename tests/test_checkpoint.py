"""Checkpoints: exactly the slices asked for, under every layout's names, and no memory beyond them."""

import os
import shutil
import textwrap

import pytest
import torch
from helpers import (
    PROJECTIONS,
    interleaved,
    random_state,
    spelled,
    text_fields,
    to_fp8,
    whole,
    write_checkpoint,
)
from processes import run
from safetensors.torch import save_file

from parallel import Place, Slice, parts_of
from runtime import checkpoint, native
from runtime.checkpoint import Checkpoint, canonical_name, fill
from runtime.config import read_config
from runtime.files import UserError
from runtime.optimizer import held_tensors
from vision import build_model

LAYOUTS = ("text", "new", "old", "native")


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
            model, opened, seen = build_model(config, place, torch.float32), Checkpoint(directory), []
            fill(model, opened, lambda done, total: seen.append((done, total)))
            expected_bytes = 0
            for name, (layer, rows) in parts_of(model).items():
                part, parameter = rows.slice, rows.rows_of(layer.weight)
                whole = state[name].float().movedim(part.dim, 0)[part.start : part.stop]
                expected_bytes += 2 * whole.numel()
                padded = torch.zeros(part.stop - part.start, *whole.shape[1:])
                padded[: len(whole)] = whole
                assert torch.equal(parameter, padded.movedim(0, part.dim)), name
                assert part.local_shape == parameter.shape
            assert opened.bytes_read == expected_bytes
            assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
            assert len(seen) == len(parts_of(model))


def test_tied(tmp_path):
    """One tensor where embedding and head are on one rank; the same values where they are not; read once a rank."""
    fields = text_fields(tie_word_embeddings=True)
    state = random_state(fields)
    directory = write_checkpoint(tmp_path, fields, state)
    config = read_config(directory)
    opened, model = Checkpoint(directory), build_model(config, dtype=torch.float32)
    assert model.lm_head.weight is None  # parameters count once
    fill(model, opened)
    x = torch.randn(5, fields["hidden_size"])
    assert torch.equal(model.lm_head(x), x @ model.embed_tokens.weight.t())
    assert opened.bytes_read == sum(4 * t.numel() for t in state.values())
    last = build_model(config, Place(pp_rank=1, pp_size=2), torch.float32)
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
        fill(build_model(read_config(directory), dtype=torch.bfloat16, keep_fp8=keep_fp8), opened)
        scales = sum(not t.dim() for t in stored.values()) // (1 if keep_fp8 else 2)  # inputs' scales: only if kept
        assert opened.bytes_read == sum(t.numel() * t.element_size() for t in stored.values() if t.dim()) + 4 * scales


@pytest.mark.parametrize("most", [1, 5000, 1 << 40])
def test_a_file_is_opened_anew(most, tmp_path, monkeypatch):
    """After so many bytes, so that what was read of a mapped file does not stay in memory; the weights are the same."""
    fields = text_fields(num_hidden_layers=2)
    state = random_state(fields)
    directory, opened, read = write_checkpoint(tmp_path, fields, state), [], [0]
    real, model = checkpoint.safe_open, build_model(read_config(directory), dtype=torch.float32)
    monkeypatch.setattr(checkpoint, "safe_open", lambda *a, **k: opened.append(read[0]) or real(*a, **k))
    monkeypatch.setattr(checkpoint, "MAPPED", most)
    file = Checkpoint(directory)
    opened[:] = [0]
    fill(model, file, lambda done, total: read.__setitem__(0, file.bytes_read))
    largest, total = max(t.nbytes for t in state.values()), sum(t.nbytes for t in state.values())
    assert all(after - before <= most + largest for before, after in zip(opened, [*opened[1:], total]))
    assert all(after - before > most for before, after in zip(opened, opened[1:]))
    assert len(opened) == 1 if most > total else len(opened) > 2
    for name, parameter in whole(model).items():
        assert torch.equal(parameter, state[name])


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
    assert torch.equal(native.half_split(interleaved(weight, 14), 14), weight)
    assert not torch.equal(interleaved(weight, 14), weight)


# -------------------------------------------------------------------------------------------------------- memory

LOADER = """
    import sys, threading, time
    import torch
    from runtime.checkpoint import Checkpoint, fill
    from runtime.config import read_config
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
    model = build_model(read_config(sys.argv[1]), dtype=getattr(torch, sys.argv[2]), keep_fp8=sys.argv[3] == "kept")
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
    model = build_model(read_config(write_checkpoint(root / "shape", fields, {"x": torch.zeros(1)})))
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
