"""How the tests make checkpoints (random weights, every layout, a small tokenizer), and what they compare models with.

Nothing here uses the project's own conversions, so that a mistake in those cannot cancel out.
"""

import base64
import json
import math
import os
import random
import re

import numpy as np
import torch
from safetensors.torch import save_file

import fp8
from model import Config, MistralMedium
from parallel import Place, parts_of
from runtime.checkpoint import Checkpoint, fill
from runtime.config import parse_config, read_config
from runtime.cpu import speed_up
from runtime.optimizer import held_tensors
from runtime.tokenizer import PATTERN
from vision import build_model

# The rotary settings worth distinguishing. "yarn" is this model's, with Ministral 3's query scaling.
ROPES = {
    "plain": dict(rope_type="default", rope_theta=1e4),
    "plain, scaled queries": dict(
        rope_type="default", rope_theta=1e4, llama_4_scaling_beta=0.1, original_max_position_embeddings=20
    ),
    "yarn": dict(
        rope_type="yarn", rope_theta=1e6, factor=64.0, original_max_position_embeddings=4096, beta_fast=4.0,
        beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0, llama_4_scaling_beta=0.1,
    ),
    "yarn, short": dict(
        rope_type="yarn", rope_theta=500.0, factor=64.0, original_max_position_embeddings=32, beta_fast=4.0,
        beta_slow=1.0, llama_4_scaling_beta=0.1,
    ),
    "yarn, two mscales": dict(
        rope_type="yarn", rope_theta=500.0, factor=16.0, original_max_position_embeddings=64, mscale=0.7,
        mscale_all_dim=1.3, llama_4_scaling_beta=0.0,
    ),
    "yarn, given factor": dict(
        rope_type="yarn", rope_theta=500.0, factor=3.0, original_max_position_embeddings=100, attention_factor=1.25,
        truncate=False, llama_4_scaling_beta=0.0,
    ),
}  # fmt: skip
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def text_fields(rope: str = "yarn, short", **changes) -> dict:
    """The fields of a text-only `config.json`, with sizes that are neither round nor alike."""
    fields = dict(
        architectures=["Ministral3ForCausalLM"], model_type="ministral3", vocab_size=301, hidden_size=42,
        intermediate_size=52, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=14,
        hidden_act="silu", rms_norm_eps=1e-5, max_position_embeddings=8192, sliding_window=None,
        tie_word_embeddings=False, rope_parameters=dict(ROPES[rope]),
    )  # fmt: skip
    return fields | changes


def vision_fields(theta: float = 1e4, **changes) -> dict:
    """A `vision_config`; `changes` give the sizes."""
    fields = dict(model_type="pixtral", num_channels=3, hidden_act="silu") | changes
    fields["rope_parameters"] = dict(rope_type="axial", rope_theta=theta)
    return dict(fields, head_dim=fields["hidden_size"] // fields["num_attention_heads"])


def random_state(fields: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 weights by canonical name, large enough that every part counts, small enough that rounding does not."""
    draw = torch.Generator().manual_seed(seed)
    C, F, V, D = (fields[n] for n in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, kv = fields["num_attention_heads"] * D, fields["num_key_value_heads"] * D
    shapes = {"embed_tokens.weight": (V, C), "norm.weight": (C,)}
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, C)
    for i in range(fields["num_hidden_layers"]):
        sizes = zip(PROJECTIONS, [(q, C), (kv, C), (kv, C), (C, q), (F, C), (F, C), (C, F)])
        shapes |= {f"layers.{i}.{name}.weight": size for name, size in sizes}
        shapes |= {f"layers.{i}.{name}.weight": (C,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {name: randomize(name, torch.empty(shape), draw) for name, shape in shapes.items()}


def whole_state(fields: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """The same with the tower and the projector that `fields["vision_config"]` asks for."""
    draw, config = torch.Generator().manual_seed(seed), parse_config(layout_config(fields, "new")[1])
    parts = {name: part.slice.shape for name, (_, part) in parts_of(build_model(config)).items()}
    return {name: randomize(name, torch.empty(shape), draw) for name, shape in parts.items()}


def randomize(name: str, tensor: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=draw)
    if tensor.dim() == 1:  # the weight of a norm
        return 1 + 0.3 * noise
    return 0.5 * noise if "embed_tokens" in name else 1.2 * noise / math.sqrt(tensor[0].numel())


def to_fp8(state: dict, static: bool, scale_dtype=torch.bfloat16) -> tuple[dict, dict]:
    """(the tensors of an FP8 checkpoint, the float32 weights they stand for)."""
    stored, meant = {}, {}
    for name, weight in state.items():
        stem = name.removesuffix(".weight")
        if not stem.endswith(PROJECTIONS):
            stored[name] = meant[name] = weight
            continue
        scale = (weight.abs().max() / 448).to(scale_dtype)
        stored[name] = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        meant[name] = stored[name].float() * scale.float()
        stored[f"{stem}.weight_scale_inv"] = scale
        if static:
            stored[f"{stem}.activation_scale"] = torch.tensor(0.01 + 0.001 * len(stem), dtype=scale_dtype)
    return stored, meant


# ------------------------------------------------------------------------------------------------- writing files

SPELLINGS = {  # layout -> what stands before the decoder's names, the head's and the vision parts'
    "text": ("model.", "", None),
    "new": ("model.language_model.", "", "model."),
    "old": ("language_model.model.", "language_model.", ""),
}
NATIVE = {
    "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "weight_scale_inv": "qscale_weight",
    "activation_scale": "qscale_act", "vision_tower": "vision_encoder", "attention.q_proj": "attention.wq",
    "attention.k_proj": "attention.wk", "attention.v_proj": "attention.wv", "attention.o_proj": "attention.wo",
    "feed_forward.gate_proj": "feed_forward.w1", "feed_forward.down_proj": "feed_forward.w2",
    "feed_forward.up_proj": "feed_forward.w3", "multi_modal_projector.patch_merger": "patch_merger",
    "multi_modal_projector.norm": "pre_mm_projector_norm", "multi_modal_projector.linear_1":
    "vision_language_adapter.w_in", "multi_modal_projector.linear_2": "vision_language_adapter.w_out",
}  # fmt: skip


def spelled(name: str, layout: str) -> str:
    """A canonical name as a layout spells it."""
    if layout == "native":
        stem, _, last = name.rpartition(".")
        for ours in sorted(NATIVE, key=len, reverse=True):
            stem = re.sub(rf"(^|\.){re.escape(ours)}($|\.)", rf"\g<1>{NATIVE[ours]}\g<2>", stem)
        return f"{stem}.{NATIVE.get(last, last)}"
    decoder, head, vision = SPELLINGS[layout]
    if name.startswith("lm_head"):
        return head + name
    return (vision if name.startswith(("vision_tower", "multi_modal")) else decoder) + name


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a q or k projection in the native order: dimension 2i is the HF's i, 2i + 1 its i + D/2."""
    rows = []
    for head in weight.split(head_dim):
        for i in range(head_dim // 2):
            rows += [head[i], head[i + head_dim // 2]]
    return torch.stack(rows)


def layout_tensors(state: dict, fields: dict, layout: str) -> dict:
    """Canonical tensors as a layout stores them. `fields` are the text fields, with a `vision_config` where needed."""
    tensors = {}
    for name, tensor in state.items():
        if layout == "native" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            vision = fields.get("vision_config") or {}
            head_dim = vision["head_dim"] if name.startswith("vision_tower") else fields["head_dim"]
            order = interleaved(torch.arange(len(tensor))[:, None], head_dim)[:, 0]
            tensor = tensor.view(torch.uint8)[order].view(tensor.dtype) if tensor.element_size() == 1 else tensor[order]
        tensors[spelled(name, layout)] = tensor.contiguous()
    return tensors


def layout_config(fields: dict, layout: str, fp8: str | None = None) -> tuple[str, dict]:
    """(file name, contents) of a layout's config. `fp8`: None, "static" or "dynamic"."""
    if layout == "native":
        params = dict(
            dim=fields["hidden_size"], n_layers=fields["num_hidden_layers"], head_dim=fields["head_dim"],
            hidden_dim=fields["intermediate_size"], n_heads=fields["num_attention_heads"],
            n_kv_heads=fields["num_key_value_heads"], norm_eps=fields["rms_norm_eps"],
            vocab_size=fields["vocab_size"], tied_embeddings=fields["tie_word_embeddings"],
            rope_theta=fields["rope_parameters"]["rope_theta"],
            max_position_embeddings=fields["max_position_embeddings"],
        )  # fmt: skip
        rope = fields["rope_parameters"]
        original = rope.get("original_max_position_embeddings")
        if rope["rope_type"] == "yarn":
            params["yarn"] = dict(
                original_max_position_embeddings=original, factor=rope["factor"], apply_scale=True,
                beta=rope["beta_fast"], alpha=rope["beta_slow"],
            )  # fmt: skip
        if rope.get("llama_4_scaling_beta"):
            params["llama_4_scaling"] = dict(
                beta=rope["llama_4_scaling_beta"], original_max_position_embeddings=original
            )
        if fp8:
            params["quantization"] = dict(
                qformat_weight="fp8_e4m3", qscheme_act="TENSOR" if fp8 == "static" else "DYNAMIC"
            )
        return "params.json", params
    if layout == "text":
        raw = dict(fields)
    else:
        text = {name: value for name, value in fields.items() if name not in ("architectures", "vision_config")}
        raw = dict(architectures=["Mistral3ForConditionalGeneration"], model_type="mistral3", text_config=text)
        raw["tie_word_embeddings"] = fields["tie_word_embeddings"]
        if fields.get("vision_config"):
            raw |= dict(vision_config=fields["vision_config"], image_token_index=10, spatial_merge_size=2)
            raw |= dict(vision_feature_layer=-1, multimodal_projector_bias=False, projector_hidden_act="gelu")
    if fp8:
        raw["quantization_config"] = dict(quant_method="fp8", activation_scheme=fp8, weight_block_size=None)
    return "config.json", raw


def write_checkpoint(
    directory, fields: dict, state: dict, layout: str = "text", shards: int = 0, fp8: str | None = None
) -> str:
    """Write `state` (canonical names) as one file, or as `shards` files with an index. Returns the directory."""
    stem = "consolidated" if layout == "native" else "model"
    write_files(directory, layout_tensors(state, fields, layout), stem, shards)
    name, contents = layout_config(fields, layout, fp8)
    write_json(os.path.join(directory, name), contents)
    return str(directory)


def write_files(directory, tensors: dict, stem: str = "model", shards: int = 0) -> None:
    os.makedirs(directory, exist_ok=True)
    if not shards:
        save_file(tensors, os.path.join(directory, f"{stem}.safetensors"), metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, os.path.join(directory, file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(os.path.join(directory, f"{stem}.safetensors.index.json"), {"metadata": {}, "weight_map": weight_map})


def write_json(path, value) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def write_tekken(directory, version: str = "v15", merges: tuple = ("th", "he", " t", " the", "in", "er")) -> int:
    """A `tekken.json` of the single bytes and a few merges after 40 special tokens; returns its vocabulary's size."""
    special = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 5: "[AVAILABLE_TOOLS]"}
    special |= {6: "[/AVAILABLE_TOOLS]", 7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]", 9: "[TOOL_CALLS]", 10: "[IMG]"}
    special |= {11: "<pad>", 12: "[IMG_BREAK]", 13: "[IMG_END]", 17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]"}
    special |= {32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]", 36: "[MODEL_SETTINGS]"}
    special |= {37: "[/MODEL_SETTINGS]"}
    words = [bytes([i]) for i in range(256)] + [merge.encode() for merge in merges]
    size = 40 + len(words)
    contents = dict(
        config=dict(
            pattern=PATTERN, num_vocab_tokens=len(words), default_vocab_size=size,
            default_num_special_tokens=40, version=version,
        ),
        vocab=[dict(rank=i, token_bytes=base64.b64encode(w).decode(), token_str=None) for i, w in enumerate(words)],
        special_tokens=[dict(rank=i, token_str=name, is_control=True) for i, name in special.items()],
    )  # fmt: skip
    if version == "v15":
        effort = dict(type="enum", accepts_none=True, default="none", values=["none", "high"])
        contents["model_settings_builder"] = dict(reasoning_effort=effort)
    write_json(os.path.join(str(directory), "tekken.json"), contents)
    return size


# --------------------------------------------------------------------------------------- whole checkpoints

EYES = dict(
    model_type="pixtral", hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=8, head_dim=6,
    num_channels=3, patch_size=3, image_size=60, hidden_act="silu", rope_parameters=dict(rope_theta=100.0),
)  # fmt: skip
SIZES = dict(
    hidden_size=40, intermediate_size=56, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=2, head_dim=6,
    vocab_size=301, vision_config=EYES,
)  # fmt: skip


def make_eyes(directory, layout: str, fp8: str | None, changes: dict, seed: int = 0) -> str:
    """A checkpoint in three files with the sizes above, a tower included, but for `changes`."""
    fields = text_fields("yarn, short", **(SIZES | changes))
    state = whole_state(fields, seed)
    if fp8:
        state, _ = to_fp8(state, fp8 == "static")
    write_checkpoint(directory, fields, state, layout, shards=3, fp8=fp8)
    if layout == "native" and fields["vision_config"]:
        path = os.path.join(str(directory), "params.json")
        with open(path) as file:
            params = json.load(file)
        params["vision_encoder"] = {name: value for name, value in EYES.items() if name != "rope_parameters"}
        params["vision_encoder"] |= dict(
            rope_theta=100.0, image_token_id=10, max_image_size=60, mm_projector_id="patch_merge",
            add_pre_mm_projector_layer_norm=True, adapter_bias=False, spatial_merge_size=2,
        )  # fmt: skip
        write_json(path, params)
    return str(directory)


def make_checkpoint(folder, config: Config, seed: int = 0, dtype=torch.float32) -> str:
    """Random weights with norms that are not 1, with a tokenizer, for training."""
    torch.manual_seed(seed)
    state = {}
    for tensor in held_tensors(build_model(config)):
        noise = torch.randn(tensor.part.shape)
        weight = 1 + 0.3 * noise if noise.dim() == 1 else noise / noise[0].numel() ** 0.5
        state[tensor.name] = weight.to(dtype)
    write_files(folder, layout_tensors(state, {}, "new" if config.vision else "text"))
    write_json(os.path.join(folder, "config.json"), config.raw)
    assert write_tekken(folder) <= config.vocab_size
    return str(folder)


# ------------------------------------------------------------------------------------------------- running models


def load(
    directory, dtype=torch.float32, keep_fp8: bool = False, fast: bool = False, place: Place = Place()
) -> MistralMedium:
    model = build_model(read_config(str(directory)), place, dtype, keep_fp8)
    fill(model, Checkpoint(str(directory)))
    if fast:
        speed_up(model)
    return model.eval()


@torch.inference_mode()
def log_probabilities(model, tokens: list[int], sizes: list[int] | None = None) -> torch.Tensor:
    """(T, V) after every position: whole and without a cache, or in pieces of `sizes` through the cache."""
    ids = torch.tensor([tokens])
    if sizes is None:
        return model.logits(model(model.embed(ids)))[0].log_softmax(-1)
    assert sum(sizes) == len(tokens)
    cache, out, start = model.new_cache(1, len(tokens) + 3), [], 0
    for tensor in cache.layers:
        tensor.fill_(torch.nan)  # nothing may read what was not written
    for size in sizes:
        out.append(
            model.logits(model(model.embed(ids[:, start : start + size]), model.prompts([(0, start, size)]), cache))[0]
        )
        start += size
    return torch.cat(out).log_softmax(-1)


class Letters:
    """A tokenizer of the vocabulary: 0 to 2 are special (2 ends), then "a" to "z", then pairs of letters."""

    eos_id, special = 2, {}
    pieces = [b"", b"", b"", *(bytes([c]) for c in b"abcdefghijklmnopqrstuvwxyz")]
    pieces += [bytes([a, b]) for a in b"abcdefghijklmnopq" for b in b"abcdefghijklmnop"]
    vocab_size = len(pieces)

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[id] for id in ids).decode(errors="replace")

    def text(self, ids: list[int]) -> str:
        return b"".join(self.pieces[id] for id in ids).decode()


class Endless(Letters):
    eos_id = -1


class Tokens(Letters):
    """So many tokens, none of which ends an answer."""

    eos_id = -1

    def decode(self, ids: list[int]) -> str:
        return "x" * len(ids)


def answers(result: tuple[int, str, str]) -> list[dict]:
    """The JSON lines of a run of generate.py that went well; stdout holds nothing else."""
    status, out, err = result
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


def random_tokens(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def later_chunk(case: int) -> tuple:
    """The queries, keys and values of a chunk that begins later in its text, and how steep their softmax is."""
    draw, sizes = torch.Generator().manual_seed(case), random.Random(case)
    B, KV, G, D = sizes.randint(1, 3), sizes.randint(1, 3), sizes.randint(1, 4), sizes.choice((6, 32, 48))
    T, before, steep = sizes.randint(1, 70), sizes.randint(1, 300), sizes.choice((1, 1, 30))
    q, k, v = (torch.randn(B, h, n, D, generator=draw) for h, n in ((KV * G, T), (KV, before + T), (KV, before + T)))
    q *= steep
    return q, k, v, steep


def formula(fields: dict, state: dict, tokens: list[int]) -> np.ndarray:
    """The decoder in float64, head by head, straight from the papers: (T, V) log-probabilities.

    `fields` are those of `config.json`, `state` holds canonical names.
    """
    W = {name: tensor.double().numpy() for name, tensor in state.items()}
    rope, D, T = fields["rope_parameters"], fields["head_dim"], len(tokens)
    heads, group = fields["num_attention_heads"], fields["num_attention_heads"] // fields["num_key_value_heads"]
    theta, original = rope["rope_theta"], rope.get("original_max_position_embeddings", 0)

    frequencies, sharpness = [], 1.0
    for i in range(D // 2):
        plain = theta ** (-2 * i / D)
        if rope["rope_type"] == "yarn":
            ends = [
                D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
            ]
            if rope.get("truncate", True):
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            low, high = max(ends[0], 0), min(ends[1], D - 1)
            slow = min(1, max(0, (i - low) / (high - low)))  # share of interpolation
            plain = slow * plain / rope["factor"] + (1 - slow) * plain
        frequencies.append(plain)
    if rope["rope_type"] == "yarn":
        mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        sharpness = 0.1 * math.log(rope["factor"]) + 1
        if mscale and mscale_all:
            sharpness = (0.1 * mscale * math.log(rope["factor"]) + 1) / (
                0.1 * mscale_all * math.log(rope["factor"]) + 1
            )
        sharpness = rope.get("attention_factor", sharpness)
    positions = np.arange(T)
    turns = sharpness * np.exp(1j * positions[:, None] * np.array(frequencies))  # (T, D/2)
    scaling = np.ones(T)
    if beta := rope.get("llama_4_scaling_beta"):
        scaling = 1 + beta * np.log(1 + positions // original)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + fields["rms_norm_eps"]) * weight

    def rotate(x):
        z = (x[:, : D // 2] + 1j * x[:, D // 2 :]) * turns
        return np.concatenate([z.real, z.imag], axis=1)

    x = W["embed_tokens.weight"][tokens]
    for layer in range(fields["num_hidden_layers"]):
        w = {name: W[f"layers.{layer}.{name}.weight"] for name in (*PROJECTIONS, "input_layernorm")}
        h, read = norm(x, w["input_layernorm"]), []
        for head in range(heads):
            own, shared = slice(head * D, head * D + D), slice(head // group * D, head // group * D + D)
            q = rotate(h @ w["self_attn.q_proj"][own].T) * scaling[:, None]
            k, v = rotate(h @ w["self_attn.k_proj"][shared].T), h @ w["self_attn.v_proj"][shared].T
            scores = np.where(positions[:, None] >= positions, q @ k.T / math.sqrt(D), -np.inf)
            scores = np.exp(scores - scores.max(1, keepdims=True))
            read.append(scores / scores.sum(1, keepdims=True) @ v)
        x = x + np.concatenate(read, axis=1) @ w["self_attn.o_proj"].T
        h = norm(x, W[f"layers.{layer}.post_attention_layernorm.weight"])
        gate = h @ w["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    head = W["embed_tokens.weight" if fields["tie_word_embeddings"] else "lm_head.weight"]
    logits = norm(x, W["norm.weight"]) @ head.T
    top = logits.max(1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))


def set_weights(model: MistralMedium, tensors: dict[str, torch.Tensor]) -> MistralMedium:
    """Give a model of one process exactly these whole tensors, by canonical name."""
    parts = parts_of(model)
    assert sorted(parts) == sorted(tensors)
    for name, (layer, part) in parts.items():
        if layer.weight.is_meta:
            layer.weight = torch.nn.Parameter(torch.empty_like(layer.weight, device="cpu"))
        rows = part.rows_of(layer.weight.data)
        assert rows.shape == tensors[name].shape, name
        rows.copy_(tensors[name])
    return model


def whole(model: MistralMedium, grad: bool = False) -> dict[str, torch.Tensor]:
    """What a model of one process holds by canonical name, or the gradients of that."""
    weights = {name: layer.weight.grad if grad else layer.weight for name, (layer, _) in parts_of(model).items()}
    return {name: part.rows_of(weights[name]) for name, (_, part) in parts_of(model).items()}


def check_product(draw: random.Random, rows: int, by_rows: bool, device: torch.device) -> None:
    """`fp8.fp8_matmul` against float64 on the very numbers that are multiplied, the input's scale given and not.

    Sums are float32's, but units that add up many products at a time keep 14 bits of each beside the largest.
    """
    torch.manual_seed(draw.getrandbits(32))
    size, out = 16 * draw.randint(1, 20), 16 * draw.randint(1, 20)
    x, weight = torch.randn(rows, size).bfloat16(), torch.randn(out, size).mul(100).to(fp8.E4M3)
    scales = torch.rand(out, 1).add(0.5) if by_rows else torch.tensor(0.7)
    act = draw.choice([None, x.abs().max().float() / 600])  # the largest inputs are clamped
    scale = fp8.scale_of(x.abs().amax()) if act is None else act
    meant, exact = fp8.quantize(x, scale).double() * scale.double(), weight.double() * scales.double()
    expected, sizes = meant @ exact.t(), meant.abs() @ exact.abs().t()
    x, weight, scales = (t.to(device) for t in (x, weight, scales))
    found = fp8.fp8_matmul(x, weight, scales, act if act is None else act.to(device)).cpu()
    assert ((found.double() - expected).abs() <= expected.abs() * 2**-8 + sizes * 2**-12).all()
