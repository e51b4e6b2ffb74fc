"""The Triton kernel of DPLR, the recurrence whose transition is diagonal plus rank one.

RWKV-7 (arXiv 2503.14456): S_t = (diag(e^g_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ. Relative to the middle
of a frame (frame_kernels.py) nothing decays, and with u_t = S_{t-1}ᵀ a⁺_t, what the state before a
token returns for its a⁺, the recurrence is the sum of two linear attentions that share a state:

    S_t = S_{t-1} + b⁻_t u_tᵀ + k⁻_t v_tᵀ        o_t = s S_tᵀ q⁺_t        s: the scale

In a step of at most 32 tokens, with S the state before and S' after it, X solves for U as in the
delta rule (delta_kernels.py: that with the keys A⁺ and B⁻, beta -1 and values -P V, whose walks
serve here too):

    X = A⁺ S + P V        U = (1 - N)⁻¹ X        S' = S + B⁻ᵀ U + K⁻ᵀ V

P and N are the parts of A⁺ K⁻ᵀ and A⁺ B⁻ᵀ below the diagonal. Backwards, with λ' the gradient of
S', λ that of S, and [ ] the part on and below the diagonal,

    dU = s [Q⁺ B⁻ᵀ]ᵀ dO + B⁻ λ'        dX = (1 - N)⁻ᵀ dU        λ = λ' + s Q⁺ᵀ dO + A⁺ᵀ dX

after which all gradients are sums of two linear attentions again. `pairs_kernel` serves them all:

          x1  x2   y1 z1    y2 z2   direction   S of the pass
    o     q⁺       b⁻ u     k⁻ v    forward     S
    dq    do       u  b⁻    v  k⁻   forward     Sᵀ
    da        dx                                          (the token itself left out, unscaled)
    dv    k⁻       q⁺ do    a⁺ dx   backward    λ         (the token left out of the second pair,
    dk    v        do q⁺    dx a⁺   backward    λᵀ         the first scaled)
    db        u

Gradient of the decays: as in decay_kernels.py, with r_t = q⁺ dq⁺ - k⁻ dk⁻ - b⁻ db⁻ of the token and
all after it, and a⁺ da⁺ of those after it only: a_t reads the state that e^g_t has not reached yet.

No product has more than 32 rows, for the reason that decay_kernels.py gives.
"""

import triton
import triton.language as tl

from seqpar.kernels.decay_kernels import _state, _tile
from seqpar.kernels.delta_kernels import _low


@triton.jit
def _attend(
    x,
    state,
    y1,
    z1,
    y2,
    z2,
    scale,
    mask1,
    mask2,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x S + scale [x y1ᵀ] z1 + [x y2ᵀ] z2, in fp32; SCALED: the scale is of the first pair."""
    OPERAND: tl.constexpr = x.dtype
    scores1 = tl.dot(x, tl.trans(y1), input_precision=PRECISION)
    scores1 = tl.where(mask1, scores1, 0.0).to(OPERAND)
    scores2 = tl.dot(x, tl.trans(y2), input_precision=PRECISION)
    scores2 = tl.where(mask2, scores2, 0.0).to(OPERAND)
    mixed = tl.dot(scores1, z1, input_precision=PRECISION)
    if SCALED:
        mixed *= scale
    mixed = tl.dot(scores2, z2, mixed, input_precision=PRECISION)
    high = state.to(OPERAND)
    mixed = tl.dot(x, tl.trans(high), mixed, input_precision=PRECISION)
    if SPLIT:
        mixed = tl.dot(x, tl.trans(_low(state, high)), mixed)
    return mixed


@triton.jit(do_not_specialize=["batches", "tokens", "pieces", "chunks", "slots", "saves", "blocks"])
def pairs_kernel(
    x1,
    x2,
    y1,
    z1,
    y2,
    z2,
    out1,
    out2,
    entering,
    saved,
    flows,
    halves,
    steps,
    counts,
    table,
    scale,
    batches,
    tokens,
    pieces,
    chunks,
    slots,
    saves,
    blocks,
    xb,
    xt,
    xh,
    wb,
    wt,
    wh,
    yb,
    yt,
    yh,
    zb,
    zt,
    zh,
    ub,
    ut,
    uh,
    vb,
    vt,
    vh,
    HEADS: tl.constexpr,
    DY: tl.constexpr,
    DZ: tl.constexpr,
    BY: tl.constexpr,
    BZ: tl.constexpr,
    C: tl.constexpr,
    SPAN: tl.constexpr,
    REVERSE: tl.constexpr,
    TWO: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One piece of a pass of the table above, and some columns of z.

    x1, x2, y1, y2 [B, T, H, DY]; z1, z2, out1, out2 [B, T, H, DZ]; strides of x1, x2, y1, z1, y2,
    z2. entering: states of the pieces, or backwards gradients, [B, slots, H, K, V]. TWO: x2 too,
    for which z has K columns; then the state is taken in two parts, and what the gradient of the
    decays needs is written: saved [B, saves, H, K, V] at the ends of blocks forwards, flows
    [B, blocks, H, K] backwards. `table`: `tables.piece_rows`. C: tokens of the longest frame.
    """
    SPLIT: tl.constexpr = TWO and tl.bfloat16 == OPERAND
    SIZE: tl.constexpr = DY * DZ
    BLOCKS: tl.constexpr = (DZ + BZ - 1) // BZ
    pid = tl.program_id(0)
    block = pid % BLOCKS
    head = pid // BLOCKS % HEADS
    batch = (pid // (BLOCKS * HEADS) % batches).to(tl.int64)
    piece = pid // (BLOCKS * HEADS) // batches
    row = table + 8 * piece
    start = tl.load(row).to(tl.int64)
    length = tl.load(row + 1)
    slot = tl.load(row + (3 if REVERSE else 2)).to(tl.int64)
    first_chunk = tl.load(row + 7).to(tl.int64)
    index = tl.arange(0, C)
    cols = tl.arange(0, BY)
    z_cols = block * BZ + tl.arange(0, BZ)
    Y_STRIDE: tl.constexpr = 1 if TWO else DZ
    Z_STRIDE: tl.constexpr = DY if TWO else 1
    state = tl.zeros([BZ, BY], tl.float32)
    if slot >= 0:
        base = entering + ((batch * slots + slot) * HEADS + head) * SIZE
        pointers, inside = _state(base, z_cols, cols, Z_STRIDE, Y_STRIDE, DZ, DY)
        state = tl.load(pointers, mask=inside, other=0.0)

    x1 += batch * xb + head * xh + start * xt
    x2 += batch * wb + head * wh + start * wt
    y1 += batch * yb + head * yh + start * yt
    z1 += batch * zb + head * zh + start * zt
    y2 += batch * ub + head * uh + start * ut
    z2 += batch * vb + head * vh + start * vt
    out = ((batch * tokens + start) * HEADS + head) * DZ
    count = tl.load(counts + (batch * HEADS + head) * pieces + piece)
    steps += ((batch * HEADS + head) * chunks + first_chunk) * (C // 8)
    DK: tl.constexpr = DZ if TWO else DY
    halves += ((batch * chunks + first_chunk) * (C // 8) * HEADS + head) * DK
    if TWO:
        first_save = tl.load(row + 5)
        piece_saves = tl.load(row + 6) - first_save
        saved += ((batch * saves + first_save) * HEADS + head) * SIZE
        saved_at, saved_inside = _state(saved, z_cols, cols, Z_STRIDE, Y_STRIDE, DZ, DY)
        flows += ((batch * blocks + tl.load(row + 4)) * HEADS + head) * DZ

    for step in tl.range(count, num_stages=STAGES):
        turn = step
        if REVERSE:
            turn = count - 1 - step
        entry = tl.load(steps + turn)
        first = entry // 4 * 8
        stop = tl.minimum(first + (C >> entry % 4), length)
        rows = (first + index).to(tl.int64)
        mask = rows < stop
        x_tile = _tile(x1, rows, mask, cols, xt, DY, BY).to(OPERAND)
        y1_tile = _tile(y1, rows, mask, cols, yt, DY, BY).to(OPERAND)
        y2_tile = _tile(y2, rows, mask, cols, ut, DY, BY).to(OPERAND)
        z1_tile = _tile(z1, rows, mask, z_cols, zt, DZ, BLOCKS * BZ).to(OPERAND)
        z2_tile = _tile(z2, rows, mask, z_cols, vt, DZ, BLOCKS * BZ).to(OPERAND)

        every = first // SPAN
        ends = (stop % SPAN == 0) | (stop == length)
        at_end = saved
        if TWO:
            at_end = saved_at + every.to(tl.int64) * (HEADS * SIZE)
            if REVERSE and ends:
                flow = tl.zeros([BZ], tl.float32)
                if every < piece_saves:
                    flow = tl.sum(tl.load(at_end, mask=saved_inside, other=0.0) * state, 1)
                tl.store(flows + every * (HEADS * DZ) + z_cols, flow, mask=z_cols < DZ)
            half_at = halves + (entry // 4).to(tl.int64) * (HEADS * DK) + z_cols
            half = tl.exp2(tl.load(half_at, mask=z_cols < DK, other=0.0))[:, None]
        else:
            half_at = halves + (entry // 4).to(tl.int64) * (HEADS * DK) + cols
            half = tl.exp2(tl.load(half_at, mask=cols < DK, other=0.0))[None, :]
        state *= half

        if REVERSE:
            others = index[:, None] < index[None, :]
            upto = index[:, None] <= index[None, :]
            mask2 = others
        else:
            others = index[:, None] > index[None, :]
            upto = index[:, None] >= index[None, :]
            mask2 = upto
        mixed = _attend(
            x_tile,
            state,
            y1_tile,
            z1_tile,
            y2_tile,
            z2_tile,
            scale,
            upto,
            mask2,
            REVERSE,
            SPLIT,
            PRECISION,
        )
        if not REVERSE:
            mixed *= scale
        out_at = out + rows[:, None] * (HEADS * DZ) + z_cols[None, :]
        out_mask = mask[:, None] & (z_cols < DZ)[None, :]
        tl.store(out1 + out_at, mixed.to(out1.dtype.element_ty), mask=out_mask)
        if TWO:
            x_tile = _tile(x2, rows, mask, cols, wt, DY, BY).to(OPERAND)
            if not REVERSE:
                upto = others
            mixed = _attend(
                x_tile,
                state,
                y1_tile,
                z1_tile,
                y2_tile,
                z2_tile,
                scale,
                upto,
                others,
                REVERSE,
                SPLIT,
                PRECISION,
            )
            tl.store(out2 + out_at, mixed.to(out2.dtype.element_ty), mask=out_mask)

        if REVERSE:
            added = scale * tl.dot(tl.trans(z1_tile), y1_tile, input_precision=PRECISION)
            state += tl.dot(tl.trans(z2_tile), y2_tile, added, input_precision=PRECISION)
        else:
            state = tl.dot(tl.trans(z1_tile), y1_tile, state, input_precision=PRECISION)
            state = tl.dot(tl.trans(z2_tile), y2_tile, state, input_precision=PRECISION)
        state *= half
        if TWO and not REVERSE:
            if ends and every < piece_saves:
                tl.store(at_end, state, mask=saved_inside)
