"""The keys' kernel of the delta rule (delta_back_kernels.py) for Hopper, in Gluon.

dK⁻ is a pass like "dk" of hopper_kernels.py with two sums in one. The state is held as -λᵀ,
[K, V], for products can add what they form, not take it away; so is what is read of it. Scores
are [i, j]. With decay the state is taken in two parts, for its rounding would not cancel in the
gradient of the decays; that of the scores does, as the passes of dq and dk⁺ form the same ones.
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
    rows_layout,
    score_layout,
    store_shares,
    tokens_of,
    warps_layout,
    write_decays,
)

STAGES = gl.constexpr(2)  # tiles of so many steps are on their way or at hand

NUMBERS = ["scale", "batches", "tokens", "pieces", "chunks", "slots", "saves", "blocks"]
NUMBERS += ["oh", "qh", "kh", "gb", "gt", "gh"]
POINTERS = ["out_pointer", "gate", "leaving", "saved", "shares", "flows"]
POINTERS += ["halves", "steps", "counts", "table"]


@gluon.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def keys_hopper_kernel(
    u, do, dx, q, plus, d_plus, out, out_pointer, gate, leaving, saved, shares, flows,
    halves, steps, counts, table,
    scale, batches, tokens, pieces, chunks, slots, saves, blocks,
    oh, qh, kh, gb, gt, gh,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    SPAN: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    """dK⁻ of one piece [B, T, H, DK]; but for frames dK⁺, `d_plus`, is added to it.

    u, do, dx in tiles [C, DV]; q, plus, d_plus, out in tiles [C, DK]; out may be d_plus. With
    scalar decay the shares of its gradient [B, H, DK / 16, T] and flows [B, H, DK / 16, blocks] are
    sums over a warp's channels.
    """
    dtype: gl.constexpr = u.dtype
    FRAMED: gl.constexpr = DECAY == "frames"
    SCALAR: gl.constexpr = DECAY == "scalar"
    SPLIT: gl.constexpr = DECAY != "none"
    SIZE: gl.constexpr = DK * DV
    head, batch, piece = head_and_piece(batches, HEADS)
    of_head = batch.to(gl.int64) * HEADS + head
    row = table + 8 * piece
    start = gl.load(row)
    length = gl.load(row + 1)
    slot = gl.load(row + 3)
    count = (length + C - 1) // C
    if FRAMED:
        first_chunk = gl.load(row + 7).to(gl.int64)
        lists = steps, counts, halves
        place_of = batch, head, piece, pieces, first_chunk, chunks
        count, steps, halves = frames_of(*lists, *place_of, HEADS, DK)

    # [DK, DV], [DK, C], [C, C]
    num_warps: gl.constexpr = gl.num_warps()
    STATE: gl.constexpr = product_layout(DV, num_warps)
    MIXED: gl.constexpr = product_layout(C, num_warps)
    SCORES: gl.constexpr = score_layout(num_warps)
    READING: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    WRITING: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    LINE: gl.constexpr = line_layout(num_warps)
    ROWS: gl.constexpr = rows_layout(num_warps)
    WARPS: gl.constexpr = warps_layout(num_warps)

    u_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DV], u.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DV], do.layout)
    dx_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DV], dx.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DK], q.layout)
    plus_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DK], plus.layout)
    score_tiles = gl.allocate_shared_memory(
        dtype, [2, C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    )
    out_tile = q_tiles.index(0)
    if not FRAMED:  # d_plus comes in and the sum goes out; fp32 goes out of the registers
        out_tile = gl.allocate_shared_memory(dtype, [C, DK], out.layout)
    lines = score_tiles
    if SCALAR:
        lines = gl.allocate_shared_memory(gl.float32, [6, C], FLAT)
    elif FRAMED:
        lines = gl.allocate_shared_memory(gl.float32, [2, DK], FLAT)
        halves += gl.arange(0, DK, channels_layout(num_warps))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    came = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(came, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barrier()

    channel = gl.arange(0, DK, gl.SliceLayout(1, STATE))
    col = gl.arange(0, DV, gl.SliceLayout(0, STATE))
    at_state = channel[:, None] * DV + col[None, :]
    state = gl.zeros([DK, DV], gl.float32, STATE)
    if slot >= 0:
        base = leaving + ((batch.to(gl.int64) * slots + slot) * HEADS + head) * SIZE
        state = -gl.load(base + at_state)

    origin = batch * tokens + start
    uc = head * DV
    oc = head * oh
    qc = head // GROUP * qh
    kc = head // GROUP * kh
    out_c = head * DK
    gate += batch.to(gl.int64) * gb + head * gh + start.to(gl.int64) * gt
    warp = gl.arange(0, num_warps, gl.SliceLayout(1, WARPS))
    if SPLIT:
        first_save = gl.load(row + 5)
        piece_saves = gl.load(row + 6) - first_save
        saved += ((batch.to(gl.int64) * saves + first_save) * HEADS + head) * SIZE
        first_block = gl.load(row + 4)
        if FRAMED:
            flows += ((batch.to(gl.int64) * blocks + first_block) * HEADS + head) * DK
        else:
            shares += of_head * num_warps * tokens + start
            flows += of_head * num_warps * blocks + first_block
    V_BYTES: gl.constexpr = u.block_type.nbytes * 3
    BYTES: gl.constexpr = V_BYTES + plus.block_type.nbytes * 2

    sources = (u, do, dx, q, plus)
    columns = (uc, oc, uc, qc, kc)
    tiles = (u_tiles, do_tiles, dx_tiles, q_tiles, plus_tiles)
    for i in gl.static_range(STAGES):
        if i < count:
            at = origin + entry_of(steps, i, count, FRAMED, True) // 4 * 8
            mbarrier.expect(ready.index(i), BYTES)
            bring(sources, columns, tiles, at, i, ready)

    entry = entry_of(steps, 0, count, FRAMED, True)
    coming = entry_of(steps, 1, count, FRAMED, True)
    here = entry // 4 * 8
    whole = 1.0
    if SCALAR:
        stop = gl.minimum(here + C, length)
        whole = write_decays(lines, 0, column(gate, here, stop, gt, LINE), 0.0, False)
    if FRAMED:
        lines.index(0).store(exp2(half_of(halves, entry, HEADS * DK)))
    barrier()

    i_index = gl.arange(0, C, gl.SliceLayout(1, SCORES))
    j_index = gl.arange(0, C, gl.SliceLayout(0, SCORES))
    no_scores = gl.zeros([C, C], gl.float32, SCORES)
    nothing = gl.zeros([DK, C], gl.float32, MIXED)
    no_state = gl.zeros([DK, DV], gl.float32, STATE)
    log_scale = gl.log2(scale)
    for step in range(count):
        ring = step % STAGES
        even = step % 2
        here, size = tokens_of(entry, length)
        u_tile = u_tiles.index(ring)
        do_tile = do_tiles.index(ring)
        dx_tile = dx_tiles.index(ring)
        q_tile = q_tiles.index(ring)
        plus_tile = plus_tiles.index(ring)
        # asked for now, wanted at the end
        wanted = entry_of(steps, step + STAGES, count, FRAMED, True)
        following = coming // 4 * 8
        if SCALAR:
            following_stop = gl.minimum(following + C, length)
            coming_decays = column(gate, following, following_stop, gt, LINE)
        if FRAMED:
            coming_half = half_of(halves, coming, HEADS * DK)

        if SPLIT:
            block = here // SPAN
            if ((here + size) % SPAN == 0) | (here + size == length):
                if SCALAR:
                    flow = gl.zeros([num_warps], gl.float32, gl.SliceLayout(1, WARPS))
                else:
                    flow = gl.zeros([DK], gl.float32, gl.SliceLayout(1, STATE))
                if block < piece_saves:
                    at_end = gl.load(saved + block.to(gl.int64) * (HEADS * SIZE) + at_state)
                    found = -gl.sum(at_end * state, 1)
                    if SCALAR:
                        found = gl.sum(gl.reshape(found, [num_warps, 16]), 1)
                        flow = gl.convert_layout(found, gl.SliceLayout(1, WARPS))
                    else:
                        flow = found
                if SCALAR:
                    gl.store(flows + block + warp * blocks, flow)
                else:
                    gl.store(flows + block * (HEADS * DK) + channel, flow)
        if FRAMED:
            half = lines.index(even).load(gl.SliceLayout(1, STATE))
            state = state * half[:, None]
        high = gl.convert_layout(rounded(state), READING)
        mbarrier.wait(ready.index(ring), step // STAGES & 1)
        if size < C:
            clear_all((do_tiles, dx_tiles), ring, size, ROWS)
            barrier()
        of_o = warpgroup_mma(
            do_tile, u_tile.permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        of_x = warpgroup_mma(
            dx_tile, u_tile.permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        mixed = warpgroup_mma(high, u_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        of_o, of_x = warpgroup_mma_wait(1, deps=[of_o, of_x])
        if SCALAR:
            sum_i = lines.index(3 * even).load(gl.SliceLayout(1, SCORES))
            sum_j = lines.index(3 * even).load(gl.SliceLayout(0, SCORES))
            of_o = of_o * exp2((sum_i + log_scale)[:, None] - sum_j[None, :])
            of_x = of_x * exp2(sum_i[:, None] - sum_j[None, :])
        of_o = gl.where(j_index[None, :] <= i_index[:, None], -of_o, 0.0)
        of_x = gl.where(j_index[None, :] < i_index[:, None], of_x, 0.0)
        score_tiles.index(0).store(rounded(of_o))
        score_tiles.index(1).store(rounded(of_x))
        fence_async_shared()
        if not FRAMED:
            tma.store_wait(0)  # of the step before, out of the same tile
        barrier()
        if not FRAMED:
            mbarrier.expect(came, d_plus.block_type.nbytes)
            tma.async_copy_global_to_shared(d_plus, [origin + here, out_c], came, out_tile)
        mixed, high = warpgroup_mma_wait(0, deps=[mixed, high])
        if SPLIT:
            rest = gl.convert_layout(low(state, rounded(state)), READING)
            mixed = warpgroup_mma(rest, u_tile.permute((1, 0)), mixed, is_async=True)
            mixed, rest = warpgroup_mma_wait(0, deps=[mixed, rest])
        if SCALAR:
            mixed = mixed * lines.index(3 * even + 2).load(gl.SliceLayout(0, MIXED))[None, :]
        of_q, of_k = score_tiles.index(0), score_tiles.index(1)
        if SCALAR:
            mixed = warpgroup_mma(q_tile.permute((1, 0)), of_q, mixed, is_async=True)
        else:  # the scale comes after rounding, as in the pass of dq
            by_q = warpgroup_mma(
                q_tile.permute((1, 0)), of_q, nothing, use_acc=False, is_async=True
            )
            by_q = warpgroup_mma_wait(0, deps=[by_q])
            mixed = mixed + scale * by_q
        mixed = warpgroup_mma(plus_tile.permute((1, 0)), of_k, mixed, is_async=True)
        if SCALAR:
            enters = lines.index(3 * even + 1).load(gl.SliceLayout(0, WRITING))[None, :]
            added = q_tile.permute((1, 0)).load(WRITING).to(gl.float32) * enters
            high = rounded(added)
            rest = low(added, high)
            grown = warpgroup_mma(high, do_tile, no_state, use_acc=False, is_async=True)
            grown = warpgroup_mma(rest, do_tile, grown, is_async=True)
            mixed = warpgroup_mma_wait(2, deps=[mixed])
            grown, high, rest = warpgroup_mma_wait(0, deps=[grown, high, rest])
            state = state * whole - scale * grown
            added = plus_tile.permute((1, 0)).load(WRITING).to(gl.float32) * enters
            high = rounded(added)
            rest = low(added, high)
            state = warpgroup_mma(rest, dx_tile, state, is_async=True)
            state = warpgroup_mma(high, dx_tile, state, is_async=True)
        else:
            grown = warpgroup_mma(
                q_tile.permute((1, 0)), do_tile, no_state, use_acc=False, is_async=True
            )
            mixed = warpgroup_mma_wait(1, deps=[mixed])
            grown = warpgroup_mma_wait(0, deps=[grown])
            state = state - scale * grown
            state = warpgroup_mma(plus_tile.permute((1, 0)), dx_tile, state, is_async=True)

        at_z = gl.arange(0, DK, gl.SliceLayout(1, MIXED))
        at_i = gl.arange(0, C, gl.SliceLayout(0, MIXED))
        at = (origin + here + at_i).to(gl.int64)[None, :] * (HEADS * DK) + (out_c + at_z)[:, None]
        inside = (at_i < size)[None, :] & (at_z >= 0)[:, None]
        if SCALAR:
            key = plus_tile.permute((1, 0)).load(MIXED).to(gl.float32)
            store_shares(shares, mixed * key, here, size, tokens, warp, NEGATIVE=True)
        if FRAMED:
            gl.store(out_pointer + at, -mixed, mask=inside)
        else:
            mbarrier.wait(came, step & 1)
            mixed = out_tile.permute((1, 0)).load(MIXED).to(gl.float32) - mixed
            if size < C:
                gl.store(out_pointer + at, mixed.to(out.dtype), mask=inside)
            else:
                out_tile.permute((1, 0)).store(rounded(mixed))
        if SCALAR:
            coming_whole = write_decays(lines, 3 - 3 * even, coming_decays, 0.0, False)
        if FRAMED:
            lines.index(1 - even).store(exp2(coming_half))
        if SCALAR:
            state, high, rest = warpgroup_mma_wait(0, deps=[state, high, rest])
        else:
            state = warpgroup_mma_wait(0, deps=[state])
        if FRAMED:
            state = state * half[:, None]
        fence_async_shared()
        barrier()
        if not FRAMED and size == C:
            tma.async_copy_shared_to_global(out, [origin + here, out_c], out_tile)
        if step + STAGES < count:
            row_at = origin + wanted // 4 * 8
            mbarrier.expect(ready.index(ring), BYTES)
            bring(sources, columns, tiles, row_at, ring, ready)
        if SCALAR:
            whole = coming_whole
        entry = coming
        coming = wanted

    if not FRAMED:
        tma.store_wait(0)
