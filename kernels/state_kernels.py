"""Triton kernels around the run kernel: summaries of pieces, their scan, the decays' gradient."""

import triton
import triton.language as tl

from seqpar.kernels.decay_kernels import _frames, _half, _state, _tile


@triton.jit(do_not_specialize=["batches", "pieces", "chunks"])
def fold_kernel(
    y, z, gate,
    halves, steps, counts,
    A, B,
    table,
    scale, batches, pieces, chunks,
    yb, yt, yh, zb, zt, zh, gb, gt, gh,
    HEADS: tl.constexpr, Y_GROUP: tl.constexpr, Z_GROUP: tl.constexpr, DY: tl.constexpr,
    DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What each piece adds to the state: B = scale Σ_j e^(decay from j to the end) y_j z_jᵀ.

    y [B, T, H, DY]; z [B, T, H, DZ]; A [B, N, H, 1 or DY], the decay over the whole piece; B [B, N,
    H, DY, DZ]. Reversed, the end is the piece's start and the decay includes token j's own. It
    walks away from that end, so the state is never rescaled; but with diagonal decay ("key") it
    walks towards it, from frame to frame (frame_kernels.py). `table`: `tables.summary_rows`.
    """
    ROWS: tl.constexpr = (DY + BY - 1) // BY
    COLS: tl.constexpr = (DZ + BZ - 1) // BZ
    pid = tl.program_id(0)
    block = pid % (ROWS * COLS)
    head = pid // (ROWS * COLS) % HEADS
    batch = (pid // (ROWS * COLS * HEADS) % batches).to(tl.int64)
    summary = pid // (ROWS * COLS * HEADS) // batches
    summaries = tl.num_programs(0) // (ROWS * COLS * HEADS) // batches
    start = tl.load(table + 4 * summary).to(tl.int64)
    length = tl.load(table + 4 * summary + 1)

    index = tl.arange(0, C)
    y_cols = block // COLS * BY + tl.arange(0, BY)
    z_cols = block % COLS * BZ + tl.arange(0, BZ)
    y += batch * yb + head // Y_GROUP * yh + start * yt
    z += batch * zb + head // Z_GROUP * zh + start * zt
    state = tl.zeros([BY, BZ], tl.float32)
    count = tl.cdiv(length, C)
    if DECAY == "key":
        first_chunk = tl.load(table + 4 * summary + 2).to(tl.int64)
        piece = tl.load(table + 4 * summary + 3)
        lists = steps, counts, halves
        place_of = batch, head, piece, pieces, first_chunk, chunks
        count, steps, halves = _frames(*lists, *place_of, HEADS, DY, C)
        passed = tl.zeros([BY], tl.float32)
    else:
        gate += batch * gb + head * gh + start * gt
        passed = 0.0

    for step in tl.range(count, num_stages=STAGES):
        if (DECAY == "key") == REVERSE:
            turn = count - 1 - step
        else:
            turn = step
        first = turn * C
        stop = length
        if DECAY == "key":
            entry = tl.load(steps + turn)
            first = entry // 4 * 8
            stop = tl.minimum(first + (C >> entry % 4), length)
        rows = (first + index).to(tl.int64)
        mask = rows < stop
        y_tile = _tile(y, rows, mask, y_cols, yt, DY, ROWS * BY).to(OPERAND)
        z_tile = _tile(z, rows, mask, z_cols, zt, DZ, COLS * BZ).to(OPERAND)
        if DECAY == "scalar":
            decays = tl.load(gate + rows * gt, mask=mask, other=0.0).to(tl.float32)
            whole = tl.sum(decays, 0)
            reach = tl.cumsum(decays, 0)
            if not REVERSE:
                reach = whole - reach
            z_tile = (z_tile * tl.exp(passed + reach)[:, None]).to(OPERAND)
            passed += whole
        elif DECAY == "key":
            half = _half(halves, entry // 4, y_cols, HEADS, DY)
            state *= tl.exp2(half)[:, None]
            passed += 2 * half
        state = tl.dot(tl.trans(y_tile), z_tile, state, input_precision=PRECISION)
        if DECAY == "key":
            state *= tl.exp2(half)[:, None]

    place = (batch * summaries + summary) * HEADS + head
    pointers, inside = _state(B + place * (DY * DZ), y_cols, z_cols, DZ, 1, DY, DZ)
    tl.store(pointers, state * scale, mask=inside)
    if DECAY == "scalar":
        if block == 0:
            tl.store(A + place, tl.exp(passed))
    elif DECAY == "key":
        if block % COLS == 0:
            tl.store(A + place * DY + y_cols, tl.exp2(passed), mask=y_cols < DY)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def gate_kernel(
    q_shares, plus_shares, k_shares, flows, d_gate,
    table,
    tokens, blocks,
    HEADS: tl.constexpr, LINES: tl.constexpr, KEY_LINES: tl.constexpr, PLUS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The gradient of scalar decays, d_gate [B, T, H], from what the passes of dq and dk left.

    q_shares [B, H, LINES, T], k_shares [B, H, KEY_LINES, T], the sums of whose lines are q dq and
    k dk; flows [B, H, KEY_LINES, blocks], <S, λ> at the end of each block of SIZE tokens. PLUS: and
    plus_shares, of k⁺ dk⁺, as those of q. `table`: `tables.cut_rows`.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    head = pid // blocks % HEADS
    batch = (pid // (blocks * HEADS)).to(tl.int64)
    start = tl.load(table + 3 * block).to(tl.int64)
    token = tl.arange(0, SIZE)
    mask = token < tl.load(table + 3 * block + 1)
    line = (batch * HEADS + head) * LINES
    key_line = (batch * HEADS + head) * KEY_LINES
    share = tl.zeros([SIZE], tl.float32)
    flow = 0.0
    for i in tl.static_range(LINES):
        at = (line + i) * tokens + start + token
        share += tl.load(q_shares + at, mask=mask, other=0.0)
        if PLUS:
            share += tl.load(plus_shares + at, mask=mask, other=0.0)
    for i in tl.static_range(KEY_LINES):
        at = (key_line + i) * tokens + start + token
        share -= tl.load(k_shares + at, mask=mask, other=0.0)
        flow += tl.load(flows + (key_line + i) * blocks + block)
    gradient = flow + tl.sum(share, 0) - tl.cumsum(share, 0) + share
    tl.store(d_gate + (batch * tokens + start + token) * HEADS + head, gradient, mask=mask)


@triton.jit(do_not_specialize=["batches", "summaries", "slots"])
def scan_kernel(
    A, B, arriving, states, whole_A, whole_B,
    table,
    batches, summaries, slots,
    HEADS: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, PADDED: tl.constexpr,
    DECAY: tl.constexpr, STEP: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """States that enter pieces, from the summaries of the pieces before them: S' = A S + B.

    A row of `table` is a run of pieces, each of which hands its state to the next: [first summary,
    summaries, slot of the first state, which of `arriving` it begins with, which range it leaves
    (-1: none)]. B [B, summaries, H, DY, DZ]; states [B, slots, ...]; arriving [ranges, B, ...].
    STEP: 1, or -1 for the gradient, which goes through the pieces backwards. Without STORE nothing
    arrives, and the map of each run is what is wanted: whole_A and whole_B [ranges, B, H, ...].
    """
    BLOCKS: tl.constexpr = (DY + BY - 1) // BY
    pid = tl.program_id(0)
    row = pid % BLOCKS * BY + tl.arange(0, BY)
    head = pid // BLOCKS % HEADS
    batch = (pid // (BLOCKS * HEADS) % batches).to(tl.int64)
    chain = table + 5 * (pid // (BLOCKS * HEADS) // batches)
    first = tl.load(chain).to(tl.int64)
    count = tl.load(chain + 1)
    slot = tl.load(chain + 2).to(tl.int64)
    source = tl.load(chain + 3).to(tl.int64)
    target = tl.load(chain + 4).to(tl.int64)
    cols = tl.arange(0, PADDED)
    offsets = row[:, None] * DZ + cols[None, :]
    inside = (row < DY)[:, None] & (cols < DZ)[None, :]
    SIZE: tl.constexpr = DY * DZ
    state = tl.zeros([BY, PADDED], tl.float32)
    total = tl.full([BY], 1.0, tl.float32)
    if STORE:
        if source >= 0:
            base = arriving + ((source * batches + batch) * HEADS + head) * SIZE
            state = tl.load(base + offsets, mask=inside, other=0.0)
            base = states + ((batch * slots + slot) * HEADS + head) * SIZE
            tl.store(base + offsets, state, mask=inside)
            slot += STEP
    stored = count
    if target >= 0:
        stored = count - 1
    for i in tl.range(count, num_stages=6):
        place = (batch * summaries + first + i * STEP) * HEADS + head
        added = tl.load(B + place * SIZE + offsets, mask=inside, other=0.0)
        if DECAY == "scalar":
            factor = tl.load(A + place)
            state, total = state * factor, total * factor
        elif DECAY == "key":
            factors = tl.load(A + place * DY + row, mask=row < DY, other=0.0)
            state, total = state * factors[:, None], total * factors
        state += added
        if STORE:
            base = states + ((batch * slots + slot + i * STEP) * HEADS + head) * SIZE
            tl.store(base + offsets, state, mask=inside & (i < stored))
    if not STORE:
        place = (target * batches + batch) * HEADS + head
        tl.store(whole_B + place * SIZE + offsets, state, mask=inside)
        if DECAY == "scalar":
            tl.store(whole_A + place + row * 0, total, mask=row == 0)
        elif DECAY == "key":
            tl.store(whole_A + place * DY + row, total, mask=row < DY)
