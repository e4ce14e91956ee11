"""What only makes a CPU faster, put over a loaded model by one call: `speed_up(model)`.

The model does not know of it. Each trick stands beside the plain formula that it equals; `benchmarks/tricks.py`
measures what each of them gains.

| trick | plain formula |
|---|---|
| `Product`: BF16 products in float32, or in the layout that the kernels read; float32 by oneDNN | `F.linear(x, W)` |
| `attend_in_two`: a later chunk of a prompt, without computing what a mask would hide | `model.attend` |
| `attend_by_products`: short samples in training, without the fused kernel's backward pass | `model.attend` |
| `Steps`: a decoding step started by C++ instead of Python | `MistralMedium.forward` |
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from model import DecoderLayer, KVCache, MistralMedium, Step, attend, product_attention
from parallel import Linear
from vision import VisionAttention

FLOAT32_ROWS = 64  # a CPU that can't multiply BF16 multiplies at least this many rows in float32
FLOAT32_ROWS_AVX2 = 8  # one that has no BF16 instructions at all, this many
Tensors = list[torch.Tensor]
CACHED = 1 << 18  # elements of a weight converted to float32 at a time, so that they stay in cache
SHORT = {torch.bfloat16: 256, torch.float32: 128}  # tokens of a sample whose attention in training is two products
KERNELS = "64"  # that oneDNN keeps: more than the shapes of a training step


def speed_up(model: MistralMedium, inference: bool = True) -> None:
    """Put the tricks over `model`, whose weights are there: for training only those that have gradients."""
    if model.place.device.type != "cpu":
        return
    model.attention = attend_fast
    if model.dtype != torch.bfloat16 and (inference or not beats_mkl()):
        return
    # oneDNN makes kernels for every number of rows, 0.6 MB each, and keeps 1,024 of them, twice: a gigabyte, after
    # batches and prompts of many lengths. It reads these limits when it multiplies for the first time.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, KERNELS)
    for name, module in model.named_modules():
        if isinstance(module, VisionAttention) and model.dtype == torch.bfloat16:
            module.attention = functools.partial(attend_fast, causal=False)
        elif isinstance(module, Linear) and module.weight_scale is None and ".adapter" not in name:
            module.multiply = Product(module)
    if inference:
        model.forward = Steps(model)


# ----------------------------------------------------------------------------------------------------- products


@functools.cache  # a trace cannot record the questions
def knows_bf16() -> bool:
    """Whether oneDNN has BF16 kernels for this CPU: from AVX-512 on."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def has_matrix_units() -> bool:
    return torch.cpu._is_amx_tile_supported()


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the CPU itself does: twice to four times as fast as float32. From AVX-512 on, others can only pretend."""
    return has_matrix_units() or (knows_bf16() and torch.cpu._is_avx512_bf16_supported())


@functools.cache
def beats_mkl() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL, which leaves AVX-512 unused unless the CPU is Intel's."""
    vendor = "/proc/cpuinfo"
    if not (os.path.exists(vendor) and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()):
        return False
    with open(vendor, encoding="ascii", errors="replace") as file:
        return "AuthenticAMD" in file.read(4096)


class Product:
    """`F.linear(x, W)` of one linear, the fastest way for each number of rows: many, on a CPU that can't multiply BF16,
    in float32; and few, decoding, with the weight in the layout of the kernels, once `pack` was called.
    """

    def __init__(self, linear: Linear):
        self.linear = linear
        self.packed: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.holder[0].weight if self.linear.weight is None else self.linear.weight  # a tied head's

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return self.packed(x)
        rows = x.numel() // x.shape[-1]
        if x.dtype == torch.float32:
            return OneDNNMatmul.apply(x, self.weight) if rows >= FLOAT32_ROWS else F.linear(x, self.weight)
        if has_matrix_units() and 0 < rows < FLOAT32_ROWS:
            return with_weight_on_the_left(x, self.weight)
        many = rows >= (FLOAT32_ROWS if knows_bf16() else FLOAT32_ROWS_AVX2)
        multiply = Float32Matmul.apply if many and not multiplies_bf16() else F.linear
        return multiply(x, self.weight)

    def pack(self) -> None:
        """The weight of a tied head stays with the embedding: what is packed is a copy."""
        self.packed = self.linear.packed = pack(self.weight.data)
        if self.packed is not None:
            self.linear.weight = None


def with_weight_on_the_left(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """W x^T: the weight is read once, as it lies in memory. On the right it would be rearranged first."""
    flat = x.reshape(-1, x.shape[-1])
    y = weight @ flat[0] if len(flat) == 1 else (weight @ flat.t()).t().contiguous()
    return y.reshape(*x.shape[:-1], -1)


class Float32Matmul(torch.autograd.Function):
    """`F.linear(x, weight)` in BF16, multiplied in float32: the same sums, rounded once, as BF16 products have them.

    A CPU without such products multiplies BF16 at half its float32 speed or far below, so from some rows on converting
    pays. The weight is converted block by block, and the copy is not kept.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        wide, rows = x.float(), max(1, CACHED // weight.shape[1])
        return torch.cat([F.linear(wide, block.float()).to(x.dtype) for block in weight.split(rows)], dim=-1)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (for_x, for_weight) = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad.float()
        grad_x = (grad @ weight.float()).to(x.dtype) if for_x else None
        flat, wide = grad.flatten(0, -2), x.float().flatten(0, -2)
        return grad_x, (flat.t() @ wide).to(weight.dtype) if for_weight else None


class OneDNNMatmul(torch.autograd.Function):
    """`F.linear(x, weight)` and its gradients in float32, by oneDNN instead of MKL."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        y = onednn(x.flatten(0, -2), weight)
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))  # no view: the heads are turned in place

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (for_x, for_weight) = ctx.saved_tensors, ctx.needs_input_grad
        flat, rows = grad.flatten(0, -2), x.flatten(0, -2)
        return onednn(grad, weight.t()) if for_x else None, onednn(flat.t(), rows.t()) if for_weight else None


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T by oneDNN; `weight` may be in its own layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def pack(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function (..., in) -> (..., out) that has `weight` (out, in) in the layout its kernels read; None: no use."""
    if knows_bf16():
        return OneDNNWeight(weight)
    if "fbgemm" in torch.backends.quantized.supported_engines and 2**-6 <= weight.abs().amax() <= 65504:
        return FBGEMMWeight(weight)
    return None


class OneDNNWeight(torch.nn.Module):
    """A BF16 weight (out, in) in oneDNN's own layout, for CPUs from AVX-512 on.

    Such a CPU multiplies BF16 in pairs along the columns, for 16 rows of the weight at a time. Found row by row in
    memory, a weight is rearranged anew for every product, and that takes longer than the product of a few rows itself.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            return product_in_script()(x, self.weight)
        if x.numel() >= FLOAT32_ROWS * x.shape[-1] and not multiplies_bf16():
            return Float32Matmul.apply(x, self.weight.to_dense())
        return onednn(x, self.weight)


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


def attend_fast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True) -> torch.Tensor:
    """`model.attend`, or `VisionAttention.attention` where it is not causal, the fastest way for these tokens."""
    if k.shape[2] > q.shape[2]:
        return attend_in_two(q, k, v)
    if q.requires_grad and q.shape[2] <= SHORT.get(q.dtype, 0):
        return attend_by_products(q, k, v, causal)
    return attend(q, k, v) if causal else F.scaled_dot_product_attention(q, k, v)


def attend_by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention of T tokens to themselves, with gradients: the fused kernel's backward pass is slow, most of all in
    BF16. The scores are float32, as in the kernel, but they are kept, for which long samples would lack the memory.
    """
    B, H, T, D = q.shape
    KV = k.shape[1]
    bias = torch.full((T, T), -torch.inf).triu_(1).repeat(H // KV, 1) if causal else None
    return product_attention(q.reshape(B, KV, -1, D), k, v, bias).view(B, H, T, D)


def attend_in_two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`model.attend` of a later chunk, which would take a mask, and with one the kernel computes what it hides, too.

    So the chunk attends to itself and to what came before, and the two are merged by their softmax denominators.
    """
    B, H, T, D = q.shape
    KV, S = k.shape[1], k.shape[2]
    q = q.reshape(B * KV, H // KV, T, D)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, H // KV, -1, -1) for x in (k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_sum = flash(q, k[:, :, S - T :], v[:, :, S - T :], is_causal=True)  # sums: logarithms of sums of exp
    before, before_sum = flash(q, k[:, :, : S - T], v[:, :, : S - T])
    share = (before_sum - own_sum).sigmoid_()[..., None]
    return own.float().lerp_(before.float(), share).to(q.dtype).view(B, H, T, D)


# --------------------------------------------------------------------------------------------------------- steps


class Steps:
    """`MistralMedium.forward`, but from the second step of decoding on with packed weights, and with the layers called
    by C++, as a TorchScript graph: the same operations on the same numbers.

    Weights stream through a CPU's caches and evict the interpreter: a small model's step waits for Python a fifth of
    its time. Layers are alike, so one is traced, in 0.02 s, and called for all with their tensors as inputs. It depends
    on nothing but tensors and their sizes, on whether there is one row, whether all are at the same position, and how
    many tokens there are of each: every such kind has a graph of its own.
    """

    def __init__(self, model: MistralMedium):
        self.model, self.forward, self.count, self.packed = model, model.forward, 0, False
        self.graphs: dict[tuple, Callable[..., torch.Tensor]] = {}
        # Messages between ranks cannot be part of a graph, nor FBGEMM's weights; Python 3.14 has no TorchScript.
        plain = model.place.world_size == 1 and not model.keep_fp8
        self.traces = plain and knows_bf16() and sys.version_info < (3, 14)

    def __call__(self, x: torch.Tensor, span=None, cache: KVCache | None = None) -> torch.Tensor:
        rows, step = x.shape[:2].numel(), isinstance(span, Step)
        self.count += step
        if not step or self.count == 1 or rows >= FLOAT32_ROWS:  # from there on, other products may be used
            return self.forward(x, span, cache)
        if not self.packed and (rows > 1 or not has_matrix_units()):  # which read one row's weights as they lie
            self.pack()
        if not self.traces:
            return self.forward(x, span, cache)
        shared = [x for x in (span.cos, span.sin, span.positions, span.rows, span.bias) if x is not None]
        kind = len(x) == 1, span.bias is None, x.shape[1]
        if kind not in self.graphs:
            own = cache.layers[0][:, :, :, : span.length]
            self.graphs[kind] = trace(list(self.model.layers.values()), replace(span, length=None), x, own, shared)
        with torch.jit.optimized_execution(False):  # optimizing takes longer than it saves
            return self.graphs[kind](x, shared, cache.layers, span.length)

    def pack(self) -> None:
        """All but the vision tower's weights: a picture has many rows."""
        self.packed = True
        self.graphs.clear()
        for name, module in self.model.named_modules():
            if isinstance(getattr(module, "multiply", None), Product) and not name.startswith("vision."):
                module.multiply.pack()


def trace(layers: list[DecoderLayer], span: Step, *inputs) -> Callable[..., torch.Tensor]:
    """TorchScript that runs all layers, made from the first one's operations on `inputs`: x, its cache, the span's."""
    every = [[*layer.parameters(), *layer.buffers()] for layer in layers]

    def call(x, cache, shared, tensors):  # a trace knows a tensor by its identity
        return layers[0](x, span, cache)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is old, and that a graph has no `if`
        layer = torch.jit.trace(call, (*inputs, every[0]), check_trace=False)

        def run(every: list[Tensors], x: torch.Tensor, shared: Tensors, caches: Tensors, length: int):
            for tensors, cache in zip(every, caches):  # a draft's caches are behind those of the layers
                x = layer(x, cache[:, :, :, :length], shared, tensors)
            return x

        return functools.partial(torch.jit.script(run), every)
