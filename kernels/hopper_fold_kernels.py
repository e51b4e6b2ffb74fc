"""The fold kernel of state_kernels.py for Hopper: the same summaries, from the same table.

As in hopper_kernels.py the state is held transposed in registers, [DZ, DY], and tiles arrive by the
copy engine. It walks in the direction of the run, so that the state decays as it does there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from seqpar.kernels.hopper_kernels import _add, _clear, _decays, _entry, _exp2, barrier

NUMBERS = ["scale", "batches", "tokens", "pieces", "chunks", "yh", "zh", "gb", "gt", "gh"]
POINTERS = ["gate", "halves", "steps", "counts", "A", "B", "table"]


@gluon.jit
def _load(y, z, y_tiles, z_tiles, ready, slot, row, yc, zc):
    """Start copying one chunk's tiles into a slot of the ring."""
    mbarrier.expect(ready.index(slot), y.block_type.nbytes + z.block_type.nbytes)
    tma.async_copy_global_to_shared(y, [row, yc], ready.index(slot), y_tiles.index(slot))
    tma.async_copy_global_to_shared(z, [row, zc], ready.index(slot), z_tiles.index(slot))


@gluon.jit
def _reach(decays, REVERSE: gl.constexpr):
    """The decay of each token up to the chunk's end [C], and over the whole chunk (log2)."""
    decays = decays * 1.4426950408889634
    total = gl.associative_scan(decays, 0, _add)
    whole = gl.sum(decays, 0)
    if not REVERSE:
        total = whole - total
    return _exp2(total), whole


@gluon.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def fold_hopper_kernel(
    y,
    z,
    gate,
    halves,
    steps,
    counts,
    A,
    B,
    table,
    scale,
    batches,
    tokens,
    pieces,
    chunks,
    yh,
    zh,
    gb,
    gt,
    gh,
    HEADS: gl.constexpr,
    Y_GROUP: gl.constexpr,
    DY: gl.constexpr,
    DZ: gl.constexpr,
    C: gl.constexpr,
    DECAY: gl.constexpr,
    REVERSE: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """y [B*T, columns], heads `yh` columns apart, in tiles [C, DY]; z likewise."""
    dtype: gl.constexpr = y.dtype
    FRAMED: gl.constexpr = DECAY == "key"
    pid = gl.program_id(0)
    head = pid % HEADS
    batch = pid // HEADS % batches
    summary = pid // HEADS // batches
    summaries = gl.num_programs(0) // HEADS // batches
    start = gl.load(table + 4 * summary)
    length = gl.load(table + 4 * summary + 1)
    of_head = batch.to(gl.int64) * HEADS + head
    count = (length + C - 1) // C
    if FRAMED:
        first_chunk = gl.load(table + 4 * summary + 2).to(gl.int64)
        count = gl.load(counts + of_head * pieces + gl.load(table + 4 * summary + 3))
        steps += (of_head * chunks + first_chunk) * (C // 8)
        first_slot = (batch.to(gl.int64) * chunks + first_chunk) * (C // 8)
        halves += (first_slot * HEADS + head) * DY

    # [DZ, DY], 64 rows a warpgroup
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, DY, 16])
    ADDED: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    LINE: gl.constexpr = gl.BlockedLayout([C // 32], [32], [num_warps], [0])
    CHANNELS: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    y_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DY], y.layout)
    z_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DZ], z.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)

    origin = batch * tokens + start
    yc = head // Y_GROUP * yh
    zc = head * zh
    for i in gl.static_range(STAGES):
        if i < count:
            row = origin + _entry(steps, i, count, C, FRAMED, REVERSE) // 4 * 8
            _load(y, z, y_tiles, z_tiles, ready, i, row, yc, zc)

    # what the tiles of a chunk, or the state in a frame, are multiplied with: one line a step
    entry = _entry(steps, 0, count, C, FRAMED, REVERSE)
    coming_entry = _entry(steps, 1, count, C, FRAMED, REVERSE)
    wanted_entry = _entry(steps, STAGES, count, C, FRAMED, REVERSE)
    loaded_entry = wanted_entry
    step_rows = C
    if REVERSE:
        step_rows = -C
    if DECAY == "scalar":
        lines = gl.allocate_shared_memory(gl.float32, [2, C], FLAT)
        gate += batch.to(gl.int64) * gb + head * gh + start.to(gl.int64) * gt
        first = entry // 4 * 8
        reach, whole = _reach(_decays(gate, first, length, gt, C, LINE), REVERSE)
        lines.index(0).store(reach)
        passed = 0.0
        coming = _decays(gate, first + step_rows, length, gt, C, LINE)
    elif FRAMED:
        lines = gl.allocate_shared_memory(gl.float32, [4, DY], FLAT)
        halves += gl.arange(0, DY, CHANNELS)
        coming = gl.load(halves + (entry // 4).to(gl.int64) * (HEADS * DY))
        lines.index(0).store(_exp2(coming))
        passed = 2 * coming
        coming = gl.load(halves + (coming_entry // 4).to(gl.int64) * (HEADS * DY))
    barrier()

    state = warpgroup_mma_init(gl.zeros([DZ, DY], gl.float32, STATE))
    for step in range(count):
        ring = step % STAGES
        here = entry // 4 * 8
        size = gl.minimum(C >> entry % 4, length - here)
        y_tile = y_tiles.index(ring)
        z_tile = z_tiles.index(ring)
        later_entry = _entry(steps, step + 2, count, C, FRAMED, REVERSE)
        later_wanted = _entry(steps, step + 1 + STAGES, count, C, FRAMED, REVERSE)
        if DECAY == "scalar":
            later = _decays(gate, here + 2 * step_rows, length, gt, C, LINE)
            reach, coming_whole = _reach(coming, REVERSE)
            lines.index((step + 1) % 2).store(reach)
        elif FRAMED:
            later = gl.load(halves + (later_entry // 4).to(gl.int64) * (HEADS * DY))
            if step + 1 < count:
                passed += 2 * coming
            lines.index((step + 1) % 4).store(_exp2(coming))
        mbarrier.wait(ready.index(ring), step // STAGES & 1)
        if size < C:
            _clear(y_tile, size, ROWS)
            _clear(z_tile, size, ROWS)
            fence_async_shared()
            barrier()
        if DECAY == "scalar":
            reached = lines.index(step % 2).load(gl.SliceLayout(0, ADDED))
            added = z_tile.permute((1, 0)).load(ADDED)
            added = (added.to(gl.float32) * reached[None, :]).to(dtype)

        state = warpgroup_mma_wait(0, deps=[state])
        barrier()
        # all are done with the chunk before: its slot of the ring is free
        if step > 0:
            if step - 1 + STAGES < count:
                row = origin + loaded_entry // 4 * 8
                _load(y, z, y_tiles, z_tiles, ready, (step - 1) % STAGES, row, yc, zc)
        if DECAY == "scalar":
            passed += whole
            state = warpgroup_mma(added, y_tile, state * _exp2(whole), is_async=True)
            whole = coming_whole
            coming = later
        else:
            if FRAMED:
                if step > 0:
                    half = lines.index((step - 1) % 4).load(gl.SliceLayout(0, STATE))
                    state = state * half[None, :]
                half = lines.index(step % 4).load(gl.SliceLayout(0, STATE))
                state = state * half[None, :]
                coming = later
            state = warpgroup_mma(z_tile.permute((1, 0)), y_tile, state, is_async=True)
        entry = coming_entry
        coming_entry = later_entry
        loaded_entry = wanted_entry
        wanted_entry = later_wanted

    state = warpgroup_mma_wait(0, deps=[state])
    place = (batch.to(gl.int64) * summaries + summary) * HEADS + head
    if FRAMED:
        half = lines.index((count - 1) % 4).load(gl.SliceLayout(0, STATE))
        state = state * half[None, :]
        gl.store(A + place * DY + gl.arange(0, DY, CHANNELS), _exp2(passed))
    elif DECAY == "scalar":
        gl.store(A + place, _exp2(passed))
    z_index = gl.arange(0, DZ, gl.SliceLayout(1, STATE))
    y_index = gl.arange(0, DY, gl.SliceLayout(0, STATE))
    at = B + place * (DY * DZ) + y_index[None, :] * DZ + z_index[:, None]
    gl.store(at, state * scale)
