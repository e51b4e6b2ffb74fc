"""The weighted gated SiLU within experts: one kernel forward, one backward, or plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.kernels.choose import uses_triton
from seqpar.kernels.tuned import ceil_div


def gated_silu(x: Tensor, scale: Tensor) -> Tensor:
    """SiLU(gate) · value · scale, of which only the inputs are kept.

    Args:
        x: [rows, 2 dim], gates before values.
        scale: [rows], of any precision.

    Returns:
        [rows, dim] in x's dtype. Triton kernels reckon in fp32 inside.
    """
    if not uses_triton("gated_silu", x):
        gate, value = x.chunk(2, -1)
        return (F.silu(gate) * value * scale[:, None]).to(x.dtype)
    with torch.cuda.device_of(x):
        return _GatedSiLU.apply(x, scale)


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        from seqpar.kernels.gate_kernels import gated_silu_kernel  # triton only where it is used

        x, scale = x.contiguous(), scale.contiguous()
        ctx.save_for_backward(x, scale)
        y = x.new_empty(len(x), x.shape[1] // 2)
        if len(x):
            programs, constants = _cut(y)
            gated_silu_kernel[(programs,)](x, scale, y, len(x), **constants)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        from seqpar.kernels.gate_kernels import gated_silu_backward_kernel

        x, scale = ctx.saved_tensors
        dy, dx, d_scale = dy.contiguous(), torch.empty_like(x), torch.empty_like(scale)
        if len(x):
            programs, constants = _cut(dy)
            gated_silu_backward_kernel[(programs,)](x, scale, dy, dx, d_scale, len(x), **constants)
        return dx, d_scale


def _cut(y: Tensor) -> tuple[int, dict[str, Any]]:
    """Programs, and the constants of the kernels: 32 numbers a thread and tensor."""
    rows, dim = y.shape
    cols = min(1024, 1 << (dim - 1).bit_length())
    each = 4096 // cols
    sizes = {"DIM": dim, "ROWS": each, "COLS": cols, "num_warps": 4}
    return ceil_div(rows, each), {**sizes, "FAST": y.is_cuda}
