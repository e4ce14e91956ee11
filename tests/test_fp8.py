"""FP8: every code and scale against float64, the three ways to multiply, and what stays in memory."""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PROJECTIONS,
    load,
    log_probabilities,
    random_state,
    random_tokens,
    text_fields,
    to_fp8,
    write_checkpoint,
)

import fp8

CODES = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3)
FINITE = CODES[~CODES.float().isnan()]


def random_fp8(*shape: int, seed: int = 0) -> torch.Tensor:
    return (40 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(fp8.E4M3)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_dequantize(scale_dtype):
    """The product as float64 gives it, rounded to float32, and to BF16 only after that."""
    draw = torch.Generator().manual_seed(1)
    for scale in torch.rand(50, generator=draw).pow(4).to(scale_dtype):
        exact = (FINITE.double() * scale.double()).float()
        assert torch.equal(fp8.dequantize(FINITE, scale, torch.float32), exact)
        assert torch.equal(fp8.dequantize(FINITE, scale, torch.bfloat16), exact.bfloat16())


def test_dequantize_is_not_a_bf16_product():
    scale = torch.tensor(0.0123456)
    ours = fp8.dequantize(FINITE, scale, torch.bfloat16)
    assert not torch.equal(ours, FINITE.bfloat16() * scale.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_has_the_bits_of_a_float32_product(dtype):
    """Every code by scales of all sizes, in both ways to give a kernel the scale: see fp8.dequantize."""
    draw = torch.Generator().manual_seed(3)
    for scale in (6 * torch.randn(500, generator=draw) - 4).exp():
        exact = (FINITE.float() * scale).to(dtype)
        assert torch.equal(fp8.dequantize(FINITE, scale, dtype), exact)
        assert torch.equal(FINITE.to(dtype).mul_(scale.reshape(1)), exact)  # as on a GPU
    for shape in ((7,), (11, 7), (5, 2, 3), (0, 4)):
        weight = random_fp8(*shape)
        assert torch.equal(fp8.dequantize(weight, scale, dtype), (weight.float() * scale).to(dtype))


def test_quantize():
    """To the nearest of the 253 finite values, ties to the even code, beyond ±448 to ±448."""
    values = FINITE.double().unique()
    draw = torch.Generator().manual_seed(2)
    scale = torch.tensor(0.037)
    x = torch.cat([3 * torch.randn(4000, generator=draw), torch.tensor([0.0, 1e6, -1e6, torch.inf, -torch.inf])])
    middles = ((values[1:] + values[:-1]) / 2).float()  # exact in float32: these are ties
    for inputs, by in ((x, scale), (middles, torch.tensor(1.0))):
        scaled = (inputs / by).double().clamp(-448, 448)
        distance = (scaled[:, None] - values).abs()
        nearest = distance.amin(1, keepdim=True)
        even = torch.tensor([int(v.to(fp8.E4M3).view(torch.uint8)) % 2 == 0 for v in values.float()])
        order = (distance == nearest).double() + 0.5 * even
        expected = values[order.argmax(1)]
        assert torch.equal(fp8.quantize(inputs, by).double(), expected)


def test_scale_of():
    assert fp8.scale_of(torch.tensor(0.0)) == 1
    assert fp8.scale_of(torch.tensor(3.0, dtype=torch.bfloat16)) == torch.tensor(3.0) / 448
    x = torch.tensor([[-5.5, 2.0], [0.1, 5.4]])
    quantized = fp8.quantize(x, fp8.scale_of(x.abs().amax()))
    assert quantized.float().abs().max() == 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_fp8_matmul(static, dtype):
    """Both sides quantized, summed in float64; the static scale below is small enough that inputs saturate."""
    draw = torch.Generator().manual_seed(3)
    x = (2 * torch.randn(3, 5, 64, generator=draw)).to(dtype)
    weight, weight_scale = random_fp8(48, 64), torch.tensor(0.0031)
    scale = torch.tensor(4.0 / 448) if static else x.abs().max().float() / 448
    out = fp8.fp8_matmul(x, weight, weight_scale, scale if static else None)
    inputs = (x.float() / scale).clamp(-448, 448).to(fp8.E4M3).double()
    expected = inputs @ weight.double().T * scale.double() * weight_scale.double()
    assert out.shape == (3, 5, 48) and out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2e-5 if dtype == torch.float32 else 0.01, atol=1e-4)
    if static:
        assert (inputs.abs() == 448).sum() > 10
    real = x.double() @ (weight.double() * weight_scale.double()).T
    error = (out.double() - real).norm() / real.norm()
    assert error < (0.5 if static else 0.05)


@pytest.mark.parametrize("out_features, in_features", [(48, 64), (7, 33)])
def test_kept_fp8_equals_dequantized(out_features, in_features):
    """Without FP8 hardware: the same bits as a dequantized linear, forward and in the gradient of the input."""
    weight, scale = random_fp8(out_features, in_features), torch.tensor(0.0123)
    for dtype in (torch.float32, torch.bfloat16):
        draw = torch.Generator().manual_seed(4)
        x = torch.randn(2, 5, in_features, generator=draw).to(dtype).requires_grad_()
        grad = torch.randn(2, 5, out_features, generator=draw).to(dtype)
        plain = fp8.dequantize(weight, scale, dtype).requires_grad_()
        results = []
        for forward in (lambda x: fp8.linear(x, weight, scale, torch.tensor(0.5)), lambda x: F.linear(x, plain)):
            x.grad = None
            out = forward(x)
            out.backward(grad)
            results.append((out.detach(), x.grad))
        for ours, theirs in zip(*results):
            assert torch.equal(ours, theirs)


def test_backward_keeps_the_fp8_weight_only():
    weight, saved = random_fp8(48, 64), []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8.linear(x, weight, torch.tensor(0.1), None)
    assert [t.dtype for t in saved if t.numel() == weight.numel()] == [fp8.E4M3]


def test_linear_chooses(monkeypatch):
    """Where the hardware multiplies FP8 it is used; not for odd sizes, nor where the input wants a gradient."""
    assert not fp8.has_fp8_matmul(torch.device("cpu"))
    monkeypatch.setattr(fp8, "has_fp8_matmul", lambda device: True)
    x, scale, act = torch.randn(4, 64), torch.tensor(0.1), torch.tensor(0.02)
    weight, odd = random_fp8(48, 64), random_fp8(40, 64)
    slow = F.linear(x, fp8.dequantize(weight, scale, x.dtype))
    for activation in (act, None):
        fast = fp8.fp8_matmul(x, weight, scale, activation)
        assert torch.equal(fp8.linear(x, weight, scale, activation), fast) and not torch.equal(fast, slow)
    assert torch.equal(fp8.linear(x, odd, scale, act), F.linear(x, fp8.dequantize(odd, scale, x.dtype)))
    narrow = x[:, :40].contiguous()
    inner = weight[:, :40].contiguous()
    assert torch.equal(fp8.linear(narrow, inner, scale, act), F.linear(narrow, fp8.dequantize(inner, scale, x.dtype)))
    assert torch.equal(fp8.linear(x.clone().requires_grad_(), weight, scale, act), slow)
    with torch.no_grad():
        assert torch.equal(
            fp8.linear(x.clone().requires_grad_(), weight, scale, act), fp8.fp8_matmul(x, weight, scale, act)
        )


@pytest.mark.parametrize("layout", ["text", "native"])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_kept_fp8_model(scheme, layout, tmp_path):
    """Weights kept in FP8: the stored bytes in memory, one byte an element, and the same numbers to the bit."""
    fields = text_fields("yarn, short")
    stored, _ = to_fp8(random_state(fields), static=scheme == "static")
    directory = write_checkpoint(tmp_path, fields, stored, layout, fp8=scheme)
    kept, plain = load(directory, keep_fp8=True), load(directory)
    tokens = random_tokens(40, 301)
    assert torch.equal(log_probabilities(kept, tokens), log_probabilities(plain, tokens))
    sizes = {}
    for name, parameter in kept.named_parameters():
        linear = name.removesuffix(".weight").endswith(PROJECTIONS)
        assert parameter.dtype == (fp8.E4M3 if linear else torch.float32), name
        assert parameter.requires_grad != linear
        sizes[name] = parameter.numel() * parameter.element_size()
        if linear:
            layer = kept.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(layer.weight_scale, stored[f"{name}_scale_inv"].float())
            assert (layer.activation_scale is not None) == (scheme == "static")
            if scheme == "static":
                scale = stored[name.replace(".weight", ".activation_scale")]
                assert torch.equal(layer.activation_scale, scale.float())
            if layout == "text":
                assert torch.equal(parameter.view(torch.uint8), stored[name].view(torch.uint8))
    assert sum(sizes.values()) == sum(t.numel() * t.element_size() for t in stored.values() if t.dim())


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_joined_linears(scheme, tmp_path, monkeypatch):
    """q, k, v and gate, up as one FP8 product each, where the hardware takes a scale per row: the same bits.

    Their input is quantized once. Where scales of the input differ, that is with the largest of them.
    """
    try:
        fp8.fp8_matmul_by_rows(torch.ones(2, 16).bfloat16(), torch.ones(16, 16).to(fp8.E4M3), torch.ones(1, 16), None)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} on a CPU: {str(error)[-60:]}")
    monkeypatch.setattr(fp8, "has_fp8_matmul", lambda device: True)
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=80)
    fields = text_fields("yarn, short", **sizes)
    stored, _ = to_fp8(random_state(fields), static=scheme == "static")
    differ = {name: scale.clone() for name, scale in stored.items() if name.endswith(".activation_scale")}
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    for name in differ:
        for group in groups:
            if any(part in name for part in group):
                first = next(part for part in group if part in name)
                same = [name.replace(first, part) for part in group]
                stored[name] = torch.stack([differ[other] for other in same]).amax(0)
    assert scheme == "dynamic" or not all(torch.equal(stored[name], scale) for name, scale in differ.items())
    made = write_checkpoint(tmp_path / "same", fields, stored, fp8=scheme)
    tokens, quantized, quantize = random_tokens(40, 301), [], fp8.quantize
    monkeypatch.setattr(fp8, "quantize", lambda x, scale: quantized.append(x) or quantize(x, scale))
    results = []
    for fast in (False, True):
        quantized.clear()
        with torch.inference_mode():
            model = load(made, torch.bfloat16, keep_fp8=True, fast=fast)
            results.append(log_probabilities(model, tokens))
        assert len(quantized) == len(model.layers) * (4 if fast else 7)
    assert torch.equal(*results)
    if scheme == "static":
        made = write_checkpoint(tmp_path / "differ", fields, {**stored, **differ}, fp8=scheme)
        assert torch.equal(log_probabilities(load(made, torch.bfloat16, keep_fp8=True, fast=True), tokens), results[0])
    odd = text_fields("yarn, short", **{**sizes, "intermediate_size": 72})  # no multiple of 16
    made = write_checkpoint(tmp_path / "odd", odd, to_fp8(random_state(odd), scheme == "static")[0], fp8=scheme)
    layer = load(made, torch.bfloat16, keep_fp8=True, fast=True).layers["0"]
    assert layer.self_attn.joined is not None and layer.mlp.joined is None
    exact = load(made, torch.float32, keep_fp8=True, fast=True)  # these units give BF16 only
    assert exact.layers["0"].self_attn.joined is None and exact.layers["0"].mlp.joined is None


@pytest.mark.parametrize("rows", [1, 3, 70, 300])
@pytest.mark.parametrize("kind", [fp8.OneDNNWeight, fp8.FBGEMMWeight, None])
def test_bf16_on_a_cpu(kind, rows):
    """Each way to multiply BF16 on this CPU, against float64: a BF16 number beside the exact one at most."""
    if kind is fp8.OneDNNWeight and not fp8.knows_bf16():
        pytest.skip("oneDNN has no BF16 kernels for this CPU")
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(617, 451, generator=generator).mul_(0.02).bfloat16()
    weight[5], weight[7, 3] = weight[5] * 1e-4, 1e-9  # below what FP16 has digits for
    x = torch.randn(min(rows, 2), rows, 451, generator=generator).bfloat16()
    exact, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    with torch.inference_mode():
        found = kind(weight)(x) if kind else fp8.matmul(x, weight)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape and found.is_contiguous()
    bound = exact.abs() * 2**-8 + sizes * 2**-20 + 451 * 3e-8
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("largest", [1e-3, 1e5, float("inf"), float("nan")])
def test_what_fp16_cannot_hold(largest, monkeypatch):
    """Weights that are very small or very large, or none at all, are multiplied as they are."""
    monkeypatch.setattr(fp8, "knows_bf16", lambda: False)
    weight = torch.randn(6, 5).bfloat16()
    assert isinstance(fp8.pack(weight), fp8.FBGEMMWeight)
    assert fp8.pack(weight * (largest / weight.abs().max())) is None


@pytest.mark.parametrize("seed", range(12))
def test_few_rows_of_a_weight_that_is_not_packed(seed, monkeypatch):
    """As a CPU with matrix units multiplies them, on any CPU: none, one, as many as go on the right; and gradients."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    draw = random.Random(seed)
    shape = (
        (0,)
        if seed == 0
        else draw.choice([(draw.randint(0, 2 * fp8.LEFT_ROWS),), (1, 1), (), (draw.randint(1, 3), draw.randint(1, 4))])
    )
    torch.manual_seed(seed)
    x, weight = torch.randn(*shape, 37).bfloat16(), torch.randn(draw.randint(1, 90), 37).bfloat16()
    exact, found = (
        [t.detach().to(dtype).requires_grad_() for t in (x, weight)] for dtype in (torch.double, torch.bfloat16)
    )
    results = []
    for product, (a, b) in ((F.linear, exact), (fp8.matmul, found)):
        y = product(a, b)
        y.square().sum().backward()
        results.append((y.detach(), a.grad, b.grad))
    assert results[1][0].is_contiguous()
    for mine, theirs in zip(results[1], results[0]):
        assert mine.shape == theirs.shape and mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), theirs, rtol=0.03, atol=0.03 * max(1, float(theirs.norm()) / 5))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("by_rows", [False, True])
def test_fp8_products(seed, by_rows, device):
    """Against float64 on the very numbers that are multiplied, one row among other numbers of them, the input's scale
    given and not. Sums are float32's, but units that add up many products at a time keep 14 bits of each beside the
    largest."""
    if device == "cuda" and not (torch.cuda.is_available() and fp8.has_fp8_matmul(torch.device(device, 0))):
        pytest.skip("needs a GPU with FP8 products")
    if device == "cpu" and torch.__version__ < "2.13":
        pytest.skip("multiplies no rows with scales of their own on a CPU, and many rows to NaN")
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, size, out = draw.choice([1, draw.randint(2, 300)]), 16 * draw.randint(1, 20), 16 * draw.randint(1, 20)
    x, weight = torch.randn(rows, size).bfloat16(), torch.randn(out, size).mul(100).to(fp8.E4M3)
    scales = torch.rand(out, 1).add(0.5) if by_rows else torch.tensor(0.7)
    act = draw.choice([None, x.abs().max().float() / 600])  # the largest inputs are clamped
    scale = fp8.scale_of(x.abs().amax()) if act is None else act
    meant, exact = fp8.quantize(x, scale).double() * scale.double(), weight.double() * scales.double()
    expected, sizes = meant @ exact.t(), meant.abs() @ exact.abs().t()
    product, scales = (fp8.fp8_matmul_by_rows, scales.t()) if by_rows else (fp8.fp8_matmul, scales)
    x, weight, scales = (t.to(device) for t in (x, weight, scales.contiguous()))
    found = product(x, weight, scales, act if act is None else act.to(device)).cpu()
    assert ((found.double() - expected).abs() <= expected.abs() * 2**-8 + sizes * 2**-12).all()
