"""Triton kernels of norms of heads: a program takes some heads of some tokens, each once.

x, gate and dy are [B, T, H, DIM] by their strides in units (see conv_kernels.py); what is written
is contiguous. Rows are the heads of all tokens of a sequence, token by token.
"""

import triton
import triton.language as tl

from seqpar.kernels.conv_kernels import sigmoid


@triton.jit
def _rows(tile, tokens, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLS):
    """The batch, token and head of each row of a tile, its channels, and what exists of it."""
    tiles = tl.cdiv(tokens * HEADS, ROWS)
    row = tile % tiles * ROWS + tl.arange(0, ROWS)
    # A whole tile of columns: the weight, loaded with them, lies in registers as x does.
    cols = tl.arange(0, COLS)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    inside = (row < tokens * HEADS)[:, None] & (cols < DIM)
    batch = (tile // tiles).to(tl.int64)
    return batch, (row // HEADS).to(tl.int64)[:, None], (row % HEADS)[:, None], cols, inside


@triton.jit
def _load(x, batch, token, head, cols, inside, xb, xt, xh, UNIT: tl.constexpr):
    x += batch * xb * UNIT + token * (xt * UNIT) + head * (xh * UNIT) + cols
    return tl.load(x, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(y, value, batch, token, head, cols, inside, tokens, HEADS, DIM):
    y += ((batch * tokens + token) * HEADS + head) * DIM + cols
    tl.store(y, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def gated_norm_kernel(
    x, gate, weight, y,
    tokens, eps,
    xb, xt, xh, gb, gt, gh,
    X_UNIT: tl.constexpr, G_UNIT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    FAST: tl.constexpr, SILU: tl.constexpr, GATE_FIRST: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """y = norm(x) · weight · open(gate), or norm(x · open(gate)) · weight if GATE_FIRST.

    norm(x) = x / sqrt(mean(x²) + eps); open is SiLU or the sigmoid.
    """
    batch, token, head, cols, inside = _rows(tl.program_id(0), tokens, HEADS, DIM, ROWS, COLS)
    x_tile = _load(x, batch, token, head, cols, inside, xb, xt, xh, X_UNIT)
    g_tile = _load(gate, batch, token, head, cols, inside, gb, gt, gh, G_UNIT)
    scale = tl.load(weight + cols, mask=cols < DIM, other=0.0).to(tl.float32)
    half = sigmoid(g_tile, FAST)
    open = g_tile * half if SILU else half
    if GATE_FIRST:
        x_tile *= open
    length = tl.rsqrt(tl.sum(x_tile * x_tile, 1) * (1.0 / DIM) + eps)
    value = x_tile * length[:, None] * scale
    if not GATE_FIRST:
        value *= open
    _store(y, value, batch, token, head, cols, inside, tokens, HEADS, DIM)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def gated_norm_backward_kernel(
    x, gate, weight, dy, dx, d_gate, sums,
    tokens, tiles, eps,
    xb, xt, xh, gb, gt, gh, yb, yt, yh,
    X_UNIT: tl.constexpr, G_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, FAST: tl.constexpr, SILU: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of x and the gate, and in sums [programs, DIM] each program's share of weight's.

    Every so many of the `tiles`, over all sequences, are a program's.
    """
    total = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        batch, token, head, cols, inside = _rows(tile, tokens, HEADS, DIM, ROWS, COLS)
        x_tile = _load(x, batch, token, head, cols, inside, xb, xt, xh, X_UNIT)
        g_tile = _load(gate, batch, token, head, cols, inside, gb, gt, gh, G_UNIT)
        d_tile = _load(dy, batch, token, head, cols, inside, yb, yt, yh, Y_UNIT)
        scale = tl.load(weight + cols, mask=cols < DIM, other=0.0).to(tl.float32)
        half = sigmoid(g_tile, FAST)
        open = g_tile * half if SILU else half
        normed = x_tile * open if GATE_FIRST else x_tile
        length = tl.rsqrt(tl.sum(normed * normed, 1) * (1.0 / DIM) + eps)[:, None]
        unit = normed * length
        d_open = d_tile * unit * scale
        if not GATE_FIRST:
            d_tile *= open
        total += d_tile * unit
        d_unit = d_tile * scale
        along = tl.sum(d_unit * unit, 1)[:, None] * (1.0 / DIM)
        d_normed = (d_unit - unit * along) * length
        if GATE_FIRST:
            d_open = d_normed * x_tile
            d_normed *= open
        slope = half * (1.0 - half)
        d_gated = d_open * (half + g_tile * slope if SILU else slope)
        _store(d_gate, d_gated, batch, token, head, cols, inside, tokens, HEADS, DIM)
        _store(dx, d_normed, batch, token, head, cols, inside, tokens, HEADS, DIM)
    cols = tl.arange(0, COLS)
    tl.store(sums + tl.program_id(0) * DIM + cols, tl.sum(total, 0), mask=cols < DIM)


@triton.jit(do_not_specialize=["tokens"])
def unit_kernel(
    x, y,
    tokens, eps,
    xb, xt, xh,
    X_UNIT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """y = x / sqrt(|x|² + eps)."""
    batch, token, head, cols, inside = _rows(tl.program_id(0), tokens, HEADS, DIM, ROWS, COLS)
    x_tile = _load(x, batch, token, head, cols, inside, xb, xt, xh, X_UNIT)
    value = x_tile * tl.rsqrt(tl.sum(x_tile * x_tile, 1) + eps)[:, None]
    _store(y, value, batch, token, head, cols, inside, tokens, HEADS, DIM)


@triton.jit(do_not_specialize=["tokens"])
def unit_backward_kernel(
    x, dy, dx,
    tokens, eps,
    xb, xt, xh, yb, yt, yh,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    batch, token, head, cols, inside = _rows(tl.program_id(0), tokens, HEADS, DIM, ROWS, COLS)
    x_tile = _load(x, batch, token, head, cols, inside, xb, xt, xh, X_UNIT)
    d_tile = _load(dy, batch, token, head, cols, inside, yb, yt, yh, Y_UNIT)
    length = tl.rsqrt(tl.sum(x_tile * x_tile, 1) + eps)[:, None]
    unit = x_tile * length
    value = (d_tile - unit * tl.sum(d_tile * unit, 1)[:, None]) * length
    _store(dx, value, batch, token, head, cols, inside, tokens, HEADS, DIM)
