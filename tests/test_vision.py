"""The tower, the projector and the model with eyes: equal to transformers (stored, and live where it is installed)."""

import dataclasses
import json
import os
import random

import pytest
import torch
from helpers import layout_config, set_weights, text_fields, vision_fields, whole
from processes import ROOT
from safetensors import safe_open
from safetensors.torch import save_file

import model
import vision
from model import Config, MistralMedium
from parallel import Place, parts_of
from runtime.checkpoint import Checkpoint, fill
from runtime.config import parse_config, read_config
from vision import build_model

GOLDEN = os.path.join(ROOT, "tests", "golden", "vision.safetensors")


def draw_config(draw: random.Random, **changes) -> Config:
    """Sizes that are neither round nor alike; head sizes whose half and quarter are odd among them."""
    head_dim, heads = draw.choice([(6, 3), (10, 2), (12, 2), (12, 3), (20, 1), (26, 2), (52, 1), (8, 5)])
    tower = vision_fields(
        theta=draw.choice([90.0, 10000.0]),
        hidden_size=head_dim * heads,
        intermediate_size=draw.choice([7, 33]),
        num_hidden_layers=draw.choice([1, 2, 3]),
        num_attention_heads=heads,
        patch_size=draw.choice([2, 3, 5]),
        image_size=40,
        hidden_act=draw.choice(["silu", "gelu"]),
    )
    beta = draw.choice([0.0, 0.1])
    rope = dict(rope_type="default", rope_theta=500.0, original_max_position_embeddings=20, llama_4_scaling_beta=beta)
    text_head_dim, kv_heads, group = draw.choice([(6, 2, 3), (10, 1, 2), (14, 3, 1)])
    fields = text_fields(
        vocab_size=29,
        hidden_size=draw.choice([18, 35]),
        intermediate_size=21,
        num_hidden_layers=2,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=text_head_dim,
        rms_norm_eps=draw.choice([1e-5, 1e-2]),
        max_position_embeddings=4096,
        tie_word_embeddings=draw.choice([False, True]),
        rope_parameters=rope,
        vision_config=tower,
    )
    image = dict(spatial_merge_size=draw.choice([1, 2, 2, 3]), image_token_index=draw.choice([0, 6]))
    return parse_config(layout_config(fields | changes, "new")[1] | image)


def build(config: Config, tensors: dict[str, torch.Tensor], place: Place = Place()) -> MistralMedium:
    """The model in float32 with the weights of a transformers state_dict, whose names are ours after a prefix."""
    model = build_model(config, place, torch.float32)
    named = {n.removeprefix("model.").removeprefix("language_model."): t.float() for n, t in tensors.items()}
    if config.tie_word_embeddings:
        named.pop("lm_head.weight", None)
    return set_weights(model, named)


def draw_weights(config: Config) -> dict[str, torch.Tensor]:
    """Random weights for `config`, norms included, under our own names."""
    model = build_model(config, dtype=torch.float32)
    return {
        name: 1 + 0.3 * torch.randn(p.shape) if p.dim() == 1 else torch.randn(p.shape) / p.shape[-1] ** 0.5
        for name, p in whole(model).items()
    }


def draw_images(config: Config, grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    cell = config.vision.patch_size * config.vision.spatial_merge_size
    return [torch.randn(3, rows * cell, columns * cell) for rows, columns in grids]


def request(config: Config, grids: list[tuple[int, int]], turns: list[int]) -> list[int]:
    """Token ids of a chat: some images and some text in each turn."""
    ids, grids = [1], iter(grids)
    for count in turns:
        for _ in range(count):
            rows, columns = next(grids)
            ids += ([config.vision.image_token_id] * columns + [12]) * rows
            ids[-1] = 13
        ids += [random.randrange(14, config.vocab_size) for _ in range(random.randrange(1, 6))]
    return ids


@torch.no_grad()
def logprobs(model: MistralMedium, ids: list[list[int]], features: torch.Tensor | None) -> torch.Tensor:
    """(B, T) tokens -> (B, T, vocab) log-probabilities."""
    return model.logits(model(model.embed(torch.tensor(ids), features))).log_softmax(-1)


# ------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("case", [0, 1])
@torch.no_grad()
def test_stored_answers_of_transformers(case):
    with safe_open(GOLDEN, "pt") as file:
        tensors = {n.removeprefix(f"{case}."): file.get_tensor(n) for n in file.keys() if n.startswith(f"{case}.")}
        config = parse_config(json.loads(file.metadata()["configs"])[case])
    weights = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    model = build(config, weights)
    features = model.vision([tensors[f"image.{i}"].float() for i in range(3)])
    torch.testing.assert_close(features, tensors["features"], atol=1e-5, rtol=1e-5)
    ids = tensors["tokens"]
    scores = logprobs(model, [ids.tolist()], features)[0, :-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(scores, tensors["logprobs"], atol=1e-5, rtol=1e-5)


def native_name(name: str) -> str:
    """A transformers name in the native spelling, written out apart from the reader's own table."""
    for old, new in [
        ("model.language_model.embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("model.language_model.", ""),
        ("model.vision_tower.", "vision_encoder."), ("model.multi_modal_projector.norm", "pre_mm_projector_norm"),
        ("model.multi_modal_projector.patch_merger", "patch_merger"),
        ("model.multi_modal_projector.linear_1", "vision_language_adapter.w_in"),
        ("model.multi_modal_projector.linear_2", "vision_language_adapter.w_out"),
        ("self_attn", "attention"), ("mlp.", "feed_forward."), ("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"),
        ("o_proj", "wo"), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"),
        ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
    ]:  # fmt: skip
        name = name.replace(old, new)
    return name


def interleave(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (i, i + D/2) of every head become (2i, 2i + 1)."""
    order = [i + half * head_dim // 2 for i in range(head_dim // 2) for half in (0, 1)]
    return torch.cat([head[order] for head in weight.split(head_dim)])


@pytest.mark.parametrize("layout", ["model.language_model", "language_model.model", "native"])
@torch.no_grad()
def test_every_layout_gives_the_same_features(layout, tmp_path):
    with safe_open(GOLDEN, "pt") as file:
        tensors = {n[2:]: file.get_tensor(n) for n in file.keys() if n.startswith("0.")}
        raw = json.loads(file.metadata()["configs"])[0]
    weights = {n.removeprefix("weights."): t.float() for n, t in tensors.items() if n.startswith("weights.")}
    text, tower = raw["text_config"], raw["vision_config"]
    if layout == "native":
        for name in weights:
            if "q_proj" in name or "k_proj" in name:
                head_dim = (tower if "vision" in name else text)["head_dim"]
                weights[name] = interleave(weights[name], head_dim)
        weights = {native_name(name): weight for name, weight in weights.items()}
        same = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size"]
        params = dict(
            dim=text["hidden_size"], n_layers=text["num_hidden_layers"], head_dim=text["head_dim"],
            hidden_dim=text["intermediate_size"], n_heads=text["num_attention_heads"],
            n_kv_heads=text["num_key_value_heads"], norm_eps=text["rms_norm_eps"], vocab_size=text["vocab_size"],
            rope_theta=text["rope_parameters"]["rope_theta"], max_position_embeddings=512, tied_embeddings=False,
            vision_encoder={name: tower[name] for name in same}
            | dict(image_size=40, max_image_size=40, rope_theta=tower["rope_parameters"]["rope_theta"],
                   image_token_id=5, spatial_merge_size=2, mm_projector_id="patch_merge",
                   add_pre_mm_projector_layer_norm=True, adapter_bias=False),
        )  # fmt: skip
        files = "params.json", "consolidated.safetensors"
    else:
        if layout == "language_model.model":
            weights = {
                name.replace("model.language_model.", "language_model.model.")
                .replace("lm_head", "language_model.lm_head")
                .removeprefix("model."): weight
                for name, weight in weights.items()
            }
        params, files = raw, ("config.json", "model.safetensors")
    (tmp_path / files[0]).write_text(json.dumps(params))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / files[1])
    model = build_model(read_config(str(tmp_path)), dtype=torch.float32)
    fill(model, Checkpoint(str(tmp_path)))
    features = model.vision([tensors[f"image.{i}"].float() for i in range(3)])
    torch.testing.assert_close(features, tensors["features"], atol=1e-5, rtol=1e-5)
    ids = tensors["tokens"]
    scores = logprobs(model, [ids.tolist()], features)[0, :-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(scores, tensors["logprobs"], atol=1e-5, rtol=1e-5)


def transformers_model(config: Config):
    transformers = pytest.importorskip("transformers")
    attention = random.choice(["eager", "sdpa"])
    hf_config = transformers.Mistral3Config.from_dict(config.raw, attn_implementation=attention)
    model = transformers.Mistral3ForConditionalGeneration(hf_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.3)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    return model, weights


def padded(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as transformers wants them: one batch, padded below and to the right, and their sizes."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    batch = torch.zeros(len(images), 3, *sizes.amax(0).tolist())
    for row, image in zip(batch, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


@pytest.mark.parametrize("turns", [[1], [2], [5], [1, 0, 2], [0, 3, 1]], ids=str)
@torch.no_grad()
def test_random_models_equal_transformers(turns):
    """Features, and log-probabilities of whole requests with 1 to 5 images, in one turn and across turns."""
    pytest.importorskip("transformers")
    for _ in range(4):
        seed = random.randrange(1 << 30)
        torch.manual_seed(seed)
        draw = random.Random(seed)
        config = draw_config(draw)
        reference, weights = transformers_model(config)
        model = build(config, weights)
        grids = [draw.choice([(1, 1), (1, 7), (6, 1), (2, 3), (4, 3)]) for _ in range(sum(turns))]
        if grids == [(1, 1)]:  # a single feature makes transformers fail: it squeezes the wrong dimension
            grids = [(1, 2)]
        images, ids = draw_images(config, grids), request(config, grids, turns)
        batch, sizes = padded(images)
        features = model.vision(images)
        expected = torch.cat(reference.get_image_features(batch, sizes).pooler_output)
        assert (features - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-5, seed
        expected = reference(input_ids=torch.tensor([ids]), pixel_values=batch, image_sizes=sizes).logits.log_softmax(
            -1
        )
        assert (logprobs(model, [ids], features) - expected).abs().max() < 1e-4, seed


@torch.no_grad()
def test_a_batch_that_mixes_images_and_text_equals_transformers():
    seed = random.randrange(1 << 30)
    torch.manual_seed(seed)
    config = draw_config(random.Random(seed))
    reference, weights = transformers_model(config)
    model = build(config, weights)
    grids = [(2, 3), (1, 2), (3, 1)]
    images = draw_images(config, grids)
    rows = [request(config, grids[:1], [1]), [], request(config, grids[1:], [1, 1])]
    length = max(map(len, rows)) + 1
    rows = [row + [17] * (length - len(row)) for row in rows]
    batch, sizes = padded(images)
    expected = reference(input_ids=torch.tensor(rows), pixel_values=batch, image_sizes=sizes).logits.log_softmax(-1)
    assert (logprobs(model, rows, model.vision(images)) - expected).abs().max() < 1e-4, seed


def test_gradients_equal_transformers():
    seed = random.randrange(1 << 30)
    torch.manual_seed(seed)
    config = draw_config(random.Random(seed), tie_word_embeddings=False)
    reference, weights = transformers_model(config)
    model = build(config, weights).requires_grad_()
    grids = [(2, 3), (1, 2)]
    images, ids = draw_images(config, grids), torch.tensor([request(config, grids, [1, 1])])
    batch, sizes = padded(images)
    reference(input_ids=ids, pixel_values=batch, image_sizes=sizes, labels=ids).loss.backward()
    logits = model.logits(model(model.embed(ids, model.vision(images))))
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    expected = {
        name.removeprefix("model.").removeprefix("language_model."): parameter.grad
        for name, parameter in reference.named_parameters()
    }
    for name, grad in whole(model, grad=True).items():
        scale = expected[name].abs().max()
        assert (grad - expected[name]).abs().max() < 1e-4 * scale + 1e-7, (seed, name)


# ----------------------------------------------------------------------------------------------- own promises


TOWER = vision_fields(
    theta=90.0, hidden_size=24, intermediate_size=14, num_hidden_layers=2, num_attention_heads=2, patch_size=3,
    image_size=40,
)  # fmt: skip
FIELDS = text_fields(
    vocab_size=26, hidden_size=18, intermediate_size=22, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-3, max_position_embeddings=4096,
    rope_parameters=dict(rope_type="default", rope_theta=500.0), vision_config=TOWER,
)  # fmt: skip
SMALL = parse_config(layout_config(FIELDS, "new")[1] | dict(image_token_index=6))


@torch.no_grad()
def test_an_image_sees_no_other_image(monkeypatch):
    """The same features alone, packed, and with few enough patches at a time that each runs alone."""
    config = SMALL
    model = build(config, draw_weights(config))
    images = draw_images(config, [(3, 2), (1, 5), (2, 2)])
    alone = torch.cat([model.vision([image]) for image in images])
    torch.testing.assert_close(model.vision(images), alone, atol=1e-5, rtol=1e-5)
    calls = []
    model.vision.vision_tower.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    monkeypatch.setattr(vision, "PATCHES_AT_ONCE", 44)  # the images have 24, 20 and 16
    torch.testing.assert_close(model.vision(iter(images)), alone, atol=1e-5, rtol=1e-5)
    assert calls == [2, 1]


@torch.no_grad()
def test_prefill_in_chunks_that_cut_an_image():
    config = SMALL
    model = build(config, draw_weights(config))
    grids = [(2, 3), (3, 2)]
    ids, features = request(config, grids, [1, 1]), model.vision(draw_images(config, grids))
    whole = logprobs(model, [ids], features)
    cache, outs, seen = model.new_cache(1, len(ids)), [], 0
    for start in range(0, len(ids), 4):
        chunk = ids[start : start + 4]
        count = chunk.count(config.vision.image_token_id)
        x = model.embed(torch.tensor([chunk]), features[seen : seen + count])
        seen += count
        outs.append(model.logits(model(x, model.prompts([(0, start, len(chunk))]), cache)).log_softmax(-1))
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-5)


def test_gradients_equal_finite_differences(monkeypatch):
    """In float64 throughout, the norms included, so that steps can be small."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = SMALL
    model = build(config, draw_weights(config)).double()
    model.dtype = torch.float64
    model.vision.dtype = torch.float64
    images = [image.double() for image in draw_images(config, [(1, 2), (2, 1)])]
    ids = torch.tensor([request(config, [(1, 2), (2, 1)], [2])])

    def loss() -> torch.Tensor:
        logits = model.logits(model(model.embed(ids, model.vision(images))))
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])

    loss().backward()
    tower, projector = model.vision.vision_tower, model.vision.multi_modal_projector
    layer = tower.transformer["layers"][0]
    for weight in [
        tower.patch_conv.weight,
        layer.attention.qkv_proj.weight,
        layer.feed_forward.gate_up_proj.weight,
        layer.ffn_norm.weight,
        projector.norm.weight,
        projector.patch_merger.merging_layer.weight,
        projector.linear_1.weight,
        projector.linear_2.weight,
        model.embed_tokens.weight,
    ]:
        direction = torch.randn_like(weight)
        with torch.no_grad():
            change = []
            for step in (1e-5, -2e-5):
                weight += step * direction
                change.append(loss())
            weight += 1e-5 * direction
        slope = (change[0] - change[1]) / 2e-5
        torch.testing.assert_close((weight.grad * direction).sum(), slope, atol=1e-8, rtol=1e-5)
    assert model.embed_tokens.weight.grad[config.vision.image_token_id].abs().max() == 0  # replaced, so never used


@torch.no_grad()
def test_text_does_not_run_the_tower():
    """The tower's weights are never even loaded here."""
    config = SMALL
    weights = draw_weights(config)
    model = build(config, weights)
    ids = [[1, 14, 15, 16]]
    expected = logprobs(model, ids, None)
    model.vision.vision_tower.to("meta"), model.vision.multi_modal_projector.to("meta")
    assert torch.equal(logprobs(model, ids, None), expected)
    assert torch.equal(logprobs(model, ids, torch.empty(0, config.hidden_size)), expected)


def test_mistakes():
    config = SMALL
    text = build_model(dataclasses.replace(config, vision=None))
    assert not any("vision" in name or "multi_modal" in name for name, _ in text.named_parameters())
    assert text.vision is None
    with pytest.raises(ValueError, match="size 5 does not divide the 2 attention heads of the vision tower"):
        vision.VisionTower(config.vision, Place(tp_size=5), torch.float32)
    with pytest.raises(ValueError, match="size 3 does not divide the 20 dimensions of hidden_size"):
        vision.Projector(dataclasses.replace(config, hidden_size=20), Place(tp_size=3), torch.float32)


def test_only_the_first_stage_has_eyes():
    names = {name for name, _ in build_model(SMALL, Place(pp_rank=1, pp_size=2)).named_parameters()}
    assert names and not any("vision" in name or "multi_modal" in name for name in names)


def test_every_parameter_knows_its_slice():
    """On `meta`; the parts of two ranks are disjoint and together the whole, or both are the whole."""
    whole = build_model(SMALL)
    ranks = [parts_of(build_model(SMALL, Place(tp_rank=r, tp_size=2))) for r in range(2)]
    replicated = set()
    for name, (layer, part) in parts_of(whole).items():
        shape = part.slice.shape
        assert layer.weight.is_meta and part.slice.local_shape == shape == part.rows_of(layer.weight).shape
        pairs = [rank[name] for rank in ranks]
        slices = [held.slice for _, held in pairs]
        assert all(held.rows_of(layer.weight).shape == held.slice.local_shape for layer, held in pairs)
        assert all(s.shape == shape for s in slices)
        if slices[0] == slices[1]:
            replicated.add(name.split(".")[-2])
        else:
            dim = slices[0].dim
            assert slices[0].start == 0 and slices[0].stop == slices[1].start == slices[1].stop // 2
            assert slices[1].stop == shape[dim]
    norms = {"ln_pre", "attention_norm", "ffn_norm", "norm", "input_layernorm", "post_attention_layernorm"}
    assert replicated == norms | {"patch_conv"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 37])
def test_rms_norm(dtype, rows):
    """Few rows and many, small and large, against the formula in float64."""
    norm = model.RMSNorm(451, 3e-5, dtype)
    generator = torch.Generator().manual_seed(rows)
    norm.weight = torch.nn.Parameter(torch.randn(451, generator=generator).to(dtype))
    for size in (1e-4, 1e-2, 1.0, 1e4):  # eps decides below 5e-3
        x = (torch.randn(rows, 451, generator=generator) * size + size / 2).to(dtype)
        exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 3e-5).rsqrt() * norm.weight.double()
        tolerance = 2**-7 if dtype == torch.bfloat16 else 2e-6  # rounded twice
        torch.testing.assert_close(norm(x).double(), exact, rtol=tolerance, atol=1e-7)
