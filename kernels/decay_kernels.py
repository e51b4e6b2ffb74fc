"""Triton kernels of linear attention with no, scalar or diagonal decay.

One kernel does the work of four, for all of these are causal linear attentions (G is the running
sum of log decays, in the direction of the run):

    out_i = scale Σ_{j at or before i} (x_i · y_j) e^(G_i - G_j) z_j  +  scale x_i e^(G_i) S

           x   y   z    direction    S             decay per channel of
    o      q   k   v    forward      S [K, V]      x and y ("key")
    dv     k   q   do   backward     λ [K, V]      x and y ("key")
    dq     do  v   k    forward      Sᵀ [V, K]     z and out ("value")
    dk     v   do  q    backward     λᵀ [V, K]     z and out ("value")

S is the state, λ its gradient over scale, both kept on the chip and updated chunk by chunk. So a
pass reads three tensors and writes one, and chunk states never travel.

Triton until 3.7.1 at least miscompiles some kernels of several products on Hopper's wgmma (wrong
numbers, illegal accesses), with 64 rows or more and 4 warps. So no product here has so many rows:
chunks are of 32 tokens, the state is held transposed and cut to 32 columns of z.

Gradient of the decays: with r_t = q_t dq_t - k_t dk_t, for a token t and any later token T,

    dlog_decay_t = <S_T, λ_T> + Σ_{t <= i <= T} r_i

where S_T is the state after T and λ_T its gradient. The sum is one of differences that cancel, and
its rounding errors would add up along the sequence; so T is the end of a block of EVERY chunks: the
pass of dq saves S_T there, that of dk, which meets λ_T, forms the product in fp32. With diagonal
decay the two passes round differently, and each chunk's end is made exact too: from one chunk to
the one before, <S, λ> changes by <S, P> - <B, λ>, where B and P are what the chunk adds to S and to
λ. Each is formed from the same rounded operands as the recurrence it belongs to: no error is left.

A program works on one piece (a run of tokens) of one head, and on some of the columns of z; a row
of `table` says which: [first token, tokens, slot of the state that enters (forward), slot of the
one that leaves (-1: none), number of blocks before it, of saved states before it, and after it].
"""

import triton
import triton.language as tl

# Above this a factor of a 16-token block is not formed (see `_scores`).
LIMIT = tl.constexpr(60.0)
BLOCK = tl.constexpr(16)


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
def _block_start(gate, row, block, REVERSE: tl.constexpr):
    """The sum of gates between the chunk's beginning, in the direction of the run, and a block."""
    if REVERSE:
        before = row >= (block + 1) * BLOCK
    else:
        before = row < block * BLOCK
    return tl.sum(tl.where(before[:, None], gate, 0.0), 0)


@triton.jit
def _within(gate, total, row, C: tl.constexpr, REVERSE: tl.constexpr):
    """Running sums from the beginning of each token's own block, in the direction of the run."""
    base = tl.zeros_like(total)
    for block in tl.static_range(C // BLOCK):
        start = _block_start(gate, row, block, REVERSE)
        base = tl.where((row // BLOCK == block)[:, None], start[None, :], base)
    return total - base


@triton.jit
def _reached(tile, gate, total, row, block, REVERSE: tl.constexpr):
    """Tokens at or before a block, each decayed to the block's beginning; zero after it.

    Those of the block itself are grown, by at most e^LIMIT.
    """
    start = _block_start(gate, row, block, REVERSE)
    if REVERSE:
        inside = row // BLOCK >= block
    else:
        inside = row // BLOCK <= block
    factor = tl.exp(tl.minimum(start[None, :] - total, LIMIT))
    return tl.where(inside[:, None], tile * factor, 0.0)


@triton.jit
def _nth(tile, n, C: tl.constexpr, D: tl.constexpr):
    """For each row, row n of its block of 16: [C, D]."""
    blocks = tl.reshape(tile, [C // BLOCK, BLOCK, D])
    index = tl.arange(0, BLOCK)[None, :, None]
    row = tl.sum(tl.where(index == n, blocks, 0.0), 1)
    spread = tl.broadcast_to(row[:, None, :], [C // BLOCK, BLOCK, D])
    return tl.reshape(spread, [C, D])


@triton.jit
def _scores(
    x,
    y,
    gate,
    total,
    row,
    col,
    C: tl.constexpr,
    D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Σ_d x_id y_jd e^(total_id - total_jd) for diagonal decay [C, C]; not yet masked.

    Each block of 16 rows has its own reference, the sum at its beginning, which lies between those
    of its rows and of all earlier columns; so no factor exceeds one but within the block. If one
    would exceed e^LIMIT there, the blocks on the diagonal are done pair by pair.
    """
    within = _within(gate, total, row, C, REVERSE)
    reach = (x * tl.exp(within)).to(OPERAND)
    scores = tl.zeros([C, C], tl.float32)
    for block in tl.static_range(C // BLOCK):
        reached = _reached(y, gate, total, row, block, REVERSE).to(OPERAND)
        found = tl.dot(reach, tl.trans(reached), input_precision=PRECISION)
        scores = tl.where((row // BLOCK == block)[:, None], found, scores)
    if tl.min(tl.min(within, 1), 0) < -LIMIT:
        for n in range(BLOCK):
            factor = tl.exp(tl.minimum(total - _nth(total, n, C, D), 0.0))
            near = tl.sum(x * _nth(y, n, C, D) * factor, 1)
            here = col[None, :] == (row // BLOCK * BLOCK + n)[:, None]
            scores = tl.where(here, near[:, None], scores)
    return scores


@triton.jit
def _mix(
    scores,
    z,
    gate,
    total,
    row,
    col,
    C: tl.constexpr,
    D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Σ_j scores_ij z_jd e^(total_id - total_jd) for diagonal decay [C, D]; scores are masked."""
    within = _within(gate, total, row, C, REVERSE)
    steep = tl.min(tl.min(within, 1), 0) < -LIMIT
    diagonal = (row // BLOCK)[:, None] == (col // BLOCK)[None, :]
    far = scores
    if steep:
        far = tl.where(diagonal, 0.0, scores)
    mixed = tl.zeros([C, D], tl.float32)
    for block in tl.static_range(C // BLOCK):
        mine = tl.where((row // BLOCK == block)[:, None], far, 0.0).to(OPERAND)
        reached = _reached(z, gate, total, row, block, REVERSE).to(OPERAND)
        mixed = tl.dot(mine, reached, mixed, input_precision=PRECISION)
    mixed = mixed * tl.exp(within)
    if steep:
        for n in range(BLOCK):
            factor = tl.exp(tl.minimum(total - _nth(total, n, C, D), 0.0))
            here = col[None, :] == (row // BLOCK * BLOCK + n)[:, None]
            score = tl.sum(tl.where(here, scores, 0.0), 1)
            mixed += score[:, None] * _nth(z, n, C, D) * factor
    return mixed


@triton.jit(do_not_specialize=["batches", "tokens", "blocks", "slots", "saves"])
def run_kernel(
    x,
    y,
    z,
    gate,
    other,
    entering,
    saved,
    out,
    shares,
    flows,
    table,
    scale,
    batches,
    tokens,
    blocks,
    slots,
    saves,
    xb,
    xt,
    xh,
    yb,
    yt,
    yh,
    zb,
    zt,
    zh,
    wb,
    wt,
    wh,
    gb,
    gt,
    gh,
    state_row,
    state_col,
    HEADS: tl.constexpr,
    X_GROUP: tl.constexpr,
    Y_GROUP: tl.constexpr,
    Z_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    DY: tl.constexpr,
    DZ: tl.constexpr,
    BY: tl.constexpr,
    BZ: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    GATE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EVERY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """See the top of the file. x, y [B, T, H, DY]; z, out [B, T, H, DZ].

    DECAY: "none", "scalar", "key", "value". GATE: 1 to write what the gradient of the decays
    needs of this pass, for which `other` is the input that `out` is the gradient of.
    """
    BLOCKS: tl.constexpr = (DZ + BZ - 1) // BZ
    pid = tl.program_id(0)
    block = pid % BLOCKS
    head = pid // BLOCKS % HEADS
    batch = (pid // (BLOCKS * HEADS) % batches).to(tl.int64)
    piece = pid // (BLOCKS * HEADS) // batches
    start = tl.load(table + 7 * piece).to(tl.int64)
    length = tl.load(table + 7 * piece + 1)
    if REVERSE:
        slot = tl.load(table + 7 * piece + 3).to(tl.int64)
    else:
        slot = tl.load(table + 7 * piece + 2).to(tl.int64)

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
    if DECAY != "none":
        gate += batch * gb + head * gh + start * gt
    if GATE:
        other += batch * wb + head // W_GROUP * wh + start * wt
        first_save = tl.load(table + 7 * piece + 5)
        piece_saves = tl.load(table + 7 * piece + 6) - first_save
        saved += ((batch * saves + first_save) * HEADS + head) * STATE
        saved_at, saved_inside = _state(saved, out_cols, cols, DY, 1, DZ, DY)
        flow = tl.zeros([BZ], tl.float32)
        if DECAY == "value":
            shares += ((batch * tokens + start) * HEADS + head) * DZ
            first_chunk = tl.load(table + 7 * piece + 4) * EVERY
            flows += ((batch * blocks * EVERY + first_chunk) * HEADS + head) * DZ
        else:
            line = (batch * HEADS + head) * BLOCKS + block
            shares += line * tokens + start
            flows += line * blocks + tl.load(table + 7 * piece + 4)

    count = tl.cdiv(length, C)
    for step in tl.range(count, num_stages=STAGES):
        if REVERSE:
            chunk = count - 1 - step
            causal = index[:, None] < index[None, :]
        else:
            chunk = step
            causal = index[:, None] > index[None, :]
        rows = (chunk * C + index).to(tl.int64)
        mask = rows < length
        x_tile = _tile(x, rows, mask, cols, xt, DY, BY).to(OPERAND)
        y_tile = _tile(y, rows, mask, cols, yt, DY, BY).to(OPERAND)
        z_tile = _tile(z, rows, mask, out_cols, zt, DZ, BLOCKS * BZ).to(OPERAND)
        here = index[:, None] == index[None, :]

        # running sums of log decays from the chunk's beginning, in the direction of the run
        if DECAY == "scalar":
            decays = tl.load(gate + rows * gt, mask=mask, other=0.0).to(tl.float32)
            total = tl.cumsum(decays, 0)
            whole = tl.sum(decays, 0)
        elif DECAY == "key":
            decays = _tile(gate, rows, mask, cols, gt, DY, BY).to(tl.float32)
            total = tl.cumsum(decays, 0)
            whole = tl.sum(decays, 0)
        elif DECAY == "value":
            decays = _tile(gate, rows, mask, out_cols, gt, DZ, BLOCKS * BZ).to(tl.float32)
            total = tl.cumsum(decays, 0)
            whole = tl.sum(decays, 0)
        if REVERSE and DECAY == "scalar":
            total = whole - total
        elif REVERSE and DECAY != "none":
            total = whole[None, :] - total

        # scores of the chunk's pairs
        if DECAY == "key":
            scores = _scores(
                x_tile, y_tile, decays, total, index, index, C, BY, OPERAND, PRECISION, REVERSE
            )
        else:
            scores = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
        if DECAY == "scalar":
            scores *= tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))

        # what the state that enters the chunk gives
        if DECAY == "key":
            reach = (x_tile * tl.exp(total)).to(OPERAND)
        else:
            reach = x_tile
        mixed = tl.dot(reach, tl.trans(state.to(OPERAND)), input_precision=PRECISION)
        if DECAY == "scalar":
            mixed *= tl.exp(total)[:, None]
        elif DECAY == "value":
            mixed *= tl.exp(total)

        # what the chunk's own tokens give; the token itself apart where its rounding would show
        if GATE or DECAY == "value":
            own = tl.sum(tl.where(here, scores, 0.0), 1)
            scores = tl.where(causal, scores, 0.0)
        else:
            scores = tl.where(causal | here, scores, 0.0)
        if DECAY == "value":
            mixed += _mix(
                scores, z_tile, decays, total, index, index, C, BZ, OPERAND, PRECISION, REVERSE
            )
        else:
            mixed = tl.dot(scores.to(OPERAND), z_tile, mixed, input_precision=PRECISION)
        mixed *= scale

        # what the chunk adds to the state
        if DECAY == "none":
            added = z_tile
            key = y_tile
        elif DECAY == "scalar":
            added = (z_tile * tl.exp(whole - total)[:, None]).to(OPERAND)
            key = y_tile
        elif DECAY == "key":
            added = z_tile
            key = (y_tile * tl.exp(whole[None, :] - total)).to(OPERAND)
        else:
            added = (z_tile * tl.exp(whole[None, :] - total)).to(OPERAND)
            key = y_tile

        if GATE:
            w_tile = _tile(other, rows, mask, out_cols, wt, DZ, BLOCKS * BZ).to(OPERAND)
            share = mixed * w_tile
            every = chunk // EVERY
            ends = (chunk + 1 == count) | (chunk % EVERY == EVERY - 1)
            if REVERSE and ends:
                flow = tl.zeros([BZ], tl.float32)
                if every < piece_saves:
                    at = saved_at + every.to(tl.int64) * (HEADS * STATE)
                    at_end = tl.load(at, mask=saved_inside, other=0.0)
                    flow = scale * tl.sum(at_end * state, 1)
                if DECAY == "scalar":
                    tl.store(flows + every, tl.sum(flow, 0))
            if DECAY == "scalar":
                tl.store(shares + rows, tl.sum(share, 1), mask=mask)
            else:
                share_at = shares + rows[:, None] * (HEADS * DZ) + out_cols[None, :]
                share_mask = mask[:, None] & (out_cols < DZ)[None, :]
                pulled = (w_tile * tl.exp(total)).to(OPERAND)
                pulled = tl.dot(tl.trans(pulled), x_tile, input_precision=PRECISION)
                pull = scale * tl.sum(state * pulled, 1)
                pull_at = flows + chunk * (HEADS * DZ) + out_cols
                if REVERSE:
                    share = tl.load(share_at, mask=share_mask, other=0.0) - share
                    later = flow + tl.sum(share, 0)
                    share += later[None, :] - tl.cumsum(share, 0)
                    flow += tl.load(pull_at, mask=out_cols < DZ, other=0.0) - pull
                else:
                    tl.store(pull_at, pull, mask=out_cols < DZ)
                tl.store(share_at, share, mask=share_mask)

        if GATE or DECAY == "value":
            mixed += scale * own[:, None] * z_tile
        out_mask = mask[:, None]
        if DZ % BZ != 0:
            out_mask = out_mask & (out_cols < DZ)[None, :]
        out_at = out + rows[:, None] * (HEADS * DZ) + out_cols[None, :]
        tl.store(out_at, mixed.to(out.dtype.element_ty), mask=out_mask)

        if DECAY == "scalar":
            state *= tl.exp(whole)
        elif DECAY == "key":
            state *= tl.exp(whole)[None, :]
        elif DECAY == "value":
            state *= tl.exp(whole)[:, None]
        state = tl.dot(tl.trans(added), key, state, input_precision=PRECISION)

        if GATE and not REVERSE:
            if ends and every < piece_saves:
                at = saved_at + every.to(tl.int64) * (HEADS * STATE)
                tl.store(at, state, mask=saved_inside)
