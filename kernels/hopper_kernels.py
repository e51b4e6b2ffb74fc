"""The run kernel of decay_kernels.py for Hopper: the same passes, the same table.

Written in Gluon, for the order of things matters here: tiles arrive by the copy engine some chunks
ahead, the state stays in registers both as accumulator and as operand, and the scores of the next
chunk are formed while this one's output is stored. The state is held transposed, [DZ, DY], so that
each of its warpgroups owns 64 columns of z; scores are [j, i].

Sums for the gradient of scalar decays stay within a warp, which has a line of its own in `shares`
and `flows`.
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
    tokens_of,
    warps_layout,
    write_decays,
)

STAGES = gl.constexpr(3)  # tiles of so many chunks are on their way or at hand

# Nothing is specialised by value: one compiled kernel a set of constants (see hopper.py).
NUMBERS = ["scale", "batches", "tokens", "blocks", "slots", "saves", "chunks"]
NUMBERS += ["xh", "yh", "zh", "wh", "gb", "gt", "gh", "state_row", "state_col"]
POINTERS = ["gate", "entering", "saved", "out_pointer", "shares", "flows"]
POINTERS += ["halves", "steps", "counts", "table"]


@gluon.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def run_hopper_kernel(
    x, y, z, other, out, out_pointer, gate, entering, saved, shares, flows,
    halves, steps, counts, table,
    scale, batches, tokens, blocks, slots, saves, chunks,
    xh, yh, zh, wh, gb, gt, gh, state_row, state_col,
    HEADS: gl.constexpr, X_GROUP: gl.constexpr, Y_GROUP: gl.constexpr, Z_GROUP: gl.constexpr,
    W_GROUP: gl.constexpr, DY: gl.constexpr, DZ: gl.constexpr, DECAY: gl.constexpr,
    REVERSE: gl.constexpr, GATE: gl.constexpr, STRICT: gl.constexpr, SPLIT: gl.constexpr,
    EXACT: gl.constexpr, SPAN: gl.constexpr,
):  # fmt: skip
    """x, y [B*T, columns], heads `xh`, `yh` columns apart, in tiles [C, DY]; z, out likewise.
    STRICT: leave j = i out, forwards, for any scale, and save nothing. SPLIT: take the state in two
    parts; EXACT: what goes into it with scalar decay."""
    dtype: gl.constexpr = x.dtype
    FRAMED: gl.constexpr = DECAY == "key" or DECAY == "value"
    SCALAR: gl.constexpr = DECAY == "scalar"
    SHARES: gl.constexpr = GATE and not FRAMED
    head, batch, piece = head_and_piece(batches, HEADS)
    line = table + 8 * piece
    start = gl.load(line)
    length = gl.load(line + 1)
    slot = gl.load(line + (3 if REVERSE else 2))
    count = (length + C - 1) // C
    if FRAMED:
        first_chunk = gl.load(line + 7).to(gl.int64)
        pieces = gl.num_programs(0) // HEADS // batches
        DECAYED: gl.constexpr = DY if DECAY == "key" else DZ
        lists = steps, counts, halves
        place_of = batch, head, piece, pieces, first_chunk, chunks
        count, steps, halves = frames_of(*lists, *place_of, HEADS, DECAYED)

    # [DZ, DY], [DZ, C], [C, C]: each warpgroup has 64 rows of the first two, half the columns of
    # the last
    num_warps: gl.constexpr = gl.num_warps()
    STATE: gl.constexpr = product_layout(DY, num_warps)
    MIXED: gl.constexpr = product_layout(C, num_warps)
    SCORES: gl.constexpr = score_layout(num_warps)
    READING: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    WRITING: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    LINE: gl.constexpr = line_layout(num_warps)
    ROWS: gl.constexpr = rows_layout(num_warps)

    x_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DY], x.layout)
    y_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DY], y.layout)
    z_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DZ], z.layout)
    if SHARES:
        w_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DZ], other.layout)
    else:
        out_tiles = gl.allocate_shared_memory(out.dtype, [1, C, DZ], out.layout)
    score_tile = gl.allocate_shared_memory(
        dtype, [C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if SCALAR:
        lines = gl.allocate_shared_memory(gl.float32, [8, C], FLAT)
    elif FRAMED:
        lines = gl.allocate_shared_memory(gl.float32, [2, DECAYED], FLAT)
        halves += gl.arange(0, DECAYED, channels_layout(num_warps))
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barrier()

    z_index = gl.arange(0, DZ, gl.SliceLayout(1, STATE))
    y_index = gl.arange(0, DY, gl.SliceLayout(0, STATE))
    offsets = z_index[:, None] * state_col + y_index[None, :] * state_row
    SIZE: gl.constexpr = DY * DZ
    state = gl.zeros([DZ, DY], gl.float32, STATE)
    if slot >= 0:
        base = entering + ((batch.to(gl.int64) * slots + slot) * HEADS + head) * SIZE
        state = gl.load(base + offsets)
        if REVERSE:
            state = state / scale
    if GATE:
        first_save = gl.load(table + 8 * piece + 5)
        piece_saves = gl.load(table + 8 * piece + 6) - first_save
        saved += ((batch.to(gl.int64) * saves + first_save) * HEADS + head) * SIZE
        saved_at = z_index[:, None] * DY + y_index[None, :]
        first_block = gl.load(table + 8 * piece + 4)
        if FRAMED:
            flows += ((batch.to(gl.int64) * blocks + first_block) * HEADS + head) * DZ
    if SHARES:
        # a line of its own for each warp, for sums within a warp need no barrier
        WARPS: gl.constexpr = warps_layout(num_warps)
        warp = gl.arange(0, num_warps, gl.SliceLayout(1, WARPS))
        line_of_head = (batch.to(gl.int64) * HEADS + head) * num_warps
        shares += line_of_head * tokens + start
        flows += line_of_head * blocks + first_block

    # one chunk after the other in the direction of the run; three are on their way
    entry = entry_of(steps, 0, count, FRAMED, REVERSE)
    coming_entry = entry_of(steps, 1, count, FRAMED, REVERSE)
    loaded_entry = entry_of(steps, 2, count, FRAMED, REVERSE)
    wanted_entry = entry_of(steps, 3, count, FRAMED, REVERSE)
    origin = batch * tokens + start
    sources = x, y, z
    tiles = x_tiles, y_tiles, z_tiles
    columns = head // X_GROUP * xh, head // Y_GROUP * yh, head // Z_GROUP * zh
    if SHARES:
        sources = sources + (other,)
        tiles = tiles + (w_tiles,)
        columns = columns + (head // W_GROUP * wh,)
    Z_BYTES: gl.constexpr = z.block_type.nbytes * (2 if SHARES else 1)
    BYTES: gl.constexpr = x.block_type.nbytes + y.block_type.nbytes + Z_BYTES
    gate += batch.to(gl.int64) * gb + head * gh + start.to(gl.int64) * gt
    out_pointer += (origin.to(gl.int64) * HEADS + head) * DZ
    for i in gl.static_range(STAGES):
        if i < count:
            at = origin + entry_of(steps, i, count, FRAMED, REVERSE) // 4 * 8
            mbarrier.expect(ready.index(i), BYTES)
            bring(sources, columns, tiles, at, i, ready)

    j_index = gl.arange(0, C, gl.SliceLayout(1, SCORES))
    i_index = gl.arange(0, C, gl.SliceLayout(0, SCORES))
    if STRICT:
        allowed = j_index[:, None] < i_index[None, :]
    elif REVERSE:
        allowed = j_index[:, None] >= i_index[None, :]
    else:
        allowed = j_index[:, None] <= i_index[None, :]
    no_scores = gl.zeros([C, C], gl.float32, SCORES)
    no_mixed = gl.zeros([DZ, C], gl.float32, MIXED)

    first, size = tokens_of(entry, length)
    log_scale = gl.log2(scale)
    if STRICT:
        log_scale = 0.0
    decayed = 1.0
    if SCALAR:
        step_rows = C
        if REVERSE:
            step_rows = -C
        decays = column(gate, first, length, gt, LINE)
        decayed = write_decays(lines, 0, decays, log_scale, REVERSE)
        decays = column(gate, first + step_rows, length, gt, LINE)
    elif FRAMED:
        half = half_of(halves, entry, HEADS * DECAYED)
        lines.index(0).store(exp2(half))
        coming_half = half_of(halves, coming_entry, HEADS * DECAYED)
    mbarrier.wait(ready.index(0), 0)
    if size < C:
        clear_all(tiles[1:], 0, size, ROWS)
    barrier()
    scores = warpgroup_mma(
        y_tiles.index(0), x_tiles.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=[scores])

    for step in range(count):
        ring = step % STAGES
        even = step % 2
        here, size = tokens_of(entry, length)
        _, following_size = tokens_of(coming_entry, length)
        block = here // SPAN
        ends = ((here + size) % SPAN == 0) | (here + size == length)
        x_tile = x_tiles.index(ring)
        y_tile = y_tiles.index(ring)
        z_tile = z_tiles.index(ring)
        if SCALAR:  # asked for two chunks ahead
            following_decays = column(gate, here + 2 * step_rows, length, gt, LINE)
        elif FRAMED:
            following_half = half_of(halves, loaded_entry, HEADS * DECAYED)
        later_entry = entry_of(steps, step + 4, count, FRAMED, REVERSE)

        if GATE and REVERSE:
            if ends:
                if SHARES:
                    flow = gl.zeros([num_warps], gl.float32, gl.SliceLayout(1, WARPS))
                else:
                    flow = gl.zeros([DZ], gl.float32, gl.SliceLayout(1, STATE))
                if block < piece_saves:
                    at_end = gl.load(saved + block.to(gl.int64) * (HEADS * SIZE) + saved_at)
                    found = scale * gl.sum(at_end * state, 1)
                    if SHARES:
                        found = gl.sum(gl.reshape(found, [num_warps, 16]), 1)
                        flow = gl.convert_layout(found, gl.SliceLayout(1, WARPS))
                    else:
                        flow = found
                if SHARES:
                    gl.store(flows + block + warp * blocks, flow)
                else:
                    gl.store(flows + block * (HEADS * DZ) + z_index, flow)
        if DECAY == "key":
            state = state * lines.index(even).load(gl.SliceLayout(0, STATE))[None, :]
        elif DECAY == "value":
            state = state * lines.index(even).load(gl.SliceLayout(1, STATE))[:, None]
        high = rounded(state)
        read = gl.convert_layout(high, READING)
        mixed = warpgroup_mma(read, x_tile.permute((1, 0)), no_mixed, use_acc=False, is_async=True)
        if SPLIT:
            read_low = gl.convert_layout(low(state, high), READING)
            mixed = warpgroup_mma(read_low, x_tile.permute((1, 0)), mixed, is_async=True)
        # the chunk's own scores, decayed, while that runs
        if SCALAR:
            sum_j = lines.index(4 * even).load(gl.SliceLayout(1, SCORES))
            sum_i = lines.index(4 * even).load(gl.SliceLayout(0, SCORES)) + log_scale
            scores = scores * exp2(sum_i[None, :] - sum_j[:, None])
        scores = gl.where(allowed, scores, 0.0)
        score_tile.store(rounded(scores))
        fence_async_shared()
        tma.store_wait(0)
        barrier()
        # all are done with the chunk before: its slot of the ring is free
        if step > 0:
            if step - 1 + STAGES < count:
                at = origin + loaded_entry // 4 * 8
                freed = (step - 1) % STAGES
                mbarrier.expect(ready.index(freed), BYTES)
                bring(sources, columns, tiles, at, freed, ready)

        mixed = warpgroup_mma_wait(0, deps=[mixed])
        if SCALAR:
            mixed = mixed * lines.index(4 * even + 1).load(gl.SliceLayout(0, MIXED))[None, :]
        mixed = warpgroup_mma(z_tile.permute((1, 0)), score_tile, mixed, is_async=True)
        if SCALAR:
            reach = lines.index(4 * even + 2).load(gl.SliceLayout(0, WRITING))
            added = z_tile.permute((1, 0)).load(WRITING).to(gl.float32) * reach[None, :]
            high = rounded(added)
            state = warpgroup_mma(high, y_tile, state * decayed, is_async=True)
            if EXACT:
                state = warpgroup_mma(low(added, high), y_tile, state, is_async=True)
        else:
            state = warpgroup_mma(z_tile.permute((1, 0)), y_tile, state, is_async=True)

        # the scores of the next chunk
        if step + 1 < count:
            coming = (step + 1) % STAGES
            if SCALAR:
                decayed = write_decays(lines, 4 - 4 * even, decays, log_scale, REVERSE)
                decays = following_decays
            elif FRAMED:
                lines.index(1 - even).store(exp2(coming_half))
                coming_half = following_half
            mbarrier.wait(ready.index(coming), (step + 1) // STAGES & 1)
            if following_size < C:
                clear_all(tiles[1:], coming, following_size, ROWS)
                barrier()
        coming = (step + 1) % STAGES
        scores = warpgroup_mma(
            y_tiles.index(coming),
            x_tiles.index(coming).permute((1, 0)),
            no_scores,
            use_acc=False,
            is_async=True,
        )
        mixed = warpgroup_mma_wait(3 if SCALAR and EXACT else 2, deps=[mixed])
        if not SCALAR or STRICT:
            mixed = mixed * scale

        if SHARES:
            w_tile = w_tiles.index(ring).permute((1, 0)).load(MIXED).to(gl.float32)
            share = gl.sum(gl.reshape(mixed * w_tile, [num_warps, 16, C]), 1)
            token = here + gl.arange(0, C, gl.SliceLayout(0, WARPS))
            share_at = shares + warp[:, None] * tokens + token[None, :]
            share = gl.convert_layout(share, WARPS)
            gl.store(share_at, share, mask=(token < length)[None, :] & (warp >= 0)[:, None])

        if size < C:
            z_at = gl.arange(0, DZ, gl.SliceLayout(1, MIXED))
            i_at = gl.arange(0, C, gl.SliceLayout(0, MIXED))
            out_at = (
                out_pointer + z_at[:, None] + (here + i_at)[None, :].to(gl.int64) * (HEADS * DZ)
            )
            inside_out = (i_at < size)[None, :] & (z_at >= 0)[:, None]
            gl.store(out_at, mixed.to(out.dtype), mask=inside_out)
            barrier()  # the scores of this chunk have been read
        else:
            if SHARES:  # in the place of w, of which each thread has read what it writes
                out_tile = w_tiles.index(ring)
            else:
                out_tile = out_tiles.index(0)
            out_tile.permute((1, 0)).store(mixed.to(out.dtype))
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(out, [origin + here, head * DZ], out_tile)
        state, scores = warpgroup_mma_wait(0, deps=[state, scores])
        if DECAY == "key":
            state = state * lines.index(even).load(gl.SliceLayout(0, STATE))[None, :]
        elif DECAY == "value":
            state = state * lines.index(even).load(gl.SliceLayout(1, STATE))[:, None]

        if GATE and not REVERSE and not STRICT:
            if ends and block < piece_saves:
                gl.store(saved + block.to(gl.int64) * (HEADS * SIZE) + saved_at, state)
        entry = coming_entry
        coming_entry = loaded_entry
        loaded_entry = wanted_entry
        wanted_entry = later_entry

    tma.store_wait(0)
