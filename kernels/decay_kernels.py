"""The Triton kernel of linear attention with no, scalar or diagonal decay.

One kernel does the work of four, for all of these are causal linear attentions (G is the running
sum of log decays, in the direction of the run):

    out_i = scale Σ_{j at or before i} (x_i · y_j) e^(G_i - G_j) z_j  +  scale x_i e^(G_i) S

           x   y   z    direction    S             diagonal decay along
    o      q   k   v    forward      S [K, V]      x and y
    dv     k   q   do   backward     λ [K, V]      x and y
    dq     do  v   k    forward      Sᵀ [V, K]     z and out
    dk     v   do  q    backward     λᵀ [V, K]     z and out

S is the state, λ its gradient over scale, both kept on the chip and updated chunk by chunk. So a
pass reads three tensors and writes one, and chunk states never travel. With diagonal decay q and k
are those of frame_kernels.py, of which nothing is left to decay but the state between frames.

Triton until 3.7.1 at least miscompiles some kernels of several products on Hopper's wgmma (wrong
numbers, illegal accesses), with 64 rows or more and 4 warps. So no product here has so many rows:
chunks are of 32 tokens, the state is held transposed and cut to 32 columns of z.

Gradient of the decays: with r_t = q_t dq_t - k_t dk_t, for a token t and any later token T,

    dlog_decay_t = <S_T, λ_T> + Σ_{t <= i <= T} r_i

where S_T is the state after T and λ_T its gradient. The sum is one of differences that cancel, and
its rounding errors would add up along the sequence; so T is the end of a block of SPAN tokens: the
pass of dq saves S_T there, that of dk, which meets λ_T, forms the product in fp32. What a token has
of itself and of the tokens in its own chunk cancels but for fp32 rounding, as both passes form it
from the same rounded numbers; what the rounded states give does not, so the state is taken in two
parts then. With diagonal decay r is formed from dq and dk in fp32 (frame_kernels.py); with scalar
decay each pass leaves its share of r, without the token itself.

A program works on one piece (a run of tokens) of one head, and on some of the columns of z; `table`
says which (`tables.piece_rows`).
"""

import triton
import triton.language as tl


@triton.jit
def _tile(pointer, rows, mask, cols, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[C, D] of a tensor whose rows lie `stride` apart; zeros where masked."""
    inside = mask[:, None]
    if WIDTH != PADDED:
        inside = inside & (cols < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def _state(pointer, row, col, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers and mask of a tile of a state."""
    pointers = pointer + row[:, None] * row_stride + col[None, :] * col_stride
    return pointers, (row < ROWS)[:, None] & (col < COLS)[None, :]


@triton.jit
def _frames(
    steps, counts, halves, batch, head, piece, pieces, first_chunk, chunks,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """How many frames a piece has of one head, its steps, and its half decays of WIDTH channels."""
    of_head = batch * HEADS + head
    count = tl.load(counts + of_head * pieces + piece)
    steps += (of_head * chunks + first_chunk) * (C // 8)
    halves += ((batch * chunks + first_chunk) * (C // 8) * HEADS + head) * WIDTH
    return count, steps, halves


@triton.jit
def _half(halves, slot, cols, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The half decays, log2, of the frame that begins at a slot."""
    at = halves + slot.to(tl.int64) * (HEADS * WIDTH) + cols
    return tl.load(at, mask=cols < WIDTH, other=0.0)


@triton.jit(do_not_specialize=["batches", "tokens", "blocks", "slots", "saves", "chunks"])
def run_kernel(
    x, y, z, other, out, gate, entering, saved, shares, flows,
    halves, steps, counts, table,
    scale, batches, tokens, blocks, slots, saves, chunks,
    xb, xt, xh, yb, yt, yh, zb, zt, zh, wb, wt, wh, gb, gt, gh, state_row, state_col,
    HEADS: tl.constexpr, X_GROUP: tl.constexpr, Y_GROUP: tl.constexpr, Z_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, GATE: tl.constexpr,
    STRICT: tl.constexpr, SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    SPAN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """See the top of the file. x, y [B, T, H, DY]; z, out [B, T, H, DZ].

    DECAY: "none", "scalar", and diagonal along "key" (y) or "value" (z). GATE: whether to write
    what the gradient of the decays needs of this pass: saved [B, saves, H, DZ, DY] and flows, and
    with scalar decay shares, for which `other` is the input that `out` is the gradient of. STRICT:
    sum over j before (or after) i only; nothing is saved then. SPLIT: take the state, the scores
    and what is added to the state in two parts.
    """
    FRAMED: tl.constexpr = DECAY == "key" or DECAY == "value"
    SHARES: tl.constexpr = GATE and not FRAMED
    BLOCKS: tl.constexpr = (DZ + BZ - 1) // BZ
    pid = tl.program_id(0)
    block = pid % BLOCKS
    head = pid // BLOCKS % HEADS
    batch = (pid // (BLOCKS * HEADS) % batches).to(tl.int64)
    piece = pid // (BLOCKS * HEADS) // batches
    row = table + 8 * piece
    start = tl.load(row).to(tl.int64)
    length = tl.load(row + 1)
    if REVERSE:
        slot = tl.load(row + 3).to(tl.int64)
    else:
        slot = tl.load(row + 2).to(tl.int64)

    index = tl.arange(0, C)
    cols = tl.arange(0, BY)
    out_cols = block * BZ + tl.arange(0, BZ)
    STATE: tl.constexpr = DY * DZ
    state = tl.zeros([BZ, BY], tl.float32)
    if slot >= 0:
        base = entering + ((batch * slots + slot) * HEADS + head) * STATE
        pointers, inside = _state(base, out_cols, cols, state_col, state_row, DZ, DY)
        state = tl.load(pointers, mask=inside, other=0.0)
        if REVERSE:
            state = state / scale

    x += batch * xb + head // X_GROUP * xh + start * xt
    y += batch * yb + head // Y_GROUP * yh + start * yt
    z += batch * zb + head // Z_GROUP * zh + start * zt
    out += ((batch * tokens + start) * HEADS + head) * DZ
    if DECAY == "scalar":
        gate += batch * gb + head * gh + start * gt
    if GATE:
        first_save = tl.load(row + 5)
        piece_saves = tl.load(row + 6) - first_save
        saved += ((batch * saves + first_save) * HEADS + head) * STATE
        saved_at, saved_inside = _state(saved, out_cols, cols, DY, 1, DZ, DY)
        if FRAMED:
            flows += ((batch * blocks + tl.load(row + 4)) * HEADS + head) * DZ
    if SHARES:
        other += batch * wb + head // W_GROUP * wh + start * wt
        line = (batch * HEADS + head) * BLOCKS + block
        shares += line * tokens + start
        flows += line * blocks + tl.load(row + 4)
    count = tl.cdiv(length, C)
    if FRAMED:
        first_chunk = tl.load(row + 7).to(tl.int64)
        pieces = tl.num_programs(0) // (BLOCKS * HEADS) // batches
        lists = steps, counts, halves
        place_of = batch, head, piece, pieces, first_chunk, chunks
        DECAYED: tl.constexpr = DY if DECAY == "key" else DZ
        count, steps, halves = _frames(*lists, *place_of, HEADS, DECAYED, C)

    for step in tl.range(count, num_stages=STAGES):
        turn = step
        if REVERSE:
            turn = count - 1 - step
            causal = index[:, None] < index[None, :]
        else:
            causal = index[:, None] > index[None, :]
        first = turn * C
        stop = tl.minimum(first + C, length)
        if FRAMED:
            entry = tl.load(steps + turn)
            first = entry // 4 * 8
            stop = tl.minimum(first + (C >> entry % 4), length)
        rows = (first + index).to(tl.int64)
        mask = rows < stop
        x_tile = _tile(x, rows, mask, cols, xt, DY, BY).to(OPERAND)
        y_tile = _tile(y, rows, mask, cols, yt, DY, BY).to(OPERAND)
        z_tile = _tile(z, rows, mask, out_cols, zt, DZ, BLOCKS * BZ).to(OPERAND)
        here = index[:, None] == index[None, :]

        every = first // SPAN
        ends = (stop % SPAN == 0) | (stop == length)
        if GATE and REVERSE:
            if ends:
                flow = tl.zeros([BZ], tl.float32)
                if every < piece_saves:
                    at = saved_at + every.to(tl.int64) * (HEADS * STATE)
                    at_end = tl.load(at, mask=saved_inside, other=0.0)
                    flow = scale * tl.sum(at_end * state, 1)
                if FRAMED:
                    tl.store(flows + every * (HEADS * DZ) + out_cols, flow, mask=out_cols < DZ)
                else:
                    tl.store(flows + every, tl.sum(flow, 0))

        # decays: running sums from the chunk's beginning, in the direction of the run; or what
        # takes the state into the frame's middle
        if DECAY == "scalar":
            decays = tl.load(gate + rows * gt, mask=mask, other=0.0).to(tl.float32)
            until = tl.cumsum(decays, 0)
            after = tl.sum(decays, 0) - until
            # both directions round these differences alike, lest shares should not cancel
            if REVERSE:
                total, enters, leaves = -until, after, until
            else:
                total, enters, leaves = until, until, after
        elif DECAY == "key":
            half = tl.exp2(_half(halves, entry // 4, cols, HEADS, DY))[None, :]
            state *= half
        elif DECAY == "value":
            half = tl.exp2(_half(halves, entry // 4, out_cols, HEADS, DZ))[:, None]
            state *= half

        scores = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
        high = state.to(OPERAND)
        mixed = tl.dot(x_tile, tl.trans(high), input_precision=PRECISION)
        if (GATE or SPLIT) and tl.bfloat16 == OPERAND:
            low = (state - high.to(tl.float32)).to(OPERAND)
            mixed = tl.dot(x_tile, tl.trans(low), mixed)
        added = z_tile
        if DECAY == "scalar":
            scores *= tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))
            mixed *= tl.exp(enters)[:, None]
            exact = z_tile * tl.exp(leaves)[:, None]
            added = exact.to(OPERAND)

        if SHARES and not STRICT:
            own = tl.sum(tl.where(here, scores, 0.0), 1)
            scores = tl.where(causal, scores, 0.0)
        elif STRICT:
            scores = tl.where(causal, scores, 0.0)
        else:
            scores = tl.where(causal | here, scores, 0.0)
        high = scores.to(OPERAND)
        mixed = tl.dot(high, z_tile, mixed, input_precision=PRECISION)
        if SPLIT and tl.bfloat16 == OPERAND:
            mixed = tl.dot((scores - high.to(tl.float32)).to(OPERAND), z_tile, mixed)
        mixed *= scale
        if SHARES:
            w_tile = _tile(other, rows, mask, out_cols, wt, DZ, BLOCKS * BZ).to(OPERAND)
            tl.store(shares + rows, tl.sum(mixed * w_tile, 1), mask=mask)
            if not STRICT:
                mixed += scale * own[:, None] * z_tile
        out_mask = mask[:, None]
        if DZ % BZ != 0:
            out_mask = out_mask & (out_cols < DZ)[None, :]
        out_at = out + rows[:, None] * (HEADS * DZ) + out_cols[None, :]
        tl.store(out_at, mixed.to(out.dtype.element_ty), mask=out_mask)

        if DECAY == "scalar":
            state *= tl.exp(tl.sum(decays, 0))
        state = tl.dot(tl.trans(added), y_tile, state, input_precision=PRECISION)
        if DECAY == "scalar" and SPLIT and tl.bfloat16 == OPERAND:
            low = (exact - added.to(tl.float32)).to(OPERAND)
            state = tl.dot(tl.trans(low), y_tile, state)
        if FRAMED:
            state *= half
        if GATE and not REVERSE and not STRICT:
            if ends and every < piece_saves:
                at = saved_at + every.to(tl.int64) * (HEADS * STATE)
                tl.store(at, state, mask=saved_inside)
