"""What the delta rule's walk on Hopper needs of keys alone, found for all its steps at once.

Of a step of at most 64 tokens, in the notation of delta_kernels.py, T = M (1 + B M)⁻¹ and
W = (1 - T B) K⁺. With scalar decay, of which G is the running sum within the step, M and K⁺ have
e^(G_i - G_j) and e^(G_i) in them.

A program has one step. M lies in shared memory, and T takes its place: first that of four blocks
of 16 tokens on the diagonal, by a warp each and row by row, which stays exact where keys repeat and
β is 2; then what lies between two neighbours, T_c above and T_r below, of 16 and then of 32 tokens,

    T_rc = (1 - T_r B_r) M_rc (1 - B_c T_c)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)

from seqpar.kernels.hopper_parts import (
    FLAT,
    C,
    barrier,
    clear,
    column,
    exp2,
    line_layout,
    product,
    product_layout,
    rounded,
    rows_layout,
    score_layout,
    write_decays,
)

# Blocks of M and T change columns by the exclusive or of their numbers, so that those on the
# diagonal lie in the first 16 columns; fours of columns do likewise, against bank conflicts.
COLUMNS = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32]]
BLOCK = gl.constexpr(
    gl.SharedLinearLayout([*COLUMNS, [1, 4], [2, 8], [4, 0], [8, 0]])  # [16, 64]
)
PAIR = gl.constexpr(
    gl.SharedLinearLayout([*COLUMNS, [1, 4], [2, 8], [4, 0], [8, 0], [16, 16]])  # [32, 64]
)
WHOLE = gl.constexpr(
    gl.SharedLinearLayout([*COLUMNS, [1, 4], [2, 8], [4, 0], [8, 0], [16, 16], [32, 32]])
)
BLOCKS = gl.constexpr(  # [4, 16, 64]
    gl.SharedLinearLayout(
        [[0, *column] for column in COLUMNS]
        + [[0, 1, 4], [0, 2, 8], [0, 4, 0], [0, 8, 0], [1, 0, 0], [2, 0, 0]]
    )
)
ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

NUMBERS = ["tokens", "chunks", "kh", "bb", "bt", "bh", "gb", "gt", "gh"]
POINTERS = ["beta", "gate", "levels", "table"]


@gluon.jit
def _joined(upper, lower, between, beta, start: gl.constexpr):
    """T between two blocks. beta: of all tokens, the first of them `start`."""
    SIZE: gl.constexpr = between.shape[0]
    BLOCK: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, 2], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, BLOCK, 1)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, BLOCK, 1)
    OF_COLUMNS: gl.constexpr = gl.SliceLayout(0, LEFT)
    of_upper = beta.slice(start, SIZE).load(OF_COLUMNS)[None, :]
    of_lower = beta.slice(start + SIZE, SIZE).load(OF_COLUMNS)[None, :]
    P = product(between.load(LEFT) * -of_upper, upper.load(RIGHT), between.load(BLOCK))
    return product(lower.load(LEFT) * -of_lower, gl.convert_layout(P, RIGHT), P)


@gluon.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def solve_hopper_kernel(
    plus, minus, beta, gate, solved, w, levels, table,
    tokens, chunks, kh, bb, bt, bh, gb, gt, gh,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DK: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    """solved [B, H, T, 64]: T of each step; w [B, T, H, DK].

    plus, minus in tiles [64, DK]; beta [B, T, H]. `table`: `tables.cut_rows` of chunks of 64
    tokens. Rows of T are those of tokens, columns are counted from the first token of the token's
    frame, with zeros beyond it.
    """
    FRAMED: gl.constexpr = DECAY == "frames"
    SCALAR: gl.constexpr = DECAY == "scalar"
    dtype: gl.constexpr = plus.dtype
    pid = gl.program_id(0)
    head = pid % HEADS
    chunk = pid // HEADS % chunks
    batch = (pid // HEADS // chunks).to(gl.int64)
    start = gl.load(table + 3 * chunk)
    length = gl.load(table + 3 * chunk + 1)

    SCORES: gl.constexpr = score_layout(4)
    KEYS: gl.constexpr = product_layout(DK, 4)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, KEYS, 2)
    LINE: gl.constexpr = line_layout(4)
    VECTORS: gl.constexpr = rows_layout(4)
    # a thread has a column of a warp's block
    STANDING: gl.constexpr = gl.BlockedLayout([1, 16, 1], [1, 2, 16], [4, 1, 1], [2, 1, 0])

    plus_tile = gl.allocate_shared_memory(dtype, [C, DK], plus.layout)
    minus_tile = plus_tile
    if FRAMED:
        minus_tile = gl.allocate_shared_memory(dtype, [C, DK], minus.layout)
    whole = gl.allocate_shared_memory(gl.float32, [C, C], WHOLE)
    rates = gl.allocate_shared_memory(
        gl.float32, [16, 4, 16], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    lines = gl.allocate_shared_memory(gl.float32, [4, C], FLAT)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    barrier()
    BYTES: gl.constexpr = plus.block_type.nbytes * (2 if FRAMED else 1)
    mbarrier.expect(ready, BYTES)
    key_at = (batch * tokens).to(gl.int32) + start
    tma.async_copy_global_to_shared(plus, [key_at, head // GROUP * kh], ready, plus_tile)
    if FRAMED:
        tma.async_copy_global_to_shared(minus, [key_at, head // GROUP * kh], ready, minus_tile)

    beta += batch * bb + head * bh + start.to(gl.int64) * bt
    lines.index(0).store(column(beta, 0, length, bt, LINE))
    if SCALAR:
        gate += batch * gb + head * gh + start.to(gl.int64) * gt
        write_decays(lines, 1, column(gate, 0, length, gt, LINE), 0.0, False)
    size = C
    if FRAMED:
        size = C >> gl.load(levels + (batch * chunks + chunk) * HEADS + head)
    barrier()
    mbarrier.wait(ready, 0)
    if length < C:
        clear(plus_tile, length, VECTORS)
        if FRAMED:
            clear(minus_tile, length, VECTORS)
        fence_async_shared()
        barrier()

    M = warpgroup_mma(
        plus_tile,
        minus_tile.permute((1, 0)),
        gl.zeros([C, C], gl.float32, SCORES),
        use_acc=False,
    )
    i = gl.arange(0, C, gl.SliceLayout(1, SCORES))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, SCORES))[None, :]
    within = i > j
    if FRAMED:
        within = within & (i // size == j // size)
    if SCALAR:
        until_i = lines.index(1).load(gl.SliceLayout(1, SCORES))[:, None]
        until_j = lines.index(1).load(gl.SliceLayout(0, SCORES))[None, :]
        M = M * exp2(gl.minimum(until_i - until_j, 0.0))
    whole.store(gl.where(within, M, 0.0))
    barrier()

    diagonal = whole._reinterpret(gl.float32, [4, 16, 64], BLOCKS).slice(0, 16, 2)
    T = diagonal.load(STANDING)
    of_columns = lines.index(0)._reinterpret(gl.float32, [4, 16], ROWS)
    rate = of_columns.load(gl.SliceLayout(1, STANDING))
    rates.store(gl.permute(T * rate[:, None, :], (1, 0, 2)))
    barrier()
    of_rows = rates._reinterpret(gl.float32, [16, 4, 16], ROWS)
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, STANDING)))[None, :][:, :, None]
    for here in gl.static_range(1, 16):
        of_row = of_rows.index(here).load(gl.SliceLayout(2, STANDING))
        known = gl.sum(of_row[:, :, None] * T, 1)
        T = gl.where(row == here, T - known[:, None, :], T)
    diagonal.store(T)
    barrier()
    rates_of = lines.index(0)
    blocks = whole._reinterpret(gl.float32, [4, 16, 64], BLOCK)
    first, second = blocks.index(1), blocks.index(3)
    T = _joined(
        blocks.index(0).slice(0, 16, 1), first.slice(0, 16, 1), first.slice(16, 16, 1), rates_of, 0
    )
    more = _joined(
        blocks.index(2).slice(0, 16, 1),
        second.slice(0, 16, 1),
        second.slice(16, 16, 1),
        rates_of,
        32,
    )
    barrier()  # all have read M
    first.slice(16, 16, 1).store(T)
    second.slice(16, 16, 1).store(more)
    barrier()
    pairs = whole._reinterpret(gl.float32, [2, 32, 64], PAIR)
    upper, lower = pairs.index(0), pairs.index(1)
    T = _joined(upper.slice(0, 32, 1), lower.slice(0, 32, 1), lower.slice(32, 32, 1), rates_of, 0)
    barrier()
    lower.slice(32, 32, 1).store(T)
    barrier()

    solved += ((batch * HEADS + head) * tokens + start) * C
    i = gl.arange(0, C, gl.SliceLayout(1, VECTORS))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, VECTORS))[None, :]
    at = j
    if FRAMED:  # eight columns lie together, wherever the frame begins
        at = (j // 8 ^ i // size * (size // 8)) * 8 + j % 8
    gl.store(solved + i * C + at, rounded(whole.load(VECTORS)), mask=i < length)

    weight = lines.index(0).load(gl.SliceLayout(0, WEIGHTS))
    W = plus_tile.load(KEYS).to(gl.float32)
    if SCALAR:
        weight = weight * lines.index(2).load(gl.SliceLayout(0, WEIGHTS))
        W = W * lines.index(2).load(gl.SliceLayout(1, KEYS))[:, None]
    weights = rounded(whole.load(WEIGHTS) * -weight[None, :])
    W = warpgroup_mma(weights, plus_tile, W)
    channel = gl.arange(0, DK, gl.SliceLayout(0, VECTORS))[None, :]
    w += ((batch * tokens + start) * HEADS + head) * DK
    W = gl.convert_layout(rounded(W), VECTORS)
    gl.store(w + i * (HEADS * DK) + channel, W, mask=i < length)
