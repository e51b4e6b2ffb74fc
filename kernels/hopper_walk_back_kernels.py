"""The delta rule's walk back (delta_back_kernels.py) for Hopper, in Gluon.

A step is a chunk of at most 64 tokens, with T of 64. The state is held transposed, [V, K]; each
warpgroup has 64 of its rows. hopper_walk_kernels.py says what is rounded once and what is taken
in two parts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from seqpar.kernels.hopper_parts import (
    FLAT,
    C,
    barrier,
    bring,
    channels_layout,
    clear_all,
    column,
    entry_of,
    exp2,
    frames_of,
    half_of,
    head_and_piece,
    line_layout,
    low,
    product_layout,
    rounded,
    row_of,
    rows_layout,
    score_layout,
    store_shares,
    tokens_of,
    warps_layout,
    write_decays,
)

STAGES = gl.constexpr(2)  # tiles of so many steps are on their way or at hand

NUMBERS = ["scale", "batches", "tokens", "pieces", "chunks", "slots", "qh", "kh", "oh"]
NUMBERS += ["bb", "bt", "bh", "gb", "gt", "gh"]
POINTERS = ["dx_pointer", "shares", "beta", "gate", "leaving", "B"]
POINTERS += ["halves", "steps", "counts", "table"]


@gluon.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def walk_back_hopper_kernel(
    q, plus, minus, do, r, solved, dx, dx_pointer, shares, beta, gate, leaving, B,
    halves, steps, counts, table,
    scale, batches, tokens, pieces, chunks, slots,
    qh, kh, oh, bb, bt, bh, gb, gt, gh,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    DECAY: gl.constexpr, SUMMARY: gl.constexpr,
):  # fmt: skip
    """dX of one piece, and dβ, a share for each warp [B, H, DV / 16, T]; or SUMMARY: see
    `walk_back_kernel`.

    q, plus, minus in tiles [C, DK]; do, r, dx in tiles [C, DV]; solved [B*H*T, C].
    """
    dtype: gl.constexpr = plus.dtype
    FRAMED: gl.constexpr = DECAY == "frames"
    SCALAR: gl.constexpr = DECAY == "scalar"
    SIZE: gl.constexpr = DK * DV
    head, batch, place = head_and_piece(batches, HEADS)
    of_head = batch.to(gl.int64) * HEADS + head
    row, first_chunk, piece = row_of(table, place, SUMMARY)
    start = gl.load(row)
    length = gl.load(row + 1)
    count = (length + C - 1) // C
    if FRAMED:
        lists = steps, counts, halves
        place_of = batch, head, piece, pieces, first_chunk, chunks
        count, steps, halves = frames_of(*lists, *place_of, HEADS, DK)

    # [DV, DK], [DV, C], [C, C]
    num_warps: gl.constexpr = gl.num_warps()
    STATE: gl.constexpr = product_layout(DK, num_warps)
    MIXED: gl.constexpr = product_layout(C, num_warps)
    SCORES: gl.constexpr = score_layout(num_warps)
    READING: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    WRITING: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    LINE: gl.constexpr = line_layout(num_warps)
    ROWS: gl.constexpr = rows_layout(num_warps)
    WARPS: gl.constexpr = warps_layout(num_warps)

    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DK], q.layout)
    plus_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DK], plus.layout)
    minus_tiles = plus_tiles
    if FRAMED:
        minus_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DK], minus.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DV], do.layout)
    solved_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, C], solved.layout)
    r_tiles = do_tiles
    dx_tiles = do_tiles
    if not SUMMARY:
        r_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DV], r.layout)
        dx_tiles = gl.allocate_shared_memory(dtype, [1, C, DV], dx.layout)
    score_tile = gl.allocate_shared_memory(
        dtype, [C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    )
    lines = gl.allocate_shared_memory(gl.float32, [8, C], FLAT)
    half_lines = lines
    if FRAMED:
        half_lines = gl.allocate_shared_memory(gl.float32, [2, DK], FLAT)
        halves += gl.arange(0, DK, channels_layout(num_warps))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barrier()

    col = gl.arange(0, DV, gl.SliceLayout(1, STATE))
    channel = gl.arange(0, DK, gl.SliceLayout(0, STATE))
    state = gl.zeros([DV, DK], gl.float32, STATE)
    if not SUMMARY:
        slot = gl.load(row + 3)
        if slot >= 0:
            base = leaving + ((batch.to(gl.int64) * slots + slot) * HEADS + head) * SIZE
            state = gl.load(base + col[:, None] + channel[None, :] * DV)

    origin = batch * tokens + start
    solved_origin = (batch * HEADS + head) * tokens + start
    qc = head // GROUP * qh
    kc = head // GROUP * kh
    oc = head * oh
    xc = head * DV
    beta += batch.to(gl.int64) * bb + head * bh + start.to(gl.int64) * bt
    gate += batch.to(gl.int64) * gb + head * gh + start.to(gl.int64) * gt
    warp = gl.arange(0, num_warps, gl.SliceLayout(1, WARPS))
    shares += of_head * num_warps * tokens + start
    K_BYTES: gl.constexpr = plus.block_type.nbytes * (3 if FRAMED else 2)
    V_BYTES: gl.constexpr = do.block_type.nbytes * (1 if SUMMARY else 2)
    BYTES: gl.constexpr = K_BYTES + V_BYTES + solved.block_type.nbytes

    sources = (q, plus, do)
    columns = (qc, kc, oc)
    tiles = (q_tiles, plus_tiles, do_tiles)
    if FRAMED:
        sources = sources + (minus,)
        columns = columns + (kc,)
        tiles = tiles + (minus_tiles,)
    if not SUMMARY:
        sources = sources + (r,)
        columns = columns + (xc,)
        tiles = tiles + (r_tiles,)
    for i in gl.static_range(STAGES):
        if i < count:
            at = entry_of(steps, i, count, FRAMED, True) // 4 * 8
            mbarrier.expect(ready.index(i), BYTES)
            bring(sources, columns, tiles, origin + at, i, ready)
            bring((solved,), (0,), (solved_tiles,), solved_origin + at, i, ready)

    entry = entry_of(steps, 0, count, FRAMED, True)
    coming = entry_of(steps, 1, count, FRAMED, True)
    here, size = tokens_of(entry, length)
    lines.index(0).store(column(beta, here, here + size, bt, LINE))
    whole = 1.0
    if SCALAR:
        whole = write_decays(lines, 1, column(gate, here, here + size, gt, LINE), 0.0, False)
    if FRAMED:
        half_lines.index(0).store(exp2(half_of(halves, entry, HEADS * DK)))
    barrier()

    i_index = gl.arange(0, C, gl.SliceLayout(1, SCORES))
    j_index = gl.arange(0, C, gl.SliceLayout(0, SCORES))
    allowed = j_index[None, :] <= i_index[:, None]
    no_scores = gl.zeros([C, C], gl.float32, SCORES)
    nothing = gl.zeros([DV, C], gl.float32, MIXED)
    no_state = gl.zeros([DV, DK], gl.float32, STATE)
    log_scale = gl.log2(scale)
    for step in range(count):
        ring = step % STAGES
        even = step % 2
        here, size = tokens_of(entry, length)
        q_tile = q_tiles.index(ring)
        plus_tile = plus_tiles.index(ring)
        minus_tile = minus_tiles.index(ring)
        do_tile = do_tiles.index(ring)
        # asked for now, wanted at the end
        wanted = entry_of(steps, step + STAGES, count, FRAMED, True)
        following = coming // 4 * 8
        following_stop = gl.minimum(following + (C >> coming % 4), length)
        coming_rate = column(beta, following, following_stop, bt, LINE)
        if SCALAR:
            coming_decays = column(gate, following, following_stop, gt, LINE)
        if FRAMED:
            coming_half = half_of(halves, coming, HEADS * DK)

        if FRAMED:
            half = half_lines.index(even).load(gl.SliceLayout(0, STATE))
            state = state * half[None, :]
        high = gl.convert_layout(rounded(state), READING)
        mbarrier.wait(ready.index(ring), step // STAGES & 1)
        if size < C:
            clear_all((do_tiles,), ring, size, ROWS)
            barrier()
        scores = warpgroup_mma(
            q_tile, minus_tile.permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        mixed = warpgroup_mma(
            high, minus_tile.permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        rate = lines.index(4 * even).load(gl.SliceLayout(0, MIXED))[None, :]
        scores = warpgroup_mma_wait(1, deps=[scores])
        if SCALAR:
            sum_i = lines.index(4 * even + 1).load(gl.SliceLayout(1, SCORES)) + log_scale
            sum_j = lines.index(4 * even + 1).load(gl.SliceLayout(0, SCORES))
            scores = scores * exp2(sum_i[:, None] - sum_j[None, :])
        else:
            scores = scores * scale
        here_only = allowed & (i_index < size)[:, None]  # what lies beyond may overflow
        score_tile.store(rounded(gl.where(here_only, scores, 0.0)))
        fence_async_shared()
        if not SUMMARY:
            tma.store_wait(0)  # of the step before, whose tile is written to below
        barrier()
        mixed, high = warpgroup_mma_wait(0, deps=[mixed, high])
        if SCALAR:
            mixed = mixed * lines.index(4 * even + 3).load(gl.SliceLayout(0, MIXED))[None, :]
        mixed = warpgroup_mma(do_tile.permute((1, 0)), score_tile, mixed, is_async=True)
        if SCALAR:
            enters = lines.index(4 * even + 2).load(gl.SliceLayout(0, WRITING))
            added = do_tile.permute((1, 0)).load(WRITING).to(gl.float32) * enters[None, :]
            added_high = rounded(added)
            added_low = low(added, added_high)
            of_o = warpgroup_mma(added_high, q_tile, no_state, use_acc=False, is_async=True)
            of_o = warpgroup_mma(added_low, q_tile, of_o, is_async=True)
            mixed = warpgroup_mma_wait(2, deps=[mixed])
        else:
            of_o = warpgroup_mma(
                do_tile.permute((1, 0)), q_tile, no_state, use_acc=False, is_async=True
            )
            mixed = warpgroup_mma_wait(1, deps=[mixed])
        high = gl.convert_layout(rounded(-rate * mixed), READING)
        mixed = warpgroup_mma(high, solved_tiles.index(ring), mixed, is_async=True)
        if SCALAR:
            of_o, added_high, added_low, mixed, high = warpgroup_mma_wait(
                0, deps=[of_o, added_high, added_low, mixed, high]
            )
            state = state * whole
        else:
            of_o, mixed, high = warpgroup_mma_wait(0, deps=[of_o, mixed, high])
        state = state + scale * of_o
        final = rounded(rate * mixed)
        if SCALAR:
            write = final.to(gl.float32)
            write = -write * lines.index(4 * even + 2).load(gl.SliceLayout(0, MIXED))[None, :]
            rest = gl.convert_layout(low(write, rounded(write)), WRITING)
            high = gl.convert_layout(rounded(write), WRITING)
            state = warpgroup_mma(rest, plus_tile, state, is_async=True)
        else:
            high = gl.convert_layout(rounded(-rate * mixed), WRITING)
        state = warpgroup_mma(high, plus_tile, state, is_async=True)

        if not SUMMARY:
            value = r_tiles.index(ring).permute((1, 0)).load(MIXED).to(gl.float32)
            store_shares(shares, mixed * value, here, size, tokens, warp)
            if size < C:
                at_z = gl.arange(0, DV, gl.SliceLayout(1, MIXED))
                at_i = gl.arange(0, C, gl.SliceLayout(0, MIXED))
                out = (origin + here + at_i).to(gl.int64)[None, :] * (HEADS * DV) + xc
                out += at_z[:, None]
                inside = (at_i < size)[None, :] & (at_z >= 0)[:, None]
                gl.store(dx_pointer + out, final, mask=inside)
            else:
                dx_tiles.index(0).permute((1, 0)).store(final)
        lines.index(4 - 4 * even).store(coming_rate)
        if SCALAR:
            coming_whole = write_decays(lines, 5 - 4 * even, coming_decays, 0.0, False)
        if FRAMED:
            half_lines.index(1 - even).store(exp2(coming_half))
        if SCALAR:
            state, high, rest = warpgroup_mma_wait(0, deps=[state, high, rest])
        else:
            state, high = warpgroup_mma_wait(0, deps=[state, high])
        if FRAMED:
            state = state * half[None, :]
        fence_async_shared()
        barrier()
        if not SUMMARY and size == C:
            tma.async_copy_shared_to_global(dx, [origin + here, xc], dx_tiles.index(0))
        if step + STAGES < count:
            at = wanted // 4 * 8
            mbarrier.expect(ready.index(ring), BYTES)
            bring(sources, columns, tiles, origin + at, ring, ready)
            bring((solved,), (0,), (solved_tiles,), solved_origin + at, ring, ready)
        if SCALAR:
            whole = coming_whole
        entry = coming
        coming = wanted

    if not SUMMARY:
        tma.store_wait(0)
    else:
        summaries = gl.num_programs(0) // HEADS // batches
        index = (batch.to(gl.int64) * summaries + place) * HEADS + head
        gl.store(B + index * SIZE + col[:, None] + channel[None, :] * DV, state)
