"""What is written: checkpoints, whole or not at all; and `python fp8.py IN OUT`, its numbers, layouts and scales."""

import errno
import fcntl
import json
import os
import random
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    PROJECTIONS,
    load,
    random_state,
    random_tokens,
    text_fields,
    to_fp8,
    whole,
    write_checkpoint,
    write_json,
    write_tekken,
)
from safetensors.torch import load_file, save_file

from parallel import parts_of
from runtime import export
from runtime.checkpoint import Checkpoint, canonical_name
from runtime.export import main, measure_inputs, save
from runtime.files import UserError, lock, new_folder

LINEARS = [f"layers.{i}.{name}.weight" for i in range(3) for name in PROJECTIONS]


@pytest.fixture
def source(tmp_path):
    """A checkpoint of random BF16 weights and the canonical state it holds."""
    fields = text_fields()
    fields["vocab_size"] = write_tekken_size(tmp_path)
    state = {name: tensor.bfloat16() for name, tensor in random_state(fields).items()}
    return fields, state


def write_tekken_size(folder) -> int:
    (folder / "in").mkdir()
    return write_tekken(folder / "in")


def written(folder) -> dict[str, torch.Tensor]:
    return {canonical_name(name, False): tensor for name, tensor in load_file(folder / "model.safetensors").items()}


def test_quantizes_the_seven_linears_and_nothing_else(tmp_path, source, capsys):
    fields, state = source
    write_checkpoint(tmp_path / "in", fields, state)
    main([str(tmp_path / "in"), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert said.startswith(f"wrote {tmp_path}/out: fp8, 0.0") and said.endswith(f"generate.py --ckpt {tmp_path}/out\n")
    out = written(tmp_path / "out")
    assert {name for name, tensor in out.items() if tensor.dtype == torch.float8_e4m3fn} == set(LINEARS)
    for name in LINEARS:
        weight, scale = out[name], out[name.replace("weight", "weight_scale_inv")]
        assert scale.shape == () and scale.dtype == torch.float32
        torch.testing.assert_close(scale.double(), state[name].double().abs().max() / 448, rtol=1e-6, atol=0)
        error = (weight.double() * scale.double() - state[name].double()).abs()
        step = torch.maximum(state[name].double().abs() * 2**-4, scale.double() * 2**-10)  # half of E4M3's spacing
        assert (error <= step * 1.0001).all()
    for name in set(state) - set(LINEARS):
        assert torch.equal(out[name], state[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "dynamic"
    assert not [name for name in out if name.endswith("activation_scale")]
    assert (tmp_path / "out" / "tekken.json").read_bytes() == (tmp_path / "in" / "tekken.json").read_bytes()
    load(tmp_path / "out", keep_fp8=True)


@pytest.mark.parametrize("layout", ["text", "native"])
def test_fp8_stays_as_it_is_and_dequantizes_exactly(tmp_path, source, layout):
    fields, state = source
    stored, _ = to_fp8(state, static=True)
    write_checkpoint(tmp_path / "in", fields, stored, layout, fp8="static")
    main([str(tmp_path / "in"), str(tmp_path / "same")])
    same = written(tmp_path / "same")
    assert set(same) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(same[name].float(), tensor.float()), name
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "static"

    main([str(tmp_path / "in"), str(tmp_path / "plain"), "--to", "bfloat16"])
    plain = written(tmp_path / "plain")
    assert set(plain) == set(state) and all(tensor.dtype == torch.bfloat16 for tensor in plain.values())
    for name in LINEARS:
        scale = stored[name.replace("weight", "weight_scale_inv")].double()
        assert torch.equal(plain[name], (stored[name].double() * scale).bfloat16()), name
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def write_chats(folder) -> str:
    path = os.path.join(folder, "chats.jsonl")
    with open(path, "w") as file:
        for text in ("the hat", "in the weather", "where is it then?"):
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def chat_ids(folder, path: str) -> list[list[int]]:
    from runtime.chat import encode_chat
    from runtime.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    chats = [json.loads(line)["messages"] for line in open(path)]
    return [encode_chat(tokenizer, messages, training=True).ids[:-1] for messages in chats]


def test_calibration_measures_the_largest_inputs(tmp_path, source):
    """The first layer's inputs by hand: norm of the embeddings. Others are compared with transformers, below."""
    fields, state = source
    write_checkpoint(tmp_path / "in", fields, state)
    chats = write_chats(tmp_path)
    main([str(tmp_path / "in"), str(tmp_path / "out"), "--calibrate", chats])
    out = written(tmp_path / "out")
    amax = 0.0
    for ids in chat_ids(tmp_path / "in", chats):
        x = state["embed_tokens.weight"][ids].double()
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * state["layers.0.input_layernorm.weight"].double()
        amax = max(amax, x.abs().max().item())
    for name in "qkv":
        assert out[f"layers.0.self_attn.{name}_proj.activation_scale"].item() == pytest.approx(amax / 448, rel=0.01)
    assert len([name for name in out if name.endswith("activation_scale")]) == len(LINEARS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "static"


def test_calibration_against_transformers(tmp_path, source):
    transformers = pytest.importorskip("transformers")
    fields, state = source
    write_checkpoint(tmp_path / "in", fields, state)
    chats = write_chats(tmp_path)
    main([str(tmp_path / "in"), str(tmp_path / "out"), "--calibrate", chats])
    out = written(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.bfloat16)
    seen: dict[str, float] = {}
    for name, module in model.model.layers.named_modules():
        if name.endswith("_proj"):
            key = f"layers.{name}.activation_scale"
            module.register_forward_pre_hook(
                lambda _, x, key=key: seen.update({key: max(seen.get(key, 0.0), x[0].abs().max().item() / 448)})
            )
    with torch.inference_mode():
        for ids in chat_ids(tmp_path / "in", chats):
            model(torch.tensor([ids]))
    assert set(seen) == {name for name in out if name.endswith("activation_scale")}
    for name, scale in seen.items():
        assert out[name].item() == pytest.approx(scale, rel=0.03), name  # BF16 rounds at other places


def test_refusals_leave_nothing_behind(tmp_path, source):
    fields, state = source
    write_checkpoint(tmp_path / "in", fields, state)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"x"\n')
    for argv, words in (
        (["in", "full"], "already exists"),
        (["nowhere", "out"], "no such directory"),
        (["in", "out", "--to", "int4"], "invalid choice"),
        (["in", "out", "--to", "bfloat16", "--calibrate", str(bad)], "leave it out"),
        (["in", "out", "--calibrate", str(bad)], "line 2"),
        (["in", "out", "--calibrate", str(tmp_path / "none.jsonl")], "cannot be read"),
    ):
        argv = [str(tmp_path / a) if a in ("in", "out", "full", "nowhere") else a for a in argv]
        with pytest.raises(UserError, match=words) as caught:
            main(argv)
        assert "\n" not in str(caught.value)
    damaged = dict(state)
    damaged.pop("layers.1.mlp.up_proj.weight")
    os.remove(tmp_path / "in" / "model.safetensors")
    write_checkpoint(tmp_path / "in", fields, damaged)
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    os.remove(tmp_path / "in" / "model.safetensors")
    write_checkpoint(tmp_path / "in", fields, state, shards=2)
    path = tmp_path / "in" / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | {"stranger": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="holds stranger, which the index does not list"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "full", "in"]


def test_refused_before_the_model_runs(tmp_path, source, monkeypatch):
    """A folder that is there, one that cannot be made, and a model that is too large: none of it after hours."""
    fields, state = source
    write_checkpoint(tmp_path / "in", fields, state)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    command = [str(tmp_path / "in"), "", "--calibrate", write_chats(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(export, "calibrate", lambda *_: pytest.fail("the model ran"))
        for target in ("full", "full/file/out"):
            with pytest.raises(UserError, match="already exists|cannot be written"):
                main([command[0], str(tmp_path / target), *command[2:]])
    monkeypatch.setattr(export, "cpu_memory", lambda: 1e4)
    monkeypatch.setattr(export, "fill", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"the weights take 0\.\d GB, but 0\.0 GB are free"):
        main([command[0], str(tmp_path / "out"), *command[2:]])
    assert sorted(os.listdir(tmp_path)) == ["chats.jsonl", "full", "in"]


def test_a_leftover_of_another_process(source, tmp_path, monkeypatch):
    """In containers every process may have the number 1: the folder of one that was killed, or still writes, stays."""
    names, make = [], os.makedirs
    write_checkpoint(tmp_path / "in", *source)
    monkeypatch.setattr(os, "makedirs", lambda path, *more, **other: names.append(path) or make(path, *more, **other))
    with pytest.raises(FileExistsError), new_folder(str(tmp_path)):
        pass
    assert os.path.isdir(tmp_path)
    for number in (1, 2):
        export.convert(str(tmp_path / "in"), str(tmp_path / f"out{number}"), False, None)
    made = [name.split("partial-")[1] for name in names if "partial-" in name]
    assert len(set(made)) == 2 and sorted(os.listdir(tmp_path)) == ["in", "out1", "out2"]


def test_the_sign_of_inputs_does_not_count(tmp_path, source):
    """Beside formulas of its own: the largest magnitude over all tokens, where it often is of a negative number."""
    fields, state = source
    model = load(write_checkpoint(tmp_path / "ckpt", fields, state))
    tokens, extremes = torch.tensor([random_tokens(60, fields["vocab_size"], seed=4)]), {}

    def watch(name, module, inputs) -> None:
        extremes[name] = float(inputs[0].min()), float(inputs[0].max())

    for name, (layer, _) in parts_of(model).items():
        layer.register_forward_pre_hook(partial(watch, name))
    with torch.no_grad():
        model(model.embed(tokens))
    found = measure_inputs(model, [SimpleNamespace(tokens=tokens, pixels=[], images=[])], "")
    assert found == pytest.approx({name: max(-extremes[name][0], extremes[name][1]) / 448 for name in LINEARS})
    assert 0 < sum(-extremes[name][0] > extremes[name][1] for name in LINEARS) < len(LINEARS)


def test_the_largest_input_of_all_batches_counts(tmp_path, source):
    """Whichever batch it is in: each alone gives what the two together exceed or equal, in either order."""
    fields, state = source
    model = load(write_checkpoint(tmp_path / "in", fields, state))
    batches = [SimpleNamespace(tokens=torch.tensor([ids]), images=[]) for ids in ([50, 61, 72], [183, 94, 205, 116])]
    first, second = (measure_inputs(model, [batch], "") for batch in batches)
    assert any(first[name] > second[name] for name in first) and any(first[name] < second[name] for name in first)
    for order in (batches, batches[::-1]):
        assert measure_inputs(model, order, "") == {name: max(first[name], second[name]) for name in LINEARS}


# ------------------------------------------------------------------------------------------------------- writing


def pieces(model) -> list:
    return [(name, p.detach()) for name, p in whole(model).items()]


@pytest.mark.parametrize("shard_bytes", [1 << 40, 30_000, 1])
@pytest.mark.parametrize("layout", ["text", "new", "native"])
def test_save_and_load(layout, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", shard_bytes)
    fields = text_fields("yarn, short", tie_word_embeddings=layout == "new")
    source = write_checkpoint(tmp_path / "in", fields, random_state(fields), layout)
    for name in ("tekken.json", "README.md", "model-00009-of-00009.safetensors.old"):  # only the first comes along
        write_json(f"{source}/{name}", name)
    os.mkdir(f"{source}/subfolder")
    model = load(source)
    tensors = pieces(model)
    out = str(tmp_path / "deep" / "out")
    save(out, model.config, iter(tensors), source)
    again = load(out)
    assert again.config == model.config
    for name, parameter in whole(again).items():
        assert torch.equal(parameter, whole(model)[name].bfloat16().float())
    files = sorted(name for name in os.listdir(out) if name.endswith(".safetensors"))
    with open(f"{out}/model.safetensors.index.json") as file:
        index = json.load(file)
    assert set(index["weight_map"].values()) == set(files) and len(index["weight_map"]) == len(tensors)
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for _, t in tensors)
    if shard_bytes == 1:
        assert len(files) == len(tensors) and files[0] == f"model-00001-of-{len(tensors):05d}.safetensors"
    elif shard_bytes == 30_000:
        assert 1 < len(files) < len(tensors)
    else:
        assert files == ["model.safetensors"]
    others = {"config.json", "model.safetensors.index.json", "tekken.json"}
    assert set(os.listdir(out)) == others | set(files)
    assert os.listdir(tmp_path / "deep") == ["out"]


COMPANIONS = """tekken.json tokenizer.json tokenizer_config.json tokenizer.model tokenizer.model.v3
    special_tokens_map.json mistral_instruct_tokenizer_240323.model.v3
    added_tokens.json vocab.json merges.txt preprocessor_config.json processor_config.json generation_config.json
    chat_template.jinja chat_template.json SYSTEM_PROMPT.txt""".split()
OTHERS = """adapter_config.json adapter_model.safetensors pytorch_model.bin pytorch_model.bin.index.json model.gguf
    consolidated.00.pth params.json README.md picture.png LICENSE training_args.bin consolidated.safetensors.index.json
    mytekken.json config.json.bak .gitattributes model.safetensors.old run.json tf_model.h5""".split()


@pytest.mark.parametrize("seed", range(4))
def test_what_comes_along(seed, tmp_path):
    """What belongs to tokenizer, processor and chat, and nothing else; all of it for whom the umask says."""
    draw, fields = random.Random(seed), text_fields(num_hidden_layers=1)
    model = load(source := write_checkpoint(tmp_path / "in", fields, random_state(fields)))
    drawn = {name: draw.randbytes(9) for name in draw.sample(COMPANIONS + OTHERS, 20)}
    for name, data in drawn.items():
        (tmp_path / "in" / name).write_bytes(data)
        (tmp_path / "in" / name).chmod(0o600)
    before, umask = os.umask(0), draw.choice([0o022, 0o027, 0o077, 0o002])
    os.umask(umask)
    try:
        save(str(tmp_path / "out"), model.config, pieces(model), source)
    finally:
        os.umask(before)
    own = {"config.json", "model.safetensors", "model.safetensors.index.json"}
    assert set(os.listdir(tmp_path / "out")) == own | (set(drawn) & set(COMPANIONS))
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
        assert path.name in own or path.read_bytes() == drawn[path.name]


@pytest.mark.parametrize("there", [False, True])
def test_on_the_disk_before_it_counts(there, tmp_path, monkeypatch):
    """Every file is flushed before it has its name, and its folder before config.json, which makes a model of it."""
    flushed, flush, replace, rename = [], export.flush_to_disk, os.replace, os.rename

    def named(move, old, new) -> None:
        files = set(os.listdir(old)) if os.path.isdir(old) else {os.path.basename(old)}
        assert files <= {os.path.basename(path) for path in flushed}
        if os.path.basename(new) == "config.json":
            assert flushed[-1] == str(tmp_path / "out")
        move(old, new)

    if there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    with export.staged(str(tmp_path / "out")) as folder:
        for name in ("config.json", "a.safetensors", "z.json"):
            with open(os.path.join(folder, name), "w"):
                pass
        monkeypatch.setattr(export, "flush_to_disk", lambda path: flushed.append(path) or flush(path))
        monkeypatch.setattr(os, "replace", partial(named, replace))
        monkeypatch.setattr(os, "rename", partial(named, rename))
    assert flushed[-1] == str(tmp_path) and (str(tmp_path / "out") in flushed) == there


def test_saved_for_transformers(tmp_path):
    """transformers finds every weight of a checkpoint written here."""
    transformers = pytest.importorskip("transformers")
    fields = text_fields("yarn, short")
    state = {name: tensor.bfloat16() for name, tensor in random_state(fields).items()}  # what is written is BF16
    model = load(write_checkpoint(tmp_path / "in", fields, state, "native"))
    out = str(tmp_path / "out")
    save(out, model.config, pieces(model), None)
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        ours = model.logits(model(model.embed(tokens))).log_softmax(-1)
        assert (ours - peer(input_ids=tokens).logits.log_softmax(-1)).abs().max() < 1e-4


def test_save_refuses_and_leaves_nothing(tmp_path, monkeypatch):
    fields = text_fields(num_hidden_layers=1)
    good = write_checkpoint(tmp_path / "ckpt", fields, random_state(fields))
    model = load(good)
    tensors = pieces(model)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match="already exists"):
        save(good, model.config, tensors, None)
    blocker = tmp_path / "a file"
    blocker.write_text("")
    with pytest.raises(UserError, match="a file"):
        save(str(blocker), model.config, tensors, None)
    with pytest.raises(UserError, match="cannot be written"):
        save(str(blocker / "out"), model.config, tensors, None)
    blocker.unlink()

    def interrupted():
        yield tensors[0]
        raise RuntimeError("the tensors end here")

    with pytest.raises(RuntimeError, match="end here"):
        save(str(tmp_path / "out"), model.config, interrupted(), None)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        with pytest.raises(UserError, match="No space left"):
            save(str(tmp_path / "out"), model.config, tensors, None)
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / "out").mkdir()
    save(str(tmp_path / "out") + "/", model.config, tensors, None)  # an empty folder may be filled
    load(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])


def cannot_be_replaced(draw: random.Random, folder) -> tuple[str, str]:
    """(a name that a new folder cannot take, what is said of it)."""
    how = draw.choice(["link", "link/", "dangling", ".", "full", "file", "running"])
    out = folder / "out"
    (folder / "behind").mkdir()
    if how in ("link", "link/"):
        out.symlink_to(folder / "behind")
    elif how == "dangling":
        out.symlink_to(folder / "nowhere")
    elif how == "full":
        (out / ".hidden").mkdir(parents=True)
    elif how == "file":
        out.touch()
    elif how == "running":
        (folder / "out.partial-0a1b2c3d").mkdir()
    words = {"full": "already exists", "file": "already exists", ".": "cannot be written"}
    words["running"] = "another run is writing there"
    return {".": ".", "link/": f"{out}/"}.get(how, str(out)), words.get(how, "is a link")


@pytest.mark.parametrize("seed", range(20))
def test_a_name_that_cannot_be_taken(seed, tmp_path, source, monkeypatch):
    """It is refused before a tensor is read, and nothing is written or removed."""
    write_checkpoint(tmp_path / "in", *source)
    monkeypatch.setattr(Checkpoint, "weight", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(Checkpoint, "scale", lambda *_: pytest.fail("a scale was read"))
    out, words = cannot_be_replaced(random.Random(seed), tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    with ExitStack() as stack, pytest.raises(UserError, match=words):
        for folder in tmp_path.glob("*.partial-*"):
            lock(str(folder), stack)
        main([str(tmp_path / "in"), out])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mount_point(tmp_path, source, monkeypatch):
    """Or whatever else the kernel does not rename to."""
    write_checkpoint(tmp_path / "in", *source)
    monkeypatch.setattr(Checkpoint, "weight", lambda *_: pytest.fail("a tensor was read"))
    rename = os.rename

    def busy(old, new):
        if new == str(tmp_path / "disk"):
            raise OSError(16, "Device or resource busy")
        rename(old, new)

    monkeypatch.setattr(os, "rename", busy)
    (tmp_path / "disk").mkdir()
    with pytest.raises(UserError, match=r"disk: cannot be written \(Device or resource busy\); choose a new folder"):
        main([str(tmp_path / "in"), str(tmp_path / "disk")])
    assert sorted(os.listdir(tmp_path)) == ["disk", "in"]


def no_locks(*arguments) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))  # what some network file systems say


@pytest.mark.parametrize("locks", [True, False])
def test_two_conversions_at_once(locks, tmp_path, source, monkeypatch):
    """The second one learns it at once; without locks at its end, and then nothing of the first is lost."""
    write_checkpoint(tmp_path / "in", *source)
    weight, second, argv = Checkpoint.weight, [], [str(tmp_path / "in"), str(tmp_path / "out")]
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)

    def start_another(self, *arguments):
        if not second:
            second.append(True)
            if locks:
                with pytest.raises(UserError, match="another run is writing there"):
                    main([*argv, "--to", "bfloat16"])
            else:
                main([*argv, "--to", "bfloat16"])
        return weight(self, *arguments)

    monkeypatch.setattr(Checkpoint, "weight", start_another)
    if locks:
        main(argv)
    else:
        with pytest.raises(UserError, match="another process wrote there meanwhile"):
            main(argv)
    is_fp8 = any(tensor.dtype == torch.float8_e4m3fn for tensor in written(tmp_path / "out").values())
    assert is_fp8 == locks and sorted(os.listdir(tmp_path)) == ["in", "out"]
    (tmp_path / "other.partial-00000000").mkdir()  # of one that was killed: it is no obstacle
    main([argv[0], str(tmp_path / "other")])
