"""FP8: what the checkpoint's linears look like on disk, and how one multiplies with them.

A weight is stored as `float8_e4m3fn` (4 exponent bits, 3 mantissa bits, largest value 448) with one scale for the
whole tensor, named `weight_scale_inv` although it is the multiplier: `w = w_fp8 * scale`. From there a linear can

- be **dequantized** once while it is loaded, and be an ordinary BF16 or FP32 linear ever after;
- stay FP8 in memory and be **converted as it goes**: half the memory, the same numbers up to rounding;
- stay FP8 and **multiply in FP8** (`torch._scaled_mm`): the inputs are quantized too, with the checkpoint's static
  `activation_scale`, or with one measured on the spot. Fast on GPUs of compute capability 8.9 and later.

Several matrices with the same input (q, k, v; gate, up) are one linear here, and each was quantized with a scale of
its own. Such a weight has a scale for every row: a tensor (out, 1). A weight that is one matrix has a 0-d scale.

    python fp8.py IN OUT [--to fp8|bfloat16] [--calibrate CHATS.jsonl]

rewrites a checkpoint of any layout in the HF layout; `runtime/export.py` is that program, this file the arithmetic.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import; `run_program` sets the rule

import functools

import torch
import torch.nn.functional as F

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# Whether a conversion turns what lies beyond ±448 into ±448. Before torch 2.13 it makes it NaN.
SATURATES = bool(torch.tensor([464.1, 1e4, torch.inf]).to(E4M3).float().isfinite().all())


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` (out, in) E4M3 times `scale` (0-d, or (out, 1)), multiplied in float32 and rounded once to `dtype`.

    No float32 copy of the weight is needed: BF16 holds every E4M3 number exactly, and a kernel multiplies in float32
    whatever it reads and writes. The trap is the scale, which must not be rounded to BF16 first. A CPU takes a 0-d
    tensor as a float32 number. A GPU would convert it to the dtype of the product, since a 0-d tensor has no say in
    type promotion; with a dimension it has. (A Python number would do, but reading it from the GPU stops the host.)
    """
    scale = scale.float()
    return weight.to(dtype).mul_(scale.reshape(-1, 1) if weight.device.type == "cuda" else scale)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x` over `scale` (0-d float32), clamped to ±448 and rounded to E4M3. Same shape.

    Divided in float32: a scale of one dimension takes part in type promotion, a 0-d one does not. A GPU divides and
    converts in one kernel when the output is E4M3, without a float32 tensor between the two. A CPU would take copies of
    input and output for that, more than it takes one after the other.
    """
    scale = scale.reshape(1)
    if x.device.type == "cuda" and SATURATES:
        return torch.div(x, scale, out=torch.empty_like(x, dtype=E4M3))
    return (x / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """The scale (0-d float32) that maps the largest magnitude `amax` to 448; 1 for a tensor of zeros."""
    amax = amax.float()
    return torch.where(amax > 0, amax / E4M3_MAX, 1.0)


def fp8_matmul(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, activation_scale: torch.Tensor | None
) -> torch.Tensor:
    """`x @ weight.T` with both sides in E4M3, accumulated in float32. `x` (..., in), `weight` (out, in) E4M3.

    `activation_scale` is static where given; None measures the largest input of this call (dynamic). Where the weight
    has a scale per row, the hardware wants one per row of the input too (all the same), and BF16 results.
    """
    flat = x.reshape(-1, x.shape[-1])
    scale = scale_of(flat.abs().amax()) if activation_scale is None else activation_scale.float()
    scales = scale
    if weight_scale.dim():
        scales, weight_scale = scale.reshape(1, 1).expand(len(flat), 1).contiguous(), weight_scale.t()
    product = torch._scaled_mm(
        quantize(flat, scale), weight.t(), scale_a=scales, scale_b=weight_scale.float(), out_dtype=x.dtype
    )
    return product.view(*x.shape[:-1], -1)


def times_fp8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x` (..., in) @ `weight` (in, out) E4M3 · `scale` (0-d, or (1, out)) -> (..., out) in the dtype of `x`.

    BF16 holds every E4M3 number exactly, so converting the weight rounds nothing. The sums stay float32 until they are
    scaled, and are rounded once: nearer to float64 than a dequantized weight, each of whose numbers is rounded. Scaling
    sums that are BF16 already would round them twice, which is about as far off as dequantizing.
    """
    flat = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu" or x.dtype == torch.float32:  # a CPU's product returns the dtype of its inputs
        sums = flat.float() @ weight.float()
    else:
        sums = torch.mm(flat, weight.to(x.dtype), out_dtype=torch.float32)
    y = torch.mul(sums, scale.float(), out=torch.empty_like(sums, dtype=x.dtype))
    return y.view(*x.shape[:-1], -1)


class _Fp8Linear(torch.autograd.Function):
    """`x @ dequantize(weight).T`, keeping only the FP8 weight for the backward pass. The weight gets no gradient.

    A CPU dequantizes the weight. A GPU without FP8 units, or whose units cannot be used, converts it and scales the
    product, which moves 5 bytes per weight and not 9. A scale per row of the weight is one per column of the gradient,
    which is scaled before its product and so rounded to its dtype, as the numbers of a dequantized weight would be.
    """

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        if dequantizes(x.device):
            return F.linear(x, dequantize(weight, scale, x.dtype))
        return times_fp8(x, weight.t(), scale.t())

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        if dequantizes(grad.device):
            return grad @ dequantize(weight, scale, grad.dtype), None, None
        if scale.dim():
            return torch.mul(grad, scale.t(), out=torch.empty_like(grad)) @ weight.to(grad.dtype), None, None
        return times_fp8(grad, weight, scale), None, None


def dequantizes(device: torch.device) -> bool:
    return device.type == "cpu"


@functools.cache
def has_fp8_matmul(device: torch.device) -> bool:
    """Whether `device` multiplies E4M3 in hardware. CPUs can run `torch._scaled_mm` too, but only slowly."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def takes_row_scales(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` multiplies with a scale per row, tried once: not all GPUs do (pytorch #192707)."""
    a, scales = torch.empty(16, 16, dtype=E4M3, device=device), torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(a, a.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def multiplies_in_fp8(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product is one for the FP8 units.

    They want both sizes in multiples of 16 (an odd slice is dequantized instead) and give BF16; and where a gradient is
    wanted they are of no use, since quantizing the input has none.
    """
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    odd = weight.shape[0] % 16 or weight.shape[1] % 16
    return has_fp8_matmul(x.device) and x.dtype == torch.bfloat16 and not (odd or wants_gradient)


def linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, activation_scale: torch.Tensor | None
) -> torch.Tensor:
    """A linear whose weight stays FP8 in memory. `x` (..., in) -> (..., out) in the dtype of `x`."""
    if multiplies_in_fp8(x, weight):
        return fp8_matmul(x, weight, weight_scale, activation_scale)
    return _Fp8Linear.apply(x, weight, weight_scale)


if __name__ == "__main__":
    from runtime.export import main
    from runtime.launch import run_program

    run_program(main, alone=True)
