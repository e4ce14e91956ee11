"""FP8: every code and scale against float64, the three ways to multiply, and what stays in memory."""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PROJECTIONS,
    check_product,
    load,
    log_probabilities,
    random_state,
    random_tokens,
    text_fields,
    to_fp8,
    write_checkpoint,
)

import fp8
from parallel import parts_of

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_has_the_bits_of_clamping(dtype):
    """All numbers of 16 bits (in float32 those of BF16, and the borders), strided too, by scales of all sizes."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    more = torch.tensor([448, 449, 464, 465, 479, 480, 1e30, 2**-9, 2**-10, 1.5 * 2**-10, 1e-45, torch.inf, torch.nan])
    x = torch.cat((x, more.to(dtype), -more.to(dtype)))
    for scale in [*torch.logspace(-39, 3, 9), torch.tensor(1.0), torch.tensor(0.0)]:
        expected = (x.float() / scale).clamp(-448, 448).to(fp8.E4M3).view(torch.uint8)
        with torch.inference_mode():
            assert torch.equal(fp8.quantize(x, scale).view(torch.uint8), expected)
            if fp8.SATURATES:  # as on a GPU
                found = torch.div(x, scale.reshape(1), out=torch.empty_like(x, dtype=fp8.E4M3))
                assert torch.equal(found.view(torch.uint8), expected)
        pairs = x.view(2, -1).t()
        assert torch.equal(fp8.quantize(pairs, scale).view(torch.uint8), expected.view(2, -1).t())


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


def draw_rows(shape: tuple, by_rows: bool, dtype: torch.dtype) -> tuple:
    """x, a gradient, an E4M3 weight and its scale."""
    rows, out, size = shape
    x, grad = torch.randn(2, rows, size).to(dtype), torch.randn(2, rows, out).to(dtype)
    scale = torch.rand(out, 1).pow(3) + 1e-3 if by_rows else torch.tensor(0.0123)
    return x, grad, random_fp8(out, size, seed=sum(shape)), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("shape", [(1, 48, 64), (5, 7, 333), (33, 144, 1000)])
def test_scaled_products(shape, by_rows, dtype, monkeypatch):
    """As on a GPU without FP8 units: float64's numbers, rounded once; gradients of rows' scales as when dequantized."""
    torch.manual_seed(shape[0])
    x, grad, weight, scale = draw_rows(shape, by_rows, dtype)
    monkeypatch.setattr(fp8, "dequantizes", lambda device: False)
    x.requires_grad_()
    y = fp8.linear(x, weight, scale, None)
    y.backward(grad)
    assert y.dtype == x.grad.dtype == dtype
    exact, once = weight.double() * scale.double(), 2**-8 if dtype == torch.bfloat16 else 2**-24
    pairs = ((y.detach(), x.detach().double(), exact.t()), (x.grad, grad.double(), exact))
    for i, (found, left, right) in enumerate(pairs):
        expected, sizes = left @ right, left.abs() @ right.abs()
        twice = by_rows and i == 1  # the scaled gradient is rounded, too
        bound = 1.01 * once * expected.abs() + sizes * (2**-20 + twice * once)
        assert ((found.double() - expected).abs() <= bound).all()


def test_scaled_products_are_nearer_than_dequantized_ones():
    torch.manual_seed(0)
    x, _, weight, scale = draw_rows((40, 300, 2000), False, torch.bfloat16)
    expected = x.double() @ (weight.double() * scale.double()).t()
    ours, theirs = fp8.times_fp8(x, weight.t(), scale), F.linear(x, fp8.dequantize(weight, scale, x.dtype))
    assert (ours.double() - expected).norm() < 0.85 * (theirs.double() - expected).norm()


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
    x, scale, act = torch.randn(4, 64).bfloat16(), torch.tensor(0.1), torch.tensor(0.02)
    weight, odd = random_fp8(48, 64), random_fp8(40, 64)
    slow = F.linear(x, fp8.dequantize(weight, scale, x.dtype))
    for activation in (act, None):
        fast = fp8.fp8_matmul(x, weight, scale, activation)
        assert torch.equal(fp8.linear(x, weight, scale, activation), fast) and not torch.equal(fast, slow)
    assert torch.equal(fp8.linear(x, odd, scale, act), F.linear(x, fp8.dequantize(odd, scale, x.dtype)))
    exact = x.float()  # the units give BF16
    assert torch.equal(
        fp8.linear(exact, weight, scale, act), F.linear(exact, fp8.dequantize(weight, scale, exact.dtype))
    )
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
    for name, (layer, part) in parts_of(kept).items():
        linear, parameter = name.removesuffix(".weight").endswith(PROJECTIONS), part.rows_of(layer.weight)
        assert parameter.dtype == (fp8.E4M3 if linear else torch.float32), name
        assert layer.weight.requires_grad != linear
        sizes[name] = parameter.numel() * parameter.element_size()
        if linear:
            assert (part.rows_of(layer.weight_scale) == stored[f"{name}_scale_inv"].float()).all()
            assert (layer.activation_scale is not None) == (scheme == "static")
            if scheme == "static":
                names = [name.rsplit(".", 2)[0] + f".{part.name}" if part.name else name[:-7] for part in layer.parts]
                scales = [stored[f"{each}.activation_scale"].float() for each in names]
                assert torch.equal(layer.activation_scale, torch.stack(scales).amax())  # of a common input the largest
            if layout == "text":
                assert torch.equal(parameter.view(torch.uint8), stored[name].view(torch.uint8))
    assert sum(sizes.values()) == sum(t.numel() * t.element_size() for t in stored.values() if t.dim())


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_one_product_for_several_matrices(scheme, tmp_path, monkeypatch):
    """q, k, v and gate, up in FP8, with a scale per row: the numbers of products that are made one by one.

    Their input is quantized once. Where scales of the input differ, that is with the largest of them. A slice that the
    units do not take, and a model in float32, are dequantized.
    """
    try:
        fp8.fp8_matmul(torch.ones(2, 16).bfloat16(), torch.ones(16, 16).to(fp8.E4M3), torch.ones(16, 1), None)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} on a CPU: {str(error)[-60:]}")
    monkeypatch.setattr(fp8, "has_fp8_matmul", lambda device: True)
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=80)
    fields = text_fields("yarn, short", **sizes)
    stored, _ = to_fp8(random_state(fields), static=scheme == "static")
    made = write_checkpoint(tmp_path / "made", fields, stored, fp8=scheme)
    tokens, quantized, quantize = random_tokens(40, 301), [], fp8.quantize
    monkeypatch.setattr(fp8, "quantize", lambda x, scale: quantized.append(x) or quantize(x, scale))
    model = load(made, torch.bfloat16, keep_fp8=True)
    with torch.inference_mode():
        log_probabilities(model, tokens)
    assert len(quantized) == 4 * len(model.layers)
    layer, x = model.layers["1"].self_attn.qkv_proj, torch.randn(3, 64).bfloat16()
    names = [f"layers.1.self_attn.{name}_proj" for name in "qkv"]
    scale = None
    if scheme == "static":
        scale = torch.stack([stored[f"{name}.activation_scale"].float() for name in names]).amax()
    parts = [
        fp8.fp8_matmul(x, stored[f"{name}.weight"], stored[f"{name}.weight_scale_inv"].float(), scale) for name in names
    ]
    for by_rows in (True, False):
        monkeypatch.setattr(fp8, "takes_row_scales", lambda device, by_rows=by_rows: by_rows)
        quantized.clear()
        with torch.inference_mode():
            assert torch.equal(layer(x), torch.cat(parts, -1))
        assert len(quantized) == (1 if by_rows else 3)
    monkeypatch.setattr(fp8, "takes_row_scales", lambda device: True)
    odd = text_fields("yarn, short", **{**sizes, "intermediate_size": 72})  # no multiple of 16
    made = write_checkpoint(tmp_path / "odd", odd, to_fp8(random_state(odd), scheme == "static")[0], fp8=scheme)
    for dtype, count in ((torch.bfloat16, 3), (torch.float32, 0)):  # not down, whose input is odd; twice 72 is not
        quantized.clear()
        model = load(made, dtype, keep_fp8=True)
        with torch.inference_mode():
            log_probabilities(model, tokens)
        assert len(quantized) == count * len(model.layers)


@pytest.mark.parametrize("refuses", [True, False])
def test_row_scales_are_tried_once(refuses, monkeypatch):
    calls, device = [], torch.device("cpu")

    def product(a, b, scale_a, scale_b, out_dtype):
        calls.append((a.shape, b.stride(), scale_a.shape, scale_b.shape, out_dtype))
        if refuses:
            raise RuntimeError("Invalid scaling configuration")

    monkeypatch.setattr(torch, "_scaled_mm", product)
    fp8.takes_row_scales.cache_clear()
    assert [fp8.takes_row_scales(device) for _ in range(3)] == [not refuses] * 3
    assert calls == [((16, 16), (1, 16), (16, 1), (1, 16), torch.bfloat16)]
    fp8.takes_row_scales.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("by_rows", [False, True])
def test_fp8_products(seed, by_rows, device):
    """One row, and many."""
    if device == "cuda" and not (torch.cuda.is_available() and fp8.has_fp8_matmul(torch.device(device, 0))):
        pytest.skip("needs a GPU with FP8 products")
    if device == "cpu" and torch.__version__ < "2.13":
        pytest.skip("multiplies no rows with scales of their own on a CPU, and many rows to NaN")
    draw = random.Random(seed)
    check_product(draw, draw.choice([1, draw.randint(2, 300)]), by_rows, torch.device(device))
