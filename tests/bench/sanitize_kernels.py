# mypy: ignore-errors
"""A handover by mbarriers that is seen at a glance to be right, for racecheck to be tried on."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from seqpar.kernels.hopper_parts import FLAT, barrier


@gluon.jit
def _give(line, tile, numbers, ready, free, count, LAYOUT: gl.constexpr, WAY: gl.constexpr):
    for step in range(count):
        mbarrier.wait(free, (step & 1) ^ 1)
        line.store(gl.arange(0, line.shape[0], LAYOUT) + step)
        barrier()  # of this warpgroup, before its one arrival
        if WAY == "arrives":
            mbarrier.arrive(ready, count=1)
        elif WAY == "expects nothing":
            mbarrier.expect(ready, 0)
        else:
            mbarrier.expect(ready, numbers.block_type.nbytes)
            tma.async_copy_global_to_shared(numbers, [0, 0], ready, tile)


@gluon.jit
def _take(line, ready, free, count, out, LAYOUT: gl.constexpr):
    place = gl.arange(0, line.shape[0], LAYOUT)
    total = place * 0
    for step in range(count):
        mbarrier.wait(ready, step & 1)
        total += line.load(LAYOUT)
        barrier()
        mbarrier.arrive(free, count=1)
    gl.store(out + place, total)


@gluon.jit
def handover_kernel(numbers, out, count, SIZE: gl.constexpr, WAY: gl.constexpr):
    """out [SIZE], the sum over steps of what one warpgroup gives and another takes, in one place.

    WAY: how that which gives arrives: alone, or saying how many bytes the copy engine will bring
    before the other may go on; none, or a tile of numbers [64, 64].
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    line = gl.allocate_shared_memory(gl.int32, [SIZE], FLAT)
    tile = gl.allocate_shared_memory(numbers.dtype, [64, 64], numbers.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(free, count=1)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_give, (line, tile, numbers, ready, free, count, LAYOUT, WAY)),
            (_take, (line, ready, free, count, out, LAYOUT)),
        ],
        [4],
        [64],
    )
