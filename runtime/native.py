"""Mistral's own layout: what `params.json` says in the words of `config.json`, tensor names, and the order of rows."""

import torch

from model import Config
from runtime.files import Fields

VISION_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")

NATIVE_SIZES = dict(vocab_size="vocab_size", hidden_size="dim", intermediate_size="hidden_dim", head_dim="head_dim")
NATIVE_SIZES |= dict(num_hidden_layers="n_layers", num_attention_heads="n_heads", num_key_value_heads="n_kv_heads")

# What absent fields mean to mistral-inference. Three of them then say what is not supported here.
NATIVE_VISION = dict(mm_projector_id="", spatial_merge_size=1, add_pre_mm_projector_layer_norm=False, adapter_bias=True)

# What mistral-inference and vLLM know: it is read here, or changes nothing that is computed.
NATIVE_KNOWN = {*NATIVE_SIZES.values(), "norm_eps", "rope_theta", "max_position_embeddings", "tied_embeddings"}
NATIVE_KNOWN |= {"yarn", "llama_4_scaling", "quantization", "vision_encoder", "max_seq_len", "model_type", "causal"}
NATIVE_KNOWN_OF_VISION = {*VISION_SIZES, *NATIVE_VISION, "rope_theta", "num_channels", "image_size", "max_image_size"}
NATIVE_KNOWN_OF_VISION |= {"image_token_id", "image_break_token_id", "image_end_token_id"}


def translate_params(raw: dict, where: str = "params.json") -> dict:
    """The dictionary of a `config.json` that says what this native `params.json` says.

    Every value is checked here under its native name, so that errors speak of the file that the user has. Exports copy
    the result, so it also says what transformers and llama.cpp want to read, defaults included.
    """
    top = Fields(raw, where)
    top.say_strangers(NATIVE_KNOWN)
    top.only(**dict.fromkeys(("moe", "lora", "sliding_window", "_sliding_window"), (None, False)))
    top.only(use_biases=(None, False), q_lora_rank=(None, False))
    family, rope = translate_rope(top)
    hf = {name: top.size(native) for name, native in NATIVE_SIZES.items()}
    hf |= dict(rms_norm_eps=top.positive("norm_eps", float), rope_parameters=rope)
    hf |= dict(max_position_embeddings=top.size("max_position_embeddings"))
    hf |= dict(tie_word_embeddings=top.get("tied_embeddings", bool, False))
    hf |= dict(model_type=family.lower(), hidden_act="silu", sliding_window=None, attention_dropout=0.0)
    hf |= dict(initializer_range=0.02, bos_token_id=1, eos_token_id=2, pad_token_id=11)
    tower = top.section("vision_encoder")
    if tower is not None:
        hf = translate_vision(tower, hf)
    architecture = "Mistral3ForConditionalGeneration" if tower else f"{family}ForCausalLM"
    hf = dict(architectures=[architecture], dtype="bfloat16") | hf
    if quantization := top.section("quantization"):
        quantization.get("qformat_weight", str)
        quantization.only(qformat_weight=("fp8_e4m3",), qscheme_act=("TENSOR", "DYNAMIC", None))
        static = quantization.values.get("qscheme_act", "TENSOR") == "TENSOR"
        hf["quantization_config"] = dict(quant_method="fp8", activation_scheme="static" if static else "dynamic")
    return hf


def translate_rope(top: Fields) -> tuple[str, dict]:
    """(the family of transformers' classes that the fields ask for, `rope_parameters`)."""
    original = "original_max_position_embeddings"  # in the HF layout also the period of query scaling
    plain = {"rope_type": "default", "rope_theta": top.positive("rope_theta", float)}
    rope = plain | {original: top.size("max_position_embeddings"), "llama_4_scaling_beta": 0.0}
    yarn, scaling = top.section("yarn"), top.section("llama_4_scaling")
    if yarn is not None:
        rope |= {"rope_type": "yarn", "factor": yarn.positive("factor", float), original: yarn.size(original)}
        rope |= dict(beta_fast=yarn.positive("beta", float), beta_slow=yarn.positive("alpha", float))
        # Whether the attention factor applies: a zero leaves it m(1), equal multipliers cancel out to 1.
        rope |= dict(mscale=1.0, mscale_all_dim=0.0 if yarn.get("apply_scale", bool) else 1.0)
        if scaling is not None:
            scaling.agree(original, rope[original], "that of yarn")
    if scaling is not None:
        rope |= {"llama_4_scaling_beta": scaling.get("beta", float), original: scaling.size(original, rope[original])}
    # transformers' Ministral 3 always scales queries; its Mistral knows no such field.
    return ("Mistral", plain) if yarn is None and scaling is None else ("Ministral3", rope)


def translate_vision(tower: Fields, text: dict) -> dict:
    """The dictionary of a model that has this tower beside the decoder `text`."""
    tower.say_strangers(NATIVE_KNOWN_OF_VISION)
    tower.values = NATIVE_VISION | tower.values
    tower.only(mm_projector_id=("patch_merge",), add_pre_mm_projector_layer_norm=(True,), adapter_bias=(False,))
    tower.only(num_channels=(3,))
    longest = "max_image_size" if "max_image_size" in tower.values else "image_size"
    vision = {name: tower.size(name) for name in VISION_SIZES} | dict(image_size=tower.size(longest))
    vision |= dict(model_type="pixtral", hidden_act="silu", num_channels=3)
    vision["head_dim"] = vision["hidden_size"] // vision["num_attention_heads"]
    vision["rope_parameters"] = dict(rope_type="axial", rope_theta=tower.positive("rope_theta", float, 10000.0))
    return dict(
        model_type="mistral3",
        image_token_index=tower.get("image_token_id", int, 10),
        spatial_merge_size=tower.size("spatial_merge_size"),
        tie_word_embeddings=text["tie_word_embeddings"],
        text_config=text,
        vision_config=vision,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
    )


def to_params(config: Config) -> dict:
    """The `params.json` of a text-only `config`: what `translate_params` reads.

    It has no words for a YaRN ramp that is not rounded, nor for an attention factor other than 1 and YaRN's own.
    """
    rope, params = config.rope, {native: getattr(config, name) for name, native in NATIVE_SIZES.items()}
    params |= dict(norm_eps=config.rms_norm_eps, tied_embeddings=config.tie_word_embeddings, rope_theta=rope.theta)
    params |= dict(max_position_embeddings=config.max_position_embeddings)
    original = dict(original_max_position_embeddings=rope.original_max_position_embeddings)
    if rope.yarn:
        params["yarn"] = original | dict(factor=rope.factor, apply_scale=rope.attention_factor != 1.0)
        params["yarn"] |= dict(beta=rope.beta_fast, alpha=rope.beta_slow)
    if rope.query_scaling_beta:
        params["llama_4_scaling"] = original | dict(beta=rope.query_scaling_beta)
    if config.fp8:
        params["quantization"] = dict(qformat_weight="fp8_e4m3", qscheme_act="DYNAMIC")
    return params


# What a decoder layer's parts are called in this layout, and what here. The tower's have only the second kind of names.
BLOCKS = {"attention": "self_attn", "feed_forward": "mlp"}
BLOCKS |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
LINEARS = {f"w{x}": f"{x}_proj" for x in "qkvo"} | {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LINEARS |= {"qscale_weight": "weight_scale_inv", "qscale_act": "activation_scale"}

NATIVE_NAMES = [
    (r"^tok_embeddings\.", "embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^vision_encoder\.", "vision_tower."),
    (r"^patch_merger\.", "multi_modal_projector.patch_merger."),
    (r"^pre_mm_projector_norm\.", "multi_modal_projector.norm."),
    (r"^vision_language_adapter\.w_in\.", "multi_modal_projector.linear_1."),
    (r"^vision_language_adapter\.w_out\.", "multi_modal_projector.linear_2."),
    *((rf"^layers\.(\d+)\.{native}\.", rf"layers.\1.{name}.") for native, name in BLOCKS.items()),
    *((rf"\.{native}(?=\.|$)", f".{name}") for native, name in LINEARS.items()),
]


def native_name(name: str) -> str:
    """The name of a decoder layer's tensor in this layout. Others than those of layers stay."""
    words = {name: native for native, name in (BLOCKS | LINEARS).items()}
    return ".".join(words.get(word, word) for word in name.split("."))


def half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a native q or k projection (heads · D, in), rotary pairs (2i, 2i+1), to the HF order (i, i + D/2)."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """And back."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
