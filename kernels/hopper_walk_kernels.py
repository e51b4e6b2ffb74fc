"""The delta rule's walk (delta_kernels.py) for Hopper, in Gluon.

A step is a chunk of at most 64 tokens. With W = (1 - T B) K⁺, which like T is found beforehand, it
is a chain of two products,

    R = (1 - T B) V - W S        S' = S + K⁻ᵀ B R

The state is held transposed, [columns, K], as accumulator; it and U = B R become operands without
leaving the registers. Each warpgroup has 64 columns and goes its own way, so that the tensor cores
work for one while the other rounds. One more warp has the tiles brought by the copy engine, STAGES
steps ahead, and works out the decays.

What keeps these warps apart, for no barrier holds all of them. A slot of the ring, tiles and lines,
is the bringing warps' from `free` to `ready` and the others' from `ready` to `free`. Lines are
ordinary stores; the barrier of the bringing warps orders them before the one arrival at `ready`,
and tiles are counted in by the copy engine. A warpgroup arrives at `free` when its products of the
slot have been awaited and, behind its own barrier, its loads are done; nothing was written to
tiles, so the engine may overwrite them without a fence. With u and r it is the other way: each
thread fences what it stored for the engine, the barrier gathers the warps, one thread starts the
copy. Their tiles are written again two steps later, and before its barrier each step has waited for
the copies that the step before started.

U is rounded once: what is written is what goes into the state, lest the passes that form the states
again from it should drift away. With scalar decay, which is multiplied with it, and in summaries it
goes in in two parts.
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
    column,
    entry_of,
    exp2,
    frames_of,
    half_of,
    line_layout,
    low,
    product_layout,
    rounded,
    row_of,
    tokens_of,
    write_decays,
)

# a thread's, of the warpgroups that walk; the one that brings their tiles needs few
REGISTERS = gl.constexpr(232)


@gluon.jit
def _bring(ring, where, inputs, PARTS: gl.constexpr, HEADS: gl.constexpr, DECAY: gl.constexpr):
    """Fill the ring, step by step: tiles, and lines of β and of `write_decays`."""
    w_tiles, minus_tiles, v_tiles, solved_tiles, lines, half_lines, ready, free = ring
    steps, row, length, count, valued = where
    STAGES: gl.constexpr = ready.shape[0]
    DK: gl.constexpr = minus_tiles.shape[2]
    w, minus, v, solved, beta, gate, halves, bt, gt, solved_row, wc, kc, vc = inputs
    FRAMED: gl.constexpr = DECAY == "frames"
    LINE: gl.constexpr = line_layout(4)
    CHANNELS: gl.constexpr = channels_layout(4)
    BYTES: gl.constexpr = 2 * w.block_type.nbytes + solved.block_type.nbytes
    V_BYTES: gl.constexpr = PARTS * v.block_type.nbytes
    if FRAMED:
        halves += gl.arange(0, DK, CHANNELS)
    coming = entry_of(steps, 0, count, FRAMED, False)
    for step in range(count):
        slot = step % STAGES
        entry = coming
        coming = entry_of(steps, step + 1, count, FRAMED, False)
        here = entry // 4 * 8
        stop = gl.minimum(here + (C >> entry % 4), length)
        rate = column(beta, here, stop, bt, LINE)
        if DECAY == "scalar":
            decays = column(gate, here, stop, gt, LINE)
        if FRAMED:
            half = half_of(halves, entry, HEADS * DK)
        mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
        lines.index(4 * slot).store(rate)
        if DECAY == "scalar":
            whole = write_decays(lines, 4 * slot + 1, decays, 0.0, False)
            half_lines.index(slot).store(gl.zeros([DK], gl.float32, CHANNELS) + whole)
        if FRAMED:
            half_lines.index(slot).store(exp2(half))
        barrier()
        bar = ready.index(slot)
        if valued:
            mbarrier.expect(bar, BYTES + V_BYTES)
            for i in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    v, [row + here, vc + 64 * i], bar, v_tiles.index(PARTS * slot + i)
                )
        else:
            mbarrier.expect(bar, BYTES)
        bring((w, minus), (wc, kc), (w_tiles, minus_tiles), row + here, slot, ready)
        bring((solved,), (0,), (solved_tiles,), solved_row + here, slot, ready)


@gluon.jit
def _columns(
    ring, where, outputs, PART: gl.constexpr, PARTS: gl.constexpr,
    HEADS: gl.constexpr, DV: gl.constexpr, DECAY: gl.constexpr,
    SUMMARY: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """A warpgroup's 64 columns of the state, through all steps."""
    w_tiles, minus_tiles, v_tiles, solved_tiles, lines, half_lines, ready, free = ring
    steps, row, length, count, valued = where
    STAGES: gl.constexpr = ready.shape[0]
    DK: gl.constexpr = minus_tiles.shape[2]
    written, states, columns = outputs
    u, r, u_pointer, r_pointer, u_tiles, r_tiles = written
    entering, enters, summary = states
    uc, first_column, width = columns
    FRAMED: gl.constexpr = DECAY == "frames"
    SCALAR: gl.constexpr = DECAY == "scalar"
    # [64, DK] and [64, C]
    STATE: gl.constexpr = product_layout(DK, 4)
    MIXED: gl.constexpr = product_layout(C, 4)
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

    coming = entry_of(steps, 0, count, FRAMED, False)
    for step in range(count):
        slot = step % STAGES
        even = step % 2
        entry = coming
        coming = entry_of(steps, step + 1, count, FRAMED, False)
        here, size = tokens_of(entry, length)
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


NUMBERS = ["batches", "tokens", "pieces", "chunks", "slots", "kh", "vh", "bb", "bt", "bh"]
NUMBERS += ["gb", "gt", "gh"]
POINTERS = ["u_pointer", "r_pointer", "beta", "gate", "entering", "A", "B"]
POINTERS += ["halves", "steps", "counts", "table"]


@gluon.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def walk_hopper_kernel(
    w, minus, v, solved, u, r, u_pointer, r_pointer, beta, gate, entering, A, B,
    halves, steps, counts, table,
    batches, tokens, pieces, chunks, slots,
    kh, vh, bb, bt, bh, gb, gt, gh,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    PARTS: gl.constexpr, DECAY: gl.constexpr, SUMMARY: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """U, and with RESIDUAL R, of one piece; or SUMMARY, A and B: see `walk_kernel`.

    w [B*T, H*DK] and minus [B*T, columns] in tiles [C, DK]; v, u, r likewise in tiles [C, 64];
    solved [B*H*T, C]. A program has 64 PARTS columns of the state.
    """
    OF_A: gl.constexpr = DK // (64 * PARTS) if SUMMARY else 0
    OF_B: gl.constexpr = DV // (64 * PARTS)
    BLOCKS: gl.constexpr = OF_A + OF_B
    FRAMED: gl.constexpr = DECAY == "frames"
    pid = gl.program_id(0)
    block = pid % BLOCKS
    head = pid // BLOCKS % HEADS
    batch = pid // (BLOCKS * HEADS) % batches
    place = pid // (BLOCKS * HEADS) // batches
    valued = block < OF_B
    first_column = block * (64 * PARTS)
    width = DV
    enters = valued
    summary = B
    line, first_chunk, piece = row_of(table, place, SUMMARY)
    if SUMMARY:
        summaries = gl.num_programs(0) // (BLOCKS * HEADS) // batches
        index = (batch.to(gl.int64) * summaries + place) * HEADS + head
        if valued:
            summary = B + index * (DK * DV)
        else:
            summary = A + index * (DK * DK)
            first_column -= OF_B * (64 * PARTS)
            width = DK
    else:
        slot = gl.load(line + 2)
        enters = slot >= 0
        entering += ((batch.to(gl.int64) * slots + slot) * HEADS + head) * (DK * DV)
    start = gl.load(line)
    length = gl.load(line + 1)
    count = (length + C - 1) // C
    if FRAMED:
        lists = steps, counts, halves
        place_of = batch, head, piece, pieces, first_chunk, chunks
        count, steps, halves = frames_of(*lists, *place_of, HEADS, DK)
    row = batch * tokens + start
    solved_row = (batch * HEADS + head) * tokens + start
    beta += batch.to(gl.int64) * bb + head * bh + start.to(gl.int64) * bt
    gate += batch.to(gl.int64) * gb + head * gh + start.to(gl.int64) * gt
    wc, kc, uc = head * DK, head // GROUP * kh, head * DV
    vc = head * vh + first_column

    dtype: gl.constexpr = w.dtype
    STAGES: gl.constexpr = 3 if SUMMARY else 2
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DK], w.layout)
    minus_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, DK], minus.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [PARTS * STAGES, C, 64], v.layout)
    solved_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, C], solved.layout)
    u_tiles = v_tiles
    r_tiles = v_tiles
    if not SUMMARY:
        u_tiles = gl.allocate_shared_memory(dtype, [2 * PARTS, C, 64], u.layout)
        if RESIDUAL:
            r_tiles = gl.allocate_shared_memory(dtype, [2 * PARTS, C, 64], r.layout)
    lines = gl.allocate_shared_memory(gl.float32, [4 * STAGES, C], FLAT)
    half_lines = lines
    if DECAY != "none":
        half_lines = gl.allocate_shared_memory(gl.float32, [STAGES, DK], FLAT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=PARTS)
    fence_async_shared()
    barrier()
    ring = (w_tiles, minus_tiles, v_tiles, solved_tiles, lines, half_lines, ready, free)
    where = (steps, row, length, count, valued)
    inputs = (w, minus, v, solved, beta, gate, halves, bt, gt, solved_row, wc, kc, vc)
    written = (u, r, u_pointer, r_pointer, u_tiles, r_tiles)
    outputs = (written, (entering, enters, summary), (uc, first_column, width))
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_bring, (ring, where, inputs, PARTS, HEADS, DECAY)),
                (_columns, (ring, where, outputs, 0, PARTS, HEADS, DV, DECAY, SUMMARY, RESIDUAL)),
                (_columns, (ring, where, outputs, 1, PARTS, HEADS, DV, DECAY, SUMMARY, RESIDUAL)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_bring, (ring, where, inputs, PARTS, HEADS, DECAY)),
                (_columns, (ring, where, outputs, 0, PARTS, HEADS, DV, DECAY, SUMMARY, RESIDUAL)),
            ],
            [4],
            [REGISTERS],
        )
