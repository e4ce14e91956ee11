"""What only a GPU can show: that its kernels, its FP8 products, its recorded steps and NCCL give the CPU's numbers.

On a new machine, in the order in which a failure tells most; all of it is meant to take 8 minutes on one H200:

    python -m pytest tests/test_gpu.py -x -k "not nccl"     # kernels, the model, training
    python benchmarks/flagship.py                           # the 128B at its true sizes
    python -m pytest tests/test_gpu.py -x -k nccl           # up to four ranks, which share the GPU

Should flash-decoding be at fault, PLAIN_KERNELS=1 goes without it.
"""

import json
import os
import random

import pytest
import torch
from draft_cases import Knows, key, make_draft
from helpers import (
    Endless,
    answers,
    check_product,
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
import model
import train
from generate import Engine
from model import MistralMedium, attend, attend_step, flash_decoding, segments_of
from parallel import Place, gumbel
from runtime.config import read_config
from runtime.draft import Eagle, Guesses, read_draft
from runtime.requests import Answer, Request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HERE = torch.device("cpu")
GPU = torch.device("cuda", 0)

# Sizes that the GPU's units take and that are not round otherwise.
SIZES = dict(hidden_size=176, intermediate_size=208, num_attention_heads=6, num_key_value_heads=2, head_dim=32)


def build(folder, device: torch.device, dtype: torch.dtype, keep_fp8: bool = False) -> MistralMedium:
    return load(folder, dtype, keep_fp8, fast=True, place=Place(device=device))


def generated(
    model: MistralMedium, requests: list[Request], chunk: int, recorded: bool = True, draft: Guesses | None = None
) -> list[Answer]:
    """Four at a time."""
    engine = Engine(model, Endless.eos_id, 4096, draft)
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


@pytest.mark.parametrize("sizes", [(1, 12, 1, 9, 128), (2, 8, 2, 130, 64), (1, 6, 2, 257, 32)])
def test_gradients_of_attention(sizes):
    """Flash attention's backward pass, where heads share keys that are expanded, against the formula in float64."""
    B, H, KV, T, D = sizes
    torch.manual_seed(2)
    tensors = [torch.randn(B, heads, T, D).bfloat16() for heads in (H, KV, KV, H)]
    q, k, v = (x.double().requires_grad_() for x in tensors[:3])
    keys, values = (x.repeat_interleave(H // KV, 1) for x in (k, v))
    hidden = torch.arange(T) > torch.arange(T)[:, None]
    scores = (q @ keys.mT / D**0.5).masked_fill(hidden, -torch.inf)
    (scores.softmax(-1) @ values).backward(tensors[3].double())
    ours = [x.to(GPU).requires_grad_() for x in tensors[:3]]
    attend(*ours).backward(tensors[3].to(GPU))
    for found, meant in zip(ours, (q, k, v)):
        error = found.grad.cpu().double() - meant.grad
        assert error.norm() < 0.02 * meant.grad.norm() and error.abs().max() < 0.1 * meant.grad.abs().max()


@pytest.mark.parametrize("rows, kv_heads, group, length, size, T", [
    (1, 1, 12, 8192, 128, 1), (16, 1, 12, 1000, 128, 1), (3, 2, 3, 77, 32, 1), (1, 2, 3, 77, 32, 1),
    (5, 8, 12, 513, 128, 1),
    (2, 4, 1, 300, 64, 1), (1, 1, 12, 8192, 128, 4), (16, 1, 12, 1000, 128, 4), (3, 2, 3, 77, 32, 5),
])  # fmt: skip
def test_flash_decoding(rows, kv_heads, group, length, size, T):
    """Against attention as products, also recorded and replayed at other positions; what lies beyond does not count."""
    if not model.has_flash_decoding(GPU, torch.bfloat16, size):
        assert model.PLAIN_KERNELS or not model.has_flash(GPU, torch.bfloat16, size)
        pytest.skip("not used here")
    torch.manual_seed(rows)
    cache = torch.randn(2, rows + 1, kv_heads, length, size, device=GPU).bfloat16()[:, :rows]
    q = torch.randn(rows, kv_heads * (group + 2), T, size, device=GPU).bfloat16()[:, : kv_heads * group]
    steps = torch.arange(T, device=GPU)
    positions = torch.randint(length - T + 1, (rows, 1), device=GPU) + steps
    run = lambda: flash_decoding(q, cache, *segments_of(positions, cache))  # noqa: E731
    run()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        recorded = run()
    for first in (0, length // 2, length - T):
        positions[0] = first + steps
        beyond = torch.arange(length, device=GPU) > positions.repeat_interleave(group, dim=1)[..., None]
        bias = torch.zeros(beyond.shape, device=GPU).masked_fill_(beyond, -torch.inf)[:, None]
        expected = attend_step(q, *cache, bias)
        graph.replay()
        for found in (run(), recorded):
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize("by_rows", [False, True])
def test_few_rows_in_fp8(rows, by_rows):
    if not fp8.has_fp8_matmul(GPU) or (by_rows and not fp8.takes_row_scales(GPU)):
        pytest.skip("no such products here")
    check_product(random.Random(rows), rows, by_rows, GPU)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaled_products(by_rows, dtype):
    """FP8 weights without FP8 units, forward and backward: the CPU's numbers."""
    torch.manual_seed(4)
    x, grad, weight = torch.randn(33, 176).to(dtype), torch.randn(33, 208).to(dtype), torch.randn(208, 176).to(fp8.E4M3)
    scale, results = torch.rand(208, 1) if by_rows else torch.tensor(0.0123), []
    for device in (HERE, GPU):
        ours = x.to(device, copy=True).requires_grad_()
        y = fp8.linear(ours, weight.to(device), scale.to(device), None)
        y.backward(grad.to(device))
        results.append((y.detach().cpu(), ours.grad.cpu()))
    for found, expected in zip(*reversed(results)):
        bound = 0.01 if dtype == torch.bfloat16 else 1e-5
        assert (found.double() - expected.double()).norm() < bound * expected.double().norm()


def test_what_is_rounded_once():
    """Dequantizing and quantizing give the very bits of a CPU; the noise of sampling is as near as logarithms are."""
    weight = torch.randn(176, 208).mul(100).to(fp8.E4M3)
    x, scale = torch.randn(50, 208).bfloat16(), torch.tensor(0.0123)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(
            fp8.dequantize(weight.to(GPU), scale.to(GPU), dtype).cpu(), fp8.dequantize(weight, scale, dtype)
        )
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all numbers, and NaN
    for inputs in (x, bits, bits.float(), torch.tensor([448, 464, 465, 1e30, torch.inf, -torch.inf, torch.nan])):
        quantized, meant = fp8.quantize(inputs.to(GPU), scale.to(GPU)).cpu(), fp8.quantize(inputs, scale)
        nan = meant.isnan()
        assert torch.equal(quantized.isnan(), nan)  # of either sign
        assert torch.equal(quantized.view(torch.uint8)[~nan], meant.view(torch.uint8)[~nan])
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


@pytest.mark.parametrize("wrong", [None, 0.0, 0.4])
def test_drafts(wrong, tmp_path):
    """Recorded steps that draft and verify, by a head or by one that knows what to guess: the CPU's tokens without."""
    fields = text_fields("yarn, short", **SIZES)
    write_checkpoint(tmp_path / "model", fields, random_state(fields, seed=4))
    make_draft(tmp_path / "draft", **fields)
    requests = drawn_requests(11, 5)
    expected = generated(build(tmp_path / "model", HERE, torch.float32), requests, 23)
    model = build(tmp_path / "model", GPU, torch.float32)
    if wrong is None:
        draft = Eagle(read_draft(str(tmp_path / "draft"), model).eval(), model, 3)
    else:
        known = {key(request): answer.tokens for request, answer in zip(requests, expected)}
        draft = Knows(3, known, wrong, device=GPU)
    assert_near(generated(model, requests, 23, draft=draft), expected, 1e-3, other=1)


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


def test_training_in_bfloat16(cases, tmp_path):
    """As near to the CPU's float32 run as the CPU's own BF16 run is, twice over."""
    options, runs = {"micro_batch_size": 3, "max_steps": 4}, {}
    train.main(arguments(*cases["images"], tmp_path / "gpu", dtype="bfloat16", **options))
    for dtype in ("bfloat16", "float32"):
        train_on_ranks(arguments(*cases["images"], tmp_path / dtype, dtype=dtype, **options), (1, 1, 1))
        runs[dtype] = metrics(tmp_path / dtype)
    for column, least in (("loss", 0.005), ("grad_norm", 0.02)):
        apart = worst(metrics(tmp_path / "gpu"), runs["float32"], column)
        bound = max(least, 2 * worst(runs["bfloat16"], runs["float32"], column))
        print(f"{column}: {apart:.4f} of {bound:.4f}")
        assert apart < bound


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


def share_symmetric_memory() -> None:
    share_one_gpu()
    os.environ |= {"SYMMETRIC_MEMORY": "1", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("prepare", [share_one_gpu, share_symmetric_memory])
def test_fp8_over_nccl(prepare, tmp_path):
    """FP8 products, tensor parallelism and recorded steps together, as the 128B runs: near to float32 on the CPU."""
    fields = text_fields("yarn, short", **SIZES, vocab_size=write_tekken(tmp_path) + 3)
    stored, _ = to_fp8(random_state(fields, seed=1), False)
    write_checkpoint(tmp_path, fields, stored, fp8="dynamic")
    lines = [{"raw": "the in other when " * (1 + i), "max_new_tokens": 20} for i in range(6)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--ckpt", tmp_path, "--requests", tmp_path / "requests.jsonl", "--json", "--logprobs", "--batch-size", 4]
    (alone,) = run_on_ranks(1, "generate.py", *argv, "--dtype", "float32")
    ranks = run_on_ranks(2, "generate.py", *argv, prepare=prepare)
    assert [rank.status for rank in ranks] == [0, 0], "".join(rank.err for rank in ranks)
    apart = []
    for a, b in zip(answers((0, ranks[0].out, "")), answers((0, alone.out, "")), strict=True):
        count = next((i for i, pair in enumerate(zip(a["tokens"], b["tokens"])) if pair[0] != pair[1]), 20)
        found, meant = (x["prompt_logprobs"][1:] + x["logprobs"][:count] for x in (a, b))
        apart += [abs(x - y) for x, y in zip(found, meant)]
    print(f"log-probabilities {sum(apart) / len(apart):.3f} apart, at most {max(apart):.3f}")
    assert sum(apart) / len(apart) < 0.25


SUMS = """
import torch
import parallel
from runtime.launch import find_place

place = find_place(2, 1)
torch.manual_seed(0)
with torch.inference_mode():
    both = torch.randn(2, 16, 12288, device=place.device).bfloat16()
    buffer = parallel.symmetric_buffer(place.tp_group, both.dtype, place.device)
    if buffer is None:
        print("nothing shared")
    else:
        x, expected = both[place.tp_rank].clone(), both[0] + both[1]
        run = lambda: [parallel.summed(x.clone(), place.tp_group) for _ in range(20)]
        found = run()
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            recorded = run()
        for _ in range(5):
            graph.replay()
        print(all(torch.equal(total, expected) for total in found + recorded))
"""


def test_symmetric_memory_over_nccl(tmp_path):
    """Sums of two ranks to the bit, one after the other, recorded too."""
    (tmp_path / "sums.py").write_text(SUMS)
    ranks = run_on_ranks(2, str(tmp_path / "sums.py"), prepare=share_symmetric_memory)
    said = [rank.out.strip() for rank in ranks]
    if said == ["nothing shared"] * 2:
        pytest.skip("two ranks on one GPU share no memory here")
    assert said == ["True", "True"], "".join(rank.err for rank in ranks)


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
