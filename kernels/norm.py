"""Norms of heads, each one kernel forward and one backward: Triton, launched, or plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.kernels.choose import uses_triton
from seqpar.kernels.strides import dense, in_units

WIDEST = 1024
"""Channels of a head that the Triton kernels hold in registers."""


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight · SiLU(gate), the mean over the last dimension.

    Args:
        x, gate: [..., heads, dim]; slices of packed projections are read where they lie.
        weight: [dim], for all heads.
        eps: added to the mean square.

    Returns:
        x's shape and dtype. Triton kernels reckon in fp32 inside.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if gate.shape != x.shape:
        raise ValueError(f"gate is {list(gate.shape)}, it must have x's shape {list(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {list(weight.shape)}, it must be [dim={x.shape[-1]}]")
    if not uses_triton("gated_rms_norm", x, _unfit(x)):
        return (F.rms_norm(x, x.shape[-1:], weight, eps) * F.silu(gate)).to(x.dtype)
    with torch.cuda.device_of(x):
        return _GatedNorm.apply(_heads(x), _heads(gate), weight, eps).view(x.shape)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|² + eps) along the last dimension; a vector of zeros stays, gently.

    Args:
        x: [..., heads, dim]; a slice of something packed is read where it lies.
        eps: added to the squared length.

    Returns:
        x's shape and dtype, reckoned in at least fp32.
    """
    if not uses_triton("unit", x, _unfit(x)):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    with torch.cuda.device_of(x):
        return _Unit.apply(_heads(x), eps).view(x.shape)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        from seqpar.kernels.norm_kernels import gated_norm_kernel  # triton only where it is used

        x, gate, weight = dense(x), dense(gate), weight.contiguous()
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles, constants = _cut(x)
        (x_strides, x_unit), (g_strides, g_unit) = in_units(x), in_units(gate)
        gated_norm_kernel[(tiles,)](
            x,
            gate,
            weight,
            y,
            x.shape[1],
            eps,
            *x_strides,
            *g_strides,
            X_UNIT=x_unit,
            G_UNIT=g_unit,
            FAST=x.is_cuda,
            **constants,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from seqpar.kernels.norm_kernels import gated_norm_backward_kernel
        from seqpar.kernels.tuned import processors

        x, gate, weight = ctx.saved_tensors
        dy = dense(dy)
        dx, d_gate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
        tiles, constants = _cut(x)
        programs = min(tiles, 32 * processors(x.device))
        sums = torch.empty(programs, x.shape[3], dtype=torch.float32, device=x.device)
        (x_strides, x_unit), (g_strides, g_unit) = in_units(x), in_units(gate)
        y_strides, y_unit = in_units(dy)
        gated_norm_backward_kernel[(programs,)](
            x,
            gate,
            weight,
            dy,
            dx,
            d_gate,
            sums,
            x.shape[1],
            tiles,
            ctx.eps,
            *x_strides,
            *g_strides,
            *y_strides,
            X_UNIT=x_unit,
            G_UNIT=g_unit,
            Y_UNIT=y_unit,
            FAST=x.is_cuda,
            **constants,
        )
        return dx, d_gate, sums.sum(0).to(weight.dtype), None


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        from seqpar.kernels.norm_kernels import unit_kernel

        x = dense(x)
        ctx.save_for_backward(x)
        ctx.eps = eps
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles, constants = _cut(x)
        strides, x_unit = in_units(x)
        unit_kernel[(tiles,)](x, y, x.shape[1], eps, *strides, X_UNIT=x_unit, **constants)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from seqpar.kernels.norm_kernels import unit_backward_kernel

        (x,) = ctx.saved_tensors
        dy = dense(dy)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles, constants = _cut(x)
        (x_strides, x_unit), (y_strides, y_unit) = in_units(x), in_units(dy)
        unit_backward_kernel[(tiles,)](
            x,
            dy,
            dx,
            x.shape[1],
            ctx.eps,
            *x_strides,
            *y_strides,
            X_UNIT=x_unit,
            Y_UNIT=y_unit,
            **constants,
        )
        return dx, None


def _unfit(x: Tensor) -> str | None:
    return f"dim={x.shape[-1]} must be at most {WIDEST}" if x.shape[-1] > WIDEST else None


def _heads(x: Tensor) -> Tensor:
    """x as [B, T, H, dim], without a copy up to four dimensions."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(0, -4)


def _cut(x: Tensor) -> tuple[int, dict[str, int]]:
    """Tiles of all sequences, and the constants of the kernels: 16 numbers a thread."""
    batch, tokens, heads, dim = x.shape
    cols = 1 << (dim - 1).bit_length()
    rows = max(4, 2048 // cols)
    tiles = batch * -(-tokens * heads // rows)
    return tiles, {"HEADS": heads, "DIM": dim, "ROWS": rows, "COLS": cols, "num_warps": 4}
