"""Triton kernels of the delta rule (delta_kernels.py), backwards.

With λ' the gradient of the state after a step and λ of that before it, s the scale, and P the part
of Q⁺ K⁻ᵀ up to the diagonal, dX the gradient of X and of V,

    dU = s Pᵀ dO + K⁻ λ'       Z = dU - Tᵀ B dU       dX = B Z       dβ_t = z_t · r_t
    λ = λ' + s Q⁺ᵀ dO - K⁺ᵀ dX

`walk_back_kernel` goes from step to step. The gradients of q and k are causal linear attentions
again: of q⁺ and k⁺ that of the pass "dq" (decay_kernels.py), with dO, and -dX strictly causal, in
place of do, and U of v. That of k⁻,

    dK⁻ = U λ'ᵀ + s (dO Uᵀ on and below the diagonal)ᵀ Q⁺ - (dX Uᵀ below the diagonal)ᵀ K⁺

is `keys_kernel`: a pass "dk" of two sums in one, for λ is much smaller than either of its terms.

With one decay a head, all of these take on the factors of delta_kernels.py.

Gradient of the decays: as in decay_kernels.py, with r_t = q⁺ dq⁺ + k⁺ dk⁺ - k⁻ dk⁻. The passes for
these take states, scores and what is added to states in two parts, for their rounding does not
cancel.
"""

import triton
import triton.language as tl

from seqpar.kernels.decay_kernels import _frames, _half, _state, _tile
from seqpar.kernels.delta_kernels import STEP, _decayed, _decays, _low, _part, _row, _solved


@triton.jit(do_not_specialize=["batches", "tokens", "pieces", "chunks", "slots"])
def walk_back_kernel(
    q, plus, minus, do, r, beta, gate, solved, dx, shares, leaving, B,
    halves, steps, counts, table,
    scale, batches, tokens, pieces, chunks, slots,
    qb, qt, qh, kb, kt, kh, ob, ot, oh, bb, bt, bh, gb, gt, gh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, SUMMARY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dX of one piece, [B, T, H, DV], from the gradient of the state that leaves it, and dβ, a
    share for each block of columns [B, H, blocks, T].

    SUMMARY: not those, but dB [B, N, H, DK, DV] of the pieces that a state enters, the gradient of
    that state if nothing comes from those that follow. `table`: `tables.piece_rows`, or
    `tables.summary_rows`.
    """
    FRAMED: tl.constexpr = DECAY == "frames"
    # dX is rounded once; times its decay it would be once more
    SPLIT: tl.constexpr = DECAY == "scalar" and tl.bfloat16 == OPERAND
    BLOCKS: tl.constexpr = (DV + BV - 1) // BV
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
    if not SUMMARY:
        slot = tl.load(row + 3).to(tl.int64)
        if slot >= 0:
            base = leaving + ((batch * slots + slot) * HEADS + head) * (DK * DV)
            pointers, inside = _state(base, v_cols, cols, 1, DV, DV, DK)
            state = tl.load(pointers, mask=inside, other=0.0)
    start = tl.load(row).to(tl.int64)
    length = tl.load(row + 1)

    q += batch * qb + head // GROUP * qh + start * qt
    plus += batch * kb + head // GROUP * kh + start * kt
    minus += batch * kb + head // GROUP * kh + start * kt
    do += batch * ob + head * oh + start * ot
    beta += batch * bb + head * bh + start * bt
    gate += batch * gb + head * gh + start * gt
    solved += ((batch * HEADS + head) * tokens + start) * STEP
    shares += ((batch * HEADS + head) * BLOCKS + block) * tokens + start
    out = ((batch * tokens + start) * HEADS + head) * DV
    count = tl.cdiv(length, STEP)
    if FRAMED:
        lists = steps, counts, halves
        place_of = batch, head, piece, pieces, first_chunk, chunks
        count, steps, halves = _frames(*lists, *place_of, HEADS, DK, C)

    for turn in tl.range(count, num_stages=STAGES):
        first, stop, at_half, opens, closes = _part(steps, count - 1 - turn, length, C, FRAMED)
        rows = (first + index).to(tl.int64)
        mask = rows < stop
        q_tile = _tile(q, rows, mask, cols, qt, DK, BK).to(OPERAND)
        plus_tile = _tile(plus, rows, mask, cols, kt, DK, BK).to(OPERAND)
        minus_tile = plus_tile
        if FRAMED:
            minus_tile = _tile(minus, rows, mask, cols, kt, DK, BK).to(OPERAND)
        T = _solved(solved, first, rows, mask)
        rate = tl.load(beta + rows * bt, mask=mask, other=0.0).to(tl.float32)[:, None]
        do_tile = _tile(do, rows, mask, v_cols, ot, DV, BLOCKS * BV).to(OPERAND)

        if FRAMED:
            half = _half(halves, at_half, cols, HEADS, DK)
            state *= tl.exp2(tl.where(closes, half, 0.0))[None, :]
        # [j, i]
        scores = tl.dot(minus_tile, tl.trans(q_tile), input_precision=PRECISION)
        if DECAY == "scalar":
            until, after, whole = _decays(gate, rows, mask, gt)
            scores = _decayed(scores, until, True)
        scores = tl.where(index[:, None] <= index[None, :], scores, 0.0).to(OPERAND)
        dU = tl.dot(minus_tile, tl.trans(state.to(OPERAND)), input_precision=PRECISION)
        if DECAY == "scalar":
            dU *= tl.exp(after)[:, None]
        dU += scale * tl.dot(scores, do_tile, input_precision=PRECISION)
        Z = dU - tl.dot(tl.trans(T), (rate * dU).to(OPERAND), input_precision=PRECISION)
        dX = (rate * Z).to(OPERAND)
        if not SUMMARY:
            out_at = out + rows[:, None] * (HEADS * DV) + v_cols[None, :]
            v_mask = mask[:, None] & (v_cols < DV)[None, :]
            R = tl.load(r + out_at, mask=v_mask, other=0.0).to(tl.float32)
            tl.store(shares + rows, tl.sum(Z * R, 1), mask=mask)
            tl.store(dx + out_at, dX.to(dx.dtype.element_ty), mask=v_mask)
        of_o = do_tile
        of_x = -dX
        if DECAY == "scalar":
            state *= tl.exp(whole)
            entered = tl.exp(until)[:, None]
            decayed_o = do_tile * entered
            decayed_x = of_x * entered
            of_o = decayed_o.to(OPERAND)
            of_x = decayed_x.to(OPERAND)
        read = tl.dot(tl.trans(of_o), q_tile, input_precision=PRECISION)
        if SPLIT:
            read = tl.dot(tl.trans(_low(decayed_o, of_o)), q_tile, read)
            state = tl.dot(tl.trans(_low(decayed_x, of_x)), plus_tile, state)
        state += tl.dot(tl.trans(of_x), plus_tile, scale * read, input_precision=PRECISION)
        if FRAMED:
            state *= tl.exp2(tl.where(opens, half, 0.0))[None, :]

    if SUMMARY:
        summaries = tl.num_programs(0) // (BLOCKS * HEADS) // batches
        place = (batch * summaries + place) * HEADS + head
        pointers, inside = _state(B + place * (DK * DV), v_cols, cols, 1, DV, DV, DK)
        tl.store(pointers, state, mask=inside)


@triton.jit(do_not_specialize=["batches", "tokens", "pieces", "chunks", "slots", "saves", "blocks"])
def keys_kernel(
    u, do, dx, q, plus, d_plus, out, gate, leaving, saved, shares, flows,
    halves, steps, counts, table,
    scale, batches, tokens, pieces, chunks, slots, saves, blocks,
    ob, ot, oh, qb, qt, qh, kb, kt, kh, gb, gt, gh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, DECAY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK⁻ of one piece and some of its channels, [B, T, H, DK]; without frames dK⁺ is added to it.

    u, dx, do [B, T, H, DV]. With decay, what its gradient needs: saved [B, saves, H, DK, DV] of the
    pass "dq"; flows [B, blocks, H, DK], or with scalar decay shares [B, H, BLOCKS, T] and flows [B,
    H, BLOCKS, blocks].
    """
    FRAMED: tl.constexpr = DECAY == "frames"
    SPLIT: tl.constexpr = DECAY != "none" and tl.bfloat16 == OPERAND
    BLOCKS: tl.constexpr = (DK + BK - 1) // BK
    pid = tl.program_id(0)
    block = pid % BLOCKS
    head = pid // BLOCKS % HEADS
    batch = (pid // (BLOCKS * HEADS) % batches).to(tl.int64)
    piece = pid // (BLOCKS * HEADS) // batches
    row = table + 8 * piece
    start = tl.load(row).to(tl.int64)
    length = tl.load(row + 1)
    slot = tl.load(row + 3).to(tl.int64)
    index = tl.arange(0, STEP)
    cols = tl.arange(0, BV)
    k_cols = block * BK + tl.arange(0, BK)
    SIZE: tl.constexpr = DK * DV
    state = tl.zeros([BK, BV], tl.float32)
    if slot >= 0:
        base = leaving + ((batch * slots + slot) * HEADS + head) * SIZE
        pointers, inside = _state(base, k_cols, cols, DV, 1, DK, DV)
        state = tl.load(pointers, mask=inside, other=0.0)

    here = ((batch * tokens + start) * HEADS + head).to(tl.int64)
    u += here * DV
    dx += here * DV
    do += batch * ob + head * oh + start * ot
    q += batch * qb + head // GROUP * qh + start * qt
    plus += batch * kb + head // GROUP * kh + start * kt
    count = tl.cdiv(length, STEP)
    if FRAMED:
        first_chunk = tl.load(row + 7).to(tl.int64)
        lists = steps, counts, halves
        place_of = batch, head, piece, pieces, first_chunk, chunks
        count, steps, halves = _frames(*lists, *place_of, HEADS, DK, C)
        flows += ((batch * blocks + tl.load(row + 4)) * HEADS + head) * DK
    if DECAY == "scalar":
        gate += batch * gb + head * gh + start * gt
        line = (batch * HEADS + head) * BLOCKS + block
        shares += line * tokens + start
        flows += line * blocks + tl.load(row + 4)
    if DECAY != "none":
        first_save = tl.load(row + 5)
        piece_saves = tl.load(row + 6) - first_save
        saved += ((batch * saves + first_save) * HEADS + head) * SIZE
        saved_at, saved_inside = _state(saved, k_cols, cols, DV, 1, DK, DV)

    for turn in tl.range(count, num_stages=STAGES):
        first, stop, at_half, opens, closes = _part(steps, count - 1 - turn, length, C, FRAMED)
        rows = (first + index).to(tl.int64)
        mask = rows < stop
        u_tile = _tile(u, rows, mask, cols, HEADS * DV, DV, BV).to(OPERAND)
        dx_tile = -_tile(dx, rows, mask, cols, HEADS * DV, DV, BV).to(OPERAND)
        do_tile = _tile(do, rows, mask, cols, ot, DV, BV).to(OPERAND)
        q_tile = _tile(q, rows, mask, k_cols, qt, DK, BLOCKS * BK).to(OPERAND)
        plus_tile = _tile(plus, rows, mask, k_cols, kt, DK, BLOCKS * BK).to(OPERAND)

        if DECAY != "none":
            every = first // SPAN
            if (stop % SPAN == 0) | (stop == length):
                flow = tl.zeros([BK], tl.float32)
                if every < piece_saves:
                    at = saved_at + every.to(tl.int64) * (HEADS * SIZE)
                    flow = tl.sum(tl.load(at, mask=saved_inside, other=0.0) * state, 1)
                if FRAMED:
                    tl.store(flows + every * (HEADS * DK) + k_cols, flow, mask=k_cols < DK)
                else:
                    tl.store(flows + every, tl.sum(flow, 0))
        if FRAMED:
            half = _half(halves, at_half, k_cols, HEADS, DK)
            state *= tl.exp2(tl.where(closes, half, 0.0))[:, None]
        of_o = tl.dot(u_tile, tl.trans(do_tile), input_precision=PRECISION)
        of_o = tl.where(index[:, None] <= index[None, :], of_o, 0.0)
        if DECAY == "scalar":
            until, after, whole = _decays(gate, rows, mask, gt)
            of_o = _decayed(of_o, until, True)
            itself = index[:, None] == index[None, :]
            own = tl.sum(tl.where(itself, of_o, 0.0), 1)[:, None]
            of_o = tl.where(itself, 0.0, of_o)
        of_x = tl.dot(u_tile, tl.trans(dx_tile), input_precision=PRECISION)
        of_x = tl.where(index[:, None] < index[None, :], of_x, 0.0)
        if DECAY == "scalar":
            of_x = _decayed(of_x, until, True)
        high = of_o.to(OPERAND)
        mixed = tl.dot(high, q_tile, input_precision=PRECISION)
        if SPLIT:
            mixed = tl.dot(_low(of_o, high), q_tile, mixed)
        high = of_x.to(OPERAND)
        mixed = tl.dot(high, plus_tile, scale * mixed, input_precision=PRECISION)
        if SPLIT:
            mixed = tl.dot(_low(of_x, high), plus_tile, mixed)
        high = state.to(OPERAND)
        read = tl.dot(u_tile, tl.trans(high), input_precision=PRECISION)
        if SPLIT:
            read = tl.dot(u_tile, tl.trans(_low(state, high)), read)
        if DECAY == "scalar":
            read *= tl.exp(after)[:, None]
        mixed += read
        if DECAY == "scalar":
            tl.store(shares + rows, tl.sum(mixed * plus_tile, 1), mask=mask)
            mixed += scale * own * q_tile
        out_at = here * DK + rows[:, None] * (HEADS * DK) + k_cols[None, :]
        out_mask = mask[:, None] & (k_cols < DK)[None, :]
        if not FRAMED:
            mixed += tl.load(d_plus + out_at, mask=out_mask, other=0.0)
        tl.store(out + out_at, mixed.to(out.dtype.element_ty), mask=out_mask)
        if DECAY == "scalar":
            state *= tl.exp(whole)
            entered = tl.exp(until)[:, None]
            decayed_q = q_tile * entered
            decayed_plus = plus_tile * entered
            q_tile = decayed_q.to(OPERAND)
            plus_tile = decayed_plus.to(OPERAND)
        added = tl.dot(tl.trans(q_tile), do_tile, input_precision=PRECISION)
        if DECAY == "scalar" and SPLIT:
            added = tl.dot(tl.trans(_low(decayed_q, q_tile)), do_tile, added)
            state = tl.dot(tl.trans(_low(decayed_plus, plus_tile)), dx_tile, state)
        state += tl.dot(tl.trans(plus_tile), dx_tile, scale * added, input_precision=PRECISION)
        if FRAMED:
            state *= tl.exp2(tl.where(opens, half, 0.0))[:, None]
