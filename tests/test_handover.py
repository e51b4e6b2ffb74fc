"""States handed on through shared memory: the GPU kernels, interpreted, on ranks that share memory.

The processes are forks that map the same memory, so the counters by which sender and receiver agree
are at work as they are between GPUs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import assert_close, run_ranks
from test_exchange import fold
from torch import Tensor

from seqpar import Layout
from seqpar.chain import Chain
from seqpar.comm import Communicator
from seqpar.handover import Handover
from seqpar.kernels.transition import Decay, Dense, Identity, Transition

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")

BATCH, HEADS, ENOUGH = 2, 1, 1 << 30
KINDS: dict[str, tuple[Transition, int, int]] = {  # rows and columns of A, -1 for K
    "none": (Identity(), 0, 0),
    "scalar": (Decay(), 1, 1),
    "diagonal": (Decay(), -1, 1),
    "dense": (Dense(), -1, -1),
}


def shape_of(kind: str, K: int) -> tuple[int, int]:
    _, rows, columns = KINDS[kind]
    return K if rows < 0 else rows, K if columns < 0 else columns


def rooms(size: int, state: torch.Size) -> list[Tensor]:
    """A rank's memory each, seen by all forks."""
    return [torch.zeros(Handover.elements(state)).share_memory_() for _ in range(size)]


def summaries(
    chain: Chain, kind: str, K: int, V: int, seed: int
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    make = torch.Generator().manual_seed(seed)
    return {
        place: (
            torch.randn(BATCH, HEADS, *shape_of(kind, K), generator=make) / K**0.5,
            torch.randn(BATCH, HEADS, K, V, generator=make),
        )
        for place in sorted(chain.places)
    }


def check(handover: Handover, layout: Layout, rank: int, kind: str, K: int, V: int) -> None:
    """Two calls, forward and backward, against the fold."""
    transition, comm = KINDS[kind][0], Communicator(torch.distributed.group.WORLD)
    for turn in range(2):
        for chain in (layout.chain, layout.chain.backwards):
            given = summaries(chain, kind, K, V, turn)
            wide = {place: (A.double(), B.double()) for place, (A, B) in given.items()}
            expected = fold(chain, transition, wide)
            mine = [given[rank, slot] for slot in range(len(layout.ranges(rank)))]
            A, B = (torch.stack(parts) for parts in zip(*mine, strict=True))
            for slot, state in enumerate(handover.scan(A, B, chain, comm, "state")):
                wanted = expected.get((rank, slot))
                assert (state is None) == (wanted is None), (layout, rank, slot)
                if state is not None and wanted is not None:
                    assert_close(f"{kind} {layout} {rank}", state, wanted, 1e-5)


@pytest.mark.parametrize(
    ("kind", "K", "V"),
    [("none", 16, 80), ("scalar", 16, 16), ("diagonal", 20, 70), ("dense", 20, 16)],
)
def test_states_equal_the_fold(kind: str, K: int, V: int) -> None:
    size = 3
    state = torch.Size([BATCH, HEADS, K, V])
    memory, late = rooms(size, state), torch.zeros(1, dtype=torch.int32).share_memory_()
    layouts = [
        Layout(60, size, layout_kind, documents)
        for layout_kind in ("contiguous", "zigzag")
        for documents in (None, [0, 5, 25, 45, 60])
    ]

    def work(rank: int) -> None:
        handover = Handover(rank, memory, state, late, ENOUGH)
        for layout in layouts:
            check(handover, layout, rank, kind, K, V)

    run_ranks(work, size)


def test_wide_products_are_formed_in_blocks() -> None:
    """K above 64, and columns that fill no tile."""
    state = torch.Size([BATCH, HEADS, 80, 70])
    memory, late = rooms(2, state), torch.zeros(1, dtype=torch.int32).share_memory_()

    def work(rank: int) -> None:
        handover = Handover(rank, memory, state, late, ENOUGH)
        check(handover, Layout(8, 2), rank, "dense", 80, 70)

    run_ranks(work, 2)


def test_a_rank_may_be_two_calls_ahead_of_the_next_one() -> None:
    """The first rank sends twice without waiting; the third time it waits for a place."""
    state = torch.Size([1, 1, 16, 16])
    memory, late = rooms(2, state), torch.zeros(1, dtype=torch.int32).share_memory_()
    chain = Layout(2, 2).chain
    A = torch.zeros(1, 1, 1, 0, 0)

    def work(rank: int) -> list[float]:
        comm = Communicator(torch.distributed.group.WORLD)
        handover = Handover(rank, memory, state, late, ENOUGH)
        found = []
        if rank == 1:
            comm.barrier()
        for turn in range(5):
            if rank == 0 and turn == 2:
                comm.barrier()
            [came] = handover.scan(A, torch.full((1, *state), float(turn)), chain, comm, "state")
            if came is not None:
                assert (came == came.flatten()[0]).all()
                found.append(came.flatten()[0].item())
        return found

    assert run_ranks(work, 2) == [[], [0.0, 1.0, 2.0, 3.0, 4.0]]


def test_every_byte_that_crosses_is_counted() -> None:
    state = torch.Size([1, 2, 16, 16])
    memory, late = rooms(3, state), torch.zeros(1, dtype=torch.int32).share_memory_()

    def work(rank: int) -> tuple[int, int, int]:
        comm = Communicator(torch.distributed.group.WORLD)
        handover = Handover(rank, memory, state, late, ENOUGH)
        A, B = torch.ones(2, 1, 2, 1, 1), torch.ones(2, *state)
        handover.scan(A, B, Layout(6, 3, "zigzag").chain, comm, "state")
        moved = comm.total()
        return moved.calls, moved.bytes_sent, moved.bytes_received

    size = 4 * state.numel()
    assert run_ranks(work, 3) == [
        (2, size, size),  # from the first range, and into the last
        (4, 2 * size, 2 * size),
        (2, size, size),  # between its own ranges nothing crosses
    ]


def test_a_rank_that_waits_too_long_says_for_whom() -> None:
    """On a GPU the kernel stops then; the interpreter knows no way to, and fails somehow."""
    state = torch.Size([1, 1, 16, 16])
    memory, late = rooms(2, state), torch.zeros(1, dtype=torch.int32).share_memory_()

    def work(rank: int) -> str:
        comm = Communicator(torch.distributed.group.WORLD)
        handover = Handover(rank, memory, state, late, limit=5)
        A, B = torch.zeros(1, 1, 1, 0, 0), torch.ones(1, *state)
        if rank == 0:
            return ""
        with pytest.raises(Exception):  # noqa: B017, PT011
            handover.scan(A, B, Layout(2, 2).chain, comm, "state")
        assert late[0] == 1, "rank 0, plus one"
        with pytest.raises(RuntimeError, match="for rank 0 in vain"):
            handover.scan(A, B, Layout(2, 2).chain, comm, "state")
        return "said"

    assert run_ranks(work, 2)[1] == "said"


def test_the_kernels_compile_without_a_gpu() -> None:
    script = Path(__file__).with_name("handover_compiles.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
