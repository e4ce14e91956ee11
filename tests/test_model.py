"""The decoder: equal to a float64 formula, to stored log-probabilities of transformers, and to transformers live.

All in float32 on random weights; the bound everywhere is 1e-4 in log-probability at every position and token.
"""

import json
import math
import os
import random

import numpy as np
import pytest
import torch
from helpers import (
    ROPES,
    formula,
    later_chunk,
    load,
    log_probabilities,
    random_state,
    random_tokens,
    randomize,
    text_fields,
    to_fp8,
    write_checkpoint,
    write_json,
)
from safetensors import safe_open

from model import RopeConfig, attend, rope_frequencies
from runtime.config import read_config

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "golden", "decoder.safetensors")


def assert_close(ours: torch.Tensor, theirs, bound: float = 1e-4) -> None:
    difference = (ours.double() - torch.as_tensor(theirs).double()).abs()
    assert difference.shape == ours.shape and difference.isfinite().all()
    assert difference.max() <= bound, f"differs by {difference.max():.2e} at position {difference.amax(1).argmax()}"


def ways(count: int) -> dict[str, list[int] | None]:
    """Ways to feed `count` tokens: whole, in uneven pieces, one by one."""
    uneven, left = [], count
    for size in (5, 1, 17, 2, 31, 1, 1, 40, count):
        if left:
            uneven.append(min(size, left))
            left -= uneven[-1]
    return {"no cache": None, "whole": [count], "uneven": uneven, "one by one": [1] * count}


# ------------------------------------------------------------------------------------------- the float64 formula


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ROPES)
def test_formula(rope, tied, tmp_path):
    fields = text_fields(rope, tie_word_embeddings=tied, rms_norm_eps=1e-5 if tied else 1e-2)
    state, tokens = random_state(fields, seed=len(rope)), random_tokens(110, fields["vocab_size"], seed=int(tied))
    model = load(write_checkpoint(tmp_path, fields, state))
    expected = formula(fields, state, tokens)
    for sizes in ways(len(tokens)).values():
        assert_close(log_probabilities(model, tokens, sizes), expected)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, hidden", [(1, 1, 2, 5), (5, 5, 6, 30), (9, 3, 10, 11), (4, 1, 8, 7)]
)
def test_formula_other_shapes(heads, kv_heads, head_dim, hidden, tmp_path):
    """heads · head_dim need not be hidden_size; all groupings from one key/value head to one a query head."""
    sizes = dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, hidden_size=hidden)
    fields = text_fields("yarn, short", vocab_size=37, num_hidden_layers=2, **sizes)
    state, tokens = random_state(fields, seed=heads), random_tokens(70, 37)
    model = load(write_checkpoint(tmp_path, fields, state))
    for pieces in (None, [70], [33, 1, 36]):
        assert_close(log_probabilities(model, tokens, pieces), formula(fields, state, tokens))


@pytest.mark.parametrize("stored", ["bf16", "fp8 static", "fp8 dynamic", "fp8 kept"])
@pytest.mark.parametrize("layout", ["text", "new", "old", "native"])
def test_formula_layouts(layout, stored, tmp_path):
    """Every spelling, one file and several, BF16 and FP8: the same numbers from the same weights."""
    fields = text_fields("yarn, short", tie_word_embeddings=stored == "fp8 static")
    state, tokens = random_state(fields, seed=3), random_tokens(60, fields["vocab_size"])
    state = {name: weight.bfloat16() for name, weight in state.items()}
    scheme = None
    meant = state
    if stored != "bf16":
        scheme = "static" if stored == "fp8 static" else "dynamic"
        state, meant = to_fp8({n: w.float() for n, w in state.items()}, scheme == "static")
    directory = write_checkpoint(tmp_path, fields, state, layout, shards=0 if stored == "bf16" else 3, fp8=scheme)
    model = load(directory, keep_fp8=stored == "fp8 kept")
    assert model.config.fp8 == (stored != "bf16") and model.config.activation_scheme == (scheme or "static")
    assert_close(log_probabilities(model, tokens), formula(fields, meant, tokens))


def test_rows_at_different_positions(tmp_path):
    """One token for each of several rows, each somewhere else: as if it were alone."""
    fields = text_fields("yarn, short")
    state = random_state(fields)
    model = load(write_checkpoint(tmp_path, fields, state))
    lengths = [1, 40, 7, 33, 90]
    texts = [random_tokens(n + 2, fields["vocab_size"], seed=n) for n in lengths]
    cache = model.new_cache(len(lengths), 92)
    for tensor in cache.layers:
        tensor.fill_(1e3)  # what stands after a row's end must not count
    with torch.inference_mode():
        for i, (n, text) in enumerate(zip(lengths, texts)):
            model(model.embed(torch.tensor([text[:n]])), model.prompts([(0, 0, n)]), cache.rows(i, i + 1))
        for step in range(2):
            ids = torch.tensor([[text[n + step]] for n, text in zip(lengths, texts)])
            span = model.step(torch.tensor([[n + step] for n in lengths]), 92)
            hidden = model(model.embed(ids), span, cache)
            got = model.logits(hidden)[:, 0].log_softmax(-1)
            expected = np.stack([formula(fields, state, text[: n + step + 1])[-1] for n, text in zip(lengths, texts)])
            assert_close(got, expected)


@pytest.mark.parametrize("case", range(12))
def test_a_later_chunk(case):
    """A chunk attends to itself and to what came before it, apart; together that is one softmax, however steep."""
    q, k, v, steep = later_chunk(case)
    T, G, D, before = q.shape[2], q.shape[1] // k.shape[1], q.shape[3], k.shape[2] - q.shape[2]
    scores = q.double() @ k.double().repeat_interleave(G, 1).mT / D**0.5
    scores = scores.masked_fill(torch.ones(T, before + T).triu(before + 1).bool(), -torch.inf)
    expected = scores.softmax(-1) @ v.double().repeat_interleave(G, 1)
    torch.testing.assert_close(attend(q, k, v).double(), expected, rtol=2e-5, atol=2e-5)
    rounded = attend(*(x.bfloat16() for x in (q / steep, k, v)))
    assert rounded.dtype == torch.bfloat16 and rounded.shape == q.shape


@pytest.mark.parametrize("case", range(4))
def test_a_later_chunk_in_flash(case, monkeypatch):
    """The chunk goes to flash attention as it lies, causal from the last key on: by that kernel's definition."""

    def flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
        assert causal and not dropout and not debug and scale is None
        hidden = torch.arange(k.shape[2]) > torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
        scores = (q.double() @ k.double().mT / q.shape[3] ** 0.5).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v.double()).to(q.dtype), *[torch.empty(0)] * 3, 0, 0, *[torch.empty(0)] * 3

    q, k, v, _ = later_chunk(case)
    expected, kernels = attend(q, k, v), torch.library.Library("aten", "IMPL")
    monkeypatch.setattr("model.has_flash", lambda device, dtype, head_dim: True)
    kernels.impl("_scaled_dot_product_flash_attention", flash, "CPU")
    try:
        torch.testing.assert_close(attend(q, k, v), expected, rtol=2e-5, atol=2e-5)
    finally:
        kernels._destroy()


def test_gradients_through_attention():
    """Training differentiates the same attention: against the softmax written out, in float64."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 6, generator=draw, dtype=torch.float64).requires_grad_() for h in (6, 2, 2))
    weight = torch.randn(2, 6, 9, 6, generator=draw, dtype=torch.float64)
    (attend(q, k, v) * weight).sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    keys, values = (x.repeat_interleave(3, dim=1) for x in (k, v))
    scores = (q @ keys.mT / 6**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    (scores.softmax(-1) @ values * weight).sum().backward()
    for ours, x in zip(got, (q, k, v)):
        torch.testing.assert_close(ours, x.grad)


def test_frequencies_of_this_model():
    """Of 64 pairs, those before 23 turn as they did, those from the other end of the ramp 64 times slower."""
    rope = read_config(os.path.join(HERE, "data", "config.json")).rope
    ratio = rope_frequencies(rope, 128).double() * 1e6 ** (torch.arange(64, dtype=torch.float64) / 64)
    low, high = 23, 31  # floor and ceiling of 128 ln(4096 / 2πr) / (2 ln 1e6) for r = 4 and r = 1: 23.6 and 30.03
    torch.testing.assert_close(ratio[: low + 1], torch.ones(low + 1, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[high:], torch.full((64 - high,), 1 / 64, dtype=torch.float64), rtol=1e-5, atol=0)
    assert (ratio[low : high + 1].diff() < -0.1).all()
    assert rope.attention_factor == pytest.approx(1.41589, abs=5e-6)


# ------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("seed", range(30))
def test_yarn_where_its_bounds_bite(seed):
    """Against the paper's formula in float64, for settings whose ramp begins before the first pair or ends after the
    last dimension, or has no length."""
    draw = random.Random(seed)
    D, theta, factor = 2 * draw.randint(2, 40), draw.choice((1.5, 10.0, 500.0, 1e6)), draw.uniform(1.5, 100)
    original, truncate = draw.choice((2, 30, 4096, 1 << 28)), draw.random() < 0.5
    slow = 10 ** draw.uniform(-3, 2)
    rope = RopeConfig(
        theta, yarn=True, factor=factor, original_max_position_embeddings=original, beta_slow=slow,
        beta_fast=slow * draw.choice((1.0, 4.0, 1000.0)), truncate=truncate,
    )  # fmt: skip

    def dimension(rotations: float) -> float:
        return D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, D - 1)
    high += 0.001 if low == high else 0
    pairs = torch.arange(D // 2, dtype=torch.float64)
    ramp = ((pairs - low) / (high - low)).clamp(0, 1)
    plain = theta ** (-2 * pairs / D)
    expected = plain / factor * ramp + plain * (1 - ramp)
    torch.testing.assert_close(rope_frequencies(rope, D).double(), expected, rtol=2e-5, atol=0)


def test_golden(tmp_path):
    """Log-probabilities that transformers computed (make_decoder_golden.py)."""
    with safe_open(GOLDEN, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert len(cases) >= 4
    for i, fields in enumerate(cases):
        state = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
        if fields["tie_word_embeddings"]:
            del state["lm_head.weight"]
        model = load(write_checkpoint(tmp_path / str(i), fields, state))
        tokens = tensors["tokens"].tolist()
        for sizes in ways(len(tokens)).values():
            assert_close(log_probabilities(model, tokens, sizes), tensors[f"logprobs.{i}"])


def peer(fields: dict, seed: int = 0, dtype=torch.float32):
    """A transformers model with random weights that `dtype` can hold, and these weights by canonical name."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    if vision := fields.get("vision_config"):
        text = {k: v for k, v in fields.items() if k not in ("architectures", "vision_config")}
        config = transformers.Mistral3Config(
            text_config=text, vision_config=vision, image_token_index=10, spatial_merge_size=2, vision_feature_layer=-1,
            tie_word_embeddings=fields["tie_word_embeddings"],
        )  # fmt: skip
        model = transformers.Mistral3ForConditionalGeneration(config)
    else:
        kind = {"ministral3": "Ministral3", "mistral": "Mistral"}[fields["model_type"]]
        raw = {k: v for k, v in fields.items() if k != "model_type"}
        raw["rope_parameters"] = {"llama_4_scaling_beta": 0.0, **fields["rope_parameters"]}
        raw["rope_parameters"].setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**raw))
    model.eval().float()
    draw, state = torch.Generator().manual_seed(seed), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(randomize(name, parameter, draw).to(dtype))
            state[canonical(name)] = parameter.detach().to(dtype)
    if fields["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    return model, state


def canonical(name: str) -> str:
    for prefix in ("model.language_model.", "model.", "language_model.model.", "language_model."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


@torch.inference_mode()
def peer_log_probabilities(model, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)


VISION = dict(
    model_type="pixtral", hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, head_dim=8,
    num_channels=3, patch_size=4, image_size=32, hidden_act="silu",
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ROPES)
def test_transformers(rope, tied, tmp_path):
    fields = text_fields(rope, tie_word_embeddings=tied)
    model, state = peer(fields, seed=int(tied))
    tokens = random_tokens(110, fields["vocab_size"])
    expected = peer_log_probabilities(model, tokens)
    ours = load(write_checkpoint(tmp_path, fields, state))
    for sizes in ways(len(tokens)).values():
        assert_close(log_probabilities(ours, tokens, sizes), expected)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "fp8 static", "fp8 dynamic"])
@pytest.mark.parametrize("layout", ["text", "new", "old", "native"])
@pytest.mark.parametrize("vision", [False, True], ids=["text only", "with vision"])
def test_transformers_layouts(vision, layout, stored, tmp_path):
    """What transformers holds, in every spelling, split over files or not. FP8: it computes on what FP8 stands for."""
    if vision and layout == "text":
        pytest.skip("this spelling is that of models without vision")
    fields = text_fields("yarn, short", tie_word_embeddings=stored == "bfloat16")
    if vision:
        fields["vision_config"] = VISION
    model, state = peer(fields, seed=1, dtype=torch.bfloat16 if stored == "bfloat16" else torch.float32)
    scheme = stored.removeprefix("fp8 ") if stored.startswith("fp8") else None
    if scheme:
        state, meant = to_fp8(state, scheme == "static")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(meant[canonical(name)])
    tokens = random_tokens(60, fields["vocab_size"])
    tokens = [20 if token == 10 else token for token in tokens]  # 10 would ask for an image
    directory = write_checkpoint(tmp_path, fields, state, layout, shards=4 if scheme else 0, fp8=scheme)
    if vision and layout == "native":
        add_native_vision(directory)
    assert_close(log_probabilities(load(directory), tokens), peer_log_probabilities(model, tokens))


def add_native_vision(directory: str) -> None:
    """The vision fields of a params.json (the rotary theta of VISION is the default)."""
    path = os.path.join(directory, "params.json")
    with open(path) as file:
        params = json.load(file)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    params["vision_encoder"] = {name: VISION[name] for name in sizes} | dict(
        image_token_id=10, num_channels=3, max_image_size=32, rope_theta=10000.0, mm_projector_id="patch_merge",
        spatial_merge_size=2, add_pre_mm_projector_layer_norm=True, adapter_bias=False,
    )  # fmt: skip
    with open(path, "w") as file:
        json.dump(params, file)


def test_saved_by_transformers(tmp_path):
    """A folder as `save_pretrained` leaves it, whole and in shards."""
    for vision, shard in ((False, "50GB"), (True, "50GB"), (False, "60KB"), (True, "60KB")):
        fields = text_fields("yarn, short")
        if vision:
            fields["vision_config"] = VISION
        model, _ = peer(fields, seed=2)
        directory = tmp_path / f"{vision}{shard}"
        model.save_pretrained(directory, max_shard_size=shard)
        files = [name for name in os.listdir(directory) if name.endswith(".safetensors")]
        assert (len(files) > 2) == (shard == "60KB")
        tokens = [token for token in random_tokens(50, 301) if token != 10]
        assert_close(log_probabilities(load(directory), tokens), peer_log_probabilities(model, tokens))


def test_mistral_in_the_old_spelling(tmp_path):
    """The first Mistral models: `model_type: mistral`, `rope_theta` at the top, no head_dim."""
    fields = text_fields("plain", model_type="mistral", hidden_size=48, head_dim=8)
    model, state = peer(fields, seed=3)
    directory = write_checkpoint(tmp_path, fields, state)
    old = {name: value for name, value in fields.items() if name not in ("rope_parameters", "head_dim")}
    write_json(tmp_path / "config.json", old | dict(rope_theta=1e4, rope_scaling=None))
    tokens = random_tokens(50, 301)
    assert_close(log_probabilities(load(directory), tokens), peer_log_probabilities(model, tokens))


@pytest.mark.parametrize("rope", ["yarn", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.time_limit(400)
def test_transformers_at_6000_tokens(rope, tmp_path):
    """Beyond the original 4,096 positions, where query scaling begins: whole, in uneven chunks, one by one."""
    fields = text_fields(
        rope, hidden_size=18, num_attention_heads=3, num_key_value_heads=1, head_dim=10, intermediate_size=26,
        num_hidden_layers=2, vocab_size=101,
    )  # fmt: skip
    model, state = peer(fields, seed=4)
    tokens = random_tokens(6000, 101)
    expected = peer_log_probabilities(model, tokens)
    ours = load(write_checkpoint(tmp_path, fields, state))
    assert_close(log_probabilities(ours, tokens), expected)
    assert_close(log_probabilities(ours, tokens, [1024] * 5 + [880]), expected)
    assert_close(log_probabilities(ours, tokens, [1, 999, 1030, 2070, 1, 1, 1898]), expected)
    assert_close(log_probabilities(ours, tokens, [3000] + [1] * 3000), expected)
    assert_close(log_probabilities(ours, tokens[:3001], [1] * 3001), expected[:3001])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_weights_laid_out_for_speed_give_the_same(tmp_path, dtype):
    """A CPU's tricks: the same results."""
    fields = text_fields("yarn, short")
    state, kept = random_state(fields), dtype == "fp8"
    if kept:
        state, _ = to_fp8(state, static=False)
    folder = write_checkpoint(tmp_path, fields, state, fp8="dynamic" if kept else None)
    options = (torch.bfloat16 if dtype == "bfloat16" else torch.float32, kept)
    model, fast = load(folder, *options), load(folder, *options, fast=True)
    tokens = random_tokens(340, fields["vocab_size"])
    chunks = (None, [13, 26, 1, 300])  # packed weights have a way for few tokens and one for many
    for sizes in chunks:
        before, after = log_probabilities(model, tokens, sizes), log_probabilities(fast, tokens, sizes)
        torch.testing.assert_close(after, before, atol=0.3 if dtype == "bfloat16" else 5e-5, rtol=0)
        assert (after - before).square().mean().sqrt() < (0.03 if dtype == "bfloat16" else 1e-5)
