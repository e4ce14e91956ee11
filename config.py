"""The model's sizes, read from `config.json` (HF layout) or `params.json` (native layout).

One dataclass for the decoder, one for its rotary embedding, one for the vision tower. Everything that changes a
number is either understood or refused here, so that no later file has to ask what a checkpoint might mean.
"""

import json
import math
import os
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, field


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong and what to do. Programs exit with `status`."""

    status = 2


class TopologyError(UserError):
    """The model cannot be split this way. The program that knows the flags adds what to do about it."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (RoFormer, arXiv:2104.09864) and its YaRN extension (arXiv:2309.00071)."""

    theta: float
    yarn: bool = False
    factor: float = 1.0  # YaRN: how many times longer the context became
    original_max_position_embeddings: int = 0  # context length before YaRN; also the period of query scaling
    beta_fast: float = 32.0  # frequencies with more rotations than this over the original context stay as they are
    beta_slow: float = 1.0  # those with fewer are divided by `factor`; between the two, a ramp
    truncate: bool = True  # the ramp's ends are rounded outwards to whole dimensions
    attention_factor: float = 1.0  # multiplies cos and sin
    query_scaling_beta: float = 0.0  # `llama_4_scaling_beta`


@dataclass(frozen=True)
class VisionConfig:
    """The Pixtral tower and the projector behind it. Sizes in pixels where they are lengths of an image."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int  # longest side an image may have after scaling
    rope_theta: float
    hidden_act: str = "silu"
    num_channels: int = 3
    spatial_merge_size: int = 2
    image_token_id: int = 10

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    """The decoder's sizes; `vision` is None for a text-only checkpoint."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    vision: VisionConfig | None = None
    fp8: bool = False  # the decoder's linears are stored as float8_e4m3fn with a scale each
    activation_scheme: str = "static"  # of FP8: "static" has a scale for inputs in the file, "dynamic" has none
    initializer_range: float = 0.02
    raw: dict = field(default_factory=dict, repr=False, compare=False)  # the HF config this came from, for export


# ------------------------------------------------------------------------------------------------- reading


class _Fields:
    """A JSON object whose fields are taken one by one, with errors that name the file and the field."""

    def __init__(self, values: dict, where: str):
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(values).__name__}")
        self.values, self.where = values, where

    def get(self, name: str, kind: type, default=None):
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise UserError(f"{self.where}: the field {name!r} is missing")
            return default
        number = kind is float and type(value) is int
        if not (number or type(value) is kind) or (kind is float and not math.isfinite(value)):
            raise UserError(f"{self.where}: {name} should be {kind.__name__}, found {value!r}")
        return kind(value)

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name, int, default)
        if value < 1:
            raise UserError(f"{self.where}: {name} should be at least 1, found {value}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.get(name, float, default)
        if value <= 0:
            raise UserError(f"{self.where}: {name} should be above 0, found {value}")
        return value

    def only(self, name: str, *allowed) -> None:
        """Refuse a value that would change the numbers in a way this code does not compute."""
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            raise UserError(f"{self.where}: {name} = {value!r} is not supported (known: {allowed[0]!r})")


def read_config(directory: str) -> Config:
    """Read `config.json`, or `params.json` where that is all there is, from a checkpoint directory (or a file)."""
    if os.path.isfile(directory):
        path = directory
    else:
        if not os.path.isdir(directory):
            raise UserError(f"{directory}: no such directory; give the folder that holds config.json or params.json")
        found = [p for n in ("config.json", "params.json") if os.path.isfile(p := os.path.join(directory, n))]
        if not found:
            raise UserError(f"{directory}: holds neither config.json nor params.json, so it is not a checkpoint")
        path = found[0]
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object")
    config = parse_params(raw, path) if "dim" in raw else parse_config(raw, path)
    check(config, path)
    return config


def read_json(path: str):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def read_lines(path: str) -> list[tuple[int, bytes]]:
    """The lines of a JSON-lines file that are not blank, each with its number from 1. Raises UserError."""
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def parse_line(line: bytes, where: str, keys: Collection[str] = ()) -> dict:
    """The JSON object in `line`; with `keys`, no others may occur. Raises UserError that begins with `where`."""
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: should be a JSON object")
    if keys and (strange := set(value) - set(keys)):
        raise UserError(f"{where}: unknown key {min(strange)!r}; known are {', '.join(sorted(keys))}")
    return value


def write_json(path: str, value) -> None:
    """Under a temporary name first: a reader sees the old file or the new one."""
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
    os.replace(f"{path}.partial", path)


def parse_config(raw: dict, where: str = "config.json") -> Config:
    """An HF config: `mistral3` with `text_config`, or `ministral3`/`mistral` with the text fields at the top."""
    top = _Fields(raw, where)
    top.only("model_type", "mistral3", "ministral3", "mistral")
    nested = "text_config" in raw
    text = _Fields(raw["text_config"], f"{where}, text_config") if nested else top
    if nested:
        text.only("model_type", "ministral3", "mistral")
    text.only("hidden_act", "silu")
    text.only("sliding_window", None)
    for name in ("attention_bias", "mlp_bias"):
        text.only(name, False, None)
    hidden_size, heads = text.size("hidden_size"), text.size("num_attention_heads")
    max_positions = text.size("max_position_embeddings")
    # Where the two differ the top's word counts, as in transformers, whose own defaults differ.
    tied = top.get("tie_word_embeddings", bool, text.get("tie_word_embeddings", bool, nested))

    fp8, scheme = False, "static"
    if (quantization := raw.get("quantization_config")) is not None:
        q = _Fields(quantization, f"{where}, quantization_config")
        q.only("quant_method", "fp8")
        q.only("weight_block_size", None)
        q.only("activation_scheme", "static", "dynamic")
        fp8, scheme = True, q.get("activation_scheme", str, "static")

    vision = None
    if raw.get("vision_config") is not None:
        top.only("vision_feature_layer", -1)
        top.only("multimodal_projector_bias", False)
        top.only("projector_hidden_act", "gelu")
        v = _Fields(raw["vision_config"], f"{where}, vision_config")
        v.only("model_type", "pixtral")
        v.only("hidden_act", "gelu", "silu")
        v.only("num_channels", 3)
        rope = _Fields(v.values.get("rope_parameters") or {}, f"{where}, vision_config.rope_parameters")
        rope.only("rope_type", "axial", "default")
        if (
            "image_token_index" in raw
            and raw.get("image_token_id", raw["image_token_index"]) != raw["image_token_index"]
        ):
            raise UserError(f"{where}: image_token_id and image_token_index differ")
        vision = VisionConfig(
            hidden_size=v.size("hidden_size"),
            intermediate_size=v.size("intermediate_size"),
            num_hidden_layers=v.size("num_hidden_layers"),
            num_attention_heads=v.size("num_attention_heads"),
            patch_size=v.size("patch_size"),
            image_size=v.size("image_size"),
            rope_theta=rope.positive("rope_theta", v.values.get("rope_theta") or 10000.0),
            hidden_act=v.get("hidden_act", str, "gelu"),
            num_channels=v.size("num_channels", 3),
            spatial_merge_size=top.size("spatial_merge_size", 2),
            image_token_id=top.get("image_token_index", int, raw.get("image_token_id") or 10),
        )
        if (head_dim := v.values.get("head_dim")) not in (None, vision.head_dim):
            raise UserError(
                f"{v.where}: head_dim = {head_dim}, but hidden_size / num_attention_heads = {vision.head_dim}"
            )
    return Config(
        vocab_size=text.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=text.size("intermediate_size"),
        num_hidden_layers=text.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=text.size("num_key_value_heads", heads),
        head_dim=text.size("head_dim", max(1, hidden_size // heads)),
        rms_norm_eps=text.positive("rms_norm_eps"),
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        rope=parse_rope(text, max_positions),
        vision=vision,
        fp8=fp8,
        activation_scheme=scheme,
        initializer_range=text.get("initializer_range", float, 0.02),
        raw=raw,
    )


def parse_rope(text: _Fields, max_positions: int) -> RopeConfig:
    """`rope_parameters`, or the older `rope_theta` + `rope_scaling`; the type is `rope_type` or, older, `type`."""
    values = text.values.get("rope_parameters") or text.values.get("rope_scaling") or {}
    rope = _Fields(values, f"{text.where}, rope_parameters")
    thetas = {float(f["rope_theta"]) for f in (values, text.values) if isinstance(f.get("rope_theta"), (int, float))}
    kinds = {values[name] for name in ("rope_type", "type") if name in values} or {"default"}
    if len(thetas) != 1 or len(kinds) != 1:
        raise UserError(
            f"{rope.where}: needs one rope_theta and one rope_type, found {sorted(thetas)} and {sorted(kinds)}"
        )
    theta, kind = thetas.pop(), kinds.pop()
    if kind not in ("default", "yarn"):
        raise UserError(f"{rope.where}: rope_type = {kind!r} is not supported (known: 'default', 'yarn')")
    rope.only("partial_rotary_factor", 1.0, None)
    beta = rope.get("llama_4_scaling_beta", float, 0.0)
    if kind == "default":
        original = rope.size("original_max_position_embeddings", max_positions)
        return RopeConfig(theta=theta, original_max_position_embeddings=original, query_scaling_beta=beta)
    factor = rope.positive("factor")
    mscale, mscale_all_dim = (values.get(name) or 0.0 for name in ("mscale", "mscale_all_dim"))
    if (attention_factor := values.get("attention_factor")) is None:
        if mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = yarn_mscale(factor)
        if mscale_all_dim == 1.0 and factor == 64.0 and text.values.get("num_hidden_layers") == 88:
            print(
                f"WARNING: {rope.where} says mscale_all_dim = 1.0, as this model's config first did by mistake. "
                f"It makes the attention factor {attention_factor:.5f} instead of 1.41589 and spoils long contexts. "
                "Set mscale_all_dim to 0.0.",
                file=sys.stderr,
            )
    return RopeConfig(
        theta=theta,
        yarn=True,
        factor=factor,
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        truncate=rope.get("truncate", bool, True),
        attention_factor=float(attention_factor),
        query_scaling_beta=beta,
    )


def yarn_mscale(factor: float, k: float = 1.0) -> float:
    """m(s, k) = 0.1 k ln(s) + 1: how much YaRN sharpens attention for a context s times longer (its equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * k * math.log(factor) + 1.0


def parse_params(raw: dict, where: str = "params.json") -> Config:
    """A native `params.json`."""
    top = _Fields(raw, where)
    theta, max_positions = top.positive("rope_theta"), top.size("max_position_embeddings", 262144)
    rope = dict(theta=theta, original_max_position_embeddings=max_positions)
    for name in ("moe", "lora", "sliding_window", "use_biases", "q_lora_rank"):
        top.only(name, None, False)
    if raw.get("yarn") is not None:
        y = _Fields(raw["yarn"], f"{where}, yarn")
        factor = y.positive("factor")
        rope = dict(
            theta=theta,
            yarn=True,
            factor=factor,
            original_max_position_embeddings=y.size("original_max_position_embeddings"),
            beta_fast=y.positive("beta"),
            beta_slow=y.positive("alpha"),
            attention_factor=yarn_mscale(factor) if y.get("apply_scale", bool, True) else 1.0,
        )
    if raw.get("llama_4_scaling") is not None:
        scaling = _Fields(raw["llama_4_scaling"], f"{where}, llama_4_scaling")
        rope["query_scaling_beta"] = scaling.get("beta", float)
        period = scaling.size("original_max_position_embeddings", rope["original_max_position_embeddings"])
        if "yarn" in rope and period != rope["original_max_position_embeddings"]:
            raise UserError(f"{where}: yarn and llama_4_scaling give different original_max_position_embeddings")
        rope["original_max_position_embeddings"] = period
    fp8, scheme = False, "static"
    if raw.get("quantization") is not None:
        q = _Fields(raw["quantization"], f"{where}, quantization")
        q.only("qformat_weight", "fp8_e4m3")
        q.only("qscheme_act", "TENSOR", "DYNAMIC", None)
        fp8, scheme = True, "static" if q.values.get("qscheme_act", "TENSOR") == "TENSOR" else "dynamic"
    vision = None
    if raw.get("vision_encoder") is not None:
        v = _Fields(raw["vision_encoder"], f"{where}, vision_encoder")
        v.only("mm_projector_id", "patch_merge")
        v.only("add_pre_mm_projector_layer_norm", True)
        v.only("adapter_bias", False)
        v.only("num_channels", 3)
        vision = VisionConfig(
            hidden_size=v.size("hidden_size"),
            intermediate_size=v.size("intermediate_size"),
            num_hidden_layers=v.size("num_hidden_layers"),
            num_attention_heads=v.size("num_attention_heads"),
            patch_size=v.size("patch_size"),
            image_size=v.size("max_image_size", v.values.get("image_size")),
            rope_theta=v.positive("rope_theta", 10000.0),
            num_channels=v.size("num_channels", 3),
            spatial_merge_size=v.size("spatial_merge_size", 2),
            image_token_id=v.get("image_token_id", int, 10),
        )
    return Config(
        vocab_size=top.size("vocab_size"),
        hidden_size=top.size("dim"),
        intermediate_size=top.size("hidden_dim"),
        num_hidden_layers=top.size("n_layers"),
        num_attention_heads=top.size("n_heads"),
        num_key_value_heads=top.size("n_kv_heads"),
        head_dim=top.size("head_dim"),
        rms_norm_eps=top.positive("norm_eps"),
        max_position_embeddings=max_positions,
        tie_word_embeddings=top.get("tied_embeddings", bool, False),
        rope=RopeConfig(**rope),
        vision=vision,
        fp8=fp8,
        activation_scheme=scheme,
    )


def check(config: Config, where: str) -> None:
    """Sizes that contradict each other."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{where}: num_attention_heads = {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads = {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim = {config.head_dim} is odd, but rotary embedding turns pairs")
    if (v := config.vision) is not None and (v.hidden_size % v.num_attention_heads or v.head_dim % 2):
        raise UserError(
            f"{where}: the vision tower's hidden_size = {v.hidden_size} does not split into "
            f"{v.num_attention_heads} heads of an even size"
        )


def to_hf(config: Config) -> dict:
    """The `config.json` of the HF layout that `parse_config` reads back as `config`; `raw` is kept where it exists."""
    if config.raw:
        raw = json.loads(json.dumps(config.raw))
    else:
        r = config.rope
        rope = dict(rope_type="yarn" if r.yarn else "default", rope_theta=r.theta)
        rope |= dict(
            original_max_position_embeddings=r.original_max_position_embeddings,
            llama_4_scaling_beta=r.query_scaling_beta,
        )
        if r.yarn:
            names = ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate")
            rope |= {name: getattr(r, name) for name in names}
        skip = ("rope", "vision", "fp8", "activation_scheme", "raw")
        raw = {name: value for name, value in asdict(config).items() if name not in skip}
        raw |= dict(model_type="ministral3", hidden_act="silu", rope_parameters=rope)
        raw |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=11, sliding_window=None, attention_dropout=0.0)
        if config.vision is None:
            raw |= dict(architectures=["Ministral3ForCausalLM"], dtype="bfloat16")
        else:
            vision = asdict(config.vision)
            merge, token = vision.pop("spatial_merge_size"), vision.pop("image_token_id")
            rope = dict(rope_type="axial", rope_theta=vision.pop("rope_theta"))
            vision |= dict(model_type="pixtral", rope_parameters=rope, head_dim=config.vision.head_dim)
            raw = dict(
                architectures=["Mistral3ForConditionalGeneration"],
                model_type="mistral3",
                dtype="bfloat16",
                image_token_index=token,
                spatial_merge_size=merge,
                vision_feature_layer=-1,
                multimodal_projector_bias=False,
                projector_hidden_act="gelu",
                tie_word_embeddings=config.tie_word_embeddings,
                text_config=raw,
                vision_config=vision,
            )
    raw.pop("quantization_config", None)
    if config.fp8:
        raw["quantization_config"] = dict(
            quant_method="fp8",
            activation_scheme=config.activation_scheme,
            weight_block_size=None,
            dequantize=False,
            modules_to_not_convert=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
    return raw
