"""FP8: what the checkpoint's linears look like on disk, and three ways to multiply with them.

A weight is stored as `float8_e4m3fn` (4 exponent bits, 3 mantissa bits, largest value 448) with one scale for the
whole tensor, named `weight_scale_inv` although it is the multiplier: `w = w_fp8 * scale`. From there a linear can

- be **dequantized** once while it is loaded, and be an ordinary BF16 or FP32 linear ever after;
- stay FP8 in memory and be **dequantized as it goes**, block by block: half the memory, the same numbers;
- stay FP8 and **multiply in FP8** (`torch._scaled_mm`): the inputs are quantized too, with the checkpoint's static
  `activation_scale`, or with one measured on the spot. Fast on GPUs of compute capability 8.9 and later.

    python fp8.py IN OUT [--to fp8|bfloat16] [--calibrate CHATS.jsonl]

rewrites a checkpoint of any layout in the HF layout; `export.py` is that program, this file the arithmetic.

The second half is for speed only: how a CPU multiplies BF16 (on a GPU it is `F.linear`).

- **Many rows**: CPUs without matrix units multiply BF16 at half their float32 speed or less: both sides are converted.
- **Few rows**, decoding: the weight is laid out once the way the kernels read it (`pack`), and C++ instead of Python
  starts a step's operations (`Traced`).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import; `run_program` sets the rule

import collections
import functools
import sys
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

E4M3 = torch.float8_e4m3fn

E4M3_MAX = 448.0

BLOCK = 1 << 24  # elements of a weight converted at a time: bounds a float32 copy to 64 MiB


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` (any shape, E4M3) times `scale` (0-d), multiplied in float32 and rounded once to `dtype`.

    No float32 copy of the weight is needed: BF16 holds every E4M3 number exactly, and a kernel multiplies in float32
    whatever it reads and writes. The trap is the scale, which may not be rounded to BF16 before. A CPU takes a 0-d
    tensor as a float32 number. A GPU would first convert it to the dtype of the product, and a 0-d tensor has no say
    in that; with a dimension it has, and the product is float32's. (A Python number would do, but reading it from the
    GPU stops the host.)
    """
    scale = scale.float()
    return weight.to(dtype).mul_(scale.reshape(1) if weight.device.type == "cuda" else scale)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x` over `scale` (0-d float32), clamped to ±448 and rounded to E4M3. Same shape.

    Divided in float32: a scale of one dimension takes part in type promotion, one of none does not. Converting `x`
    first would give the same numbers in one kernel more.
    """
    return (x / scale.reshape(1)).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """The scale (0-d float32) that maps the largest magnitude `amax` to 448; 1 for a tensor of zeros."""
    amax = amax.float()
    return torch.where(amax > 0, amax / E4M3_MAX, 1.0)


def fp8_matmul(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, activation_scale: torch.Tensor | None
) -> torch.Tensor:
    """`x @ weight.T` with both sides in E4M3, accumulated in float32. `x` (..., in), `weight` (out, in) E4M3.

    `activation_scale` is static where given; None measures the largest input of this call (dynamic).
    """
    flat = x.reshape(-1, x.shape[-1])
    scale = scale_of(flat.abs().amax()) if activation_scale is None else activation_scale.float()
    product = torch._scaled_mm(
        quantize(flat, scale), weight.t(), scale_a=scale, scale_b=weight_scale.float(), out_dtype=x.dtype
    )
    return product.view(*x.shape[:-1], -1)


def fp8_matmul_by_rows(
    x: torch.Tensor, weight: torch.Tensor, row_scales: torch.Tensor, activation_scale: torch.Tensor | None
) -> torch.Tensor:
    """As `fp8_matmul`, with a scale for each row of `weight`: `row_scales` (1, out) float32. `x` and result are BF16.

    Weights that were quantized one by one can so be multiplied as one, and their common input is quantized once. The
    hardware then wants a scale for each row of the input too: they are all the same.
    """
    flat = x.reshape(-1, x.shape[-1])
    scale = scale_of(flat.abs().amax()) if activation_scale is None else activation_scale
    scales = scale.reshape(1, 1).expand(len(flat), 1).contiguous()
    product = torch._scaled_mm(quantize(flat, scale), weight.t(), scale_a=scales, scale_b=row_scales, out_dtype=x.dtype)
    return product.view(*x.shape[:-1], -1)


class _DequantizingLinear(torch.autograd.Function):
    """`x @ dequantize(weight).T`, keeping only the FP8 weight for the backward pass. The weight gets no gradient."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantize(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return grad @ dequantize(weight, scale, grad.dtype), None, None


@functools.cache
def has_fp8_matmul(device: torch.device) -> bool:
    """Whether `device` multiplies E4M3 in hardware. CPUs can run `torch._scaled_mm` too, but only slowly."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fits_units(weight: torch.Tensor) -> bool:
    """Whether the matrix units take an FP8 weight of this shape."""
    return not (weight.shape[0] % 16 or weight.shape[1] % 16)


def linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, activation_scale: torch.Tensor | None
) -> torch.Tensor:
    """A linear whose weight stays FP8 in memory. `x` (..., in) -> (..., out) in the dtype of `x`.

    Multiplies in FP8 where the hardware does, unless a gradient is wanted: quantizing the input has none. The matrix
    units want both sizes in multiples of 16, so an odd slice is dequantized instead.
    """
    in_fp8 = has_fp8_matmul(x.device) and not (torch.is_grad_enabled() and x.requires_grad)
    if in_fp8 and fits_units(weight):
        return fp8_matmul(x, weight, weight_scale, activation_scale)
    return _DequantizingLinear.apply(x, weight, weight_scale)


FLOAT32_ROWS = 64  # a CPU without matrix units multiplies at least so many BF16 rows in float32

FLOAT32_ROWS_AVX2 = 8  # one that has no BF16 instructions at all, so many

PACKED_FLOAT32_ROWS = 256  # and so many where a packed weight has to be unpacked for it; see pack

LEFT_ROWS = 32  # one that has matrix units takes a weight that is not packed on the left, for so many rows at most

PATIENCE = 16  # steps of a kind that run as they are; making a graph takes as long as some 50 steps gain by it

CACHED = 1 << 18  # elements of a weight converted to float32 at a time, so that the copy stays in the cache


@functools.cache  # a trace cannot record the question
def knows_bf16() -> bool:
    """Whether oneDNN has BF16 kernels for this CPU: from AVX-512 on."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Float32Matmul(torch.autograd.Function):
    """`x W^T` in BF16, multiplied in float32: the same sums, rounded once, as a matrix unit forms them.

    A CPU without such a unit multiplies BF16 at half its float32 speed or far below, so from some rows on converting
    pays. The weight is converted block by block, and the copy is not kept.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        wide, out = x.float(), x.new_empty(*x.shape[:-1], weight.shape[0])
        blocks = _Float32Matmul.blocks(weight, CACHED)
        copy = wide.new_empty(blocks[0].stop, weight.shape[1])  # one for all blocks: new memory is slow at first touch
        for rows in blocks:
            block = weight[rows]
            out[..., rows] = F.linear(wide, copy[: len(block)].copy_(block))
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, blocks = grad.float(), _Float32Matmul.blocks(weight, BLOCK)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = sum(grad[..., rows] @ weight[rows].float() for rows in blocks).to(x.dtype)
        if ctx.needs_input_grad[1]:
            flat, grad_weight = x.float().flatten(0, -2), torch.empty_like(weight)
            for rows in blocks:
                grad_weight[rows] = grad[..., rows].flatten(0, -2).t() @ flat
        return grad_x, grad_weight

    @staticmethod
    def blocks(weight: torch.Tensor, elements: int) -> list[slice]:
        step = max(1, elements // weight.shape[1])
        return [slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step)]


def matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` (..., in), `weight` (out, in) -> (..., out)."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        rows, units = x.numel() // x.shape[-1], torch.cpu._is_amx_tile_supported()
        if not units and rows >= (FLOAT32_ROWS if knows_bf16() else FLOAT32_ROWS_AVX2):
            return _Float32Matmul.apply(x, weight)
        if units and 0 < rows <= LEFT_ROWS:
            # With W on the left it is read once, as it lies in memory. On the right it would be rearranged first.
            flat = x.reshape(rows, -1)
            y = weight @ flat[0] if rows == 1 else (weight @ flat.t()).t().contiguous()
            return y.reshape(*x.shape[:-1], -1)
    return F.linear(x, weight)


class OneDNNWeight:
    """A BF16 weight (out, in) in oneDNN's own layout, for CPUs from AVX-512 on.

    Such a CPU multiplies BF16 in pairs along the columns, for 16 rows of the weight at a time. Found row by row in
    memory, a weight is rearranged anew for every product, and that takes longer than the product of a few rows itself.
    """

    def __init__(self, weight: torch.Tensor):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            return product_in_script()(x, self.weight)
        if x.numel() >= PACKED_FLOAT32_ROWS * x.shape[-1] and not torch.cpu._is_amx_tile_supported():
            return _Float32Matmul.apply(x, self.weight.to_dense())
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


@functools.cache
def product_in_script() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The product of `OneDNNWeight` as TorchScript: from Python, a trace can't take the list among its arguments."""
    product = 'torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")'
    return torch.jit.CompilationUnit(f"def product(x, weight):\n    return {product}\n").product


class FBGEMMWeight:
    """A BF16 weight (out, in) as FP16 in FBGEMM's layout, for CPUs that have FP16 but no BF16: products in float32.

    FP16 has more digits than BF16 and fewer exponents. Below 6e-5 it rounds, by 3e-8 at most: beside weights of the
    usual size, and sums that are rounded to BF16, this is nothing. Other weights don't `fit`.
    """

    @staticmethod
    def fit(weight: torch.Tensor) -> bool:
        return 2**-6 <= weight.abs().amax() <= 65504  # False for NaN, too

    def __init__(self, weight: torch.Tensor):
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.weight).bfloat16()


def pack(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function (..., in) -> (..., out) that has `weight` (out, in) in the layout its kernels read.

    None where nothing is to be gained.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    if knows_bf16():
        return OneDNNWeight(weight)
    if "fbgemm" in torch.backends.quantized.supported_engines and FBGEMMWeight.fit(weight):
        return FBGEMMWeight(weight)
    return None


class Joined:
    """Linears with the same input as one, for inference: one large product is faster than several small ones.

    Their weights are rows of one tensor from the moment they are loaded, so that nothing is ever held twice.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers, self.sizes = layers, [len(layer.weight) for layer in layers]
        self.weight: torch.Tensor | None = None
        self.packed: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.scales: torch.Tensor | None = None  # (1, rows) float32, of FP8 weights
        self.input_scale: torch.Tensor | None = None
        for layer in layers:
            layer.joined = self

    def rows_of(self, layer: nn.Module, device: torch.device) -> torch.Tensor:
        """Where the weight of `layer` has to be put."""
        if self.weight is None:
            shape = (sum(self.sizes), layer.weight.shape[1])
            self.weight = torch.empty(shape, dtype=layer.weight.dtype, device=device)
        return self.weight.split(self.sizes)[self.layers.index(layer)]

    def pack(self) -> Callable | None:
        """Once the weights are there: see the function `pack`."""
        for layer in self.layers:  # else the weights would stay in both layouts
            layer.weight = None
        self.packed = pack(self.weight)
        if self.packed:
            self.weight = None
        return self.packed

    def read_scales(self) -> None:
        """Of several scales for the input the largest counts."""
        scales = [layer.weight_scale.float().expand(size) for layer, size in zip(self.layers, self.sizes)]
        self.scales = torch.cat(scales)[None]  # (1, rows)
        inputs = [layer.activation_scale for layer in self.layers]
        self.input_scale = None if None in inputs else torch.stack(inputs).float().amax()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., sum of the outputs)"""
        if self.layers[0].weight_scale is None:
            return self.packed(x) if self.packed else matmul(x, self.weight)
        if self.scales is None:
            self.read_scales()
        return fp8_matmul_by_rows(x, self.weight, self.scales, self.input_scale)


class Traced:
    """Decoding steps as TorchScript graphs: the same operations on the same numbers, started by C++ and not by Python.

    Weights stream through a CPU's caches and sweep out what Python needs to find the next operation: a small model's
    step waits for it a fifth of its time. A graph depends on nothing but tensors and their sizes. What else a step
    depends on is its `kind`, whether it has one row: each has a graph of its own. TorchScript can't hold oneDNN's
    layout as a constant, so the packed weights are inputs of a graph, too; a trace knows a tensor by its identity.
    """

    def __init__(self, products: list[Callable | None]):
        self.products, self.calls, self.graphs = products, collections.Counter(), {}

    def __call__(self, kind: bool, step: Callable[..., torch.Tensor], *inputs) -> torch.Tensor:
        """`step(*inputs)`. Inputs are tensors, or lists or dictionaries of them."""
        self.calls[kind] += 1
        weights = [product.weight for product in self.products if isinstance(product, OneDNNWeight)]
        packed = 0 < len(weights) == len(self.products) and sys.version_info < (3, 14)  # which has no TorchScript
        if self.calls[kind] <= PATIENCE or not packed:
            return step(*inputs)
        if kind not in self.graphs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that TorchScript is old, and that a graph has no `if`
                run = lambda weights, *inputs: step(*inputs)  # noqa: E731
                self.graphs[kind] = torch.jit.trace(run, (weights, *inputs), check_trace=False)
        with torch.jit.optimized_execution(False):  # optimizing takes longer than it saves
            return self.graphs[kind](weights, *inputs)


if __name__ == "__main__":
    from runtime.export import main
    from runtime.launch import run_program

    run_program(main, alone=True)
