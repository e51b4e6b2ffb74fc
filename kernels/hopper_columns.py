"""One warpgroup's part of the walk on Hopper (hopper_walk.py): 64 columns of the state."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from seqpar.kernels.hopper_parts import barrier, entry_of, low, rounded


@gluon.jit
def walk_columns(
    u,
    r,
    u_pointer,
    r_pointer,
    entering,
    enters,
    summary,
    w_tiles,
    minus_tiles,
    v_tiles,
    solved_tiles,
    u_tiles,
    r_tiles,
    lines,
    half_lines,
    ready,
    free,
    steps,
    row,
    uc,
    first_column,
    length,
    count,
    valued,
    width,
    PART: gl.constexpr,
    PARTS: gl.constexpr,
    HEADS: gl.constexpr,
    DK: gl.constexpr,
    DV: gl.constexpr,
    C: gl.constexpr,
    DECAY: gl.constexpr,
    SUMMARY: gl.constexpr,
    RESIDUAL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A warpgroup's 64 columns of the state, through all steps."""
    FRAMED: gl.constexpr = DECAY == "frames"
    SCALAR: gl.constexpr = DECAY == "scalar"
    # [64, DK] and [64, C]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    READING: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    WRITING: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    col = first_column + 64 * PART + gl.arange(0, 64, gl.SliceLayout(1, STATE))
    channel = gl.arange(0, DK, gl.SliceLayout(0, STATE))
    state = gl.zeros([64, DK], gl.float32, STATE)
    if SUMMARY:
        if not valued:
            state = gl.where(col[:, None] == channel[None, :], 1.0, state)
    else:
        if enters:
            state = gl.load(entering + col[:, None] + channel[None, :] * DV)

    coming = entry_of(steps, 0, count, C, FRAMED, False)
    for step in range(count):
        slot = step % STAGES
        even = step % 2
        entry = coming
        coming = entry_of(steps, step + 1, count, C, FRAMED, False)
        here = entry // 4 * 8
        size = gl.minimum(C >> entry % 4, length - here)
        w_tile = w_tiles.index(slot).permute((1, 0))
        mbarrier.wait(ready.index(slot), step // STAGES & 1)
        rate = lines.index(4 * slot).load(gl.SliceLayout(0, MIXED))[None, :]
        residual = v_tiles.index(PARTS * slot + PART).permute((1, 0)).load(MIXED).to(gl.float32)
        if SUMMARY:
            residual = gl.where(valued, residual, 0.0)
        rated = gl.convert_layout(rounded(-rate * residual), READING)
        solved_tile = solved_tiles.index(slot).permute((1, 0))
        residual = warpgroup_mma(rated, solved_tile, residual, is_async=True)
        if FRAMED:
            half = half_lines.index(slot).load(gl.SliceLayout(0, STATE))
            state = state * half[None, :]
        high = rounded(-state)
        read = gl.convert_layout(high, READING)
        residual = warpgroup_mma(read, w_tile, residual, is_async=True)
        if SUMMARY:
            read_low = gl.convert_layout(low(-state, high), READING)
            residual = warpgroup_mma(read_low, w_tile, residual, is_async=True)
        residual = warpgroup_mma_wait(0, deps=[residual])
        write = rate * residual
        if not SUMMARY:
            final = rounded(write)
            write = final.to(gl.float32)
        if SCALAR:
            write = write * lines.index(4 * slot + 3).load(gl.SliceLayout(0, MIXED))[None, :]
            state = state * half_lines.index(slot).load(gl.SliceLayout(0, STATE))[None, :]
        high = rounded(write)
        minus_tile = minus_tiles.index(slot)
        state = warpgroup_mma(gl.convert_layout(high, WRITING), minus_tile, state, is_async=True)
        if SUMMARY or SCALAR:
            write_low = gl.convert_layout(low(write, high), WRITING)
            state = warpgroup_mma(write_low, minus_tile, state, is_async=True)

        if not SUMMARY:
            if size < C:
                at_z = first_column + 64 * PART + gl.arange(0, 64, gl.SliceLayout(1, MIXED))
                at_i = gl.arange(0, C, gl.SliceLayout(0, MIXED))
                out = (row + here + at_i).to(gl.int64)[None, :] * (HEADS * DV) + uc
                out += at_z[:, None]
                inside = (at_i < size)[None, :] & (at_z >= 0)[:, None]
                gl.store(u_pointer + out, final, mask=inside)
                if RESIDUAL:
                    gl.store(r_pointer + out, rounded(residual), mask=inside)
            else:
                u_tiles.index(2 * PART + even).permute((1, 0)).store(final)
                if RESIDUAL:
                    r_tiles.index(2 * PART + even).permute((1, 0)).store(rounded(residual))
            fence_async_shared()
            tma.store_wait(0)  # of the step before: its tile is written to in the next one
        state = warpgroup_mma_wait(0, deps=[state])
        if FRAMED:
            half = half_lines.index(slot).load(gl.SliceLayout(0, STATE))
            state = state * half[None, :]
        barrier()
        mbarrier.arrive(free.index(slot), count=1)
        if not SUMMARY and size == C:
            at = [row + here, uc + first_column + 64 * PART]
            tma.async_copy_shared_to_global(u, at, u_tiles.index(2 * PART + even))
            if RESIDUAL:
                tma.async_copy_shared_to_global(r, at, r_tiles.index(2 * PART + even))

    if SUMMARY:
        gl.store(summary + col[:, None] + channel[None, :] * width, state)
    else:
        tma.store_wait(0)
