"""The run kernel of decay_kernels.py for Hopper, with no or scalar decay: same passes, same table.

Written in Gluon, for the order of things matters here: tiles arrive by the copy engine some chunks
ahead, the state stays in registers both as accumulator and as operand, and the scores of the next
chunk are formed while this one's output is stored. The state is held transposed, [DZ, DY], so that
each of its warpgroups owns 64 columns of z; scores are [j, i].

Sums for the gradient of the decays stay within a warp, one line of `shares` and `pulls` for each.
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

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.6


@gluon.jit
def _load(
    x,
    y,
    z,
    w,
    x_tiles,
    y_tiles,
    z_tiles,
    w_tiles,
    ready,
    slot,
    row,
    xc,
    yc,
    zc,
    wc,
    GATE: gl.constexpr,
):
    """Start copying one chunk's tiles into a slot of the ring."""
    size: gl.constexpr = x.block_type.nbytes + y.block_type.nbytes + z.block_type.nbytes
    if GATE:
        mbarrier.expect(ready.index(slot), size + w.block_type.nbytes)
    else:
        mbarrier.expect(ready.index(slot), size)
    tma.async_copy_global_to_shared(x, [row, xc], ready.index(slot), x_tiles.index(slot))
    tma.async_copy_global_to_shared(y, [row, yc], ready.index(slot), y_tiles.index(slot))
    tma.async_copy_global_to_shared(z, [row, zc], ready.index(slot), z_tiles.index(slot))
    if GATE:
        tma.async_copy_global_to_shared(w, [row, wc], ready.index(slot), w_tiles.index(slot))


@gluon.jit
def _clear(tile, length, layout: gl.constexpr):
    """Zero the rows of a tile from `length` on: they belong to another document."""
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    value = tile.load(layout)
    tile.store(gl.where((row < length)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _decays(gate, first, length, stride, C: gl.constexpr, layout: gl.constexpr):
    """A chunk's log decays [C]; zeros beyond the piece, on either side."""
    row = first + gl.arange(0, C, layout)
    inside = (row >= 0) & (row < length)
    return gl.load(gate + row.to(gl.int64) * stride, mask=inside, other=0.0).to(gl.float32)


@gluon.jit
def _exp2(x):
    """2^x, zero where that is subnormal: no instructions to save those."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _write_lines(lines, first, decays, log_scale, REVERSE: gl.constexpr):
    """What a chunk's decays multiply with, three lines [C]; returns the decay over the whole chunk.

    The running sum in the direction of the run (log2), the decay of what enters the chunk, and of
    each token up to the chunk's end; the first two with the scale in them.
    """
    decays = decays * 1.4426950408889634
    total = gl.associative_scan(decays, 0, _add)
    whole = gl.sum(decays, 0)
    if REVERSE:
        total = whole - total
    lines.index(first).store(total)
    lines.index(first + 1).store(_exp2(total + log_scale))
    lines.index(first + 2).store(_exp2(whole - total))
    return _exp2(whole)


@gluon.jit
def _add(a, b):
    return a + b


# Nothing is specialised by value: one compiled kernel a set of constants (see hopper.py).
NUMBERS = ["scale", "batches", "tokens", "blocks", "slots", "saves", "xh", "yh", "zh", "wh"]
NUMBERS += ["gb", "gt", "gh", "state_row", "state_col"]
POINTERS = ["gate", "entering", "saved", "out_pointer", "shares", "flows", "table"]


@gluon.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def run_hopper_kernel(
    x,
    y,
    z,
    other,
    out,
    gate,
    entering,
    saved,
    out_pointer,
    shares,
    flows,
    table,
    scale,
    batches,
    tokens,
    blocks,
    slots,
    saves,
    xh,
    yh,
    zh,
    wh,
    gb,
    gt,
    gh,
    state_row,
    state_col,
    HEADS: gl.constexpr,
    X_GROUP: gl.constexpr,
    Y_GROUP: gl.constexpr,
    Z_GROUP: gl.constexpr,
    W_GROUP: gl.constexpr,
    DY: gl.constexpr,
    DZ: gl.constexpr,
    C: gl.constexpr,
    DECAY: gl.constexpr,
    REVERSE: gl.constexpr,
    GATE: gl.constexpr,
    EVERY: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """x, y [B*T, columns], heads `xh`, `yh` columns apart, in tiles [C, DY]; z, out likewise."""
    dtype: gl.constexpr = x.dtype
    pid = gl.program_id(0)
    head = pid % HEADS
    batch = pid // HEADS % batches
    piece = pid // HEADS // batches
    start = gl.load(table + 7 * piece)
    length = gl.load(table + 7 * piece + 1)
    if REVERSE:
        slot = gl.load(table + 7 * piece + 3)
    else:
        slot = gl.load(table + 7 * piece + 2)
    count = (length + C - 1) // C

    # [DZ, DY], [DZ, C], [C, C]: each warpgroup has 64 rows of the first two, half the columns of
    # the last
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, DY, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, C, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, num_warps // 4], [16, C // (num_warps // 4), 16]
    )
    STATE_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    ADDED_OPERAND: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    LINE: gl.constexpr = gl.BlockedLayout([C // 32], [32], [num_warps], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    x_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DY], x.layout)
    y_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DY], y.layout)
    z_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DZ], z.layout)
    if GATE:
        w_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DZ], other.layout)
    else:
        w_tiles = z_tiles
    out_tiles = gl.allocate_shared_memory(dtype, [1, C, DZ], out.layout)
    score_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    score_tiles = gl.allocate_shared_memory(dtype, [1, C, C], score_layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if DECAY == "scalar":
        lines = gl.allocate_shared_memory(gl.float32, [8, C], FLAT)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)

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
        # a line of its own for each warp, for sums within a warp need no barrier
        WARPS: gl.constexpr = gl.BlockedLayout([1, C // 32], [1, 32], [num_warps, 1], [1, 0])
        warp = gl.arange(0, num_warps, gl.SliceLayout(1, WARPS))
        line_of_head = (batch.to(gl.int64) * HEADS + head) * num_warps
        shares += line_of_head * tokens + start
        flows += line_of_head * blocks + gl.load(table + 7 * piece + 4)
        first_save = gl.load(table + 7 * piece + 5)
        piece_saves = gl.load(table + 7 * piece + 6) - first_save
        saved += ((batch.to(gl.int64) * saves + first_save) * HEADS + head) * SIZE
        saved_at = z_index[:, None] * DY + y_index[None, :]

    # one chunk after the other in the direction of the run
    step_rows = C
    first = 0
    if REVERSE:
        step_rows = -C
        first = (count - 1) * C
    origin = batch * tokens + start
    xc = head // X_GROUP * xh
    yc = head // Y_GROUP * yh
    zc = head // Z_GROUP * zh
    wc = head // W_GROUP * wh
    gate += batch.to(gl.int64) * gb + head * gh + start.to(gl.int64) * gt
    out_pointer += (origin.to(gl.int64) * HEADS + head) * DZ
    for i in gl.static_range(STAGES):
        if i < count:
            row = origin + first + i * step_rows
            _load(
                x,
                y,
                z,
                other,
                x_tiles,
                y_tiles,
                z_tiles,
                w_tiles,
                ready,
                i,
                row,
                xc,
                yc,
                zc,
                wc,
                GATE,
            )

    j_index = gl.arange(0, C, gl.SliceLayout(1, SCORES))
    i_index = gl.arange(0, C, gl.SliceLayout(0, SCORES))
    if REVERSE:
        allowed = j_index[:, None] >= i_index[None, :]
    else:
        allowed = j_index[:, None] <= i_index[None, :]
    no_scores = gl.zeros([C, C], gl.float32, SCORES)
    no_mixed = gl.zeros([DZ, C], gl.float32, MIXED)

    log_scale = gl.log2(scale)
    decayed = 1.0
    if DECAY == "scalar":
        decays = _decays(gate, first, length, gt, C, LINE)
        decayed = _write_lines(lines, 0, decays, log_scale, REVERSE)
        decays = _decays(gate, first + step_rows, length, gt, C, LINE)
    mbarrier.wait(ready.index(0), 0)
    if first + C > length:
        _clear(y_tiles.index(0), length - first, ROWS)
        _clear(z_tiles.index(0), length - first, ROWS)
        if GATE:
            _clear(w_tiles.index(0), length - first, ROWS)
        fence_async_shared()
    barrier()
    scores = warpgroup_mma(
        y_tiles.index(0), x_tiles.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=[scores])

    for step in range(count):
        ring = step % STAGES
        even = step % 2
        here = first + step * step_rows
        x_tile = x_tiles.index(ring)
        y_tile = y_tiles.index(ring)
        z_tile = z_tiles.index(ring)
        if DECAY == "scalar":  # asked for two chunks ahead
            following_decays = _decays(gate, here + 2 * step_rows, length, gt, C, LINE)

        # what the state that enters the chunk gives
        if GATE and REVERSE:
            if (step == 0) | (here // C % EVERY == EVERY - 1):
                flow = gl.zeros([num_warps], gl.float32, gl.SliceLayout(1, WARPS))
                block = here // C // EVERY
                if block < piece_saves:
                    at_end = gl.load(saved + block.to(gl.int64) * (HEADS * SIZE) + saved_at)
                    found = gl.reshape(gl.sum(at_end * state, 1), [num_warps, 16])
                    flow = scale * gl.convert_layout(gl.sum(found, 1), gl.SliceLayout(1, WARPS))
                gl.store(flows + block + warp * blocks, flow)
        high = state.to(dtype)
        mixed = warpgroup_mma(
            gl.convert_layout(high, STATE_OPERAND),
            x_tile.permute((1, 0)),
            no_mixed,
            use_acc=False,
            is_async=True,
        )
        # the chunk's own scores, decayed, while that runs
        if DECAY == "scalar":
            sum_j = lines.index(4 * even).load(gl.SliceLayout(1, SCORES))
            sum_i = lines.index(4 * even).load(gl.SliceLayout(0, SCORES)) + log_scale
            scores = scores * _exp2(sum_i[None, :] - sum_j[:, None])
        scores = gl.where(allowed, scores, 0.0)
        score_tiles.index(0).store(scores.to(dtype))
        fence_async_shared()
        tma.store_wait(0)
        barrier()
        # all are done with the chunk before: its slot of the ring is free
        if step > 0:
            if step - 1 + STAGES < count:
                row = origin + here + (STAGES - 1) * step_rows
                freed = (step - 1) % STAGES
                _load(
                    x,
                    y,
                    z,
                    other,
                    x_tiles,
                    y_tiles,
                    z_tiles,
                    w_tiles,
                    ready,
                    freed,
                    row,
                    xc,
                    yc,
                    zc,
                    wc,
                    GATE,
                )

        mixed = warpgroup_mma_wait(0, deps=[mixed])
        if DECAY == "scalar":
            mixed = mixed * lines.index(4 * even + 1).load(gl.SliceLayout(0, MIXED))[None, :]
        mixed = warpgroup_mma(z_tile.permute((1, 0)), score_tiles.index(0), mixed, is_async=True)
        if DECAY == "scalar":
            reach = lines.index(4 * even + 2).load(gl.SliceLayout(0, ADDED_OPERAND))
            added = z_tile.permute((1, 0)).load(ADDED_OPERAND)
            added = (added.to(gl.float32) * reach[None, :]).to(dtype)
            state = warpgroup_mma(added, y_tile, state * decayed, is_async=True)
        else:
            state = warpgroup_mma(z_tile.permute((1, 0)), y_tile, state, is_async=True)

        # the scores of the next chunk
        following = here + step_rows
        if step + 1 < count:
            coming = (step + 1) % STAGES
            if DECAY == "scalar":
                decayed = _write_lines(lines, 4 - 4 * even, decays, log_scale, REVERSE)
                decays = following_decays
            mbarrier.wait(ready.index(coming), (step + 1) // STAGES & 1)
            if following + C > length:
                _clear(y_tiles.index(coming), length - following, ROWS)
                _clear(z_tiles.index(coming), length - following, ROWS)
                if GATE:
                    _clear(w_tiles.index(coming), length - following, ROWS)
                fence_async_shared()
                barrier()
        coming = (step + 1) % STAGES
        scores = warpgroup_mma(
            y_tiles.index(coming),
            x_tiles.index(coming).permute((1, 0)),
            no_scores,
            use_acc=False,
            is_async=True,
        )
        mixed = warpgroup_mma_wait(2, deps=[mixed])
        if DECAY == "none":
            mixed = mixed * scale

        if GATE:
            w_tile = w_tiles.index(ring).permute((1, 0)).load(MIXED).to(gl.float32)
            share = gl.sum(gl.reshape(mixed * w_tile, [num_warps, 16, C]), 1)
            token = here + gl.arange(0, C, gl.SliceLayout(0, WARPS))
            share_at = shares + warp[:, None] * tokens + token[None, :]
            share = gl.convert_layout(share, WARPS)
            gl.store(share_at, share, mask=(token < length)[None, :] & (warp >= 0)[:, None])

        if here + C > length:
            z_at = gl.arange(0, DZ, gl.SliceLayout(1, MIXED))
            i_at = gl.arange(0, C, gl.SliceLayout(0, MIXED))
            out_at = (
                out_pointer + z_at[:, None] + (here + i_at)[None, :].to(gl.int64) * (HEADS * DZ)
            )
            inside_out = (here + i_at < length)[None, :] & (z_at >= 0)[:, None]
            gl.store(out_at, mixed.to(dtype), mask=inside_out)
            barrier()  # the scores of this chunk have been read
        else:
            out_tile = out_tiles.index(0)
            out_tile.permute((1, 0)).store(mixed.to(dtype))
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(out, [origin + here, head * DZ], out_tile)
        state, scores = warpgroup_mma_wait(0, deps=[state, scores])

        if GATE and not REVERSE:
            block = here // C // EVERY
            if (step + 1 == count) | (here // C % EVERY == EVERY - 1):
                if block < piece_saves:
                    gl.store(saved + block.to(gl.int64) * (HEADS * SIZE) + saved_at, state)

    tma.store_wait(0)
