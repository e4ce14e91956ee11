"""The model's sizes, read from `config.json` (HF layout) or `params.json` (native layout).

One dataclass for the decoder, one for its rotary embedding, one for the vision tower. There is one parser, that of the
HF layout; a native file is first translated into the dictionary that `config.json` would hold. Everything that changes
a number is either understood or refused here, so that no later file has to ask what a checkpoint might mean.
"""

import math
import os

from model import Config, RopeConfig, VisionConfig
from runtime.files import Fields, UserError, find_folder, read_json, reading, warn
from runtime.native import VISION_SIZES, translate_params

# Fields that have no default and the same name in the file as here.
TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What transformers' classes know, and older files have: it is read here, or changes nothing that is computed.
KNOWN = {*TEXT_SIZES, *VISION_SIZES} | set(
    "architectures model_type dtype torch_dtype transformers_version _name_or_path use_cache return_dict hidden_act "
    "num_key_value_heads head_dim rms_norm_eps max_position_embeddings sliding_window attention_bias mlp_bias "
    "rope_parameters rope_scaling rope_theta tie_word_embeddings initializer_range bos_token_id eos_token_id "
    "pad_token_id text_config vision_config quantization_config vision_feature_layer multimodal_projector_bias "
    "projector_hidden_act spatial_merge_size image_token_index image_token_id image_size num_channels".split()
)
KNOWN_OF_ROPE = set(
    "rope_type type rope_theta factor original_max_position_embeddings max_position_embeddings beta_fast beta_slow "
    "mscale mscale_all_dim attention_factor truncate llama_4_scaling_beta partial_rotary_factor".split()
)


def read_config(directory: str) -> Config:
    """Read `config.json`, or `params.json` where that is all there is, from a checkpoint directory (or a file)."""
    paths = [directory]
    if not (directory.endswith(".json") and os.path.isfile(directory)):
        paths = [os.path.join(find_folder(directory), name) for name in ("config.json", "params.json")]
    if (path := next(filter(os.path.exists, paths), None)) is None:
        raise UserError(f"{directory}: holds neither config.json nor params.json; give the folder of a checkpoint")
    with reading(path, "config"):
        raw = Fields(read_json(path), path).values
        native = "dim" in raw or "n_layers" in raw
        config = parse_config(translate_params(raw, path) if native else raw, path)
        check(config, path)
    return config


def parse_config(raw: dict, where: str = "config.json") -> Config:
    """An HF config: `mistral3` with `text_config`, or `ministral3`/`mistral` with the text fields at the top."""
    top = Fields(raw, where)
    top.only(model_type=("mistral3", "ministral3", "mistral"))
    nested = "text_config" in raw
    text = Fields(raw["text_config"], f"{where}, text_config") if nested else top
    if nested:
        text.only(model_type=("ministral3", "mistral"))
    for section in filter(None, (top, nested and text, top.section("vision_config"))):
        section.say_strangers(KNOWN)
    text.only(hidden_act=("silu",), sliding_window=(None,), attention_bias=(False, None), mlp_bias=(False, None))
    sizes = {name: text.size(name) for name in TEXT_SIZES}
    heads = sizes["num_attention_heads"]
    q = top.section("quantization_config") or Fields({"quant_method": "fp8"}, where)
    q.get("quant_method", str)
    q.only(quant_method=("fp8",), weight_block_size=(None,), activation_scheme=("static", "dynamic"))
    return Config(
        **sizes,
        num_key_value_heads=text.size("num_key_value_heads", heads),
        head_dim=text.size("head_dim", sizes["hidden_size"] // heads),
        rms_norm_eps=text.positive("rms_norm_eps", float),
        max_position_embeddings=text.size("max_position_embeddings"),
        # Where the two differ the top counts, as in transformers, where the two classes' own defaults differ as well.
        tie_word_embeddings=top.get("tie_word_embeddings", bool, text.get("tie_word_embeddings", bool, nested)),
        rope=parse_rope(text),
        vision=parse_vision(top),
        fp8=raw.get("quantization_config") is not None,
        activation_scheme=q.get("activation_scheme", str, "static"),
        initializer_range=text.get("initializer_range", float, 0.02),
        raw=raw,
    )


def parse_rope(text: Fields) -> RopeConfig:
    """`rope_parameters`, or the older `rope_theta` + `rope_scaling`; the type is `rope_type` or, older, `type`."""
    older = text.section("rope_scaling")
    rope = text.section("rope_parameters") or older or Fields({}, text.where)
    rope.say_strangers(KNOWN_OF_ROPE)
    if older and older.values:  # transformers lets it win, which people use to switch YaRN on
        text.agree("rope_scaling", rope.values, "rope_parameters")
    theta = (text if rope.values.get("rope_theta") is None else rope).positive("rope_theta", float)
    text.agree("rope_theta", theta, "rope_theta inside rope_parameters")
    rope.only(rope_type=("default", "yarn"), type=("default", "yarn"), partial_rotary_factor=(1.0, None))
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    rope.agree("type", kind, "rope_type")
    beta = rope.get("llama_4_scaling_beta", float, 0.0)
    if kind == "default":
        original = rope.size("original_max_position_embeddings", text.size("max_position_embeddings"))
        return RopeConfig(theta, original_max_position_embeddings=original, query_scaling_beta=beta)
    factor = rope.positive("factor", float)
    return RopeConfig(
        theta,
        yarn=True,
        factor=factor,
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
        beta_fast=rope.positive("beta_fast", float, 32.0),
        beta_slow=rope.positive("beta_slow", float, 1.0),
        truncate=rope.get("truncate", bool, True),
        attention_factor=attention_factor(rope, factor, text.size("num_hidden_layers")),
        query_scaling_beta=beta,
    )


def attention_factor(rope: Fields, factor: float, layers: int) -> float:
    """How much YaRN multiplies cos and sin for a context `factor` times longer, by the rule of transformers.

    A longer context spreads attention over more keys, so YaRN sharpens it by m = 0.1 ln(factor) + 1 (its equation 22).
    A config says how much in one of three ways: the number itself; two multipliers k of the logarithm (DeepSeek's),
    whose m(k) are divided, so that equal ones cancel out to 1; or neither, which is m(1).
    """

    def m(k: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * k * math.log(factor) + 1.0

    if rope.values.get("attention_factor") is not None:
        return rope.positive("attention_factor", float)
    mscale, mscale_all_dim = (rope.get(name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
    if not (mscale and mscale_all_dim):
        return m(1.0)
    if (layers, factor, mscale_all_dim) == (88, 64.0, 1.0):
        warn(
            f"{rope.where}: mscale_all_dim = 1.0 (apply_scale = false in params.json), a mistake that this model's "
            f"config first had, makes the attention factor {m(mscale) / m(1.0):.5f} instead of {m(1.0):.5f} and spoils "
            "long contexts. Set mscale_all_dim to 0.0 (apply_scale to true)."
        )
    return m(mscale) / m(mscale_all_dim)


def parse_vision(top: Fields) -> VisionConfig | None:
    tower = top.section("vision_config")
    if tower is None:
        return None
    top.only(vision_feature_layer=(-1,), multimodal_projector_bias=(False,), projector_hidden_act=("gelu",))
    tower.only(model_type=("pixtral",), hidden_act=("gelu", "silu"), num_channels=(3,))
    rope = tower.section("rope_parameters") or tower
    rope.only(rope_type=("axial", "default"), type=("axial", "default"))
    token = top.get("image_token_index", int, top.get("image_token_id", int, 10))
    top.agree("image_token_id", token, "image_token_index")
    vision = VisionConfig(
        **{name: tower.size(name) for name in VISION_SIZES},
        image_size=tower.size("image_size"),
        rope_theta=rope.positive("rope_theta", float, tower.positive("rope_theta", float, 10000.0)),
        hidden_act=tower.get("hidden_act", str, "gelu"),
        num_channels=tower.size("num_channels", 3),
        spatial_merge_size=top.size("spatial_merge_size", 2),
        image_token_id=token,
    )
    tower.agree("head_dim", vision.head_dim, "hidden_size / num_attention_heads")
    return vision


def check(config: Config, where: str) -> None:
    """Sizes that contradict each other."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(f"{where}: num_attention_heads is not a multiple of num_key_value_heads")
    if config.rope.theta <= 1:
        raise UserError(f"{where}: rope_theta should be above 1, found {config.rope.theta}")
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim = {config.head_dim} is odd, but rotary embedding turns pairs")
    if (v := config.vision) and (v.hidden_size % v.num_attention_heads or v.head_dim % 2):
        raise UserError(f"{where}: the vision tower's hidden_size does not split into heads of an even size")
