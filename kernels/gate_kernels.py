"""Triton kernels of a weighted gated SiLU: a program takes some rows, each number once.

x is [rows, 2 DIM], gates before values; scale has a number a row. All are contiguous.
"""

import triton
import triton.language as tl

from seqpar.kernels.conv_kernels import sigmoid


@triton.jit(do_not_specialize=["rows"])
def gated_silu_kernel(
    x,
    scale,
    y,
    rows,
    DIM: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = SiLU(gate) · value · scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    for first in range(0, DIM, COLS):
        cols = first + tl.arange(0, COLS)[None, :]
        inside = (row < rows)[:, None] & (cols < DIM)
        at = x + row[:, None] * (2 * DIM) + cols
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(at + DIM, mask=inside, other=0.0).to(tl.float32)
        out = gate * sigmoid(gate, FAST) * value * factor
        tl.store(y + row[:, None] * DIM + cols, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gated_silu_backward_kernel(
    x,
    scale,
    dy,
    dx,
    d_scale,
    rows,
    DIM: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradients of x and of each row's scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, DIM, COLS):
        cols = first + tl.arange(0, COLS)[None, :]
        inside = (row < rows)[:, None] & (cols < DIM)
        along = row[:, None] * (2 * DIM) + cols
        gate = tl.load(x + along, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + along + DIM, mask=inside, other=0.0).to(tl.float32)
        d_out = tl.load(dy + row[:, None] * DIM + cols, mask=inside, other=0.0).to(tl.float32)
        half = sigmoid(gate, FAST)
        open = gate * half
        total += tl.sum(d_out * open * value, 1)
        d_out *= factor
        d_gate = d_out * value * half * (1.0 + gate * (1.0 - half))
        tl.store(dx + along, d_gate.to(dx.dtype.element_ty), mask=inside)
        tl.store(dx + along + DIM, (d_out * open).to(dx.dtype.element_ty), mask=inside)
    tl.store(d_scale + row, total.to(d_scale.dtype.element_ty), mask=row < rows)
