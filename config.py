"""The model's sizes, read from `config.json` (HF layout) or `params.json` (native layout).

One dataclass for the decoder, one for its rotary embedding, one for the vision tower. There is one parser, that of the
HF layout; a native file is first translated into the dictionary that `config.json` would hold. Everything that changes
a number is either understood or refused here, so that no later file has to ask what a checkpoint might mean.
"""

import json
import math
import os
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong and what to do. Programs exit with `status`.

    Messages quote files, which may hold anything: what does not print is escaped, and a long line loses its middle.
    """

    status = 2

    def __init__(self, message: str):
        for _ in range(2):  # again, since what is escaped grows
            message = message if len(message) <= 440 else f"{message[:280]} … {message[-157:]}"
            message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(message[:440])


class TopologyError(UserError):
    """The model cannot be split this way. The program that knows the flags adds what to do about it."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (RoFormer, arXiv:2104.09864) and its YaRN extension (arXiv:2309.00071)."""

    theta: float
    yarn: bool = False
    factor: float = 1.0  # YaRN: how many times longer the context became
    original_max_position_embeddings: int = 0  # context length before YaRN; also the period of query scaling
    # YaRN leaves a frequency as it is where it turns more than `beta_fast` times over the original context, divides it
    # by `factor` where it turns less than `beta_slow` times, and blends the two in between, along a linear ramp.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ends of the ramp outwards to whole dimensions
    attention_factor: float = 1.0  # multiplies cos and sin, so that scores grow by its square
    query_scaling_beta: float = 0.0  # Llama 4: queries times 1 + beta * ln(1 + position // original context)


@dataclass(frozen=True)
class VisionConfig:
    """The Pixtral tower and the projector behind it. Lengths of images are in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int  # longest side of an image after scaling
    rope_theta: float
    hidden_act: str  # of the tower's feed-forward: "silu" or "gelu"
    num_channels: int
    spatial_merge_size: int  # the projector merges this many patches along each side into one token
    image_token_id: int  # the token whose positions take image features

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
    tie_word_embeddings: bool  # the head is the embedding's own matrix
    rope: RopeConfig
    vision: VisionConfig | None
    fp8: bool  # the decoder's linears are stored as float8_e4m3fn with a scale each
    activation_scheme: str  # of FP8: "static" has a scale for inputs in the file, "dynamic" has none
    initializer_range: float  # standard deviation of random initial weights
    raw: dict = field(repr=False, compare=False)  # the HF dictionary that all this was read from, for export


# ------------------------------------------------------------------------------------------------- the parser

# Fields that have no default and the same name in the file as here.
TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")

# The largest sizes, and other numbers. Nothing real comes near; what is beyond might be built, or overflow, first.
LARGEST_SIZE, LARGEST_NUMBER = 1 << 20, 1e30
LARGEST = {"num_hidden_layers": 1 << 10, "n_layers": 1 << 10, "vocab_size": 1 << 24, "spatial_merge_size": 1 << 6}
LARGEST |= dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 1 << 30)


class _Fields:
    """A JSON object whose fields are taken one by one, with errors that name the file and the field.

    A null counts as absent, as in transformers. No default means that the field must be there.
    """

    def __init__(self, values: dict, where: str):
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(values).__name__}")
        self.values, self.where = values, where

    def section(self, name: str) -> "_Fields | None":
        values = self.values.get(name)
        return None if values is None else _Fields(values, f"{self.where}, {name}")

    def get(self, name: str, kind: type, default=None):
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise UserError(f"{self.where}: the field {name!r} is missing; add it")
            return default
        # `type(value)`, not isinstance: to Python, true is an int.
        number = kind is float and type(value) is int
        if not (number or type(value) is kind) or (kind in (int, float) and not abs(value) < LARGEST_NUMBER):
            raise UserError(f"{self.where}: {name} should be {kind.__name__}, found {value!r}")
        return kind(value)

    def positive(self, name: str, kind: type, default=None, largest=LARGEST_NUMBER):
        value = self.get(name, kind, default)
        if not 1 / LARGEST_NUMBER < value <= largest:
            raise UserError(f"{self.where}: {name} should be above 0 and at most {largest:g}, found {value}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        return self.positive(name, int, default, LARGEST.get(name, LARGEST_SIZE))

    def only(self, **allowed: tuple) -> None:
        """Refuse a value that would change the numbers in a way that this code does not compute.

        Such a checkpoint would load and run, only with answers that are a little wrong, which is the worst outcome.
        For each field: the values that are known; the first is what its absence means.
        """
        for name, known in allowed.items():
            if (value := self.values.get(name, known[0])) not in known:
                listed = ", ".join(map(repr, known))
                raise UserError(f"{self.where}: {name} = {value!r} is not supported (known: {listed})")

    def agree(self, name: str, value, source: str) -> None:
        """A field that repeats what `source` says may be absent, but must not differ."""
        if self.values.get(name) not in (None, value):
            raise UserError(f"{self.where}: {name} = {self.values[name]!r}, but {source} = {value!r}")


def read_config(directory: str) -> Config:
    """Read `config.json`, or `params.json` where that is all there is, from a checkpoint directory (or a file)."""
    paths = [directory]
    if not (directory.endswith(".json") and os.path.isfile(directory)):
        paths = [os.path.join(find_folder(directory), name) for name in ("config.json", "params.json")]
    if (path := next(filter(os.path.exists, paths), None)) is None:
        raise UserError(f"{directory}: holds neither config.json nor params.json; give the folder of a checkpoint")
    with reading(path, "config"):
        raw = _Fields(read_json(path), path).values
        native = "dim" in raw or "n_layers" in raw
        config = parse_config(translate_params(raw, path) if native else raw, path)
        check(config, path)
    return config


def find_folder(path: str) -> str:
    """`path`, which should be the folder of a checkpoint."""
    if os.path.isfile(path):
        raise UserError(f"{path}: is a file; give the folder that holds the checkpoint")
    if not os.path.isdir(path):
        hub = f" (of a Hugging Face repository: hf download {path} --local-dir DIR)" if path.count("/") == 1 else ""
        raise UserError(f"{path}: no such directory; give the folder of a checkpoint{hub}")
    return path


def parse_config(raw: dict, where: str = "config.json") -> Config:
    """An HF config: `mistral3` with `text_config`, or `ministral3`/`mistral` with the text fields at the top."""
    top = _Fields(raw, where)
    top.only(model_type=("mistral3", "ministral3", "mistral"))
    nested = "text_config" in raw
    text = _Fields(raw["text_config"], f"{where}, text_config") if nested else top
    if nested:
        text.only(model_type=("ministral3", "mistral"))
    text.only(hidden_act=("silu",), sliding_window=(None,), attention_bias=(False, None), mlp_bias=(False, None))
    sizes = {name: text.size(name) for name in TEXT_SIZES}
    heads = sizes["num_attention_heads"]
    q = top.section("quantization_config") or _Fields({}, where)
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


def parse_rope(text: _Fields) -> RopeConfig:
    """`rope_parameters`, or the older `rope_theta` + `rope_scaling`; the type is `rope_type` or, older, `type`."""
    rope = text.section("rope_parameters") or text.section("rope_scaling") or _Fields({}, text.where)
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


def attention_factor(rope: _Fields, factor: float, layers: int) -> float:
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


def parse_vision(top: _Fields) -> VisionConfig | None:
    tower = top.section("vision_config")
    if tower is None:
        return None
    top.only(vision_feature_layer=(-1,), multimodal_projector_bias=(False,), projector_hidden_act=("gelu",))
    tower.only(model_type=("pixtral",), hidden_act=("gelu", "silu"), num_channels=(3,))
    rope = tower.section("rope_parameters") or tower
    rope.only(rope_type=("axial", "default"))
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


# ------------------------------------------------------------------------------------- the native file

NATIVE_SIZES = dict(vocab_size="vocab_size", hidden_size="dim", intermediate_size="hidden_dim", head_dim="head_dim")
NATIVE_SIZES |= dict(num_hidden_layers="n_layers", num_attention_heads="n_heads", num_key_value_heads="n_kv_heads")
# What absent fields mean to mistral-inference. Three of them then say what is not supported here.
NATIVE_VISION = dict(mm_projector_id="", spatial_merge_size=1, add_pre_mm_projector_layer_norm=False, adapter_bias=True)


def translate_params(raw: dict, where: str = "params.json") -> dict:
    """The dictionary of a `config.json` that says what this native `params.json` says.

    Every value is checked here under its native name, so that errors speak of the file that the user has. Exports copy
    the result, so it also says what transformers and llama.cpp want to read, defaults included.
    """
    top = _Fields(raw, where)
    top.only(**dict.fromkeys(("moe", "lora", "sliding_window", "_sliding_window"), (None, False)))
    top.only(use_biases=(None, False), q_lora_rank=(None, False))
    max_positions = top.size("max_position_embeddings")
    # The HF layout has one field for both: the context before YaRN, and the period of query scaling.
    original = "original_max_position_embeddings"
    plain = {"rope_type": "default", "rope_theta": top.positive("rope_theta", float)}
    rope = plain | {original: max_positions, "llama_4_scaling_beta": 0.0}
    if yarn := top.section("yarn"):
        rope |= {"rope_type": "yarn", "factor": yarn.positive("factor", float), original: yarn.size(original)}
        rope |= dict(beta_fast=yarn.positive("beta", float), beta_slow=yarn.positive("alpha", float))
        # Whether the attention factor applies: a zero leaves it m(1), equal multipliers cancel out to 1.
        rope |= dict(mscale=1.0, mscale_all_dim=0.0 if yarn.get("apply_scale", bool) else 1.0)
    if scaling := top.section("llama_4_scaling"):
        if yarn:
            scaling.agree(original, rope[original], "that of yarn")
        rope |= {"llama_4_scaling_beta": scaling.get("beta", float), original: scaling.size(original, rope[original])}
    # transformers' Ministral 3 always scales queries; its Mistral knows no such field.
    family, rope = ("Ministral3", rope) if yarn or scaling else ("Mistral", plain)
    hf = {name: top.size(native) for name, native in NATIVE_SIZES.items()}
    hf |= dict(rms_norm_eps=top.positive("norm_eps", float), max_position_embeddings=max_positions)
    hf |= dict(tie_word_embeddings=top.get("tied_embeddings", bool, False), rope_parameters=rope)
    hf |= dict(model_type=family.lower(), hidden_act="silu", sliding_window=None, attention_dropout=0.0)
    hf |= dict(initializer_range=0.02, bos_token_id=1, eos_token_id=2, pad_token_id=11)
    if tower := top.section("vision_encoder"):
        tower.values = NATIVE_VISION | tower.values
        tower.only(mm_projector_id=("patch_merge",), add_pre_mm_projector_layer_norm=(True,), adapter_bias=(False,))
        tower.only(num_channels=(3,))
        longest = "max_image_size" if "max_image_size" in tower.values else "image_size"
        vision = {name: tower.size(name) for name in VISION_SIZES} | dict(image_size=tower.size(longest))
        vision |= dict(model_type="pixtral", hidden_act="silu", num_channels=3)
        vision["head_dim"] = vision["hidden_size"] // vision["num_attention_heads"]
        vision["rope_parameters"] = dict(rope_type="axial", rope_theta=tower.positive("rope_theta", float, 10000.0))
        hf = dict(
            model_type="mistral3",
            image_token_index=tower.get("image_token_id", int, 10),
            spatial_merge_size=tower.size("spatial_merge_size"),
            tie_word_embeddings=hf["tie_word_embeddings"],
            text_config=hf,
            vision_config=vision,
        )
        hf |= dict(vision_feature_layer=-1, multimodal_projector_bias=False, projector_hidden_act="gelu")
    architecture = "Mistral3ForConditionalGeneration" if tower else f"{family}ForCausalLM"
    hf = dict(architectures=[architecture], dtype="bfloat16") | hf
    if quantization := top.section("quantization"):
        quantization.only(qformat_weight=("fp8_e4m3",), qscheme_act=("TENSOR", "DYNAMIC", None))
        static = quantization.values.get("qscheme_act", "TENSOR") == "TENSOR"
        hf["quantization_config"] = dict(quant_method="fp8", activation_scheme="static" if static else "dynamic")
    return hf


# ------------------------------------------------------------------------------------------------ reading files

MEGABYTE, DEEPEST = 1 << 20, 64  # levels of JSON
LFS = b"version https://git-lfs"  # how the pointers begin that Git keeps in place of large files


def warn(text: str) -> None:
    """One line on stderr, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"WARNING: {UserError(text)}", file=sys.stderr)


@contextmanager
def reading(path: str, kind: str) -> Iterator[None]:
    """The guard around the interpretation of a file: whatever its reader raises becomes one line with its name."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith(str(UserError(path))) else UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path}: not a valid {kind} ({type(error).__name__}: {error})") from None


def read_file(path: str, limit: int = 0) -> bytes:
    """A regular file of at most `limit` bytes, since a pipe may block and a device never end; with 0 its first few."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            problem = "it is a folder" if stat.S_ISDIR(status.st_mode) else "it is a pipe or a device, not a file"
        elif limit and status.st_size > limit:
            problem = f"it is larger than {limit // MEGABYTE} MB"
        else:
            with open(path, "rb") as file:
                contents = file.read(min(status.st_size, limit or len(LFS)))
            if not contents.startswith(LFS):
                return contents
            problem = "it is a Git LFS pointer, not the file itself; run git lfs pull"
    except (FileNotFoundError, ValueError):  # ValueError: a zero byte in the name
        problem = "no such file"
    except OSError as error:
        problem = error.strerror
    raise UserError(f"{path}: cannot be read: {problem}")


def read_json(path: str, limit: int = 64 * MEGABYTE):
    return parse_json(read_file(path, limit), path)


def parse_json(data: bytes, where: str):
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inside for item in items if isinstance(item, (dict, list))]
        if not level:
            return value
    raise UserError(f"{where}: nested more than {DEEPEST} levels deep")


def read_lines(path: str) -> list[tuple[int, bytes]]:
    """The lines of a JSON-lines file that are not blank, each with its number from 1. Raises UserError."""
    lines = read_file(path, 1024 * MEGABYTE).splitlines()
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def parse_line(line: bytes, where: str, keys: Collection[str] = ()) -> dict:
    """The JSON object in `line`; with `keys`, no others may occur. Raises UserError that begins with `where`."""
    value = parse_json(line, where)
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
