"""`parallel.py --plan` against the sizes that are known, and against what real small runs allocate."""

import json
import os
import random
import re
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import SIZES, layout_config, make_eyes, text_fields, write_json, write_tekken
from processes import run, run_ranks

import generate
import train
from parallel import Place
from runtime import launch, plan
from runtime.checkpoint import Checkpoint, fill
from runtime.config import read_config
from runtime.files import UserError
from runtime.launch import find_place
from runtime.optimizer import STATE
from runtime.run import unpadded
from vision import build_model

MEDIUM = dict(
    vocab_size=131072, hidden_size=12288, intermediate_size=28672, num_hidden_layers=88, num_attention_heads=96,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=262144,
    vision_config=dict(
        model_type="pixtral", hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, num_attention_heads=16,
        head_dim=104, num_channels=3, patch_size=14, image_size=1540, hidden_act="silu",
        rope_parameters=dict(rope_type="axial", rope_theta=10000.0),
    ),
)  # fmt: skip
RECIPE = ("--tp", 8, "--pp", 8, "--activation-checkpointing", "--freeze", "vision_tower", "projector", "embeddings")
TOTAL = 127_704_210_176
LAYER, EMBEDDING, TOWER, PROJECTOR = 1_384_144_896, 1_610_612_736, 2_495_702_144, 182_519_424


@pytest.fixture(scope="module")
def medium(tmp_path_factory) -> str:
    """This model's config.json."""
    path = tmp_path_factory.mktemp("medium") / "config.json"
    write_json(path, layout_config(text_fields("yarn", **MEDIUM), "new", "static")[1])
    return str(path)


def planned(config: str, *options) -> dict:
    """What --json prints."""
    args = plan.parse_args(["--plan", "--config", config, *map(str, options)])
    config = read_config(config)
    args.max_length, args.max_context = args.max_length or 2048, args.max_context or config.max_position_embeddings
    return plan.make_plan(config, args)


# ------------------------------------------------------------------------------------------------------ known sizes


def test_this_model(medium):
    """The published sizes, at TP=8 × PP=8, stage by stage."""
    plan = planned(medium, *RECIPE)
    assert plan["parameters"] == TOTAL == 88 * LAYER + 2 * EMBEDDING + TOWER + PROJECTOR + 12288
    assert plan["padding"] == 0 and plan["gpus"] == 64 and plan["fits"]
    norms = 7 * (88 * 2 * 12288 + 12288 + (48 * 2 + 2) * 1664)  # the 8 ranks of a stage hold the same
    assert plan["copies"] == {"norms": norms, "patch_conv": 7 * 1664 * 3 * 14 * 14}
    layer = (LAYER - 2 * 12288) // 8 + 2 * 12288
    extra = [0] * 8
    replicated = (48 * 2 + 2) * 1664 + 1664 * 3 * 14 * 14
    extra[0] = EMBEDDING // 8 + (TOWER + PROJECTOR - replicated) // 8 + replicated
    extra[7] = EMBEDDING // 8 + 12288
    for stage, more in zip(plan["stages"], extra):
        held, trained = 11 * layer + more, 11 * layer + (more if stage["stage"] == 7 else 0)
        assert stage["layers"] == [11 * stage["stage"], 11 * stage["stage"] + 10]
        assert stage["parameters"] == held
        assert stage["weight_bytes"] == 2 * held + 4 * 64  # and the rotary frequencies
        assert (stage["gradient_bytes"], stage["optimizer_bytes"]) == (4 * trained, 12 * trained)
        names = ("weight", "gradient", "optimizer", "cache", "activation", "reserve")
        assert stage["peak_bytes"] == sum(stage[f"{name}_bytes"] for name in names)
    assert plan["micro_batches"] == 64 and plan["bubble"] == 7 / 71
    assert planned(medium, *RECIPE, "--global-batch-size", 8)["bubble"] == 7 / 15
    assert planned(medium, *RECIPE, "--dp", 2, "--micro-batch-size", 4)["micro_batches"] == 8
    assert not planned(medium, "--tp", 8, "--pp", 4, "--gpu-memory-gb", 80)["fits"]


def test_inference_of_this_model(medium):
    """FP8 weights, and 360,448 bytes of keys and values a token over all ranks."""
    fp8, rest = 88 * (LAYER - 2 * 12288), TOTAL - 88 * (LAYER - 2 * 12288)
    one = planned(medium, "--inference", "--gpu-memory-gb", 141)
    # A scale for each row of q, k, v; gate, up; o; down, and one for the inputs of these four.
    scales = 88 * 4 * ((96 + 2 * 8) * 128 + 2 * 28672 + 2 * 12288 + 4)
    assert one["stages"][0]["weight_bytes"] == fp8 + 2 * rest + scales + 4 * 64
    assert one["stages"][0]["cache_bytes"] == 360_448 * 262_144 and not one["fits"]
    limit = one["largest_context"]
    assert 0 < limit < 262_144
    for context, fits in ((limit, True), (limit + 1, False)):
        got = planned(medium, "--inference", "--gpu-memory-gb", 141, "--max-context", context)
        assert got["fits"] == fits
    for gpu, free in (("a100", 85), ("h100", 85), ("h200", 149)):  # 10^9 bytes, not what is on the box
        assert plan.GPUS[gpu].gigabytes == free
    assert planned(medium, "--inference", "--tp", 4)["fits"]
    assert planned(medium, "--inference", "--tp", 4)["stages"][0]["cache_bytes"] == 360_448 * 262_144 // 4
    whole = planned(medium, "--inference", "--weights", "dequantized")
    assert whole["stages"][0]["weight_bytes"] == 2 * TOTAL + 4 * 64 and whole["largest_context"] == 0
    sixteen = planned(medium, "--inference", "--tp", 16)  # two ranks share a key/value head
    assert sixteen["copies"]["key/value heads"] == 88 * 2 * 8 * 128 * 12288
    assert sixteen["stages"][0]["cache_bytes"] == 360_448 * 262_144 // 8


def test_a_draft(medium):
    """The published head: two layers, a matrix of two inputs, a norm; and an entry more in two layers' cache."""
    options = ("--inference", "--tp", 8, "--max-context", 9000)
    without, drafted = planned(medium, *options), planned(medium, *options, "--draft-layers", 2)
    (one,), (two,) = without["stages"], drafted["stages"]
    C, cut = 12288, (2 * LAYER + 2 * 12288**2 - 4 * 12288) // 8  # but for the norms, of which each rank has all
    assert two["parameters"] - one["parameters"] == cut + 5 * C
    scales = two["weight_bytes"] - one["weight_bytes"] - cut - 2 * 5 * C
    assert 0 < scales < 1e6  # float32, one for each row
    assert two["cache_bytes"] / one["cache_bytes"] == 90 / 88
    times = [
        drafted["seconds"][f"a token after 8,192, with a draft that brings {n:g} a step"] for n in (1.5, 2, 2.5, 3)
    ]
    (floor, about), (low, guess) = without["seconds"]["a token after 8,192"], times[0]
    # Three passes of two layers and three readings of the output head, beside 88 layers and one.
    read, more = 88 * LAYER + 2 * EMBEDDING, 3 * (2 * LAYER + 2 * EMBEDDING)
    assert 1.5 * low == pytest.approx(floor * (read + more) / read, rel=0.02)
    assert about < 1.5 * guess < 1.35 * about
    assert [low * 1.5 / n for n in (1.5, 2, 2.5, 3)] == pytest.approx([pair[0] for pair in times])


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_held_is_parameters_copies_and_padding(tied, tmp_path):
    config = str(tmp_path / "config.json")
    write_json(config, layout_config(text_fields(**(SIZES | dict(tie_word_embeddings=tied))), "new")[1])
    whole = planned(config)
    assert not whole["padding"] and not whole["copies"]
    for tp, pp in ((4, 1), (2, 2), (8, 3), (1, 5)):
        plan = planned(config, "--tp", tp, "--pp", pp)
        assert plan["parameters"] == whole["parameters"]
        held = tp * sum(stage["parameters"] for stage in plan["stages"])
        assert held == plan["parameters"] + plan["padding"] + sum(plan["copies"].values())
        ends = 2 - (tied and pp == 1)  # tables of 301 rows, rounded up to a multiple of tp
        assert plan["padding"] == ends * (-301 % tp) * 40
        assert ("tied embedding" in plan["copies"]) == (tied and pp > 1)


# ------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("gpu, fp8", [("h100", True), ("h200", True), ("a100", False)])
def test_time(gpu, fp8, medium):
    """The floors are what arithmetic and memory allow; and more GPUs take less time."""
    memory = plan.GPUS[gpu].memory
    eight, one = (planned(medium, "--inference", "--tp", tp, "--gpu", gpu)["seconds"] for tp in (8, 1))
    bytes_read = 88 * (LAYER - 2 * 12288) + 2 * EMBEDDING + 8192 * 360_448  # FP8 weights, the head in BF16, the cache
    floor, estimate = one["a token after 8,192"]
    assert floor < estimate and (not fp8 or 0.98 < floor / (bytes_read / memory) < 1.1)
    operations = 2 * 8192 * 88 * LAYER
    floor, estimate = one["a prompt of 8,192"]
    peak = plan.GPUS[gpu].fp8 or plan.GPUS[gpu].bf16
    assert operations / peak < floor < 1.4 * operations / peak and floor < estimate
    assert all(eight[name][i] < one[name][i] for name in one for i in (0, 1))
    step = planned(medium, *RECIPE, "--gpu", gpu)["seconds"]
    floor, estimate = step["a step"]
    # Forward twice, but for the layers' last product; backward; and the bubble.
    operations = (8 * TOTAL - 2 * 88 * 28672 * 12288) * 64 * 2048 / 64 * 71 / 64
    assert operations / plan.GPUS[gpu].bf16 < floor < 1.3 * operations / plan.GPUS[gpu].bf16 and floor < estimate
    assert step["100 steps (the published fine-tune)"][1] == pytest.approx(100 * estimate)


def test_time_by_hand(medium):
    """On H100s at TP=8: what a layer takes, in microseconds, worked out from the sizes in plan.py's formulas.

    A rank has 173.0 million weights of a layer, of them 44.0 in down_proj; 201.3 in the head. Reached are 692 and 1,385
    TFLOP/s, 2.68 TB/s, and 315 and 35 GB/s of the links.
    """
    # A token after 8,192: FP8 weights; keys and values of 8,192 tokens in less than 3 µs each; 14 other kernels; two
    # sums of 24.6 kB, of which 1.75 times travels. At the ends the head in BF16, 44 kernels, two messages.
    layer = 173.0 / 2.68 + 2 * 3 + 14 * 3 + 2 * (15 + 0.14)
    infer = planned(medium, "--inference", "--tp", 8)["seconds"]
    assert infer["a token after 8,192"][1] * 1e6 == pytest.approx(
        88 * layer + 2 * 201.3 / 2.68 + 44 * 3 + 30, rel=0.005
    )
    # vLLM's kernels: 6 others, and sums that take 9 µs at least.
    layer = 173.0 / 2.68 + 2 * 3 + 6 * 3 + 2 * (9 + 0.14)
    assert infer["a token after 8,192, with vLLM's kernels"][1] * 1e6 == pytest.approx(
        88 * layer + 2 * 201.3 / 2.68 + 44 * 3 + 18, rel=0.005
    )
    assert infer["a token after 8,192"][0] * 1e6 == pytest.approx(
        (88 * (173.0 + 8192 * 512e-6) + 2 * 201.3) / 3.35, rel=0.005
    )
    # A chunk of 4,096 tokens, after 2,048 on average: 346 million operations a token, and 4 · 1,536 for each of 4,096
    # keys; norms, residuals 246 kB, rotation 23, cache 1, silu 36, quantizing 89; two sums of 101 MB.
    layer = 4096 * (346 / 1385 + 4 * 1536 * 4096e-6 / 692 + 0.395 / 2.68) + 2 * (15 + 1.75 * 101e3 / 315)
    assert infer["a prompt of 8,192"][1] * 1e6 == pytest.approx(2 * 88 * layer, rel=0.01)
    # A step of the recipe: 2,048 tokens through the last stage's 11 layers forward twice, but for down_proj, and
    # backward; attention as often as 4.5 times forward, to 1,024 keys; 306 kB moved twice forward, 419 backward; 10
    # bytes for each weight's gradient; five sums of 50 MB. The head three times, 52 bytes for each logit; one message.
    layer = 2048 * (2 * (4 * 173.0 - 44.0) / 692 + 4.5 * 4 * 1536 * 1024e-6 / 692 + (2 * 0.306 + 0.419) / 2.68)
    layer += 10 * 173.0 / 2.68 + 5 * (15 + 1.75 * 50.3e3 / 315)
    head = 2048 * (3 * 2 * 201.3 / 692 + 52 * 0.016384 / 2.68) + 15 + 50.3e3 / 35
    step = planned(medium, *RECIPE)
    adam = 82 * step["stages"][7]["gradient_bytes"] / 4 / 2.68e6
    assert step["seconds"]["a step"][1] * 1e6 == pytest.approx(71 * (11 * layer + head) + adam, rel=0.01)


# ------------------------------------------------------------------------------------------------------- real runs


def nbytes(tensors) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def train_on_a_rank(argv: list[str]) -> tuple[dict, int]:
    """What lasts when train.py has taken a step: bytes by the names of the plan; and those of this rank in a state."""
    args = train.parse_args(argv)
    place = find_place(args.tp, args.pp)
    trainer = train.Trainer(args, place, train.RunFolder(args, place))
    trainer.step(1, trainer.upcoming(1))
    model, parts = trainer.model, [views for _, views in trainer.optimizer.parts]
    return dict(
        weight_bytes=nbytes([*model.parameters(), *model.buffers()]),
        gradient_bytes=nbytes([views["grads"] for views in parts]),
        optimizer_bytes=nbytes([views[name] for views in parts for name in STATE]),
    ), sum(values.nbytes for _, _, values in unpadded(pair for pair in trainer.optimizer.parts if pair[0].owner))


LARGER = dict(
    vocab_size=1003, hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=8, head_dim=32,
    vision_config=dict(
        model_type="pixtral", hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=8,
        head_dim=16, num_channels=3, patch_size=4, image_size=400, hidden_act="silu",
        rope_parameters=dict(rope_theta=100.0),
    ),
)  # fmt: skip
FROZEN = ("--freeze", "vision_tower", "projector", "embeddings")


@pytest.mark.time_limit(300)
@pytest.mark.parametrize("tp, pp, options", [(2, 2, FROZEN), (2, 2, ("--lora-rank", "4")), (4, 1, ())])
def test_a_training_step(tp, pp, options, tmp_path):
    """Weights, gradients and optimizer state, to the byte. Activations are the subject of test_plan_dry.py."""
    folder = str(tmp_path)
    config = os.path.join(folder, "config.json")
    write_json(config, layout_config(text_fields("yarn", **LARGER, num_key_value_heads=2), "new")[1])
    write_tekken(folder)
    data = os.path.join(folder, "data.jsonl")
    with open(data, "w") as file:
        chat = [dict(role="user", content="a"), dict(role="assistant", content="1")]
        file.write(4 * (json.dumps(dict(messages=chat)) + "\n"))
    common = ["--tp", str(tp), "--pp", str(pp), "--global-batch-size", "4", *options]
    argv = ["--init", config, "--tokenizer", folder, "--data", data, "--out", os.path.join(folder, "out"), *common]
    ranks = run_ranks(train_on_a_rank, tp * pp, argv, seconds=280)
    said = planned(config, *common, "--max-length", 64)
    for rank, (measured, _) in enumerate(ranks):
        assert {name: said["stages"][rank // tp][name] for name in measured} == measured
    saved, (total, most, seconds) = [state for _, state in ranks], said["files"]["a saved state"]
    assert (total, most, seconds) == (sum(saved), max(saved), sum(saved) / plan.DISK)
    assert said["files"]["model/"][0] == 2 * said["parameters"]


def loaded_bytes(directory: str, tp: int, pp: int, dtype: torch.dtype, keep_fp8: bool) -> tuple[int, int, int]:
    checkpoint = Checkpoint(directory)
    model = build_model(read_config(directory), find_place(tp, pp), dtype, keep_fp8)
    fill(model, checkpoint)
    cache = model.new_cache(1, 77)
    return nbytes([*model.parameters(), *model.buffers()]), cache.nbytes, checkpoint.bytes_read


@pytest.mark.parametrize("scheme, weights", [("static", "fp8"), ("dynamic", "fp8"), ("static", "dequantized")])
def test_a_loaded_model(scheme, weights, tmp_path):
    """Weights, scales and cache of generate.py, to the byte."""
    directory = make_eyes(tmp_path, "new", scheme, {})
    for tp, pp in ((4, 1), (2, 2)):
        ranks = run_ranks(loaded_bytes, tp * pp, directory, tp, pp, torch.bfloat16, weights == "fp8")
        options = ("--inference", "--weights", weights, "--tp", tp, "--pp", pp, "--max-context", 77)
        said = planned(os.path.join(directory, "config.json"), *options)
        for rank, (*measured, _) in enumerate(ranks):
            stage = said["stages"][rank // tp]
            assert [stage["weight_bytes"], stage["cache_bytes"]] == measured
        # The file is float32 but for what is FP8, which no published checkpoint is.
        read, halved = sum(read for *_, read in ranks), said["files"]["loading"][0]
        assert halved < read <= 2 * halved + 4 * 2 * 7 * 5 * tp


# ------------------------------------------------------------------------------------------------------ the program


def test_the_program(medium, capsys):
    ended = run("parallel.py", "--plan", "--config", medium, "--json", *RECIPE)
    assert ended.status == 0 and ended.err == ""
    assert json.loads(ended.out) == json.loads(json.dumps(planned(medium, *RECIPE)))
    plan.main(["--plan", "--config", medium, "--inference", "--tp", "2"])
    out = capsys.readouterr().out
    assert (
        "127,704,210,176 parameters" in out
        and "does not fit on 2 × 85 GB; the smallest split that fits is --tp 4 --pp 1, 4 processes" in out
    )


@pytest.mark.parametrize(
    "options, says",
    [
        (
            ("--tp", "5"),
            "tensor-parallel size 5 does not divide the 16 attention heads of the vision tower; choose other --tp",
        ),
        (("--tp", "32"), "attention heads of the vision tower"),
        (("--pp", "89"), "pipeline-parallel size 89 is more than the 88 layers; choose other --tp and --pp"),
        (("--tp", "0"), "--tp"),
        (("--freeze", "head"), "--freeze"),
        (("--gpu-memory-gb", "-1"), "--gpu-memory-gb"),
        (("--max-length", "300000"), "262144"),
        (("--inference", "--max-context", "300000"), "262144"),
        (("--inference", "--freeze", "projector"), "--inference"),
        (("--weights", "fp8"), "--inference"),
        (("--draft-layers", "2"), "--inference"),
        (("--inference", "--pp", "2", "--draft-layers", "2"), "leave out --pp"),
        (("--steps", "3"), "--steps"),
    ],
)
def test_mistakes(options, says, medium, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parallel.py", "--plan", "--config", medium, *options])
    with pytest.raises(SystemExit) as end:
        launch.run_program(plan.main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and says in err


def test_a_mistake_outside(tmp_path):
    status, out, err = run("parallel.py", "--plan", "--config", tmp_path / "none.json", "--tp", 8)
    assert status == 2 and out == "" and err.count("\n") == 1 and "none.json" in err


# ------------------------------------------------------------------------------------- before a model is built


@pytest.mark.parametrize("gpu, tp, weights", [("h100", 4, "fp8"), ("a100", 4, "dequantized"), ("a100", 2, "fp8")])
def test_weights_as_generation_takes_them(gpu, tp, weights, medium):
    """Without FP8 units dequantized where that fits, and otherwise FP8, at 5 bytes a weight instead of 2."""
    options = ["--inference", "--tp", tp, "--gpu", gpu, "--max-context", 2048]
    assert planned(medium, *options) == planned(medium, *options, "--weights", weights)
    gpu, fp8, bfloat16 = plan.GPUS[gpu], *(planned(medium, *options, "--weights", w) for w in ("fp8", "dequantized"))
    times = [each["seconds"]["a token after 2,048"][1] for each in (fp8, bfloat16)]
    each = 88 * (LAYER - 2 * 12288) / tp / gpu.memory / plan.COPIES
    if not gpu.fp8:  # beside the bytes of weights there are 8 kernels of a layer
        assert times[0] - times[1] == pytest.approx(3 * each, rel=0.1)


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_weights_that_are_kept(units, stored, medium, monkeypatch):
    """--weights auto: on a GPU with FP8 units; without them where dequantized ones don't fit by the plan."""
    config, on_gpu, kept = read_config(medium), Place(device=torch.device("cuda")), {}
    monkeypatch.setattr(plan, "has_fp8_matmul", lambda device: units)
    for free in (150e9, 268e9, 300e9):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 0))
        for choice in ("auto", "fp8", "dequantized"):
            args = generate.parse_args(["--prompt", "x", "--weights", choice])
            kept[choice, free] = plan.keeps_fp8(config, on_gpu, args, stored)
            assert plan.keeps_fp8(config, Place(), args, stored) == (choice == "fp8")
    assert all(kept[name, free] == (name == "fp8") for name, free in kept if name != "auto")
    fits = [not kept["auto", free] for free in (150e9, 268e9, 300e9)]
    assert fits == ([True] * 3 if not stored else [False] * 3 if units else [False, True, True])


def needs(config, tp: int, pp: int, args) -> int:
    """The most that a rank needs, by the plan; no reserve on a CPU."""
    options = ["--plan", "--config", "-", "--tp", str(tp), "--pp", str(pp)]
    options += ["--inference", "--max-context", str(2 * plan.CHUNK), "--weights", "dequantized"]
    wanted = plan.parse_args(options)
    return max(stage["peak_bytes"] for stage in plan.make_plan(config, wanted)["stages"]) - plan.RESERVE


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_micro_batch_is_no_larger_than_the_batch(batch, medium):
    common = ["--plan", "--config", "-", "--pp", "16", "--max-length", "512", "--activation-checkpointing"]
    config, plans = read_config(medium), []
    for size in (batch, batch + 1, 1 << 16):
        sizes = ["--global-batch-size", str(batch), "--micro-batch-size", str(size)]
        plans.append(plan.make_plan(config, plan.parse_args([*common, *sizes])))
    assert plans[0] == plans[1] == plans[2]


def test_the_smallest_topology(medium, monkeypatch):
    """What is named fits by the plan, and nothing smaller does."""
    config, args, rng = read_config(medium), generate.parse_args(["--prompt", "x"]), random.Random(3)
    for room in [rng.uniform(30e9, 250e9) for _ in range(4)]:
        monkeypatch.setattr(plan, "cpu_memory", lambda: room)
        with pytest.raises(UserError, match="the weights take 255.4 GB, but .* GB are free on the machine") as refused:
            plan.check_memory(config, Place(), args, keep_fp8=False)
        tp, pp, ranks = map(int, re.search(r"--tp (\d+) --pp (\d+), (\d+) processes", str(refused.value)).groups())
        assert tp * pp == ranks and needs(config, tp, pp, args) <= room
        for smaller in ((tp, pp - 1), (tp // 2, pp), (1, ranks - 1), (2, (ranks - 1) // 2)):
            assert not all(smaller) or needs(config, *smaller, args) > room


def test_memory_that_does_not_do(medium, monkeypatch, capsys):
    """Between the weights and the estimate there is a caution; above it nothing; and all of it is quick."""
    config, started = read_config(medium), time.monotonic()
    args = generate.parse_args(["--prompt", "x"])
    for keep_fp8, weights, peak in ((True, 133.7e9, 141e9), (False, 255.5e9, 261e9)):
        for room, says in ((weights, "caution: this may take "), (peak, "")):
            monkeypatch.setattr(plan, "cpu_memory", lambda: room)
            plan.check_memory(config, Place(), args, keep_fp8)
            err = capsys.readouterr().err
            assert err.startswith(says) and err.count("\n") == bool(says)
    training = train.parse_args(["--ckpt", "x", "--data", "x", "--out", "x", "--activation-checkpointing"])
    monkeypatch.setattr(plan, "cpu_memory", lambda: 80e9)
    with pytest.raises(UserError, match="the smallest split that fits is --tp"):
        plan.check_memory(config, Place(), training, False)
    monkeypatch.setattr(plan, "cpu_memory", lambda: 1e6)
    with pytest.raises(UserError, match="no split makes it fit"):
        plan.check_memory(config, Place(), args, False)
    assert time.monotonic() - started < 20


def check_on_a_rank(config: str, room: float) -> str:
    plan.cpu_memory = lambda: room
    try:
        plan.check_memory(read_config(config), find_place(2, 1), generate.parse_args(["--prompt", "x"]), False)
    except UserError as error:
        return str(error)


def test_ranks_share_a_machine(medium):
    """Two halves of 128 GB do not fit into 200 GB, though each alone would."""
    said = run_ranks(check_on_a_rank, 2, medium, 200e9)
    assert said[0] == said[1] and "255.4 GB, but 200.0 GB" in said[0] and "3 processes with 100.0 GB each" in said[0]


def test_programs_ask_first(medium, tmp_path, monkeypatch):
    """The 128B on this machine, and any model on a small one, are refused within seconds, before they are built."""
    directory = make_eyes(tmp_path, "new", None, {"vocab_size": write_tekken(tmp_path)})
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    training = ["--data", str(data), "--out", str(tmp_path / "out")]
    started = time.monotonic()
    with pytest.raises(UserError, match="the weights take 255.4 GB, but .* are free on the machine"):
        train.main(["--init", medium, "--tokenizer", directory, *training])
    monkeypatch.setattr(plan, "cpu_memory", lambda: 1e5)
    for program, options in ((generate, ["--prompt", "x"]), (train, training)):
        with pytest.raises(UserError, match="the weights take .* GB, but .* are free on the machine"):
            program.main(["--ckpt", directory, *options])
    assert time.monotonic() - started < 20


def test_the_memory_of_this_machine():
    with open("/proc/meminfo") as file:
        total = sum(int(line.split()[1]) for line in file if line.startswith(("MemTotal", "SwapTotal")))
    assert 1e8 < plan.cpu_memory() <= 1024 * total


# ------------------------------------------------------------------------------------------------------------- files


def test_files(medium):
    """What a machine of 8 GPUs reads and writes, at 3 GB/s: the parts of its ranks, and what replicas share once."""
    fp8, rest = 88 * (LAYER - 2 * 12288), TOTAL - 88 * (LAYER - 2 * 12288)
    one = planned(medium, "--inference", "--tp", 2)["files"]
    assert one.keys() == {"loading"} and one["loading"][0] == pytest.approx(fp8 + 2 * rest, rel=1e-3)
    assert one["loading"][2] == one["loading"][0] / 3e9
    for tp, pp, dp, machines in ((8, 2, 1, 2), (8, 1, 3, 1), (2, 2, 2, 1), (2, 1, 4, 1), (2, 2, 999, 2)):
        files = planned(medium, "--tp", tp, "--pp", pp, "--dp", dp)["files"]
        assert files["loading"][2] == pytest.approx((fp8 + 2 * rest) / machines / 3e9, rel=0.15)
        total, most, seconds = files["a saved state"]
        assert total == 12 * TOTAL and most == pytest.approx(total / (tp * pp * dp), rel=0.3)
        assert seconds == pytest.approx(total * min(8, tp * pp * dp) / (tp * pp * dp) / 3e9, rel=0.1)
        assert files["model/"] == [2 * TOTAL, 2 * TOTAL, 2 * TOTAL / 3e9]
    frozen = planned(medium, *RECIPE)["files"]
    assert frozen["a saved state"][0] == 12 * (TOTAL - TOWER - PROJECTOR - EMBEDDING)
    adapters = planned(medium, "--tp", 4, "--lora-rank", 8)
    assert adapters["files"]["a saved state"][0] == 12 * adapters["adapters"]
    assert adapters["files"]["loading"][0] < 1.01 * (fp8 + 2 * rest)


def test_a_run_says_what_takes_long(medium, monkeypatch, capsys):
    """Where it does: before the first of it, in one line."""
    monkeypatch.setattr(plan, "cpu_memory", lambda: 4e12)
    config, common = read_config(medium), ["--data", "x", "--out", "x"]
    for start, says in ((["--ckpt", "x"], ["loading: 133.6 GB"]), (["--init", "x", "--tokenizer", "x"], [])):
        for export, size in (("bfloat16", 255.4), ("fp8", 133.6)):
            args = train.parse_args([*start, *common, "--export", export])
            plan.check_memory(config, Place(), args, False)
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and err.startswith("on paper, at 3 GB/s a machine: ")
            parts = err.removeprefix("on paper, at 3 GB/s a machine: ").split("; ")
            expected = [*says, "a saved state: 1,532.5 GB", f"model/: {size} GB"]
            assert [part.partition(" GB")[0] + " GB" for part in parts] == expected
    plan.check_memory(config, Place(), generate.parse_args(["--ckpt", "x", "hello"]), True)
    assert capsys.readouterr().err == "on paper, at 3 GB/s a machine: loading: 133.6 GB, at most 133.6 a rank, 44.5 s\n"
    small = replace(config, num_hidden_layers=1, vision=None)
    plan.check_memory(small, Place(), generate.parse_args(["--ckpt", "x", "hello"]), True)
    assert capsys.readouterr().err == ""


CASES = [(rng.uniform(20, 120), rng.choice([1, 3]), 64, rng.random() < 0.5) for rng in map(random.Random, range(3))]


@pytest.mark.parametrize("room, dp, batch, sequence", [*CASES, (43, 3, 3, False)])
def test_the_plan_names_what_would_fit(room, dp, batch, sequence, medium, capsys):
    """The smallest split: it fits, and nothing smaller does. With replicas, of all of them."""
    common = ["--gpu-memory-gb", room, "--dp", dp, "--activation-checkpointing", "--freeze", "vision_tower"]
    common += ["--global-batch-size", batch, *(["--sequence-parallel"] if sequence else [])]
    said = planned(medium, *common)
    tp, pp = said["smallest"]
    there = planned(medium, *common, "--tp", tp, "--pp", pp)
    assert not said["fits"] and there["fits"] and "smallest" not in there
    for smaller in ((tp, pp - 1), (tp // 2, pp)):
        assert not all(smaller) or not planned(medium, *common, "--tp", smaller[0], "--pp", smaller[1])["fits"]
    plan.main(["--plan", "--config", medium, *map(str, common)])
    what = f"the smallest split that fits is --tp {tp} --pp {pp}, {tp * pp * dp} processes with {room:.1f} GB each"
    assert capsys.readouterr().out.endswith(f"does not fit on {dp} × {room:g} GB; {what}\n")
    plan.main(["--plan", "--config", medium, "--gpu-memory-gb", "1"])
    assert capsys.readouterr().out.endswith("; no split makes it fit\n")


@pytest.mark.slow
def test_the_flagship_benchmark():
    """On a CPU and a small model it runs from end to end."""
    ended = run("benchmarks/flagship.py", "--device", "cpu")
    assert ended.status == 0 and ended.out.count("\n") == 5 and "prefill" in ended.out and "LoRA" in ended.out
