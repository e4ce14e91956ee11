"""The small checkpoint: that its recipe runs from end to end, and that the committed one does what its README says."""

import glob
import json
import os
import subprocess
import sys

import pytest
from processes import ROOT, run, run_on_ranks

from runtime.checkpoint import Checkpoint
from runtime.config import read_config
from runtime.tokenizer import load_tokenizer

TINY = os.path.join(ROOT, "examples", "tiny")
committed = pytest.mark.skipif(not os.path.isdir(TINY), reason="the repository holds no checkpoint yet")


def held_out(tmp_path, pictures: int, seed: int) -> str:
    """A folder of held-out sets of so many fresh pictures each."""
    options = ["--chats", "0", "--review", "0", "--held-out", str(pictures), "--seed", str(seed)]
    assert run("examples/shapes.py", tmp_path / "data", *options).status == 0
    return str(tmp_path / "data")


def is_this_model(folder: str) -> None:
    """Every part in its place: what makes a checkpoint a small Mistral Medium 3.5, in at most 8 MB."""
    assert sum(os.path.getsize(path) for path in glob.glob(f"{folder}/*")) <= 8_000_000
    config, checkpoint, tokenizer = read_config(folder), Checkpoint(folder), load_tokenizer(folder)
    assert config.fp8 and config.activation_scheme == "static" and checkpoint.is_fp8()
    assert config.raw["model_type"] == "mistral3" and config.raw["text_config"]["model_type"] == "ministral3"
    assert config.raw["vision_config"]["model_type"] == "pixtral" and config.vision.spatial_merge_size == 2
    assert config.rope.yarn and config.rope.factor == 64 and abs(config.rope.attention_factor - 1.41589) < 1e-5
    assert config.num_attention_heads > config.num_key_value_heads and not config.tie_word_embeddings
    assert tokenizer.version == "v15" and tokenizer.model_settings["reasoning_effort"]["values"] == ["none", "high"]
    assert os.path.isfile(os.path.join(folder, "model.safetensors.index.json"))
    with open(os.path.join(folder, "model.safetensors.index.json"), encoding="utf-8") as file:
        names = json.load(file)["weight_map"]
    linears = [name for name in names if "language_model.layers" in name and name.endswith("_proj.weight")]
    assert len(linears) == 7 * config.num_hidden_layers
    for name in linears:
        assert {f"{name}_scale_inv", name.replace(".weight", ".activation_scale")} <= set(names)


@pytest.mark.slow
@pytest.mark.time_limit(500)
def test_the_recipe_runs_from_end_to_end(tmp_path):
    """Data, a few steps, FP8 with measured scales, evaluation; a second call goes on, not again."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')  # this very Python
    (bin_folder / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "CHATS": "24", "HELD_OUT": "6"}
    command = ["bash", os.path.join(ROOT, "examples", "train_tiny.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 3/3" in done.stderr and "| single-step questions | 6 |" in done.stdout
    is_this_model(str(tmp_path / "out" / "tiny"))


@pytest.mark.slow
@pytest.mark.time_limit(300)
def test_evaluation_reports_a_missing_set(tmp_path):
    result = run("examples/evaluate.py", tmp_path, "--sets", "single", "--ckpt", tmp_path)
    assert result.status == 2 and "shapes.py writes it" in result.err and "Traceback" not in result.err


@committed
def test_the_checkpoint_is_this_model():
    is_this_model(TINY)
    assert os.path.isfile(os.path.join(TINY, "README.md"))


@committed
@pytest.mark.time_limit(400)
def test_every_topology_and_weight_form_answers_alike(tmp_path):
    """FP8 kept in memory or dequantized, and every (tp, pp) up to four processes, on a few held-out pictures."""
    data = held_out(tmp_path, pictures=4, seed=77)
    requests = []
    for name, effort in (("single", "none"), ("several", "high"), ("tools", "none")):
        with open(f"{data}/{name}.jsonl", encoding="utf-8") as file:
            for line in list(file)[:2]:
                chat = json.loads(line)
                chat["messages"].pop()
                requests.append({**chat, "reasoning_effort": effort, "temperature": 0, "top_p": 1})
    path = os.path.join(data, "requests.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(request) + "\n" for request in requests)

    def answers(*options: str, processes: int = 1) -> list:
        common = ("--requests", path, "--json", "--dtype", "float32")
        first, *others = run_on_ranks(processes, "generate.py", *common, *options)
        assert all(rank.status == 0 for rank in (first, *others)), first.err[-2000:]
        lines = [json.loads(line) for line in first.out.splitlines()]
        return [(line["text"], line["reasoning"], line["tool_calls"]) for line in lines]

    expected = answers()
    assert any(reasoning for _, reasoning, _ in expected) and any(calls for *_, calls in expected)
    assert answers("--weights", "fp8") == expected
    for tp, pp in ((2, 1), (1, 2), (2, 2), (4, 1), (1, 4)):
        assert answers("--tp", str(tp), "--pp", str(pp), processes=tp * pp) == expected, (tp, pp)


@committed
@pytest.mark.slow
@pytest.mark.time_limit(400)
def test_the_checkpoint_is_as_good_as_said(tmp_path):
    """On fresh pictures, the figures of its README within what 200 questions can tell."""
    data = held_out(tmp_path, pictures=200, seed=99)
    sets = ["single", "crowded", "tools", "counted_calls", "follow_up", "absent"]
    result = run("examples/evaluate.py", data, "--ckpt", TINY, "--sets", *sets, seconds=300)
    assert result.status == 0, result.err[-2000:]
    rows = [[cell.strip().rstrip(" %") for cell in line.strip("| \n").split("|")] for line in result.out.splitlines()]
    with open(os.path.join(TINY, "README.md"), encoding="utf-8") as file:
        said = {cells[1].strip(): cells[3:5] for line in file if len(cells := line.split("|")) > 5}
    for title, _, *figures in rows[2:]:
        for figure, claim in zip(figures, said[title]):
            assert not figure or float(figure) > float(claim.strip(" %")) - 5, (title, figure, claim)
