"""All-Scan through peers' memory: a rank's GPU writes the state it hands on into the next one's.

Ranks of one node reach into each other's GPU memory over NVLink (PyTorch's symmetric memory), so a
range costs one kernel, and a hop a write and a signal, where NCCL takes a launch on both sides. The
kernels, and how sender and receiver agree on when a place is free or filled, are in
`seqpar.kernels.handover_kernels`. Nothing waits on the host, and CUDA graphs may capture it, but
for the first exchange of states of a new shape, which makes the room for them.

A rank that waits for another longer than the process group's timeout stops with a CUDA error; the
log then names the call and the rank that did not come.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.chain import Chain
from seqpar.comm import Communicator
from seqpar.kernels.handover_kernels import greet_kernel, handover_kernel, pace_kernel
from seqpar.kernels.launch import Launch
from seqpar.kernels.once import Once
from seqpar.kernels.tuned import ceil_div, padded

logger = logging.getLogger(__name__)

WIDEST = 256  # rows of a state that fit a program
COLUMNS = 64  # of a tile
PROGRAMS = 32  # at most, so that other kernels find room beside those that wait
WARPS = 8
LOOKS = 10_000  # by which the pace of waiting is measured
SPARE = 16  # numbers at the end of the memory, for a greeting


def handover_of(comm: Communicator, B: Tensor) -> "Handover | None":
    """What hands on states of the shape of B [ranges, ..., K, V]; None where messages have to.

    All ranks ask alike. The first time for a shape, they wait for each other.
    """
    if comm.size == 1 or not B.is_cuda or B.dtype != torch.float32 or B.shape[-2] > WIDEST:
        return None
    shape = B.shape[1:]

    def make() -> Handover | None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"states {list(shape)} are exchanged for the first time while a CUDA graph is "
                "captured, which cannot make room for them: run the call once before"
            )
        memory = comm.symmetric(Handover.elements(shape), B.device)
        if memory is None or not comm.shared.once("heard", lambda: _hears(comm, memory)):
            return None
        late = comm.shared.once("late", lambda: _watched(comm))
        limit = comm.shared.once("limit", lambda: _limit(comm, B.device))
        return Handover(comm.rank, memory, shape, late, limit)

    return comm.shared.once(("handover", shape, B.device), make)


@dataclass(frozen=True)
class _Memory:
    """One rank's memory. The first dimension of each part: the other rank, minus this one, plus 1.

    Of what others hand to it: places [3, 2, tiles, BK, BV], and how many tiles were written and
    received [3, tiles]. Of what it hands to others: how many tiles were sent and read.
    """

    places: Tensor
    written: Tensor
    received: Tensor
    sent: Tensor
    read: Tensor


class Handover(Once):
    """Room on every rank for states of one shape that its neighbours hand to it, and the kernels.

    The neighbours of a range are on the same rank or the ones beside it, in every `Layout`.

    rank: this one; memory: by rank, as `Communicator.symmetric` gives it. late: where a kernel
    writes 1 + the rank it waited for in vain; limit: after how many looks.
    """

    def __init__(
        self,
        rank: int,
        memory: Sequence[Tensor],
        shape: torch.Size,
        late: Tensor,
        limit: int,
    ) -> None:
        super().__init__()
        self._rank, self._shape, self._limit = rank, shape, limit
        self._late, self._late_value = late, late.numpy()
        self._cut = _cut(shape)
        nearby = range(max(rank - 1, 0), min(rank + 2, len(memory)))
        self._memory = {rank: _parts(memory[rank], *self._cut) for rank in nearby}

    @staticmethod
    def elements(shape: torch.Size) -> int:
        """How many fp32 numbers of memory it needs."""
        rows, columns, tiles = _cut(shape)
        return 3 * (2 * tiles * rows * columns + 4 * padded(tiles)) + SPARE

    def scan(
        self, A: Tensor, B: Tensor, chain: Chain, comm: Communicator, kind: str
    ) -> list[Tensor | None]:
        """The state that enters each range, None where none does; put on the current stream.

        A, B: as in `seqpar.exchange`. comm, kind: where the traffic is counted, and as what.

        Raises:
            ExchangeError: a kernel has waited in vain before.
        """
        if self._late_value[0]:
            raise comm.failure(_lateness(comm, self._late_value[0]))
        size = B.shape[1:].numel() * B.element_size()
        A, B = _aligned(A), _aligned(B)
        states = torch.empty_like(B)
        entering: list[Tensor | None] = [None] * len(B)
        for position, slot in chain.of(self._rank):
            source = target = None
            if chain.linked[position]:
                source, entering[slot] = chain.owner(position - 1), states[slot]
                if source != self._rank:
                    comm.count(kind, 0, size)
            if chain.sends(position):
                target = chain.owner(position + 1)
                if target != self._rank:
                    comm.count(kind, size, 0)
            if source is not None or target is not None:
                self._range(A, B, states, slot, source, target, chain.through[position])
        return entering

    def _range(
        self,
        A: Tensor,
        B: Tensor,
        states: Tensor,
        slot: int,
        source: int | None,
        target: int | None,
        through: bool,
    ) -> None:
        """Receive what comes from `source`, hand on what goes to `target`."""
        rank, (rows, columns, tiles) = self._rank, self._cut
        given = {"RECEIVES": source is not None, "SENDS": target is not None, "THROUGH": through}
        source = rank if source is None else source
        target = rank if target is None else target

        def make() -> tuple[Launch, tuple[Tensor, ...]]:
            launch = Launch(
                handover_kernel,
                min(tiles, PROGRAMS),
                tiles=tiles,
                slot=slot,
                limit=self._limit,
                source=source,
                target=target,
                K=self._shape[-2],
                V=self._shape[-1],
                BK=rows,
                BV=columns,
                KIND=_kind(A),
                **given,
                num_warps=WARPS,
            )
            own, before, after = (self._memory[each] for each in (rank, source, target))
            return launch, (
                own.places[source - rank + 1],
                own.written[source - rank + 1],
                own.received[source - rank + 1],
                before.read[rank - source + 1],
                after.places[rank - target + 1],
                after.written[rank - target + 1],
                own.sent[target - rank + 1],
                own.read[target - rank + 1],
                self._late,
            )

        key = _kind(A), slot, source, target, *given.values()
        launch, parts = self.once(key, make)
        launch(A if A.numel() else B, B, states, *parts)


def _cut(shape: torch.Size) -> tuple[int, int, int]:
    """Rows and columns of a tile, and how many tiles states [..., K, V] have."""
    *heads, rows, columns = shape
    width = min(padded(columns), COLUMNS)
    return padded(rows), width, ceil_div(columns, width) * torch.Size(heads).numel()


def _parts(memory: Tensor, rows: int, columns: int, tiles: int) -> _Memory:
    room, counters = 6 * tiles * rows * columns, 3 * padded(tiles)
    places, *rest = memory[:-SPARE].split([room, *[counters] * 4])
    counts = (x.view(torch.int32).view(3, -1) for x in rest)
    return _Memory(places.view(3, 2, tiles, rows, columns), *counts)


def _kind(A: Tensor) -> str:
    """The structure of A, by its shape (see `seqpar.kernels.transition`)."""
    if A.shape[-1] == 1:
        return "scalar" if A.shape[-2] == 1 else "diagonal"
    return "dense" if A.shape[-1] else "none"


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and as aligned as the kernels were compiled for."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _hears(comm: Communicator, memory: Sequence[Tensor]) -> bool:
    """Whether signals arrive, on every rank: not all links carry them."""
    counts = [each[-SPARE:].view(torch.int32) for each in memory]
    own, next_ = counts[comm.rank], counts[(comm.rank + 1) % comm.size]
    greet_kernel[(1,)](own[8:], own[8:], 1)  # compiled, before anybody waits
    comm.barrier()
    greet_kernel[(1,)](next_, own, 100 * LOOKS)
    heard = all(comm.all_gather_object(bool(own[1])))
    if not heard:
        logger.info("states are handed on by messages: signals between GPUs do not arrive")
    return heard


def _limit(comm: Communicator, device: torch.device) -> int:
    """After how many looks a kernel says that it has waited in vain: for a quarter of that it goes
    on waiting before it stops, all in all for the process group's timeout.
    """
    counters = torch.zeros(4 * PROGRAMS, dtype=torch.int32, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for looks in (1, LOOKS):  # the first compiles
        begin.record()
        pace_kernel[(PROGRAMS,)](counters, looks, num_warps=WARPS)
        end.record()
        end.synchronize()
    pace = begin.elapsed_time(end) / 1000 / LOOKS
    return min(int(0.8 * comm.timeout.total_seconds() / pace), 2**31 - 1)


def _watched(comm: Communicator) -> Tensor:
    """Memory of the host for a kernel to write in why it will stop, int32 [1], and a thread that
    says so in the log: the CUDA error that follows, wherever it is met, does not.
    """
    late = torch.zeros(1, dtype=torch.int32).pin_memory()
    value = late.numpy()

    def watch() -> None:
        main = threading.main_thread()
        running = True
        while running and not value[0]:
            running = main.is_alive()  # looks once more when that has ended
            time.sleep(0.1)
        if value[0]:
            logger.error("%s", comm.failure(_lateness(comm, value[0])))
            main.join()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(1)  # what else ends with a process would wait for a GPU that has stopped

    threading.Thread(target=watch, name="seqpar-watch").start()
    return late


def _lateness(comm: Communicator, late: int) -> RuntimeError:
    seconds = 0.8 * comm.timeout.total_seconds()
    return RuntimeError(f"waited {seconds:.0f} s for rank {late - 1} in vain")
