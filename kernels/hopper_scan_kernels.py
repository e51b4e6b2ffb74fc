"""States passed from piece to piece through dense transitions, for Hopper, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from seqpar.kernels.hopper_parts import barrier, product

COLUMNS = gl.constexpr(16)  # of the state, that a program has
STAGES = gl.constexpr(2)


@gluon.jit(do_not_specialize=["batches", "summaries", "slots"])
def scan_hopper_kernel(
    A, B, arriving, states, whole_A, whole_B, table, batches, summaries, slots,
    HEADS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, STEP: gl.constexpr,
    STORE: gl.constexpr, THROUGH: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """`scan_kernel` (state_kernels.py) where A is any matrix, by its transpose if TRANSPOSED.

    A [B * summaries * H * DK, DK] in tiles [DK, DK]. The next A is on its way during each product.
    whole_A is wanted if THROUGH: what becomes of the identity, in DK more columns, without B.
    """
    SIZE: gl.constexpr = DK * DV
    PART: gl.constexpr = 32
    STATE: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 1)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, STATE, 1)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    OF_B: gl.constexpr = DV // COLUMNS
    blocks: gl.constexpr = OF_B + (DK // COLUMNS if THROUGH else 0)
    pid = gl.program_id(0)
    block = pid % blocks
    head = pid // blocks % HEADS
    batch = (pid // (blocks * HEADS) % batches).to(gl.int64)
    chain = table + 5 * (pid // (blocks * HEADS) // batches)
    first = gl.load(chain)
    count = gl.load(chain + 1)
    slot = gl.load(chain + 2)
    source = gl.load(chain + 3)
    target = gl.load(chain + 4)

    A_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, DK, DK], A.layout)
    state_tile = gl.allocate_shared_memory(gl.float32, [DK, COLUMNS], ROWS)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barrier()
    summary = (batch.to(gl.int32) * summaries + first) * HEADS + head
    for i in gl.static_range(STAGES):
        if i < count:
            mbarrier.expect(ready.index(i), A.block_type.nbytes)
            at = (summary + i * STEP * HEADS) * DK
            tma.async_copy_global_to_shared(A, [at, 0], ready.index(i), A_tiles.index(i))

    row = gl.arange(0, DK, gl.SliceLayout(1, STATE))[:, None]
    col = gl.arange(0, COLUMNS, gl.SliceLayout(0, STATE))[None, :]
    offsets = row * DV + block * COLUMNS + col
    B += summary.to(gl.int64) * SIZE + offsets
    states += ((batch * slots + slot) * HEADS + head) * SIZE + offsets
    state = gl.zeros([DK, COLUMNS], gl.float32, STATE)
    if STORE:
        if source >= 0:
            state = gl.load(arriving + ((source * batches + batch) * HEADS + head) * SIZE + offsets)
            gl.store(states, state)
            states += STEP * HEADS * SIZE
    if THROUGH:
        state += gl.where(row == (block - OF_B) * COLUMNS + col, 1.0, 0.0)
    stored = count
    if target >= 0:
        stored = count - 1
    for i in range(count):
        if THROUGH:
            added = gl.load(B, mask=(offsets >= 0) & (block < OF_B), other=0.0)
        else:
            added = gl.load(B)
        B += STEP * HEADS * SIZE
        ring = i % STAGES
        state_tile.store(state)
        barrier()
        mbarrier.wait(ready.index(ring), i // STAGES & 1)
        state = gl.zeros([DK, COLUMNS], gl.float32, STATE)
        for k in gl.static_range(0, DK, PART):
            if TRANSPOSED:
                factors = A_tiles.index(ring).slice(k, PART, 0).permute((1, 0))
            else:
                factors = A_tiles.index(ring).slice(k, PART, 1)
            state = product(factors.load(LEFT), state_tile.slice(k, PART, 0).load(RIGHT), state)
        state += added
        barrier()  # all have read what is now overwritten
        if i + STAGES < count:
            mbarrier.expect(ready.index(ring), A.block_type.nbytes)
            at = (summary + (i + STAGES) * STEP * HEADS) * DK
            tma.async_copy_global_to_shared(A, [at, 0], ready.index(ring), A_tiles.index(ring))
        if STORE:
            if i < stored:
                gl.store(states, state)
            states += STEP * HEADS * SIZE
    if not STORE:
        place = (target * batches + batch) * HEADS + head
        if block < OF_B:
            gl.store(whole_B + place * SIZE + offsets, state)
        elif THROUGH:
            at = row * DK + (block - OF_B) * COLUMNS + col
            gl.store(whole_A + place * (DK * DK) + at, state)
