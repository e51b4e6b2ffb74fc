"""Triton kernels that make decay no decay: q and k relative to a decay of their frame.

A frame is a run of at most C tokens. With G the running sum of log decays in it, and M half its
sum over the whole frame, let

    q'_i = q_i e^(G_i - M)        k'_j = k_j e^(M - G_j)        S' = e^M S

per channel. Then q'_i · k'_j is the decayed score, S' + Σ_j k'_j v_jᵀ is the state at the frame's
end but for another factor e^M, and o_i = q'_iᵀ S' + Σ_j (q'_i · k'_j) v_j: a frame without decay,
forwards and backwards. The delta rule reads the state by the keys as well; for that there is a
second key, k⁺_i = k_i e^(G_i - M) (delta_kernels.py).

DPLR is the delta rule with two tokens for each of its own (PAIRS; dplr_triton.py). The second has
q' and k', the first b' in place of k', and k⁺ = -a': a_i reads the state before token i decays it,
so a'_i = a_i e^(G_(i-1) - M), G being 0 before the frame (BEFORE).

Factors reach e^-M; so where a channel decays by more than REACH within C tokens, the frame is
halved, down to 8 tokens. Decays beyond REACH / 8 count as that: e^-18 = 1.5e-8 of a state is left
then, less than fp32 resolves beside the token's own share.

M is kept in units of log 2, at the frame's first token: `halves` [B, slots, H, K], a slot for each
8 tokens of a chunk. `levels` [B, chunks, H] says how often a chunk was halved; `steps` lists the
frames of each piece in order, (slot within the piece) * 4 + level, and `counts` how many they are;
or parts of frames, of at most MOST tokens.
"""

import triton
import triton.language as tl

from seqpar.kernels.decay_kernels import _tile

REACH = tl.constexpr(144.0)  # nats; e^(REACH / 2) times a state must not overflow
STEEPEST = tl.constexpr(18.0)  # nats a token; 8 of them are REACH
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sum(weights, x, SPLIT: tl.constexpr):
    """weights @ x [C, D] in fp32, for weights that bf16 holds.

    SPLIT: x as the sum of two bf16 numbers, which leaves errors of 2^-18, for tensor cores to add.
    """
    if SPLIT:
        weights = weights.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        total = tl.dot(weights, (x - high.to(tl.float32)).to(tl.bfloat16))
        total = tl.dot(weights, high, total)
    else:
        total = tl.dot(weights, x, input_precision="ieee")
    return total


@triton.jit
def _relative(decays, level, C: tl.constexpr, SPLIT: tl.constexpr, BEFORE: tl.constexpr = False):
    """G - M of each token [C, D]: half of what its frame decays up to it less half of the rest.

    BEFORE: of the token before, with no less than the frame's beginning.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    shift = tl.where(j < i if BEFORE else j <= i, 0.5, -0.5)
    size = C >> level
    return _sum(tl.where(i // size == j // size, shift, 0.0), decays, SPLIT)


@triton.jit
def _exp2(x, SPLIT: tl.constexpr):
    """2^x; for fp32 products to fp32's accuracy, of which the GPU's own instruction is short."""
    if SPLIT:
        return tl.exp2(x)
    return tl.exp2(x.to(tl.float64)).to(tl.float32)


@triton.jit
def _decays(gate, rows, mask, columns, stride, DIM: tl.constexpr, D: tl.constexpr):
    decays = _tile(gate, rows, mask, columns, stride, DIM, D).to(tl.float32)
    return tl.maximum(decays, -STEEPEST) * LOG2E


@triton.jit(do_not_specialize=["tokens", "chunks"])
def enter_kernel(
    q, k, gate, q_out, k_out, plus_out,
    halves, levels, table,
    tokens, chunks,
    qb, qt, qh, kb, kt, kh, gb, gt, gh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    HALVINGS: tl.constexpr, PLUS: tl.constexpr, PAIRS: tl.constexpr, BEFORE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """q', k' [B, T, H, DIM], halves and levels of one chunk. `table`: `tables.cut_rows`.

    PLUS: k⁺ as well. PAIRS: they are [B, T, 2, H, DIM]; the second of two are written, or BEFORE,
    for a and b in place of q and k, the first, -a' and b'. Of the other, q' or -a' becomes 0.
    """
    EVERY: tl.constexpr = 2 if PAIRS else 1
    pid = tl.program_id(0)
    head = pid % HEADS
    chunk = pid // HEADS % chunks
    batch = (pid // HEADS // chunks).to(tl.int64)
    start = tl.load(table + 3 * chunk).to(tl.int64)
    rows = tl.arange(0, C)
    mask = rows < tl.load(table + 3 * chunk + 1)
    columns = tl.arange(0, D)
    gate += batch * gb + head * gh + start * gt
    decays = _decays(gate, rows, mask, columns, gt, DIM, D)
    q_tile = _tile(
        q + batch * qb + head // GROUP * qh + start * qt, rows, mask, columns, qt, DIM, D
    )
    k_tile = _tile(
        k + batch * kb + head // GROUP * kh + start * kt, rows, mask, columns, kt, DIM, D
    )

    level = 0
    relative = _relative(decays, level, C, SPLIT)
    while (level < HALVINGS) & (tl.min(tl.min(relative, 1), 0) < -0.5 * REACH * LOG2E):
        level += 1
        relative = _relative(decays, level, C, SPLIT)
    tl.store(levels + (batch * chunks + chunk) * HEADS + head, level)

    # a frame's last token is M from its middle
    size = C >> level
    halves += ((batch * chunks + chunk) * (C // 8 * EVERY) * HEADS + head) * DIM
    half_at = rows // size * (size // 8 * EVERY) * (HEADS * DIM)
    known = columns < DIM
    last = (rows % size == size - 1)[:, None] & known[None, :]
    tl.store(halves + (half_at[:, None] + columns[None, :]), relative, mask=last)
    out = ((batch * tokens + start) * (EVERY * HEADS) + head) * DIM
    at = rows[:, None] * (EVERY * HEADS * DIM) + columns[None, :]
    inside = mask[:, None] & known[None, :]
    grown = _exp2(relative, SPLIT)
    if BEFORE:
        grown = -_exp2(_relative(decays, level, C, SPLIT, True), SPLIT)
    if PAIRS:
        other = out + HEADS * DIM if BEFORE else out
        out = out if BEFORE else out + HEADS * DIM
        nothing = tl.zeros([C, D], q_out.dtype.element_ty)
        tl.store(q_out + other + at, nothing, mask=inside)
    tl.store(q_out + out + at, (q_tile * grown).to(q_out.dtype.element_ty), mask=inside)
    if PLUS:
        tl.store(plus_out + out + at, (k_tile * grown).to(plus_out.dtype.element_ty), mask=inside)
    tl.store(
        k_out + out + at, (k_tile * _exp2(-relative, SPLIT)).to(k_out.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["pieces", "chunks"])
def steps_kernel(
    levels, steps, counts, table,
    pieces, chunks,
    HEADS: tl.constexpr, C: tl.constexpr, MOST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The frames of one piece, in order, or their parts. `table`: `tables.piece_rows`."""
    pid = tl.program_id(0)
    head = pid % HEADS
    piece = pid // HEADS % pieces
    batch = pid // HEADS // pieces
    length = tl.load(table + 8 * piece + 1)
    first = tl.load(table + 8 * piece + 7)
    levels += (batch * chunks + first) * HEADS + head
    steps += ((batch * HEADS + head).to(tl.int64) * chunks + first) * (C // 8)
    before = 0
    for i in range(0, tl.cdiv(tl.cdiv(length, C), WIDTH)):
        chunk = i * WIDTH + tl.arange(0, WIDTH)
        here = chunk * C < length
        level = tl.load(levels + chunk * HEADS, mask=here, other=0)
        size = tl.minimum(C >> level, MOST)
        count = (tl.minimum(length - chunk * C, C) + size - 1) // size
        count = tl.where(here, count, 0)
        place = before + tl.cumsum(count, 0) - count
        for j in tl.static_range(C // 8):
            entry = (chunk * (C // 8) + j * (size // 8)) * 4 + level
            tl.store(steps + place + j, entry, mask=j < count)
        before += tl.sum(count, 0)
    tl.store(counts + (batch * HEADS + head) * pieces + piece, before)


@triton.jit(do_not_specialize=["tokens", "chunks", "blocks"])
def leave_kernel(
    q, k, plus, dq, dk, d_plus, gate, flows, q_gradient, k_gradient, a_gradient, b_gradient, d_gate,
    levels, table,
    tokens, chunks, blocks,
    gb, gt, gh,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, C: tl.constexpr, PLUS: tl.constexpr,
    PAIRS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and the decays [B, T, H, DIM] in one block, from those of q' and k'.

    PLUS: and of k⁺. PAIRS: and of a and b, from q', k' and k⁺ of `enter_kernel`'s pairs.

    flows [B, blocks, H, DIM]: <S, λ> at the end of each block (see decay_kernels.py). `table`:
    `tables.cut_rows`. But for pairs q_gradient may be q, and so on, and d_gate dq.
    """
    EVERY: tl.constexpr = 2 if PAIRS else 1
    COLS: tl.constexpr = (DIM + D - 1) // D
    pid = tl.program_id(0)
    head = pid // COLS % HEADS
    block = pid // COLS // HEADS % blocks
    batch = (pid // COLS // HEADS // blocks).to(tl.int64)
    start = tl.load(table + 3 * block).to(tl.int64)
    length = tl.load(table + 3 * block + 1)
    first = tl.load(table + 3 * block + 2)
    columns = pid % COLS * D + tl.arange(0, D)
    gate += batch * gb + head * gh
    levels += (batch * chunks + first) * HEADS + head
    flow = flows + ((batch * blocks + block) * HEADS + head) * DIM + columns
    later = tl.load(flow, mask=columns < DIM, other=0.0)
    rows = tl.arange(0, C)
    from_here = tl.where(rows[:, None] <= rows[None, :], 1.0, 0.0)
    count = tl.cdiv(length, C)
    for step in range(count):
        chunk = count - 1 - step
        origin = start + chunk * C
        mask = chunk * C + rows < length
        decays = _decays(gate + origin * gt, rows, mask, columns, gt, DIM, COLS * D)
        token = (batch * tokens + origin + rows)[:, None]
        out = (token * HEADS + head) * DIM + columns[None, :]
        a_at = (token * (EVERY * HEADS) + head) * DIM + columns[None, :]
        at = a_at
        if PAIRS:
            at += HEADS * DIM
        inside = mask[:, None] & (columns < DIM)[None, :]
        q_tile = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
        k_tile = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        dq_tile = tl.load(dq + at, mask=inside, other=0.0)
        dk_tile = tl.load(dk + at, mask=inside, other=0.0)
        level = tl.load(levels + chunk * HEADS)
        relative = _relative(decays, level, C, SPLIT)
        share = q_tile * dq_tile - k_tile * dk_tile
        if PLUS:
            plus_tile = tl.load(plus + a_at, mask=inside, other=0.0).to(tl.float32)
            d_plus_tile = tl.load(d_plus + a_at, mask=inside, other=0.0)
            of_plus = plus_tile * d_plus_tile
            share += of_plus
        if PAIRS:
            b_tile = tl.load(k + a_at, mask=inside, other=0.0).to(tl.float32)
            db_tile = tl.load(dk + a_at, mask=inside, other=0.0)
            share -= b_tile * db_tile
        gradient = later[None, :] + _sum(from_here, share, SPLIT)
        if PAIRS:
            gradient -= of_plus  # its own decay does not reach a token's a
        later += tl.sum(share, 0)
        tl.store(d_gate + out, gradient, mask=inside)
        grown = _exp2(relative, SPLIT)
        dq_tile *= grown
        shrunk = _exp2(-relative, SPLIT)
        dk_tile *= shrunk
        if PAIRS:
            d_plus_tile *= -_exp2(_relative(decays, level, C, SPLIT, True), SPLIT)
            db_tile *= shrunk
            tl.store(a_gradient + out, d_plus_tile.to(a_gradient.dtype.element_ty), mask=inside)
            tl.store(b_gradient + out, db_tile.to(b_gradient.dtype.element_ty), mask=inside)
        elif PLUS:
            dk_tile += d_plus_tile * grown
        tl.store(q_gradient + out, dq_tile.to(q_gradient.dtype.element_ty), mask=inside)
        tl.store(k_gradient + out, dk_tile.to(k_gradient.dtype.element_ty), mask=inside)
