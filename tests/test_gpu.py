"""What only a GPU can show: that its kernels, its FP8 products, its recorded steps and NCCL give the CPU's numbers."""

import json
import os
import random

import pytest
import torch
from helpers import (
    Endless,
    answers,
    load,
    make_eyes,
    random_state,
    random_tokens,
    text_fields,
    to_fp8,
    write_checkpoint,
    write_tekken,
)
from processes import run_on_ranks
from request_cases import drawn_requests
from train_cases import RECIPE, arguments, metrics, train_on_ranks, worst

import fp8
import train
from generate import Engine
from model import MistralMedium, attend, attend_step
from parallel import Place, gumbel
from runtime.config import read_config
from runtime.requests import Answer, Request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HERE = torch.device("cpu")
GPU = torch.device("cuda", 0)

# Sizes that the GPU's units take and that are not round otherwise.
SIZES = dict(hidden_size=176, intermediate_size=208, num_attention_heads=6, num_key_value_heads=2, head_dim=32)


def build(folder, device: torch.device, dtype: torch.dtype, keep_fp8: bool = False) -> MistralMedium:
    return load(folder, dtype, keep_fp8, fast=True, place=Place(device=device))


def generated(model: MistralMedium, requests: list[Request], chunk: int, recorded: bool = True) -> list[Answer]:
    """Four at a time."""
    engine = Engine(model, Endless.eos_id, 4096)
    engine.chunk = chunk
    if not recorded:
        engine.record = None
    replies = engine.generate(requests, width=4)
    assert bool(engine.record) == any(run for group in engine.groups for run in group.steps.values())
    return replies


def assert_near(replies: list[Answer], expected: list[Answer], bound: float, other: int = 0) -> None:
    """At most `other` answers have other tokens, which happens where two are about as likely."""
    parted = 0
    for reply, meant in zip(replies, expected, strict=True):
        differ = [i for i, pair in enumerate(zip(reply.tokens, meant.tokens)) if pair[0] != pair[1]]
        count = differ[0] if differ else len(meant.tokens)
        parted += bool(differ)
        assert differ or (reply.tokens, reply.finish_reason) == (meant.tokens, meant.finish_reason)
        found = reply.prompt_logprobs[1:] + reply.logprobs[:count]
        assert found == pytest.approx(meant.prompt_logprobs[1:] + meant.logprobs[:count], abs=bound)
    assert parted <= other


# ------------------------------------------------------------------------------------------------------- the pieces


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "sizes", [(1, 8, 2, 7, 7, 64), (2, 12, 1, 33, 145, 128), (1, 6, 2, 130, 700, 32), (1, 4, 4, 1, 9, 14)]
)
def test_attention(sizes, dtype):
    """Of prompts, alone and after others in the cache, against the formula in float64."""
    B, H, KV, T, S, D = sizes
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, T, D).to(dtype), torch.randn(B, KV, S, D).to(dtype), torch.randn(B, KV, S, D).to(dtype)
    keys, values = (x.double().repeat_interleave(H // KV, 1) for x in (k, v))
    hidden = torch.arange(S) > torch.arange(S - T, S)[:, None]
    scores = (q.double() @ keys.transpose(2, 3) / D**0.5).masked_fill(hidden, -torch.inf)
    expected = scores.softmax(-1) @ values
    found = attend(*(x.to(GPU) for x in (q, k, v))).cpu()
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_a_step(dtype):
    torch.manual_seed(1)
    q, k, v = (
        torch.randn(3, 12, 1, 32).to(dtype),
        torch.randn(3, 2, 77, 32).to(dtype),
        torch.randn(3, 2, 77, 32).to(dtype),
    )
    lengths = torch.tensor([1, 40, 77])
    bias = torch.zeros(3, 77).masked_fill_(torch.arange(77) >= lengths[:, None], -torch.inf)[:, None, None]
    keys, values = (x.double().repeat_interleave(6, 1) for x in (k, v))
    expected = (q.double() @ keys.transpose(2, 3) / 32**0.5 + bias).softmax(-1) @ values
    found = attend_step(*(x.to(GPU) for x in (q, k, v, bias))).cpu()
    torch.testing.assert_close(found.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_what_is_rounded_once():
    """Dequantizing and quantizing give the very bits of a CPU; the noise of sampling is as near as logarithms are."""
    weight = torch.randn(176, 208).mul(100).to(fp8.E4M3)
    x, scale = torch.randn(50, 208).bfloat16(), torch.tensor(0.0123)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(
            fp8.dequantize(weight.to(GPU), scale.to(GPU), dtype).cpu(), fp8.dequantize(weight, scale, dtype)
        )
    quantized = fp8.quantize(x.to(GPU), scale.to(GPU)).cpu()
    assert torch.equal(quantized.view(torch.uint8), fp8.quantize(x, scale).view(torch.uint8))
    seeds, positions, ids = torch.tensor([1, -(2**62)]), torch.tensor([0, 99_999]), torch.arange(1000)
    torch.testing.assert_close(
        gumbel(*(t.to(GPU) for t in (seeds, positions, ids))).cpu(), gumbel(seeds, positions, ids)
    )


# ------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("chunk", [23, 4096])
def test_answers(seed, chunk, tmp_path):
    """Rows that are refilled, chunks, steps that are recorded: the CPU's tokens and log-probabilities, in float32."""
    fields = text_fields("yarn, short", **SIZES)
    write_checkpoint(tmp_path, fields, random_state(fields, seed=seed))
    requests = drawn_requests(11, seed, logprobs=True)
    expected = generated(build(tmp_path, HERE, torch.float32), requests, chunk)
    model = build(tmp_path, GPU, torch.float32)
    for recorded in (True, False):
        assert_near(generated(model, requests, chunk, recorded), expected, 1e-3, other=1)


@pytest.mark.parametrize("form", ["bfloat16", "dequantized", "static", "dynamic"])
def test_low_precision(form, tmp_path):
    """Log-probabilities as near to those in float32 as the numbers allow; FP8 rounds the inputs of products, too."""
    fields = text_fields("yarn, short", **SIZES)
    state = random_state(fields, seed=3)
    if form != "bfloat16":
        state, _ = to_fp8(state, form == "static")
    for name in state:
        if name.endswith("activation_scale"):  # large enough that nothing is clamped
            state[name] = torch.tensor(0.05)
    write_checkpoint(
        tmp_path, fields, state, fp8=None if form == "bfloat16" else form.replace("dequantized", "dynamic")
    )
    tokens = random_tokens(300, 301, seed=5)
    requests = [Request(tokens[:size], max_new_tokens=1, logprobs=True) for size in (300, 40, 7)]
    expected = generated(build(tmp_path, HERE, torch.float32), requests, 4096)
    model = build(tmp_path, GPU, torch.bfloat16, form in ("static", "dynamic"))
    found = generated(model, requests, 100, recorded=False)
    apart = [abs(a - b) for x, y in zip(found, expected) for a, b in zip(x.prompt_logprobs[1:], y.prompt_logprobs[1:])]
    mean, most = sum(apart) / len(apart), max(apart)
    print(f"{form}: log-probabilities {mean:.3f} apart, at most {most:.3f}")
    assert mean < (0.25 if form in ("static", "dynamic") else 0.06)


def test_recorded_steps_in_fp8(tmp_path):
    """They give the tokens of those that are not recorded, whatever the number of rows."""
    fields = text_fields("yarn, short", **SIZES)
    stored, _ = to_fp8(random_state(fields, seed=4), True)
    write_checkpoint(tmp_path, fields, stored, fp8="static")
    model, requests = build(tmp_path, GPU, torch.bfloat16, True), drawn_requests(9, 5)
    once, again, plain = (generated(model, requests, 100, recorded) for recorded in (True, True, False))
    assert [a.tokens for a in once] == [a.tokens for a in again]
    same = sum(a.tokens == b.tokens for a, b in zip(once, plain))
    print(f"{same} of {len(plain)} answers alike")
    assert same >= 5  # a power of two of rows is another product, which may round otherwise


def test_pictures(tmp_path):
    """The tower's features of pictures of several sizes."""
    folder = make_eyes(tmp_path, "new", None, {})
    torch.manual_seed(0)
    side = 2 * read_config(folder).vision.patch_size
    pixels = [torch.randn(3, h * side, w * side) for h, w in ((1, 1), (2, 1), (1, 3))]
    with torch.inference_mode():
        expected, found = (build(folder, device, torch.float32).vision(pixels).cpu() for device in (HERE, GPU))
        low = build(folder, GPU, torch.bfloat16).vision(pixels).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (low.float() - expected).norm() < 0.03 * expected.norm()


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["text", "images"])
@pytest.mark.parametrize(
    "options", [{}, {"activation_checkpointing": True}, {"lora_rank": 3}, {"freeze": ["embeddings"]}]
)
def test_training(name, options, cases, tmp_path):
    """The CPU's losses and gradient norms; ranks that the tests start see no GPU."""
    options = {"micro_batch_size": 3, "max_steps": 4, **options}
    train.main(arguments(*cases[name], tmp_path / "gpu", **options))
    train_on_ranks(arguments(*cases[name], tmp_path / "cpu", **options), (1, 1, 1))
    for column in ("loss", "grad_norm"):
        assert worst(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), column) < 1e-4


# ------------------------------------------------------------------------------------------------------------ NCCL


def share_one_gpu() -> None:
    """Let all ranks of a program take the first GPU.

    NCCL refuses two ranks of a machine on one GPU. So each is told that its machine is another one, and they talk
    through sockets.
    """
    os.environ |= {"CUDA_VISIBLE_DEVICES": "0", "NCCL_HOSTID": os.environ["RANK"], "LOCAL_RANK": "0"}
    os.environ |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (2, 2), (1, 3)])
def test_generation_over_nccl(tp, pp, tmp_path):
    """More requests than stages and rows."""
    fields = text_fields("yarn, short", **SIZES, vocab_size=write_tekken(tmp_path) + 3)
    write_checkpoint(tmp_path, fields, random_state(fields, seed=1))
    draw, lines = random.Random(tp), []
    for i in range(13):
        text = "".join(draw.choices("the in other when ", k=draw.randint(3, 200)))
        lines.append(
            {"raw": text, "max_new_tokens": draw.randint(1, 25), "temperature": draw.choice([0, 1]), "seed": i}
        )
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--ckpt", tmp_path, "--requests", tmp_path / "requests.jsonl", "--json", "--dtype", "float32"]
    argv += ["--batch-size", 6, "--logprobs"]
    (alone,) = run_on_ranks(1, "generate.py", *argv)
    ranks = run_on_ranks(tp * pp, "generate.py", *argv, "--tp", tp, "--pp", pp, prepare=share_one_gpu)
    assert [rank.status for rank in ranks] == [0] * len(ranks), "".join(rank.err for rank in ranks)
    expected, found = (answers((0, rank.out, "")) for rank in (alone, ranks[0]))
    assert sum(a["tokens"] != b["tokens"] for a, b in zip(found, expected, strict=True)) <= 1
    for a, b in zip(found, expected):
        if a["tokens"] == b["tokens"]:
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-3)


@pytest.mark.time_limit(300)
@pytest.mark.parametrize(
    "topology, name, options",
    [
        ((2, 1, 1), "text", {}),
        ((1, 2, 1), "text", {"micro_batch_size": 1}),  # tied over the stages
        ((1, 1, 2), "images", RECIPE),
        ((2, 2, 1), "images", {"sequence_parallel": True, "activation_checkpointing": True}),
        ((2, 1, 1), "images", {"lora_rank": 3}),
    ],
)
def test_training_over_nccl(topology, name, options, cases, tmp_path):
    options = {"micro_batch_size": 3, "max_steps": 4, **options}
    train_on_ranks(arguments(*cases[name], tmp_path / "cpu", **options), (1, 1, 1))
    train_on_ranks(arguments(*cases[name], tmp_path / "gpu", **options), topology, prepare=share_one_gpu)
    for column in ("loss", "grad_norm"):
        assert worst(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), column) < 1e-4
