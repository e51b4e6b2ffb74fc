"""Triton kernels that hand states from rank to rank through each other's memory.

A state is cut in tiles of its columns, and every tile travels alone: it is received, changed and
passed on by one program, so that tiles are under way on all ranks at once. Between a sender and a
receiver, tile by tile, lie two places for a tile and two counters, of tiles written (at the
receiver) and of tiles read (at the sender):

    sender                                        receiver
    waits until all but one have been read        waits until one more has been written
    writes the tile into the other place          reads it
    counts it as written, at the receiver         counts it as read, at the sender

Counters only grow, and each side keeps its own count in its own memory. So nothing is reset, calls
may follow each other at any pace, and a CUDA graph can replay them. After `limit` looks in
vain `late` says for whom, for the host to read; after a quarter more the program is stopped, with
an error that ends all work on this GPU, for what would follow would be wrong.
"""

import triton
import triton.language as tl


@triton.jit
def _look(counter, wanted, limit):
    """The count, as soon as it has reached `wanted`, or after `limit` looks as it is then."""
    count = tl.atomic_add(counter, 0, sem="acquire", scope="sys")
    looks = 0
    while (count - wanted < 0) & (looks < limit):
        count = tl.atomic_add(counter, 0, sem="acquire", scope="sys")
        looks += 1
    return count


@triton.jit
def _await(counter, wanted, limit, late, peer):
    """Return when the count has reached `wanted`; what was done before it is visible then."""
    if _look(counter, wanted, limit) - wanted < 0:
        tl.store(late, peer + 1)
        tl.inline_asm_elementwise(  # the host can read it now
            "fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
        )
        _look(counter, wanted, limit // 4)
        tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def _count(counter, own, count):
    """Tell the other side that `count` tiles are done, after all that the program did before."""
    tl.debug_barrier()
    tl.store(own, count)
    tl.atomic_xchg(counter, count, sem="release", scope="sys")


@triton.jit
def _send_product(
    A, B, head, col, came, goes,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """Write A S + B to `goes`, for S [BK, BV] at `came` and A dense; or B alone."""
    SIDE: tl.constexpr = BK if BK < 64 else 64
    STEP: tl.constexpr = BK if BK < 32 else 32  # more would not fit in registers
    cols = tl.arange(0, BV)
    for first in tl.range(0, BK, SIDE):
        row = first + tl.arange(0, SIDE)
        inside = (row < K)[:, None] & (col < V)[None, :]
        at = head * (K * V) + row[:, None] * V + col[None, :]
        out = tl.load(B + at, mask=inside, other=0.0)
        if THROUGH:
            for start in tl.range(0, BK, STEP):
                inner = start + tl.arange(0, STEP)
                A_tile = tl.load(
                    A + head * (K * K) + row[:, None] * K + inner[None, :],
                    mask=(row < K)[:, None] & (inner < K)[None, :],
                    other=0.0,
                )
                state = tl.load(came + inner[:, None] * BV + cols[None, :], cache_modifier=".cg")
                out = tl.dot(A_tile, state, out, input_precision="ieee")
        tl.store(goes + row[:, None] * BV + cols[None, :], out)


@triton.jit(do_not_specialize=["tiles", "slot", "limit", "source", "target"])
def handover_kernel(
    A, B, entering, inbox, written, received, read_there, outbox, written_there, sent, read, late,
    tiles, slot, limit, source, target,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KIND: tl.constexpr,
    RECEIVES: tl.constexpr, SENDS: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """One range of a rank: S comes in, A S + B goes out.

    A [ranges, H, ...], B and entering [ranges, H, K, V], of which this is range `slot`; H counts
    heads of all batches. KIND: A is "none" (identity), "scalar" [H], "diagonal" [H, K] or "dense"
    [H, K, K]. inbox, written, received and read_there: places [2, tiles, BK, BV] for what comes
    from `source`, and the counters of its tiles; outbox, written_there, sent and read: the same for
    what goes to `target`. THROUGH: whether what comes in is part of what goes out.
    """
    COLS: tl.constexpr = (V + BV - 1) // BV
    rows, cols = tl.arange(0, BK), tl.arange(0, BV)
    places = rows[:, None] * BV + cols[None, :]
    tile = tl.program_id(0)
    while tile < tiles:
        head = (slot * (tiles // COLS) + tile // COLS).to(tl.int64)
        col = tile % COLS * BV + cols
        offsets = head * (K * V) + rows[:, None] * V + col[None, :]
        inside = (rows < K)[:, None] & (col < V)[None, :]
        came = inbox + tile.to(tl.int64) * (BK * BV)
        goes = outbox + tile.to(tl.int64) * (BK * BV)
        if SENDS and KIND != "dense":  # what needs no waiting
            out = tl.load(B + offsets, mask=inside, other=0.0)
            if KIND == "scalar":
                factor = tl.load(A + head)
            elif KIND == "diagonal":
                factor = tl.load(A + head * K + rows, mask=rows < K, other=0.0)[:, None]
        if SENDS:
            count_sent = tl.load(sent + tile)
            _await(read + tile, count_sent - 1, limit, late, target)
            goes += (count_sent & 1).to(tl.int64) * tiles * (BK * BV)
        if RECEIVES:
            count_received = tl.load(received + tile)
            _await(written + tile, count_received + 1, limit, late, source)
            came += (count_received & 1).to(tl.int64) * tiles * (BK * BV)
        # peers write it while this program runs, so never by way of this processor's own cache
        if RECEIVES and KIND != "dense":
            state = tl.load(came + places, cache_modifier=".cg")

        if SENDS:
            if KIND == "dense":
                _send_product(A, B, head, col, came, goes, K, V, BK, BV, RECEIVES and THROUGH)
            else:
                if RECEIVES and THROUGH:
                    if KIND == "none":
                        out += state
                    else:
                        out += factor * state
                tl.store(goes + places, out)
            _count(written_there + tile, sent + tile, count_sent + 1)
        if RECEIVES:
            if KIND == "dense":
                state = tl.load(came + places, cache_modifier=".cg")
            tl.store(entering + offsets, state, mask=inside)
            _count(read_there + tile, received + tile, count_received + 1)
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["limit"])
def pace_kernel(counters, limit):
    """Looks `limit` times for what never comes, for the host to see how long that takes."""
    tl.store(counters + 1, _look(counters + tl.program_id(0) * 4, 1, limit))


@triton.jit(do_not_specialize=["limit"])
def greet_kernel(there, here, limit):
    """Signals to a peer as a sender does, waits for a signal of a peer, and notes if it came."""
    tl.atomic_xchg(there, 1, sem="release", scope="sys")
    tl.store(here + 1, _look(here, 1, limit))
