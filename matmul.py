"""`x W^T`, and what it takes to do it fast on a CPU in BF16. Elsewhere it is `F.linear`.

- **Many rows**: CPUs without matrix units multiply BF16 at half their float32 speed, so both sides are converted.
- **Few rows**, decoding: the weight is laid out once the way the kernels read it (`pack`).
"""

import torch
import torch.nn.functional as F

from fp8 import BLOCK

FLOAT32_ROWS = 64  # a CPU multiplies at least so many BF16 rows in float32; see _Float32Matmul
UNPACK_ROWS = 256  # where it has to unpack the weight first, at least so many; see pack


class _Float32Matmul(torch.autograd.Function):
    """`x W^T` in BF16, multiplied in float32: the same sums, rounded once, the way a matrix unit forms them.

    A CPU without such a unit multiplies BF16 at about half its float32 speed, so from FLOAT32_ROWS rows on it pays to
    convert. The weight is converted a block at a time, and not kept.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        wide, out = x.float(), x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows in _Float32Matmul.blocks(weight):
            out[..., rows] = F.linear(wide, weight[rows].float())
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, blocks = grad.float(), _Float32Matmul.blocks(weight)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = sum(grad[..., rows] @ weight[rows].float() for rows in blocks).to(x.dtype)
        if ctx.needs_input_grad[1]:
            flat, grad_weight = x.float().flatten(0, -2), torch.empty_like(weight)
            for rows in blocks:
                grad_weight[rows] = grad[..., rows].flatten(0, -2).t() @ flat
        return grad_x, grad_weight

    @staticmethod
    def blocks(weight: torch.Tensor) -> list[slice]:
        step = max(1, BLOCK // weight.shape[1])
        return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` (..., in), `weight` (out, in), maybe packed -> (..., out)."""
    packed = weight.is_mkldnn
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        many = x.numel() >= (UNPACK_ROWS if packed else FLOAT32_ROWS) * x.shape[-1]
        if many and not torch.cpu._is_amx_tile_supported():
            return _Float32Matmul.apply(x, weight.to_dense() if packed else weight)
    if packed:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (out, in) in oneDNN's own layout; unchanged where that is of no use.

    A CPU multiplies BF16 in pairs along the columns, for 16 rows of the weight at a time. Found row by row in memory,
    a weight is rearranged anew for every product, and that takes longer than the product of a few rows itself.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return weight
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)
