"""Triton kernels of the delta rule with no, scalar or diagonal decay, forwards.

Relative to the middle of a frame (frame_kernels.py) no diagonal decay is left, and the rule has two
keys: with the state S before and S' after a step of at most 32 tokens, β on the diagonal of B, and
V the step's values (WY form: arXiv 2406.06484, with decay 2412.06464 and 2510.26692),

    U = B R        R = X - T B X        X = V - K⁺ S        S' = S + K⁻ᵀ U
    T = M (1 + B M)⁻¹                   M: the part of K⁺ K⁻ᵀ below the diagonal

Here r_t is what v_t differs by from what the state returns for k_t, and u_t = β_t r_t. T depends on
keys only: `solve_kernel` finds it for all steps at once, by forward substitution, which stays exact
where keys repeat and β is 2. `walk_kernel` goes from step to step. Given U the rest is linear
attention of q, K⁻ and U, by the kernels there (decay_kernels.py); without decay K⁺ = K⁻ = k.

With one decay a head K⁺ = K⁻ = k likewise, and with G the running sum of log decays in the step,
products take on factors of at most 1 each: M_ij of e^(G_i - G_j), what token i reads of S of e^G_i,
and what j leaves in S' of e^(G_end - G_j), as S itself of e^G_end.

The columns of S are independent; so a program walks with a few of them, held transposed. The map of
a piece, S' = A S + B, is the same walk from a state of no columns of values, 0, and one more for
each key channel, 1, whose values are 0: the first become B, the others A.

The backward pass is in delta_back_kernels.py. No product has more than 32 rows, for the reason that
decay_kernels.py gives.
"""

import triton
import triton.language as tl

from seqpar.kernels.decay_kernels import _frames, _half, _state, _tile

STEP = tl.constexpr(32)  # tokens


@triton.jit
def _low(x, high):
    """What rounding x to `high` left, rounded alike."""
    return (x - high.to(tl.float32)).to(high.dtype)


@triton.jit
def _decays(gate, rows, mask, stride):
    """Of a step's log decays: sums up to and with each token, of those after it, and of all."""
    decays = tl.load(gate + rows * stride, mask=mask, other=0.0).to(tl.float32)
    until = tl.cumsum(decays, 0)
    whole = tl.sum(decays, 0)
    return until, whole - until, whole


@triton.jit
def _decayed(scores, until, PRIOR: tl.constexpr):
    """Scores times the decay from the earlier token to the later: [i, j] of queries i and keys j;
    PRIOR: [j, i]."""
    reach = until[None, :] - until[:, None] if PRIOR else until[:, None] - until[None, :]
    return scores * tl.exp(tl.minimum(reach, 0.0))


@triton.jit
def _row(table, place, SUMMARY: tl.constexpr):
    """A row of `tables.piece_rows` or `tables.summary_rows`; the chunks before it; its piece."""
    if SUMMARY:
        row = table + 4 * place
        return row, tl.load(row + 2).to(tl.int64), tl.load(row + 3)
    row = table + 8 * place
    return row, tl.load(row + 7).to(tl.int64), place


@triton.jit
def _part(steps, turn, length, C: tl.constexpr, FRAMED: tl.constexpr):
    """A step: its first token and the one past its last; the slot of its frame's half decay, and
    whether the frame begins and ends with it."""
    first = turn * STEP
    stop = tl.minimum(first + STEP, length)
    slot, opens, closes = first, True, True
    if FRAMED:
        entry = tl.load(steps + turn)
        frame = C >> entry % 4
        first = entry // 4 * 8
        stop = tl.minimum(first + tl.minimum(frame, STEP), length)
        slot = first // frame * (frame // 8)
        opens = first % frame == 0
        closes = (stop % frame == 0) | (stop == length)
    return first, stop, slot, opens, closes


@triton.jit
def _solved(solved, first, rows, mask):
    """T of a step [32, 32], from the rows of its 32 tokens."""
    column = first % STEP + tl.arange(0, STEP)
    inside = mask[:, None] & (column < STEP)[None, :]
    return tl.load(solved + rows[:, None] * STEP + column[None, :], mask=inside, other=0.0)


@triton.jit
def _inverted(M, beta):
    """T = M (1 + B M)⁻¹ = M - M B T of 16 tokens, row by row."""
    index = tl.arange(0, 16)
    T = M
    for i in range(1, 16):
        here = (index == i)[:, None]
        row = tl.sum(tl.where(here, M, 0.0), 0)
        T = tl.where(here, (row - tl.sum((row * beta)[:, None] * T, 0))[None, :], T)
    return T


@triton.jit(do_not_specialize=["tokens", "chunks"])
def solve_kernel(
    plus, minus, beta, gate, solved,
    levels, table,
    tokens, chunks,
    kb, kt, kh, bb, bt, bh, gb, gt, gh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T of 32 tokens of one head: solved [B, H, T, 32], zero between different steps.

    plus, minus [B, T, H, DK]; beta [B, T, H]. `table`: `tables.cut_rows` of chunks of C tokens.
    """
    PARTS: tl.constexpr = C // STEP
    pid = tl.program_id(0)
    head = pid % HEADS
    part = pid // HEADS % PARTS
    chunk = pid // (HEADS * PARTS) % chunks
    batch = (pid // (HEADS * PARTS) // chunks).to(tl.int64)
    start = tl.load(table + 3 * chunk).to(tl.int64) + part * STEP
    length = tl.load(table + 3 * chunk + 1) - part * STEP
    size = STEP
    if DECAY == "frames":
        size = tl.minimum(C >> tl.load(levels + (batch * chunks + chunk) * HEADS + head), STEP)

    index = tl.arange(0, 16)
    upper, lower = index < length, index + 16 < length
    plus += batch * kb + head // GROUP * kh + start * kt
    minus += batch * kb + head // GROUP * kh + start * kt
    M11 = tl.zeros([16, 16], tl.float32)
    M21 = tl.zeros([16, 16], tl.float32)
    M22 = tl.zeros([16, 16], tl.float32)
    COLS: tl.constexpr = BK if BK < 64 else 64
    for i in tl.static_range(BK // COLS):
        cols = i * COLS + tl.arange(0, COLS)
        plus1 = _tile(plus, index, upper, cols, kt, DK, BK).to(OPERAND)
        plus2 = _tile(plus, index + 16, lower, cols, kt, DK, BK).to(OPERAND)
        minus1 = tl.trans(_tile(minus, index, upper, cols, kt, DK, BK).to(OPERAND))
        minus2 = tl.trans(_tile(minus, index + 16, lower, cols, kt, DK, BK).to(OPERAND))
        M11 = tl.dot(plus1, minus1, M11, input_precision=PRECISION)
        M21 = tl.dot(plus2, minus1, M21, input_precision=PRECISION)
        M22 = tl.dot(plus2, minus2, M22, input_precision=PRECISION)
    before = (index[:, None] > index[None, :]) & (index[:, None] // size == index[None, :] // size)
    M11 = tl.where(before, M11, 0.0)
    M22 = tl.where(before, M22, 0.0)
    M21 = tl.where(size == STEP, M21, 0.0)
    if DECAY == "scalar":
        gate += batch * gb + head * gh + start * gt
        until1, after1, _ = _decays(gate, index, upper, gt)
        until2, _, _ = _decays(gate, index + 16, lower, gt)
        M11 = _decayed(M11, until1, False)
        M22 = _decayed(M22, until2, False)
        M21 *= tl.exp(until2[:, None] + after1[None, :])
    beta += batch * bb + head * bh + start * bt
    beta1 = tl.load(beta + index * bt, mask=upper, other=0.0).to(tl.float32)
    beta2 = tl.load(beta + (index + 16) * bt, mask=lower, other=0.0).to(tl.float32)

    T11 = _inverted(M11, beta1)
    T22 = _inverted(M22, beta2)
    P = M21 - tl.dot(M21 * beta1[None, :], T11, input_precision="ieee")
    T21 = P - tl.dot(T22 * beta2[None, :], P, input_precision="ieee")

    at = solved + ((batch * HEADS + head) * tokens + start) * STEP
    at += index[:, None] * STEP + index[None, :]
    kind = solved.dtype.element_ty
    tl.store(at, T11.to(kind), mask=upper[:, None])
    tl.store(at + 16, tl.zeros([16, 16], kind), mask=upper[:, None])
    tl.store(at + 16 * STEP, T21.to(kind), mask=lower[:, None])
    tl.store(at + 16 * STEP + 16, T22.to(kind), mask=lower[:, None])


@triton.jit(do_not_specialize=["batches", "tokens", "pieces", "chunks", "slots"])
def walk_kernel(
    plus, minus, v, beta, gate, solved, u, r, entering, A, B,
    halves, steps, counts, table,
    batches, tokens, pieces, chunks, slots,
    kb, kt, kh, vb, vt, vh, bb, bt, bh, gb, gt, gh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, SUMMARY: tl.constexpr,
    RESIDUAL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """U of one piece, [B, T, H, DV], from the state that enters it; RESIDUAL: and R.

    SUMMARY: not those, but A [B, N, H, DK, DK] and B [B, N, H, DK, DV] of each piece. States and
    what is read of them are taken in two parts then, for a chain of many pieces must equal one
    piece. `table`: `tables.piece_rows`, or `tables.summary_rows`.
    """
    FRAMED: tl.constexpr = DECAY == "frames"
    SPLIT: tl.constexpr = SUMMARY and tl.bfloat16 == OPERAND
    # U is rounded once; times its decay to the step's end it would be once more
    SPLIT_ADDED: tl.constexpr = SPLIT or (DECAY == "scalar" and tl.bfloat16 == OPERAND)
    OF_B: tl.constexpr = (DV + BV - 1) // BV
    OF_A: tl.constexpr = (DK + BV - 1) // BV if SUMMARY else 0
    BLOCKS: tl.constexpr = OF_A + OF_B
    pid = tl.program_id(0)
    block = pid % BLOCKS
    head = pid // BLOCKS % HEADS
    batch = (pid // (BLOCKS * HEADS) % batches).to(tl.int64)
    place = pid // (BLOCKS * HEADS) // batches
    index = tl.arange(0, STEP)
    cols = tl.arange(0, BK)
    v_cols = block * BV + tl.arange(0, BV)
    state = tl.zeros([BV, BK], tl.float32)
    row, first_chunk, piece = _row(table, place, SUMMARY)
    if SUMMARY:
        of_A = block >= OF_B
        if of_A:
            v_cols -= OF_B * BV
            state = tl.where(v_cols[:, None] == cols[None, :], 1.0, 0.0)
        valued = (v_cols < DV) & (block < OF_B)
    else:
        slot = tl.load(row + 2).to(tl.int64)
        if slot >= 0:
            base = entering + ((batch * slots + slot) * HEADS + head) * (DK * DV)
            pointers, inside = _state(base, v_cols, cols, 1, DV, DV, DK)
            state = tl.load(pointers, mask=inside, other=0.0)
        valued = v_cols < DV
    start = tl.load(row).to(tl.int64)
    length = tl.load(row + 1)

    plus += batch * kb + head // GROUP * kh + start * kt
    minus += batch * kb + head // GROUP * kh + start * kt
    v += batch * vb + head * vh + start * vt
    beta += batch * bb + head * bh + start * bt
    gate += batch * gb + head * gh + start * gt
    solved += ((batch * HEADS + head) * tokens + start) * STEP
    out = ((batch * tokens + start) * HEADS + head) * DV
    count = tl.cdiv(length, STEP)
    if FRAMED:
        lists = steps, counts, halves
        place_of = batch, head, piece, pieces, first_chunk, chunks
        count, steps, halves = _frames(*lists, *place_of, HEADS, DK, C)

    for turn in tl.range(count, num_stages=STAGES):
        first, stop, at_half, opens, closes = _part(steps, turn, length, C, FRAMED)
        rows = (first + index).to(tl.int64)
        mask = rows < stop
        plus_tile = _tile(plus, rows, mask, cols, kt, DK, BK).to(OPERAND)
        minus_tile = plus_tile
        if FRAMED:
            minus_tile = _tile(minus, rows, mask, cols, kt, DK, BK).to(OPERAND)
        T = _solved(solved, first, rows, mask)
        rate = tl.load(beta + rows * bt, mask=mask, other=0.0).to(tl.float32)[:, None]
        v_mask = mask[:, None] & valued[None, :]
        v_tile = tl.load(v + rows[:, None] * vt + v_cols[None, :], mask=v_mask, other=0.0)

        if FRAMED:
            half = _half(halves, at_half, cols, HEADS, DK)
            state *= tl.exp2(tl.where(opens, half, 0.0))[None, :]
        high = state.to(OPERAND)
        read = tl.dot(plus_tile, tl.trans(high), input_precision=PRECISION)
        if SPLIT:
            read = tl.dot(plus_tile, tl.trans(_low(state, high)), read)
        if DECAY == "scalar":
            until, after, whole = _decays(gate, rows, mask, gt)
            read *= tl.exp(until)[:, None]
            state *= tl.exp(whole)
        X = v_tile.to(tl.float32) - read
        high = (rate * X).to(OPERAND)
        again = tl.dot(T, high, input_precision=PRECISION)
        if SPLIT:
            again = tl.dot(T, _low(rate * X, high), again)
        R = X - again
        U = rate * R
        high = U.to(OPERAND)
        if not SUMMARY:
            out_at = out + rows[:, None] * (HEADS * DV) + v_cols[None, :]
            tl.store(u + out_at, high.to(u.dtype.element_ty), mask=v_mask)
            if RESIDUAL:
                tl.store(r + out_at, R.to(r.dtype.element_ty), mask=v_mask)
        if DECAY == "scalar":
            if not SUMMARY:
                U = high.to(tl.float32)
            U *= tl.exp(after)[:, None]
            high = U.to(OPERAND)
        state = tl.dot(tl.trans(high), minus_tile, state, input_precision=PRECISION)
        if SPLIT_ADDED:
            state = tl.dot(tl.trans(_low(U, high)), minus_tile, state)
        if FRAMED:
            state *= tl.exp2(tl.where(closes, half, 0.0))[None, :]

    if SUMMARY:
        summaries = tl.num_programs(0) // (BLOCKS * HEADS) // batches
        place = (batch * summaries + place) * HEADS + head
        if of_A:
            pointers, inside = _state(A + place * (DK * DK), v_cols, cols, 1, DK, DK, DK)
            tl.store(pointers, state, mask=inside)
        else:
            pointers, inside = _state(B + place * (DK * DV), v_cols, cols, 1, DV, DV, DK)
            tl.store(pointers, state, mask=inside)
