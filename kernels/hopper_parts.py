"""What the Hopper kernels are made of, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.6

C = gl.constexpr(64)  # tokens a step at most
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # of lines in shared memory


@gluon.constexpr_function
def product_layout(columns, warps):
    """The layout of a product whose rows are spread over the warps, 16 each."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.constexpr_function
def score_layout(warps):
    """Of scores [C, C]: each warpgroup has some of the columns."""
    columns = C.value // (warps // 4)
    return gl.NVMMADistributedLayout([3, 0], [4, warps // 4], [16, columns, 16])


@gluon.constexpr_function
def line_layout(warps):
    """Of one number a token [C], which each warp has."""
    return gl.BlockedLayout([C.value // 32], [32], [warps], [0])


@gluon.constexpr_function
def warps_layout(warps):
    """Of one number a token and warp [warps, C]."""
    return gl.BlockedLayout([1, C.value // 32], [1, 32], [warps, 1], [1, 0])


@gluon.constexpr_function
def channels_layout(warps):
    """Of one number a channel."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def rows_layout(warps):
    """Of a tile in which a thread has eight channels of a token."""
    return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def exp2(x):
    """2^x, zero where that is subnormal: no instructions to save those."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def rounded(x):
    """x in bf16, two numbers an instruction: one by one it takes an eighth of the speed."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def low(x, high):
    """What rounding x to `high` left, rounded alike."""
    return rounded(x - high.to(gl.float32))


@gluon.jit
def _parts(x):
    """x in two parts that tensor cores take whole, in TF32."""
    high = (x.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    return high, x - high


@gluon.jit
def product(a, b, more):
    """a b + more in fp32, to its accuracy."""
    a_high, a_low = _parts(a)
    b_high, b_low = _parts(b)
    more = mma_v2(a_low, b_high, more, "tf32")
    more = mma_v2(a_high, b_low, more, "tf32")
    return mma_v2(a_high, b_high, more, "tf32")


@gluon.jit
def head_and_piece(batches, HEADS: gl.constexpr):
    """The head, the batch and the piece of a program that has all of a head."""
    pid = gl.program_id(0)
    return pid % HEADS, pid // HEADS % batches, pid // HEADS // batches


@gluon.jit
def row_of(table, place, SUMMARY: gl.constexpr):
    """A row of `tables.piece_rows` or `tables.summary_rows`; the chunks before it; its piece."""
    if SUMMARY:
        row = table + 4 * place
        return row, gl.load(row + 2).to(gl.int64), gl.load(row + 3)
    row = table + 8 * place
    return row, gl.load(row + 7).to(gl.int64), place


@gluon.jit
def frames_of(
    steps, counts, halves, batch, head, piece, pieces, first_chunk, chunks,
    HEADS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """How many frames a piece has of one head, its steps, and its half decays of WIDTH channels."""
    of_head = batch.to(gl.int64) * HEADS + head
    count = gl.load(counts + of_head * pieces + piece)
    steps += (of_head * chunks + first_chunk) * (C // 8)
    halves += ((batch.to(gl.int64) * chunks + first_chunk) * (C // 8) * HEADS + head) * WIDTH
    return count, steps, halves


@gluon.jit
def entry_of(steps, step, count, FRAMED: gl.constexpr, REVERSE: gl.constexpr):
    """The chunk of a step, or its frame: (first token / 8) * 4 + level; any beyond the last."""
    turn = step
    if REVERSE:
        turn = count - 1 - step
    if FRAMED:
        return gl.load(steps + turn, mask=step < count, other=0)
    return turn * (C // 2)


@gluon.jit
def tokens_of(entry, length):
    """The first token of a chunk or frame, and how many tokens it has."""
    here = entry // 4 * 8
    return here, gl.minimum(C >> entry % 4, length - here)


@gluon.jit
def half_of(halves, entry, STRIDE: gl.constexpr):
    """The half decays of a frame, log2, of the channels that `halves` points to."""
    return gl.load(halves + (entry // 4).to(gl.int64) * STRIDE)


@gluon.jit
def column(x, first, stop, stride, layout: gl.constexpr):
    """One number a token [C], in fp32; zeros from `stop` on, and before the piece."""
    row = first + gl.arange(0, C, layout)
    inside = (row >= 0) & (row < stop)
    return gl.load(x + row.to(gl.int64) * stride, mask=inside, other=0.0).to(gl.float32)


@gluon.jit
def write_decays(lines, at, decays, log_scale, REVERSE: gl.constexpr):
    """What a chunk's decays multiply with, three lines [C]; returns the decay over the whole chunk.

    The running sum in the direction of the run (log2), the decay of what enters the chunk, and of
    each token up to the chunk's end; the second with the scale in it.
    """
    decays = decays * 1.4426950408889634
    total = gl.associative_scan(decays, 0, add)
    whole = gl.sum(decays, 0)
    if REVERSE:
        total = whole - total
    lines.index(at).store(total)
    lines.index(at + 1).store(exp2(total + log_scale))
    lines.index(at + 2).store(exp2(whole - total))
    return exp2(whole)


@gluon.jit
def clear(tile, length, layout: gl.constexpr):
    """Zero the rows of a tile from `length` on: they belong to another document."""
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    value = tile.load(layout)
    tile.store(gl.where((row < length)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def clear_all(tiles, slot, length, layout: gl.constexpr):
    """The same in a slot of several rings, for products that follow."""
    for i in gl.static_range(len(tiles)):
        clear(tiles[i].index(slot), length, layout)
    fence_async_shared()


@gluon.jit
def store_shares(shares, terms, first, size, tokens, warp, NEGATIVE: gl.constexpr = False):
    """Sums of terms [D, C] within each warp's 16 rows, or their NEGATIVE, for `size` tokens.

    shares: a line of `tokens` for each `warp`, which is in `warps_layout`.
    """
    WARPS: gl.constexpr = warps_layout(gl.num_warps())
    share = gl.sum(gl.reshape(terms, [gl.num_warps(), 16, C]), 1)
    token = first + gl.arange(0, C, gl.SliceLayout(0, WARPS))
    at = shares + warp[:, None] * tokens + token[None, :]
    known = (token < first + size)[None, :] & (warp >= 0)[:, None]
    share = gl.convert_layout(share, WARPS)
    if NEGATIVE:
        share = -share
    gl.store(at, share, mask=known)


@gluon.jit
def bring(tensors, columns, tiles, row, slot, ready):
    """Start copying rows from `row` on of each tensor into a slot of its ring of tiles."""
    for i in gl.static_range(len(tensors)):
        tma.async_copy_global_to_shared(
            tensors[i], [row, columns[i]], ready.index(slot), tiles[i].index(slot)
        )
