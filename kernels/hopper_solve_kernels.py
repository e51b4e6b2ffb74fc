"""What the delta rule's walk on Hopper needs of keys alone, found for all its steps at once.

Of a step of at most 64 tokens, in the notation of delta_kernels.py, T = M (1 + B M)⁻¹ and
W = (1 - T B) K⁺. With scalar decay, of which G is the running sum within the step, M and K⁺ have
e^(G_i - G_j) and e^(G_i) in them.

A program has one step, as four blocks of 16 tokens. T of a block is found row by row, which stays
exact where keys repeat and β is 2; blocks T_c above and T_r below are joined by

    T_rc = (1 - T_r B_r) M_rc (1 - B_c T_c)
"""

import triton
import triton.language as tl

from seqpar.kernels.decay_kernels import _tile


@triton.jit
def _less(M, rate, T):
    """M B T [16, 16], to fp32's accuracy."""
    return tl.dot(M * rate[None, :], T, input_precision="tf32x3")


@triton.jit
def _joined(M, upper, upper_rate, lower, lower_rate):
    """(1 - T_r B_r) M (1 - B_c T_c) of two blocks."""
    P = M - _less(M, upper_rate, upper)
    return P - _less(lower, lower_rate, P)


@triton.jit
def _scores(a, b, more):
    return tl.dot(a, tl.trans(b), more)


@triton.jit
def _decayed(M, G_i, G_j, i, j, size):
    """Below the diagonal and within one frame, with e^(G_i - G_j)."""
    i, j = i[:, None], j[None, :]
    M *= tl.exp2(tl.minimum(G_i[:, None] - G_j[None, :], 0.0))
    return tl.where((i > j) & (i // size == j // size), M, 0.0)


@triton.jit
def _substituted(T, M, rate, row):
    """T with its row `row` found from those before it."""
    here = (tl.arange(0, 16) == row)[:, None]
    of_M = tl.sum(tl.where(here, M, 0.0), 0)
    return tl.where(here, (of_M - tl.sum((of_M * rate)[:, None] * T, 0))[None, :], T)


@triton.jit
def _put(solved, T, i, j, size, known):
    """A block of T, columns counted from the frame's first token; zeros beyond the frame."""
    i, j = i[:, None], j[None, :]
    at = solved + i * 64
    tl.store(at + j % size, T.to(tl.bfloat16), mask=known & (i // size == j // size))
    tl.store(at + j, tl.zeros([16, 16], tl.bfloat16), mask=known & (j >= size))


@triton.jit
def _weights(T, rate):
    return (T * rate[None, :]).to(tl.bfloat16)


@triton.jit(do_not_specialize=["batches", "tokens", "chunks"])
def solve_hopper_kernel(
    plus,
    minus,
    beta,
    gate,
    solved,
    w,
    levels,
    table,
    batches,
    tokens,
    chunks,
    kb,
    kt,
    kh,
    bb,
    bt,
    bh,
    gb,
    gt,
    gh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DECAY: tl.constexpr,
):
    """solved [B, H, T, 64]: T of each step; w [B, T, H, DK].

    plus, minus [B, T, H, DK]; beta [B, T, H]. `table`: `tables.cut_rows` of chunks of 64 tokens.
    Rows of T are those of tokens, columns are counted from the first token of the token's frame.
    """
    pid = tl.program_id(0)
    head = pid % HEADS
    chunk = pid // HEADS % chunks
    batch = (pid // HEADS // chunks).to(tl.int64)
    start = tl.load(table + 3 * chunk).to(tl.int64)
    length = tl.load(table + 3 * chunk + 1)
    size = 64
    if DECAY == "frames":
        size = 64 >> tl.load(levels + (batch * chunks + chunk) * HEADS + head)

    i0 = tl.arange(0, 16)
    i1, i2, i3 = i0 + 16, i0 + 32, i0 + 48
    known0, known1, known2, known3 = i0 < length, i1 < length, i2 < length, i3 < length
    beta += batch * bb + head * bh + start * bt
    b0 = tl.load(beta + i0 * bt, mask=known0, other=0.0).to(tl.float32)
    b1 = tl.load(beta + i1 * bt, mask=known1, other=0.0).to(tl.float32)
    b2 = tl.load(beta + i2 * bt, mask=known2, other=0.0).to(tl.float32)
    b3 = tl.load(beta + i3 * bt, mask=known3, other=0.0).to(tl.float32)
    G0 = tl.zeros([16], tl.float32)
    G1, G2, G3 = G0, G0, G0
    if DECAY == "scalar":
        gate += batch * gb + head * gh + start * gt
        g0 = tl.load(gate + i0 * gt, mask=known0, other=0.0).to(tl.float32) * 1.4426950408889634
        g1 = tl.load(gate + i1 * gt, mask=known1, other=0.0).to(tl.float32) * 1.4426950408889634
        g2 = tl.load(gate + i2 * gt, mask=known2, other=0.0).to(tl.float32) * 1.4426950408889634
        g3 = tl.load(gate + i3 * gt, mask=known3, other=0.0).to(tl.float32) * 1.4426950408889634
        G0 = tl.cumsum(g0, 0)
        G1 = tl.cumsum(g1, 0) + tl.sum(g0, 0)
        G2 = tl.cumsum(g2, 0) + (tl.sum(g0, 0) + tl.sum(g1, 0))
        G3 = tl.cumsum(g3, 0) + (tl.sum(g0, 0) + tl.sum(g1, 0) + tl.sum(g2, 0))

    plus += batch * kb + head // GROUP * kh + start * kt
    minus += batch * kb + head // GROUP * kh + start * kt
    zeros = tl.zeros([16, 16], tl.float32)
    M00, M11, M22, M33, M10, M32 = zeros, zeros, zeros, zeros, zeros, zeros
    M20, M21, M30, M31 = zeros, zeros, zeros, zeros
    for i in tl.static_range(DK // 64):
        cols = i * 64 + tl.arange(0, 64)
        p0 = _tile(plus, i0, known0, cols, kt, DK, DK)
        p1 = _tile(plus, i1, known1, cols, kt, DK, DK)
        p2 = _tile(plus, i2, known2, cols, kt, DK, DK)
        p3 = _tile(plus, i3, known3, cols, kt, DK, DK)
        m0, m1, m2, m3 = p0, p1, p2, p3
        if DECAY == "frames":
            m0 = _tile(minus, i0, known0, cols, kt, DK, DK)
            m1 = _tile(minus, i1, known1, cols, kt, DK, DK)
            m2 = _tile(minus, i2, known2, cols, kt, DK, DK)
            m3 = _tile(minus, i3, known3, cols, kt, DK, DK)
        M00, M10 = _scores(p0, m0, M00), _scores(p1, m0, M10)
        M20, M30 = _scores(p2, m0, M20), _scores(p3, m0, M30)
        M11, M21, M31 = _scores(p1, m1, M11), _scores(p2, m1, M21), _scores(p3, m1, M31)
        M22, M32, M33 = _scores(p2, m2, M22), _scores(p3, m2, M32), _scores(p3, m3, M33)
    M00, M10 = _decayed(M00, G0, G0, i0, i0, size), _decayed(M10, G1, G0, i1, i0, size)
    M20, M30 = _decayed(M20, G2, G0, i2, i0, size), _decayed(M30, G3, G0, i3, i0, size)
    M11, M21 = _decayed(M11, G1, G1, i1, i1, size), _decayed(M21, G2, G1, i2, i1, size)
    M31, M22 = _decayed(M31, G3, G1, i3, i1, size), _decayed(M22, G2, G2, i2, i2, size)
    M32, M33 = _decayed(M32, G3, G2, i3, i2, size), _decayed(M33, G3, G3, i3, i3, size)

    T00, T11, T22, T33 = M00, M11, M22, M33
    for row in range(1, 16):  # four chains that do not wait for each other
        T00, T11 = _substituted(T00, M00, b0, row), _substituted(T11, M11, b1, row)
        T22, T33 = _substituted(T22, M22, b2, row), _substituted(T33, M33, b3, row)
    T10, T32 = _joined(M10, T00, b0, T11, b1), _joined(M32, T22, b2, T33, b3)
    P20 = M20 - _less(M20, b0, T00) - _less(M21, b1, T10)
    P30 = M30 - _less(M30, b0, T00) - _less(M31, b1, T10)
    P21, P31 = M21 - _less(M21, b1, T11), M31 - _less(M31, b1, T11)
    T20, T21 = P20 - _less(T22, b2, P20), P21 - _less(T22, b2, P21)
    T30 = P30 - _less(T32, b2, P20) - _less(T33, b3, P30)
    T31 = P31 - _less(T32, b2, P21) - _less(T33, b3, P31)

    solved += ((batch * HEADS + head) * tokens + start) * 64
    k0, k1, k2, k3 = known0[:, None], known1[:, None], known2[:, None], known3[:, None]
    _put(solved, T00, i0, i0, size, k0)
    _put(solved, zeros, i0, i1, size, k0)
    _put(solved, zeros, i0, i2, size, k0)
    _put(solved, zeros, i0, i3, size, k0)
    _put(solved, T10, i1, i0, size, k1)
    _put(solved, T11, i1, i1, size, k1)
    _put(solved, zeros, i1, i2, size, k1)
    _put(solved, zeros, i1, i3, size, k1)
    _put(solved, T20, i2, i0, size, k2)
    _put(solved, T21, i2, i1, size, k2)
    _put(solved, T22, i2, i2, size, k2)
    _put(solved, zeros, i2, i3, size, k2)
    _put(solved, T30, i3, i0, size, k3)
    _put(solved, T31, i3, i1, size, k3)
    _put(solved, T32, i3, i2, size, k3)
    _put(solved, T33, i3, i3, size, k3)

    E0, E1, E2, E3 = tl.exp2(G0), tl.exp2(G1), tl.exp2(G2), tl.exp2(G3)
    T00, T10 = _weights(T00, b0 * E0), _weights(T10, b0 * E0)
    T20, T30 = _weights(T20, b0 * E0), _weights(T30, b0 * E0)
    T11, T21, T31 = _weights(T11, b1 * E1), _weights(T21, b1 * E1), _weights(T31, b1 * E1)
    T22, T32, T33 = _weights(T22, b2 * E2), _weights(T32, b2 * E2), _weights(T33, b3 * E3)
    w += ((batch * tokens + start) * HEADS + head) * DK
    for i in tl.static_range(DK // 64):
        cols = i * 64 + tl.arange(0, 64)
        p0 = _tile(plus, i0, known0, cols, kt, DK, DK)
        p1 = _tile(plus, i1, known1, cols, kt, DK, DK)
        p2 = _tile(plus, i2, known2, cols, kt, DK, DK)
        p3 = _tile(plus, i3, known3, cols, kt, DK, DK)
        w0 = p0 * E0[:, None] - tl.dot(T00, p0)
        w1 = p1 * E1[:, None] - tl.dot(T11, p1, tl.dot(T10, p0))
        w2 = p2 * E2[:, None] - tl.dot(T22, p2, tl.dot(T21, p1, tl.dot(T20, p0)))
        w3 = tl.dot(T33, p3, tl.dot(T32, p2, tl.dot(T31, p1, tl.dot(T30, p0))))
        w3 = p3 * E3[:, None] - w3
        at = cols[None, :] + (HEADS * DK) * i0[:, None]
        tl.store(w + at, w0.to(w.dtype.element_ty), mask=k0)
        tl.store(w + at + 16 * (HEADS * DK), w1.to(w.dtype.element_ty), mask=k1)
        tl.store(w + at + 32 * (HEADS * DK), w2.to(w.dtype.element_ty), mask=k2)
        tl.store(w + at + 48 * (HEADS * DK), w3.to(w.dtype.element_ty), mask=k3)
