"""Configs: both files of the model, every spelling, every refusal, and back to the HF form."""

import codecs
import copy
import dataclasses
import errno
import json
import os
import pickle
import random

import pytest
import torch
from helpers import ROPES, layout_config, text_fields, write_json

from model import RopeConfig
from runtime.config import parse_config, read_config
from runtime.export import to_hf
from runtime.files import LARGEST, LARGEST_SIZE, MEGABYTE, UserError, parse_line, read_file, read_lines, reading, remove
from runtime.native import translate_params
from vision import build_model

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")


def parse_params(raw: dict):
    return parse_config(translate_params(raw))


def raw_config(name: str = "config.json") -> dict:
    with open(os.path.join(DATA, name)) as file:
        return json.load(file)


def changed(raw: dict, path: str, value) -> dict:
    """A copy with one field set, or removed where the value is `...`."""
    raw = copy.deepcopy(raw)
    *parents, last = path.split("/")
    at = raw
    for parent in parents:
        at = at.setdefault(parent, {})
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return raw


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_the_model():
    """The two config files say the same, and what is built from them has the published number of parameters."""
    hf, native = (read_config(os.path.join(DATA, name)) for name in ("config.json", "params.json"))
    assert hf == native
    assert (hf.num_hidden_layers, hf.hidden_size, hf.head_dim, hf.num_key_value_heads) == (88, 12288, 128, 8)
    assert (hf.vision.num_hidden_layers, hf.vision.head_dim, hf.vision.hidden_act) == (48, 104, "silu")
    assert hf.fp8 and hf.activation_scheme == "static" and not hf.tie_word_embeddings
    assert hf.rope.yarn and hf.rope.attention_factor == pytest.approx(1.4158883)
    assert read_config(DATA) == hf  # config.json goes before params.json
    model = build_model(hf)
    assert sum(p.numel() for p in model.parameters()) == 127_704_210_176
    assert sum(p.numel() for p in model.layers["87"].parameters()) == 1_384_144_896
    assert sum(p.numel() for p in model.vision.vision_tower.parameters()) == 2_495_702_144
    assert sum(p.numel() for p in model.vision.multi_modal_projector.parameters()) == 182_519_424
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("mscale, mscale_all_dim, given, expected", [
    (1.0, 0.0, None, 1.4158883), (None, None, None, 1.4158883), (1.0, 1.0, None, 1.0), (0.0, 1.0, None, 1.4158883),
    (0.7, 1.3, None, (0.07 * 4.158883 + 1) / (0.13 * 4.158883 + 1)), (1.0, 1.0, 1.7, 1.7), (1.0, 0.0, 1.0, 1.0),
])  # fmt: skip
def test_attention_factor(mscale, mscale_all_dim, given, expected):
    fields = text_fields("yarn")
    fields["rope_parameters"] |= dict(mscale=mscale, mscale_all_dim=mscale_all_dim, attention_factor=given)
    assert parse_config(fields).rope.attention_factor == pytest.approx(expected, abs=1e-6)


def test_mscale_warning(capsys):
    """The mistake that this model's config first had: one loud line, and the numbers it asks for all the same."""
    raw = changed(raw_config(), "text_config/rope_parameters/mscale_all_dim", 1.0)
    assert parse_config(raw).rope.attention_factor == 1.0
    warning = capsys.readouterr().err
    assert warning.startswith("WARNING") and "mscale_all_dim" in warning and warning.count("\n") == 1
    parse_config(raw_config())
    parse_config(changed(raw, "text_config/rope_parameters/attention_factor", 1.41589))
    parse_config(changed(raw, "text_config/num_hidden_layers", 34))  # another model, whose config is right
    assert capsys.readouterr().err == ""


def test_native_scaling(capsys):
    raw = raw_config("params.json")
    assert parse_params(raw).rope.attention_factor == pytest.approx(1.4158883) and capsys.readouterr().err == ""
    assert parse_params(changed(raw, "yarn/apply_scale", False)).rope.attention_factor == 1.0
    assert "apply_scale" in capsys.readouterr().err  # the same mistake as in test_mscale_warning
    scaled = changed(raw, "llama_4_scaling", dict(beta=0.1, original_max_position_embeddings=4096))
    assert parse_params(scaled).rope.query_scaling_beta == 0.1
    assert parse_params(changed(raw, "quantization/qscheme_act", "DYNAMIC")).activation_scheme == "dynamic"
    assert parse_params(changed(raw, "quantization/qscheme_act", None)).activation_scheme == "dynamic"
    plain = parse_params(changed(raw, "yarn", ...)).rope
    assert plain == RopeConfig(theta=1e6, original_max_position_embeddings=262144)


def test_translation():
    """The native file becomes the HF file, without what that says twice, and stays as it was."""
    raw, hf = raw_config("params.json"), raw_config()
    before = copy.deepcopy(raw)
    translated = translate_params(raw)
    assert raw == before
    hf["quantization_config"] = dict(quant_method="fp8", activation_scheme="static")  # `to_hf` writes the rest
    for name in ("type", "max_position_embeddings"):
        del hf["text_config"]["rope_parameters"][name]
    del hf["vision_config"]["attention_dropout"]
    assert translated == hf
    assert translate_params(changed(raw, "tied_embeddings", ...)) == translated
    assert translate_params(changed(raw, "tied_embeddings", True))["text_config"]["tie_word_embeddings"]
    scaled = changed(raw, "yarn/apply_scale", False)
    for params, all_dim in ((raw, 0.0), (scaled, 1.0)):
        rope = translate_params(params)["text_config"]["rope_parameters"]
        assert (rope["rope_type"], rope["mscale"], rope["mscale_all_dim"]) == ("yarn", 1.0, all_dim)
        assert rope["llama_4_scaling_beta"] == 0.0


def test_rope_spellings():
    """`rope_parameters`, or `rope_theta` and `rope_scaling`; the type as `rope_type`, as `type`, or as both."""
    for name, rope in ROPES.items():
        fields = text_fields(name)
        expected = parse_config(fields).rope
        theta, kind = rope["rope_theta"], rope["rope_type"]
        rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
        bare = {k: v for k, v in fields.items() if k != "rope_parameters"}
        for spelled in (
            dict(rope_theta=theta, rope_scaling=dict(rest, type=kind)),
            dict(rope_theta=theta, rope_scaling=dict(rest, rope_type=kind, type=kind)),
            dict(rope_theta=theta, rope_parameters=dict(rest, rope_type=kind)),
            dict(rope_parameters=dict(rope, type=kind)),
        ):
            assert parse_config(bare | spelled).rope == expected
        both = dict(rope_parameters=dict(rope), rope_scaling=dict(rope))  # equal ones pass
        assert parse_config(bare | both).rope == expected
        with pytest.raises(UserError, match="rope_scaling = .* rope_parameters = "):  # transformers lets one win
            parse_config(bare | both | dict(rope_scaling=dict(rope, factor=2.5)))
    bare = {k: v for k, v in text_fields("plain").items() if k != "rope_parameters"}
    assert parse_config(bare | dict(rope_theta=1e4)).rope == parse_config(text_fields("plain")).rope
    assert parse_config(bare | dict(rope_theta=1e4, rope_scaling=None)).rope == parse_config(text_fields("plain")).rope


def test_layouts_agree():
    for rope in ("plain", "plain, scaled queries", "yarn", "yarn, short"):
        for fp8 in (None, "static", "dynamic"):
            for tied in (False, True):
                fields = text_fields(rope, tie_word_embeddings=tied)
                native = parse_params(layout_config(fields, "native", fp8)[1])
                for layout in ("text", "new"):
                    assert parse_config(layout_config(fields, layout, fp8)[1]) == native


TEXT_REFUSALS = [
    ("model_type", "llama", "model_type"), ("hidden_act", "gelu", "hidden_act"),
    ("sliding_window", 4096, "sliding_window"), ("attention_bias", True, "attention_bias"),
    ("mlp_bias", True, "mlp_bias"), ("hidden_size", ..., "hidden_size"), ("hidden_size", "42", "hidden_size"),
    ("hidden_size", 0, "hidden_size"), ("hidden_size", 42.0, "hidden_size"), ("hidden_size", True, "hidden_size"),
    ("vocab_size", -1, "vocab_size"), ("intermediate_size", [], "intermediate_size"),
    ("num_hidden_layers", ..., "num_hidden_layers"), ("num_attention_heads", 7, "num_key_value_heads"),
    ("num_key_value_heads", 4, "num_key_value_heads"), ("head_dim", 13, "head_dim"),
    ("rms_norm_eps", 0, "rms_norm_eps"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps"), ("max_position_embeddings", ..., "max_position_embeddings"),
    ("tie_word_embeddings", "no", "tie_word_embeddings"), ("rope_parameters", ..., "rope_theta"),
    ("rope_parameters/rope_theta", ..., "rope_theta"), ("rope_theta", 5.0, "rope_theta"),
    ("rope_parameters/type", "default", "rope_type"), ("rope_parameters/rope_type", "linear", "rope_type"),
    ("rope_parameters/factor", ..., "factor"), ("rope_parameters/factor", -2.0, "factor"),
    ("rope_parameters/factor", float("inf"), "factor"), ("rope_parameters/beta_fast", "4", "beta_fast"),
    ("rope_parameters/original_max_position_embeddings", ..., "original_max_position_embeddings"),
    ("rope_parameters/partial_rotary_factor", 0.5, "partial_rotary_factor"), ("rope_parameters", [1], "object"),
    ("quantization_config", {"quant_method": "awq"}, "quant_method"),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_block_size"),
    ("quantization_config", {"quant_method": "fp8", "activation_scheme": "token"}, "activation_scheme"),
    ("quantization_config", "fp8", "object"), ("quantization_config", {}, "quant_method"),
    *[("rope_scaling", value, "object") for value in (0, "", False, [])],
]  # fmt: skip


@pytest.mark.parametrize("path, value, named", TEXT_REFUSALS, ids=lambda x: str(x)[:40])
def test_text_refusals(path, value, named, tmp_path):
    fields = changed(text_fields("yarn"), path, value)
    write_json(tmp_path / "config.json", fields)
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path))
    message = one_line(error)
    assert named in message and str(tmp_path / "config.json") in message
    if value is not ... and path.split("/")[0] != "quantization_config":  # nested in a text_config just the same
        nested = layout_config(changed(text_fields("yarn"), path, value), "new")[1]
        write_json(tmp_path / "config.json", nested)
        with pytest.raises(UserError) as error:
            read_config(str(tmp_path))
        assert named in one_line(error)


@pytest.mark.parametrize("path, value, named", [
    ("text_config", 3, "object"),
    ("vision_feature_layer", -2, "vision_feature_layer"), ("multimodal_projector_bias", True, "projector_bias"),
    ("projector_hidden_act", "relu", "projector_hidden_act"), ("vision_config/model_type", "clip", "model_type"),
    ("vision_config/hidden_act", "relu", "hidden_act"), ("vision_config/head_dim", 100, "head_dim"),
    ("vision_config/patch_size", 0, "patch_size"), ("vision_config/num_attention_heads", 7, "heads"),
    ("vision_config/image_size", ..., "image_size"), ("vision_config/rope_parameters/rope_type", "yarn", "rope_type"),
    ("vision_config/rope_parameters/type", "yarn", "type"),
    ("image_token_id", 11, "image_token"), ("spatial_merge_size", 0, "spatial_merge_size"),
])  # fmt: skip
def test_vision_refusals(path, value, named, tmp_path):
    write_json(tmp_path / "config.json", changed(raw_config(), path, value))
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path))
    assert named in one_line(error)


@pytest.mark.parametrize("path, value, named", [
    ("dim", ..., "missing"), ("n_layers", ..., "n_layers"), ("n_heads", 95, "num_attention_heads"),
    ("head_dim", 127, "head_dim"), ("rope_theta", ..., "rope_theta"), ("rope_theta", 0, "rope_theta"),
    ("moe", {"num_experts": 8}, "moe"), ("lora", {"rank": 8}, "lora"), ("sliding_window", 4096, "sliding_window"),
    ("use_biases", True, "use_biases"), ("yarn/factor", ..., "factor"), ("yarn/beta", ..., "beta"),
    ("yarn/apply_scale", 1, "apply_scale"), ("llama_4_scaling", {"beta": "x"}, "beta"),
    ("llama_4_scaling", {"beta": 0.1, "original_max_position_embeddings": 8192}, "original_max_position_embeddings"),
    ("hidden_dim", "2", "hidden_dim"), ("n_kv_heads", 0, "n_kv_heads"), ("norm_eps", -1, "norm_eps"),
    ("yarn/alpha", ..., "alpha"), ("yarn", 3, "yarn"), ("vision_encoder/max_image_size", "x", "max_image_size"),
    ("vision_encoder/image_token_id", [], "image_token_id"),
    ("quantization", {}, "qformat_weight"),
    ("quantization/qformat_weight", "fp4", "qformat_weight"), ("quantization/qscheme_act", "ROW", "qscheme_act"),
    ("tied_embeddings", "yes", "tied_embeddings"), ("vision_encoder/mm_projector_id", "other", "mm_projector_id"),
    ("vision_encoder/adapter_bias", True, "adapter_bias"), ("vision_encoder/hidden_size", 1663, "hidden_size"),
    ("vision_encoder/add_pre_mm_projector_layer_norm", False, "add_pre_mm_projector_layer_norm"),
    ("_sliding_window", 4096, "_sliding_window"), ("max_position_embeddings", ..., "max_position_embeddings"),
    ("yarn/apply_scale", ..., "apply_scale"), ("vision_encoder/mm_projector_id", ..., "mm_projector_id = ''"),
    ("vision_encoder/adapter_bias", ..., "adapter_bias = True"),
    ("vision_encoder/add_pre_mm_projector_layer_norm", ..., "add_pre_mm_projector_layer_norm = False"),
])  # fmt: skip
def test_native_refusals(path, value, named, tmp_path):
    write_json(tmp_path / "params.json", changed(raw_config("params.json"), path, value))
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path))
    assert named in one_line(error)


def test_files_that_are_no_configs(tmp_path):
    nested = b'{"a":' * 70 + b"1" + b"}" * 70
    huge = b'{"model_type": "ministral3", "vocab_size": 1' + b"0" * 4500 + b"}"
    for contents in (b"", b"{", b"[]", b"3", b'{"model_type": "\xff"}', b"null", b"[" * 100_000, nested, huge):
        (tmp_path / "config.json").write_bytes(contents)
        with pytest.raises(UserError) as error:
            read_config(str(tmp_path))
        assert "config.json" in one_line(error)
    empty = tmp_path / "empty"
    empty.mkdir()
    for directory in (empty, tmp_path / "missing"):
        with pytest.raises(UserError) as error:
            read_config(str(directory))
        assert str(directory) in one_line(error)


LARGE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")


@pytest.mark.parametrize("name", LARGE)
def test_nothing_large_is_built(name, tmp_path):
    """What no model has is refused while reading, and what is just allowed is built at once, on meta."""
    for value in (10**12, 10**400, 1 << 62):
        write_json(tmp_path / "config.json", text_fields(**{name: value}))
        with pytest.raises(UserError) as error:
            read_config(str(tmp_path))
        assert name in one_line(error)
    layers = {} if name == "num_hidden_layers" else {"num_hidden_layers": 1}
    fields = text_fields(**layers | {name: LARGEST.get(name, LARGEST_SIZE)})
    model = build_model(parse_config(fields))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_numbers_that_would_overflow(tmp_path):
    for name in (
        "rope_theta",
        "factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "attention_factor",
        "llama_4_scaling_beta",
    ):
        for value in ("1e400", "1" + "0" * 400, "NaN", "-1e308", "1e-320"):
            fields = text_fields("yarn")
            fields["rope_parameters"] |= dict(mscale_all_dim=-1.0) | {name: "X"}
            (tmp_path / "config.json").write_text(json.dumps(fields).replace('"X"', value))
            try:
                build_model(read_config(str(tmp_path)))
            except UserError as error:
                assert name in str(error)
            else:
                assert value == "1e-320" and name in ("mscale", "llama_4_scaling_beta")  # as good as zero
    for theta in (0, 1):
        write_json(tmp_path / "config.json", changed(text_fields("yarn"), "rope_parameters/rope_theta", theta))
        with pytest.raises(UserError, match="rope_theta should be above"):
            read_config(str(tmp_path))


def test_user_errors_are_one_short_line():
    """Whatever a file's contents bring in: control characters, line breaks, lone surrogates, 100 kB."""
    draw = random.Random(0)
    for _ in range(200):
        length = draw.choice([5, 100, 440, 441, 100_000])
        text = "".join(draw.choices("ab é漢\n\r\t\0\x1b\x7f\u2028\u202e\ud800\U000e0001", k=length))
        message = str(UserError(f"file.json: {text}; do this"))
        assert message.startswith("file.json: ") and message.isprintable() and len(message) <= 440
        assert str(UserError(message)) == message == str(pickle.loads(pickle.dumps(UserError(message))))
        if length < 30:
            assert message.endswith("; do this")
    assert str(UserError("a\nb\x1b[31m")) == "a\\nb\\x1b[31m" and str(UserError("é漢")) == "é漢"


def test_what_cannot_be_removed_stays(tmp_path, monkeypatch):
    """That is no reason to stop: whoever needs the name says so."""
    for make in (lambda path: path.mkdir(), lambda path: path.touch(), lambda path: path.symlink_to(tmp_path)):
        make(path := tmp_path / "here")
        with monkeypatch.context() as patch:
            for name in ("rmdir", "remove", "unlink"):
                patch.setattr(os, name, refuse)
            remove(str(path))
        assert os.path.lexists(path)
        remove(str(path))
        assert not os.path.lexists(path) and tmp_path.exists()
    remove(str(path))  # there is nothing


def refuse(*arguments, **more) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_read_file(tmp_path):
    path = str(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"12345")
    assert read_file(path, 5) == b"12345" and read_file(path) == b"12345"
    for limit, wrong in ((4, "larger"), (MEGABYTE, None)):
        if wrong:
            with pytest.raises(UserError, match=wrong):
                read_file(path, limit)
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    os.mkfifo(tmp_path / "pipe")
    for name, wrong in [("x", "LFS pointer"), ("pipe", "a pipe or a device"), (".", "folder"), ("no", "no such file"),
                        ("a\0b", "no such file"), ("a" * 300, "too long")]:  # fmt: skip
        for limit in (0, MEGABYTE):
            with pytest.raises(UserError, match=wrong):
                read_file(str(tmp_path / name), limit)
    with pytest.raises(UserError, match="a pipe or a device"):
        read_lines("/dev/zero")


def test_a_byte_order_mark(tmp_path):
    """Windows' editors begin a file with one, and files that were put together have some inside."""
    mark = codecs.BOM_UTF8
    lines = [mark + b'{"a": 1}', b"", mark + b" ", mark + b'{"b": "\xef\xbb\xbf"}', mark]
    (tmp_path / "lines.jsonl").write_bytes(b"\r\n".join(lines))
    read = read_lines(str(tmp_path / "lines.jsonl"))
    assert [(number, parse_line(line, "")) for number, line in read] == [(1, {"a": 1}), (4, {"b": "\ufeff"})]
    for name in ("config.json", "params.json"):
        with open(os.path.join(DATA, name), "rb") as file:
            whole = file.read()
        (tmp_path / name).write_bytes(mark + whole)
        with_mark, without = (read_config(os.path.join(folder, name)) for folder in (str(tmp_path), DATA))
        assert with_mark == without
    (tmp_path / "config.json").write_bytes(mark + mark + whole)  # a second one is nobody's
    with pytest.raises(UserError, match="config.json: not JSON"):
        read_config(str(tmp_path))


def test_unknown_fields_are_named(tmp_path, capsys):
    """They change nothing, in transformers neither, but whoever wrote them meant something by them."""
    for file, places in (
        ("config.json", ("", "text_config/", "vision_config/", "text_config/rope_parameters/")),
        ("params.json", ("", "vision_encoder/")),
    ):
        raw = raw_config(file)
        for place in places:
            for name, value in (("logit_softcapping", 30.0), ("qk_norm", True), ("layer_types", ["sliding"])):
                write_json(tmp_path / file, changed(raw, place + name, value))
                read_config(str(tmp_path / file))
                said = capsys.readouterr().err
                assert said.count("\n") == 1 and f"{name} = {value!r} is not known here" in said and file in said
                write_json(tmp_path / file, changed(raw, place + name, None))
                read_config(str(tmp_path / file))
                assert capsys.readouterr().err == ""


def test_the_guard_names_the_file():
    for raised in (KeyError("x"), TypeError(), RecursionError("deep"), MemoryError(), OverflowError("int"), OSError()):
        with pytest.raises(UserError, match=rf"^a/b.json: not a valid config \({type(raised).__name__}") as error:
            with reading("a/b.json", "config"):
                raise raised
        one_line(error)
    for text in ("no field", "a/b.json: no field"):
        with pytest.raises(UserError, match="^a/b.json: no field$"), reading("a/b.json", "config"):
            raise UserError(text)


def test_what_stands_for_a_checkpoint(tmp_path):
    write_json(tmp_path / "config.json", text_fields())
    assert read_config(str(tmp_path)) == read_config(str(tmp_path / "config.json"))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for path, wrong in [("mistralai/Medium", "hf download mistralai/Medium --local-dir"), ("/no/such/x", "no such dir"),
                        (str(tmp_path / "model.safetensors"), "is a file; give the folder")]:  # fmt: skip
        with pytest.raises(UserError, match=wrong):
            read_config(path)


def test_to_hf():
    """Written as JSON and read again: the same config, from every source, in FP8 or not."""
    configs = [read_config(os.path.join(DATA, name)) for name in ("config.json", "params.json")]
    configs.append(parse_params(changed(raw_config("params.json"), "yarn/apply_scale", False)))
    for rope in ROPES:
        fp8 = random.Random(rope).choice([None, "static", "dynamic"])
        fields = text_fields(rope, initializer_range=0.03)
        configs += [parse_config(layout_config(fields, layout, fp8)[1]) for layout in ("text", "new")]
        if rope in ("plain", "plain, scaled queries", "yarn", "yarn, short"):
            configs.append(parse_params(layout_config(fields, "native", fp8)[1]))
    for config in configs:
        raw = json.loads(json.dumps(to_hf(config)))
        assert parse_config(raw) == config
        assert ("quantization_config" in raw) == config.fp8
        unquantized = dataclasses.replace(config, fp8=False)  # as an export to BF16 writes it
        assert "quantization_config" not in to_hf(unquantized)
        assert not parse_config(to_hf(unquantized)).fp8
    kept = parse_config(text_fields(comment="stays"))
    assert to_hf(kept)["comment"] == "stays" and kept.raw == text_fields(comment="stays")


def test_tied_as_in_transformers(tmp_path, capsys):
    """The defaults of the two classes differ, and transformers writes a config that says one thing at the top and
    another in text_config: the top counts. None of the fields that transformers writes is unknown."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=12, num_hidden_layers=1)
    vision = dict(model_type="pixtral", hidden_size=24, num_attention_heads=2, head_dim=12, intermediate_size=8)
    for text_only in (True, False):
        for tied in ({}, dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)):
            text = dict(model_type="ministral3", **sizes, **tied)
            if text_only:
                config = transformers.Ministral3Config(**text)
                model = transformers.Ministral3ForCausalLM
            else:
                config = transformers.Mistral3Config(text_config=text, vision_config=vision, **tied)
                model = transformers.Mistral3ForConditionalGeneration
            config.save_pretrained(tmp_path)
            with torch.device("meta"):
                peer = model(config)
            peer.tie_weights()
            really = peer.get_output_embeddings().weight is peer.get_input_embeddings().weight
            raw = json.loads((tmp_path / "config.json").read_text())
            capsys.readouterr()
            assert parse_config(raw).tie_word_embeddings == really and capsys.readouterr().err == ""
            if not tied:
                for fields in (raw, raw.get("text_config", raw)):
                    fields.pop("tie_word_embeddings", None)
                assert parse_config(raw).tie_word_embeddings == really
