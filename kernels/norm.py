"""Norms of heads, each one kernel forward and one backward: Triton, launched, or plain PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.kernels.choose import uses_triton
from seqpar.kernels.strides import dense, in_units
from seqpar.kernels.tuned import ceil_div, processors

WIDEST = 1024
"""Channels of a head that the Triton kernels hold in registers."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    gate_first: bool = False,
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight · activation(gate), the mean over the last dimension.

    Args:
        x, gate: [..., heads, dim]; slices of packed projections are read where they lie.
        weight: [dim], for all heads.
        eps: added to the mean square.
        activation: of the gate, one of ACTIVATIONS.
        gate_first: whether it is x · activation(gate) that is normalised, as in Mamba-2.

    Returns:
        x's shape and dtype. Triton kernels reckon in fp32 inside.

    Raises:
        ValueError: shapes that do not fit each other, an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if gate.shape != x.shape:
        raise ValueError(f"gate is {list(gate.shape)}, it must have x's shape {list(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {list(weight.shape)}, it must be [dim={x.shape[-1]}]")
    if not uses_triton("gated_rms_norm", x, _unfit(x)):
        opened = ACTIVATIONS[activation](gate)
        if gate_first:
            return F.rms_norm(x * opened, x.shape[-1:], weight, eps).to(x.dtype)
        return (F.rms_norm(x, x.shape[-1:], weight, eps) * opened).to(x.dtype)
    with torch.cuda.device_of(x):
        kind = activation == "silu", gate_first
        return _GatedNorm.apply(_heads(x), _heads(gate), weight, eps, kind).view(x.shape)


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
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, kind: tuple[bool, bool]
    ) -> Tensor:
        from seqpar.kernels.launch import Launch, alike  # triton only where it is used
        from seqpar.kernels.norm_kernels import gated_norm_kernel

        x, gate, weight = dense(x), dense(gate), weight.contiguous()
        ctx.save_for_backward(x, gate, weight)
        ctx.eps, ctx.kind = eps, kind
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)

        def make() -> Launch:
            tiles, values = _cut(x)
            values |= in_units(x=x, g=gate) | _kind(*kind)
            return Launch(gated_norm_kernel, tiles, eps=eps, **values)

        alike("norm", eps, kind, x, gate, weight).once("forward", make)(x, gate, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from seqpar.kernels.launch import Launch, alike
        from seqpar.kernels.norm_kernels import gated_norm_backward_kernel

        x, gate, weight = ctx.saved_tensors
        dy = dense(dy)
        dx, d_gate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
        tiles, values = _cut(x)
        programs = min(tiles, 32 * processors(x.device))
        sums = torch.empty(programs, x.shape[3], dtype=torch.float32, device=x.device)

        def make() -> Launch:
            given = values | in_units(x=x, g=gate, y=dy) | _kind(*ctx.kind)
            kernel = gated_norm_backward_kernel
            return Launch(kernel, programs, tiles=tiles, eps=ctx.eps, **given)

        launch = alike("norm", ctx.eps, ctx.kind, x, gate, weight, dy).once("backward", make)
        launch(x, gate, weight, dy, dx, d_gate, sums)
        return dx, d_gate, sums.sum(0).to(weight.dtype), None, None


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        from seqpar.kernels.launch import Launch, alike
        from seqpar.kernels.norm_kernels import unit_kernel

        x = dense(x)
        ctx.save_for_backward(x)
        ctx.eps = eps
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)

        def make() -> Launch:
            tiles, values = _cut(x)
            return Launch(unit_kernel, tiles, eps=eps, **in_units(x=x), **values)

        alike("unit", eps, x).once("forward", make)(x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from seqpar.kernels.launch import Launch, alike
        from seqpar.kernels.norm_kernels import unit_backward_kernel

        (x,) = ctx.saved_tensors
        dy = dense(dy)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)

        def make() -> Launch:
            tiles, values = _cut(x)
            return Launch(unit_backward_kernel, tiles, eps=ctx.eps, **in_units(x=x, y=dy), **values)

        alike("unit", ctx.eps, x, dy).once("backward", make)(x, dy, dx)
        return dx, None


def _kind(silu: bool, gate_first: bool) -> dict[str, bool]:
    """Constants of the kernels of the gated norm."""
    return {"SILU": silu, "GATE_FIRST": gate_first}


def _unfit(x: Tensor) -> str | None:
    return f"dim={x.shape[-1]} must be at most {WIDEST}" if x.shape[-1] > WIDEST else None


def _heads(x: Tensor) -> Tensor:
    """x as [B, T, H, dim], without a copy up to four dimensions."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(0, -4)


def _cut(x: Tensor) -> tuple[int, dict[str, int]]:
    """Tiles of all sequences, and what the kernels are given of x: 16 numbers a thread."""
    batch, tokens, heads, dim = x.shape
    cols = 1 << (dim - 1).bit_length()
    rows = max(4, 2048 // cols)
    tiles = batch * ceil_div(tokens * heads, rows)
    sizes = {"tokens": tokens, "HEADS": heads, "DIM": dim, "ROWS": rows, "COLS": cols}
    return tiles, sizes | {"FAST": x.is_cuda, "num_warps": 4}
