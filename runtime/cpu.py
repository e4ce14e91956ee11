"""What only makes a CPU faster, put over a loaded model by one call: `speed_up(model)`.

The model does not know of it. Each trick stands beside the plain formula that it equals; `benchmarks/tricks.py`
measures what each of them gains.

| trick | plain formula |
|---|---|
| `Product`: BF16 products in float32, or in the layout that the kernels read | `F.linear(x, W)` |
| `attend_in_two`: a later chunk of a prompt, without computing what a mask would hide | `model.attend` |
| `Traced`: a decoding step started by C++ instead of Python | `MistralMedium.forward` |
"""

import collections
import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from model import KVCache, MistralMedium, Step, attend
from parallel import Linear

FLOAT32_ROWS = 64  # a CPU without matrix units multiplies at least this many BF16 rows in float32
FLOAT32_ROWS_AVX2 = 8  # one that has no BF16 instructions at all, this many
PACKED_FLOAT32_ROWS = 256  # and this many where a packed weight has to be unpacked for it
STEPS_BEFORE_TRACING = 16  # making a graph takes as long as some 50 steps gain by it
BLOCK, CACHED = 1 << 24, 1 << 18  # elements of a weight converted to float32 at a time; and so that they stay in cache


def speed_up(model: MistralMedium, inference: bool = True) -> None:
    """Put the tricks over `model`, whose weights are there: for training only those that have gradients."""
    if model.place.device.type != "cpu":
        return
    model.chunk_attention = attend_in_two
    if model.dtype != torch.bfloat16:
        return
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    for name, linear in named:
        if linear.weight_scale is None and ".adapter" not in name:
            linear.multiply = Product(linear, inference)
    if inference:
        model.requires_grad_(False)  # a graph's constants may not want gradients
        model.forward = Traced(model)


# ----------------------------------------------------------------------------------------------------- products


@functools.cache  # a trace cannot record the questions
def knows_bf16() -> bool:
    """Whether oneDNN has BF16 kernels for this CPU: from AVX-512 on."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def has_matrix_units() -> bool:
    return torch.cpu._is_amx_tile_supported()


class Product:
    """`F.linear(x, W)` of one linear in BF16, the fastest way for each number of rows.

    Many rows, on a CPU without matrix units: in float32. Few rows, decoding: from the second time on with the weight in
    the layout of the kernels, whose making the first token need not wait for.
    """

    def __init__(self, linear: Linear, inference: bool):
        self.linear, self.inference, self.calls = linear, inference, 0
        self.packed: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return self.packed(x)
        rows = x.numel() // x.shape[-1]
        self.calls += rows < FLOAT32_ROWS
        if self.inference and self.calls == 2 and self.linear.weight is not None:
            self.pack()
            return self(x)
        # A head that is tied to the embedding has no weight of its own, and is never packed.
        weight = self.linear.holder[0].weight if self.linear.weight is None else self.linear.weight
        if has_matrix_units():
            few = self.inference and 0 < rows < FLOAT32_ROWS
            return with_weight_on_the_left(x, weight) if few else F.linear(x, weight)
        many = rows >= (FLOAT32_ROWS if knows_bf16() else FLOAT32_ROWS_AVX2)
        return Float32Matmul.apply(x, weight) if many else F.linear(x, weight)

    def pack(self) -> None:
        self.packed = pack(self.linear.weight.data)
        if self.packed is not None:
            self.linear.weight = None


def with_weight_on_the_left(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """W x^T: the weight is read once, as it lies in memory. On the right it would be rearranged first."""
    flat = x.reshape(-1, x.shape[-1])
    y = weight @ flat[0] if len(flat) == 1 else (weight @ flat.t()).t().contiguous()
    return y.reshape(*x.shape[:-1], -1)


class Float32Matmul(torch.autograd.Function):
    """`F.linear(x, weight)` in BF16, multiplied in float32: the same sums, rounded once, as a matrix unit forms them.

    A CPU without such a unit multiplies BF16 at half its float32 speed or far below, so from some rows on converting
    pays. The weight is converted block by block, and the copy is not kept.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        wide, out = x.float(), x.new_empty(*x.shape[:-1], weight.shape[0])
        rows = max(1, CACHED // weight.shape[1])
        copy = wide.new_empty(min(rows, len(weight)), weight.shape[1])  # one for all: new memory is slow at first touch
        for block, part in zip(weight.split(rows), out.split(rows, dim=-1)):
            part.copy_(F.linear(wide, copy[: len(block)].copy_(block)))
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, rows = grad.float(), max(1, BLOCK // weight.shape[1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            pairs = zip(grad.split(rows, dim=-1), weight.split(rows))
            grad_x = sum(part @ block.float() for part, block in pairs).to(x.dtype)
        if ctx.needs_input_grad[1]:
            flat, grad_weight = x.float().flatten(0, -2), torch.empty_like(weight)
            for part, block in zip(grad.flatten(0, -2).split(rows, dim=-1), grad_weight.split(rows)):
                block.copy_(part.t() @ flat)
        return grad_x, grad_weight


def pack(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function (..., in) -> (..., out) that has `weight` (out, in) in the layout its kernels read; None: no use."""
    if knows_bf16():
        return OneDNNWeight(weight)
    if "fbgemm" in torch.backends.quantized.supported_engines and 2**-6 <= weight.abs().amax() <= 65504:
        return FBGEMMWeight(weight)
    return None


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
        if x.numel() >= PACKED_FLOAT32_ROWS * x.shape[-1] and not has_matrix_units():
            return Float32Matmul.apply(x, self.weight.to_dense())
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


@functools.cache
def product_in_script() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The product of `OneDNNWeight` as TorchScript: from Python, a trace can't take the list among its arguments."""
    product = 'torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")'
    return torch.jit.CompilationUnit(f"def product(x, weight):\n    return {product}\n").product


class FBGEMMWeight:
    """A BF16 weight (out, in) as FP16 in FBGEMM's layout, for CPUs that have FP16 but no BF16: products in float32.

    FP16 has more digits than BF16 and fewer exponents. Below 6e-5 it rounds, by 3e-8 at most: beside weights of the
    usual size, and sums that are rounded to BF16, this is nothing. `pack` leaves other weights (and NaN) as they are.
    """

    def __init__(self, weight: torch.Tensor):
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.weight).bfloat16()


# ----------------------------------------------------------------------------------------------------- attention


def attend_in_two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`model.attend`. Here a later chunk would take a mask, and with one the kernel computes what it hides, too.

    So the chunk attends to itself and to what came before, and the two are merged by their softmax denominators.
    """
    B, H, T, D = q.shape
    KV, S = k.shape[1], k.shape[2]
    if S == T:
        return attend(q, k, v)
    q = q.reshape(B * KV, H // KV, T, D)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, H // KV, -1, -1) for x in (k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_sum = flash(q, k[:, :, S - T :], v[:, :, S - T :], is_causal=True)  # sums: logarithms of sums of exp
    before, before_sum = flash(q, k[:, :, : S - T], v[:, :, : S - T])
    share = (before_sum - own_sum).sigmoid_()[..., None]
    return own.float().lerp_(before.float(), share).to(q.dtype).view(B, H, T, D)


# --------------------------------------------------------------------------------------------------------- steps


class Traced:
    """`MistralMedium.forward` with decoding steps as TorchScript graphs: the same operations on the same numbers.

    Weights stream through a CPU's caches and evict the interpreter: a small model's step waits for Python a fifth of
    its time. A graph depends on nothing but tensors and their sizes, on whether the step has one row, and on how many
    tokens of each: every such kind has a graph of its own. TorchScript can't hold oneDNN's layout as a constant, so the
    packed weights are inputs of a graph, too; a trace knows a tensor by its identity.
    """

    def __init__(self, model: MistralMedium):
        self.forward, self.steps, self.graphs = model.forward, collections.Counter(), {}
        self.layers = len(model.layers)
        inside = [module for module in model.layers.modules() if isinstance(module, Linear)]
        self.products = [module.multiply for module in inside if isinstance(module.multiply, Product)]
        # All of the weights have to be inputs of the graph; messages between ranks cannot be part of it.
        self.possible = bool(self.products) and model.place.world_size == 1 and not model.keep_fp8
        self.possible &= knows_bf16() and sys.version_info < (3, 14)  # which has no TorchScript

    def __call__(self, x: torch.Tensor, span=None, cache: KVCache | None = None) -> torch.Tensor:
        # From some rows on other products may be used.
        if not (self.possible and isinstance(span, Step) and x.shape[:2].numel() < FLOAT32_ROWS):
            return self.forward(x, span, cache)
        kind = len(x) == 1, x.shape[1]
        self.steps[kind] += 1
        if self.steps[kind] <= STEPS_BEFORE_TRACING:  # by then all weights are packed
            return self.forward(x, span, cache)
        weights = [product.packed.weight for product in self.products]
        tensors = {name: value for name, value in vars(span).items() if isinstance(value, torch.Tensor)}
        own = cache.layers[: self.layers]  # a draft's are behind them
        inputs = weights, x, tensors, [layer[:, :, :, : span.length] for layer in own]
        if kind not in self.graphs:
            self.graphs[kind] = self.trace(span, inputs)
        with torch.jit.optimized_execution(False):  # optimizing takes longer than it saves
            return self.graphs[kind](*inputs)

    def trace(self, span: Step, inputs: tuple) -> Callable[..., torch.Tensor]:
        def run(weights, x, tensors, seen):
            return self.forward(x, replace(span, length=None, **tensors), KVCache(seen))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is old, and that a graph has no `if`
            return torch.jit.trace(run, inputs, check_trace=False)
