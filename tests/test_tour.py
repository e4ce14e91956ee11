"""examples/tour.py as a user runs it: what its page says is what the model, the files and plain formulas say."""

import base64
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from html import unescape

import numpy as np
import pytest
import torch
import tour
from processes import ROOT, run
from safetensors import safe_open

import generate
from generate import Engine
from model import MistralMedium
from runtime import launch
from runtime.checkpoint import Checkpoint, fill, hf_name
from runtime.config import read_config
from runtime.draft import read_draft
from runtime.images import load_image, pixels
from runtime.requests import Request
from vision import build_model

TINY, PICTURE = generate.TINY, os.path.join(generate.TINY, "picture.png")
LISTED = "red circles: a1 yellow star 0, a3 blue star 0, b3 blue star 0."
QUESTION = "Is there a red circle?"
pytestmark = pytest.mark.skipif(not os.path.isdir(TINY), reason="the repository holds no checkpoint yet")


def tour_of(path, *options) -> tuple[str, dict]:
    result = run("examples/tour.py", "--out", path, "--dtype", "float32", *options)
    assert result.status == 0 and os.listdir(path.parent) == [path.name], result.err
    page = path.read_text(encoding="utf-8")
    return page, json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def numbers(packed: dict) -> torch.Tensor:
    data = np.frombuffer(base64.b64decode(packed["float32"]), np.float32)
    return torch.from_numpy(data.copy()).view(packed["shape"]).double()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, dict]:
    return tour_of(tmp_path_factory.mktemp("tour") / "page.html", "--image", PICTURE, "--prompt", QUESTION)


@pytest.fixture(scope="module")
def data(tiny) -> dict:
    return tiny[1]


def load(folder: str) -> MistralMedium:
    model = build_model(Checkpoint(folder).fit(read_config(folder)), dtype=torch.float32)
    fill(model, Checkpoint(folder))
    return model


@pytest.fixture(scope="module")
def plain(data) -> dict:
    """The whole chat in one pass without a cache: logits at every position, states between the layers, inputs of the
    linears, queries and keys of the tower."""
    model, found = load(TINY), {"states": [], "inputs": {}, "tower": []}
    readers = {"self_attn.o_proj": "self_attn.o_proj", "mlp.down_proj": "mlp.down_proj"}
    readers |= {"input_layernorm": "self_attn.qkv_proj", "post_attention_layernorm": "mlp.gate_up_proj"}
    for i, layer in model.layers.items():
        layer.register_forward_pre_hook(lambda m, inputs: found["states"].append(inputs[0][0]))
        for name, reader in readers.items():
            part = layer.get_submodule(reader)
            part.register_forward_pre_hook(lambda m, x, key=f"layers.{i}.{name}": found["inputs"].update({key: x[0]}))
    for layer in model.vision.vision_tower.transformer["layers"]:
        layer.register_forward_pre_hook(lambda m, inputs: found["tower"].append((m, *inputs)))
    answer = data["answers"][0]
    ids = torch.tensor([answer["prompt_tokens"] + answer["tokens"][:-1]])
    with torch.no_grad():
        features = model.vision([pixels(load_image(PICTURE), model.config.vision)])
        found["embeddings"] = model.embed(ids, features)
        states = model(found["embeddings"].clone())
        found |= {"model": model, "ids": ids[0], "logits": model.logits(states)[0].double()}
    found["states"].append(states[0])
    return found


def test_one_file_that_needs_no_other(tiny):
    page, data = tiny
    assert len(page.encode()) < 5_000_000 and data["seconds"] < 20
    assert not re.search(r"\[\[[a-z][\w.]+\]\]", page.split("<script")[0]) and "{{data}}" not in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r'(?:src|href)="(\w+:)', page)) <= {"data:"}


def test_every_part_shows_the_code_that_does_it(tiny):
    page, data = tiny
    pattern = r'<summary>([\w.]+) <span class="soft">([\w/.]+):(\d+)</span></summary><pre class="card">(.*?)</pre>'
    shown = re.findall(pattern, page, re.S)
    assert len(shown) > 20 and len(re.findall("<section", page)) == 8
    for part in re.findall(r"<section.*?</section>", page, re.S):
        assert '<details class="source">' in part
    for name, path, line, code in shown:
        with open(os.path.join(ROOT, path), encoding="utf-8") as source:
            lines = source.read().splitlines()[int(line) - 1 :]
        assert re.search(rf"^(def|class) {name.split('.')[-1]}\b", unescape(code), re.M), (name, code)
        for written, here in zip(lines, unescape(code).splitlines()):
            assert written.strip() == here.strip(), name
    for at, code in {tuple(message[-2:]) for rank in data["found"] for message in rank["messages"]}:
        path, line = at.split(":")
        with open(os.path.join(ROOT, path), encoding="utf-8") as source:
            assert source.read().splitlines()[int(line) - 1].strip() == code != ""


def test_tokens_and_merges(data):
    with open(os.path.join(TINY, "tekken.json"), encoding="utf-8") as file:
        tekken = json.load(file)
    special = tekken["config"]["default_num_special_tokens"]
    pieces = {special + entry["rank"]: base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"]}
    ids = {piece: id for id, piece in pieces.items()}
    for id, (text, raw, control) in data["tokens"].items():
        assert control == (int(id) < special) and (control or bytes.fromhex(raw) == pieces[int(id)])
        assert control or text == pieces[int(id)].decode(errors="replace")
    text = b"".join(pieces[id] for id in data["answers"][0]["prompt_tokens"] if id >= special)
    assert text.decode().endswith(QUESTION)
    words = {word["word"]: word for word in data["words"]}
    assert {"strawberries", " circle"} <= {*words} and len(words["strawberries"]["steps"]) > 2
    for word in words.values():
        raw = word["word"].encode()
        parts = [raw[i : i + 1] for i in range(len(raw))]
        if raw in ids:
            assert word["ids"] == [ids[raw]] and word["steps"] == []
            continue
        for id, ends in word["steps"]:  # the slow way: look through all pairs
            ranks = [(ids[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ids]
            best, i = min(ranks)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            assert best == id and ends == [len(b"".join(parts[: n + 1])) for n in range(len(parts))]
        assert word["ids"] == [ids[part] for part in parts]
        assert not any(a + b in ids for a, b in zip(parts, parts[1:]))


def test_probabilities_and_answers(data, plain):
    answer, start = data["answers"][0], len(data["answers"][0]["prompt_tokens"]) - 1
    expected = plain["logits"][start:].softmax(-1)
    assert (answer["reasoning"], answer["text"]) == (LISTED, "no") and answer["effort"] == "high"
    assert (data["answers"][1]["reasoning"], data["answers"][1]["text"]) == (None, "no")
    assert len(answer["said"]) == len(answer["tokens"]) == len(expected)
    for said, token, row in zip(answer["said"], answer["tokens"], expected):
        assert [id for id, _ in said["top"]] == row.topk(5).indices.tolist() and said["top"][0][0] == token == said[
            "id"
        ]
        assert [p for _, p in said["top"]] == pytest.approx(row.topk(5).values.tolist(), rel=1e-3, abs=1e-6)
        ordered = (row.log() / 0.7).softmax(0).sort(descending=True).values
        assert said["inside"] == int((ordered.cumsum(0) < 0.95).sum()) + 1
        assert sum(count for _, count in said["drawn"]) == 8


def test_steps_of_several_tokens(data, plain):
    """The guesses that stay and the model's own tokens make up the same answer; the first guess of each step is what
    the head says in one pass without a cache."""
    model, start = plain["model"], len(data["answers"][0]["prompt_tokens"])
    with torch.no_grad():
        states = read_draft(os.path.join(TINY, "draft"), model).predict(
            plain["embeddings"][:, 1:], model.norm(plain["states"][-1])[None, :-1]
        )
        first = [None, *model.lm_head(states[0]).argmax(-1).tolist()]  # the guess after each token
    for i, answer in enumerate(data["answers"]):
        tokens, steps = answer["drafted"]["tokens"], answer["drafted"]["steps"]
        assert tokens == answer["tokens"]
        end = 1
        for guessed, said in steps:
            assert i or guessed[0] == first[start + end - 1]
            right = next((n for n in range(3) if guessed[n] != said[n]), 3)
            assert len(guessed) == 3 and len(said) == right + 1
            taken = said[: len(tokens) - end]
            assert taken == tokens[end : end + len(said)] != []
            assert {*map(str, guessed + said)} <= {*data["tokens"]}
            end += len(taken)
        assert end == len(tokens) and (i or end > 3 * len(steps))


def test_a_layer_opened(data, plain):
    """The logit lens, norms, shapes and inputs: from the states of the plain pass, in float64."""
    model, start = plain["model"], len(data["answers"][0]["prompt_tokens"]) - 1
    states = torch.stack(plain["states"]).detach().double()[:, start:]  # (layers + 1, steps, C)
    normed = states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight.detach().double()
    lens = (normed @ model.lm_head.weight.detach().double().t()).softmax(-1)
    for t, said in enumerate(data["answers"][0]["said"]):
        for i, (id, p, own) in enumerate(said["lens"], 1):
            assert id == int(lens[i, t].argmax()) and p == pytest.approx(float(lens[i, t].max()), rel=1e-3)
            assert own == pytest.approx(float(lens[i, t, said["id"]]), rel=1e-2, abs=1e-7)
        for i, (before, attention, mlp, after) in enumerate(said["norms"]):
            norms = states[i, t].norm(), states[i + 1, t].norm()
            assert (before, after) == pytest.approx([float(n) for n in norms], rel=1e-4)
            assert abs(attention - mlp) <= float((states[i + 1, t] - states[i, t]).norm()) <= attention + mlp
    T = len(data["answers"][0]["prompt_tokens"])
    shapes = data["shapes"]
    assert shapes["embed_tokens"] == [[1, T], [1, T, 192]] and shapes["layers.0.self_attn: k"][1] == [1, 2, T, 48]
    assert shapes["vision_tower.patch_conv"] == [[3, 84, 56], [24, 128]] and shapes["lm_head"] == [[1, 192], [1, 768]]
    with safe_open(os.path.join(TINY, "model.safetensors"), "pt") as file:
        for name, (largest, beyond, seen) in data["inputs"].items():
            x = plain["inputs"][name]
            linear = name.replace("input_layernorm", "self_attn.q_proj").replace(
                "post_attention_layernorm", "mlp.up_proj"
            )
            limit = 448 * float(file.get_tensor(f"model.language_model.{linear}.activation_scale"))
            assert data["limits"][name] == pytest.approx(limit) and seen == x.numel()
            assert largest == pytest.approx(float(x.abs().max()), rel=1e-4) and beyond == int((x.abs() > limit).sum())
    assert len(data["inputs"]) == 4 * 6


def rotated(x: torch.Tensor, angles: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Pairs (i, i + D/2) of x (T, D) as complex numbers, turned by angles (T, D/2)."""
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1) * factor


def queries_and_keys(linear, x: torch.Tensor) -> list[torch.Tensor]:
    return [x @ part.rows_of(linear.weight).detach().double().t() for part in linear.parts[:2]]


def test_attention_of_the_decoder(data, plain):
    model, T, D = plain["model"], len(plain["ids"]), 48
    angles = torch.arange(T).double()[:, None] * torch.tensor(data["positions"]["used"]).double()
    start, factor = len(data["answers"][0]["prompt_tokens"]) - 1, model.config.rope.attention_factor
    assert data["attention"]["layers"] == [0, 1, 2, 3, 4, 5] and data["attention"]["heads"] == [0, 1, 2, 3]
    assert data["attention"]["steps"] == [*range(len(data["rows"]))]
    rows = [numbers(packed) for packed in data["rows"]]
    for i, layer in model.layers.items():
        with torch.no_grad():
            x = layer.input_layernorm(plain["states"][int(i)]).double()
        q, k = queries_and_keys(layer.self_attn.qkv_proj, x)
        for head in range(4):
            query = rotated(q[:, head * D : head * D + D], angles, factor)
            key = rotated(k[:, head // 2 * D : head // 2 * D + D], angles, factor)
            for t, found in enumerate(rows):
                end = start + t + 1
                expected = (query[end - 1] @ key[:end].t() / math.sqrt(D)).softmax(0)
                assert found[int(i), head].sum().item() == pytest.approx(1, abs=1e-5)
                assert torch.allclose(found[int(i), head], expected, atol=1e-4), (i, head, t)


def test_attention_of_the_tower(data, plain):
    tower, maps = data["tower"], numbers(data["tower"]["maps"])
    assert tower["patches"] == [*range(24)] and maps.shape == (4, 4, 24, 24) and data["picture"]["grid"] == [3, 2]
    assert torch.allclose(maps.sum(-1), torch.ones(4, 4, 24, dtype=torch.float64), atol=1e-5)
    place = torch.cartesian_prod(torch.arange(6), torch.arange(4)).double()  # row and column of each patch
    frequencies = 1e4 ** -(torch.arange(0, 32, 2).double() / 32)
    angles = torch.cat((place[:, :1] * frequencies[0::2], place[:, 1:] * frequencies[1::2]), -1)
    for i, (layer, x, *_) in enumerate(plain["tower"]):
        x = layer.attention_norm(x[0]).detach().double()
        q, k = queries_and_keys(layer.attention.qkv_proj, x)
        for head in range(4):
            query, key = (rotated(y[:, head * 32 : head * 32 + 32], angles) for y in (q, k))
            assert torch.allclose(maps[i, head], (query @ key.t() / math.sqrt(32)).softmax(-1), atol=1e-4), (i, head)


def test_positions(data, plain):
    found, rope, answer = data["positions"], plain["model"].config.rope, data["answers"][0]
    assert found["plain"] == pytest.approx([rope.theta ** (-2 * i / 48) for i in range(24)], rel=1e-5)
    assert found["used"][0] == pytest.approx(1) and found["used"][-1] == pytest.approx(
        found["plain"][-1] / 64, rel=1e-5
    )
    logs = plain["logits"][len(answer["prompt_tokens"]) - 1 :].log_softmax(-1)
    own = [float(row[id]) for row, id in zip(logs, answer["tokens"])]
    assert found["far"][0][0] == 0 and found["far"][0][1] == pytest.approx(math.exp(sum(own) / len(own)), rel=1e-4)
    assert found["far"][-1][0] + len(answer["prompt_tokens"] + answer["tokens"]) == 16384
    assert plain["ids"][found["cut"] - 1] == 10 and 10 not in plain["ids"][found["cut"] :]
    _, yarn, without = found["far"][-1]
    assert yarn > 0.9 > without  # what YaRN is for


def test_fp8(data):
    with safe_open(os.path.join(TINY, "model.safetensors"), "pt") as file:
        for entry in data["weights"]:
            stored, size = file.get_tensor(entry["name"]), math.prod(entry["shape"])
            assert sum(entry["after"]) == size and entry["shape"] == list(stored.shape)
            if entry["name"] != "lm_head.weight":
                assert entry["scale"] == pytest.approx(float(file.get_tensor(f"{entry['name']}_scale_inv")))
                assert "before" not in entry and entry["codes"] == len(set(stored.view(torch.uint8).flatten().tolist()))
                continue
            weight = stored.double()
            scale = float(weight.abs().max()) / 448
            error = ((weight / scale).float().to(torch.float8_e4m3fn).double() * scale - weight).flatten()
            rms = math.sqrt(sum(x * x for x in error.tolist()) / size)
            assert (entry["scale"], entry["rms"]) == pytest.approx((scale, rms), rel=1e-4)
            assert entry["worst"] == pytest.approx(float(error.abs().max()), rel=1e-4)
            assert entry["relative"] == pytest.approx(rms / float(weight.square().mean().sqrt()), rel=1e-4)
            assert sum(entry["before"]) == size and entry["before"] != entry["after"]
    assert len(data["weights"]) == 8


def test_the_cut(data):
    """The slices of all ranks make up each tensor, and a rank has read the bytes of its own, and its scales."""
    config, cut = read_config(TINY), data["cut"]
    assert cut["sizes"] == [2, 2] and [(r["pp"], r["tp"]) for r in cut["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with safe_open(os.path.join(TINY, "model.safetensors"), "pt") as file:
        for rank, ran in zip(cut["ranks"], data["found"]):
            total = 0
            for name, dim, start, stop, shape in rank["slices"]:
                first, last = (0, 3) if name.startswith("vision") else rank["layers"]
                times = last - first + 1 if "layers." in name else 1
                lazy = file.get_slice(hf_name(name, config))
                assert lazy.get_shape() == shape
                total += times * lazy[(slice(None),) * dim + (slice(start, stop),)].nbytes
                total += times * 4 * (lazy.get_dtype() == "F8_E4M3")
            assert ran["bytes_read"] == total
    covered = Counter()
    for name, dim, start, stop, shape in (s for rank in cut["ranks"] for s in rank["slices"]):
        covered[name] += (stop - start) / shape[dim]
    assert all(
        share == 2 if "norm" in name or "ln_pre" in name or "patch_conv" in name else share == 1
        for name, share in covered.items()
    )
    assert [rank["parameters"] for rank in data["large"]["ranks"]][0] > 2e9 and len(data["large"]["ranks"]) == 64
    for i, rank in enumerate(data["large"]["ranks"]):
        slices = {name.split(".", 2)[2]: part for name, *part in rank["slices"] if name.startswith("layers.")}
        assert rank["layers"] == [i // 8 * 11, i // 8 * 11 + 10]
        assert slices["self_attn.q_proj.weight"] == [0, i % 8 * 1536, i % 8 * 1536 + 1536, [12288, 12288]]
        assert slices["self_attn.k_proj.weight"][1:3] == [i % 8 * 128, i % 8 * 128 + 128]
        assert slices["mlp.down_proj.weight"] == [1, i % 8 * 3584, i % 8 * 3584 + 3584, [12288, 28672]]


def test_messages(data):
    """Two all-reduces a layer, of the tokens that pass; hidden states to the next stage; the token to all."""
    T, ranks = len(data["answers"][0]["prompt_tokens"]), [rank["messages"] for rank in data["found"]]
    for messages, rank in zip(ranks, data["cut"]["ranks"]):
        for when, tokens in (("prefill", T), ("step", 1)):
            now = [m for m in messages if m[4] == when and not m[3].startswith(("vision", "multi"))]
            reduced = [(size, who) for what, group, size, who, *_ in now if (what, group) == ("all_reduce", "tp")]
            embedding = [(tokens * 192 * 4, "embed_tokens")] if rank["pp"] == 0 else []
            layers = range(rank["layers"][0], rank["layers"][1] + 1)
            parts = [f"layers.{i}.{part}" for i in layers for part in ("self_attn.o_proj", "mlp.down_proj")]
            assert reduced == embedding + [(tokens * 192 * 4, part) for part in parts]
            passed = [(what, size) for what, group, size, *_ in now if group == "pp"]
            assert passed == [("recv" if rank["pp"] else "isend", tokens * 192 * 4)]
        assert [m[:3] for m in messages if m[4] == "post"] == 2 * [["broadcast", "answer", 16]]


def test_the_timetable(data):
    events = [rank["events"] for rank in data["found"]]
    for stage, list_ in enumerate(events):
        order = "".join(kind for kind, *_ in sorted(list_, key=lambda e: e[2]))
        warm = 3 - stage
        assert order == "F" * warm + "FB" * (8 - warm) + "B" * warm
        for kind, number, start, end in list_:
            assert end - start >= (0.04 if kind == "F" else 0.08) - 1e-3
            if stage:
                before = next(e for e in events[stage - 1] if e[:2] == [kind, number])
                assert before[3] <= start if kind == "F" else end <= before[2]


def test_text_only(tmp_path, ckpt):
    """Without a tower two parts go; what a user writes stays text; sampling is the engine's."""
    page, data = tour_of(tmp_path / "page.html", "--ckpt", ckpt, "--prompt", "a </script><b>", "--max-new-tokens", "3")
    assert (
        data["picture"] is data["tower"] is None and data["prompt"] == "a </script><b>" and "</script><b>" not in page
    )
    model, answer = load(ckpt), data["answers"][0]
    engine = Engine(model, -1, 600)
    requests = [
        Request(answer["prompt_tokens"], max_new_tokens=1, temperature=0.7, top_p=0.95, seed=i) for i in range(8)
    ]
    drawn = Counter(found.tokens[0] for found in engine.generate(requests))
    assert dict(answer["said"][0]["drawn"]) == dict(drawn) and len(drawn) > 3
    assert len(answer["tokens"]) == 3 and answer["drafted"] is None and len(data["positions"]["far"]) == 9


def test_raw_where_there_is_no_chat(tmp_path):
    """A tokenizer without [INST]: the prompt is continued, in one column."""
    folder = tmp_path / "ckpt"
    shutil.copytree(TINY, folder)
    for name in ("tekken.json", "config.json"):
        text = (folder / name).read_text(encoding="utf-8").replace('"[INST]"', '"[INTS]"')
        (folder / name).write_text(text, encoding="utf-8")
    (tmp_path / "out").mkdir()
    options = "--ckpt", folder, "--draft", folder / "draft", "--max-new-tokens", "2"
    _, data = tour_of(tmp_path / "out" / "page.html", *options, "--prompt", "the blue")
    assert len(data["answers"][0]["drafted"]["steps"]) == 1
    assert data["raw"] and data["answers"][0]["prompt_tokens"][0] == 1 and len(data["answers"][0]["prompt_tokens"]) < 6


def tour_fails(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["tour.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        launch.run_program(tour.main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_mistakes(monkeypatch, capsys, tmp_path, ckpt):
    out = tmp_path / "page.html"
    usual = ["--prompt", "Why?", "--out", out]
    for more, words in (
        (["--image", tmp_path / "none.png"], "none.png"),
        (["--image", __file__], "not an image"),
        (["--ckpt", tmp_path / "none"], "no such directory"),
        (["--ckpt", tmp_path], "no model*.safetensors"),
        (["--ckpt", ckpt, "--image", PICTURE], "leave out --image"),
        (["--out", tmp_path / "none" / "page.html"], "cannot be written"),
        (["--draft", tmp_path / "none"], "no such directory"),
        (["--draft", TINY], "EAGLE head"),
        (["--ckpt", ckpt, "--draft", os.path.join(TINY, "draft")], "another model's"),
        (["--max-new-tokens", "0"], "from 1"),
        (["--nonsense"], "--nonsense"),
    ):
        assert words in tour_fails(monkeypatch, capsys, *usual, *more), more
    assert not os.listdir(tmp_path)
    out.write_text("mine")
    assert "exists already" in tour_fails(monkeypatch, capsys, *usual) and out.read_text() == "mine"
