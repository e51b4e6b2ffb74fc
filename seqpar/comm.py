"""The one file that calls `torch.distributed` collectives, and counts what they move.

A `Communicator` wraps one process group, or none (a single rank that talks to nobody). Every call
names the kind of work it serves; `Communicator.traffic[kind]` counts calls, bytes and time waited.
On GPUs nothing here waits on the host but what says so: results are waited for by streams.
"""

import logging
import os
import socket
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.agreement import agreement_of
from seqpar.kernels.once import Once

logger = logging.getLogger(__name__)

# torch 2.13 renames these two and warns at the old names; 2.11 has only the old ones.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


T = TypeVar("T")


@dataclass
class Traffic:
    """What one kind of work moved over one communicator, seen from this rank.

    calls: collectives entered. bytes_sent, bytes_received: payload that crosses between ranks; an
    all-gather of n bytes over P ranks counts (P-1)·n each way, a sum of n bytes 2(P-1)/P·n.
    seconds_waited: host time spent waiting for results; on a GPU next to none, for streams wait. A
    CUDA graph counts when it is captured, not when it is replayed.
    """

    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds_waited: float = 0.0


class Pending:
    """The result of a collective under way. `wait()` blocks until it is there and returns it."""

    def __init__(self, result: Tensor, wait: Callable[[], None] | None) -> None:
        self._result, self._wait = result, wait

    def wait(self) -> Tensor:
        if self._wait is not None:
            self._wait()
            self._wait = None
        return self._result


class Communicator:
    """Collectives over one process group, with their traffic counted by kind of work.

    Args:
        group: a `torch.distributed` process group; None for a single rank without any.

    Attributes: rank and size within the group; traffic, a dict from kind to `Traffic`; shared, what
    all communicators of the group have in common.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)
        self._agreement = agreement_of(group) if group is not None and self.size > 1 else None
        self.shared: Once = self._agreement or Once()
        self._beside = True

    def in_line(self) -> "Communicator":
        """The same, for a caller that does nothing before it asks for a result of `background`.

        Work goes on the current stream of a GPU then, and no stream waits for another.
        """
        found = copy(self)
        found._beside = False
        return found

    def reach(self, call: str) -> None:
        """Announce what this rank is about to do; return when all ranks have announced the same.

        Raises:
            ValueError: another rank announced something else.
            ExchangeError: one did not come here within the process group's timeout.
        """
        if self._agreement is not None:
            self._agreement.reach(call)
            self.shared.once("connected", self._connect)

    def _connect(self) -> None:
        """NCCL connects a group when it is first used, which must be by all of its ranks; messages
        between some of them, as exchanges of documents send, would wait for the others."""
        if "nccl" in dist.get_backend(self.group):
            self.barrier()

    def wait(self, works: Sequence[Any], kind: str = "other") -> None:
        """Wait for messages under way.

        Raises:
            ExchangeError: one failed or ran into the process group's timeout.
        """
        traffic = self.traffic[kind]
        begin = time.perf_counter()
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self.failure(error) from error
        traffic.seconds_waited += time.perf_counter() - begin

    def total(self) -> Traffic:
        """The sum of all kinds of traffic so far."""
        kinds = self.traffic.values()
        return Traffic(
            sum(t.calls for t in kinds),
            sum(t.bytes_sent for t in kinds),
            sum(t.bytes_received for t in kinds),
            sum(t.seconds_waited for t in kinds),
        )

    def all_gather(self, x: Tensor, kind: str = "other") -> Pending:
        """Start gathering `x` (same shape on all ranks) into [size, *x.shape], by rank."""
        x = x.contiguous()
        moved = x.numel() * x.element_size() * (self.size - 1)
        self.count(kind, moved, moved)
        if self.size == 1:
            return Pending(x[None], None)
        # gloo takes the output only in one dimension
        out = x.new_empty(self.size * x.numel())
        work = _all_gather_flat(out, x.view(-1), group=self.group, async_op=True)
        return Pending(out.view(self.size, *x.shape), lambda: self.wait([work], kind))

    def reduce_scatter(self, x: Tensor, kind: str = "other") -> Pending:
        """Start summing `x` [size, ...] over ranks; rank r receives the sum of the x[r]."""
        x = x.contiguous()
        moved = x.shape[1:].numel() * x.element_size() * (self.size - 1)
        self.count(kind, moved, moved)
        if self.size == 1:
            return Pending(x[0], None)
        out = x.new_empty(x.shape[1:].numel())
        work = _reduce_scatter_flat(out, x.view(-1), group=self.group, async_op=True)
        return Pending(out.view(x.shape[1:]), lambda: self.wait([work], kind))

    def all_to_all(
        self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], kind: str = "other"
    ) -> Pending:
        """Start sending `x` [sum(send_rows), ...], cut along its first dimension by target rank.

        The result is [sum(receive_rows), ...], by source rank.
        """
        x = x.contiguous()
        row = x.shape[1:].numel() * x.element_size()
        out = x.new_empty(sum(receive_rows), *x.shape[1:])
        self.count(
            kind,
            (sum(send_rows) - send_rows[self.rank]) * row,
            (sum(receive_rows) - receive_rows[self.rank]) * row,
        )
        if self.size == 1:
            return Pending(x, None)
        work = dist.all_to_all_single(
            out, x, list(receive_rows), list(send_rows), group=self.group, async_op=True
        )
        return Pending(out, lambda: self.wait([work], kind))

    def send(self, x: Tensor, to: int, kind: str = "other") -> Any:
        """Start sending `x` to rank `to`; keep `x` until the returned work has been waited for."""
        self.count(kind, x.numel() * x.element_size(), 0)
        return dist.isend(x.contiguous(), group=self.group, group_dst=to, tag=_tag(kind))

    def receive(self, out: Tensor, source: int, kind: str = "other") -> Any:
        """Start receiving into `out` (contiguous) from `source`; wait for the returned work."""
        self.count(kind, 0, out.numel() * out.element_size())
        return dist.irecv(out, group=self.group, group_src=source, tag=_tag(kind))

    def send_receive(
        self,
        sends: Sequence[tuple[Tensor, int]],
        receives: Sequence[tuple[Tensor, int]],
        kind: str = "other",
    ) -> list[Any]:
        """Start sends (tensor, to) and receives (out, source) that may meet each other."""
        made = partial(dist.P2POp, group=self.group, tag=_tag(kind))
        operations = [made(dist.isend, x.contiguous(), group_peer=peer) for x, peer in sends]
        operations += [made(dist.irecv, x, group_peer=peer) for x, peer in receives]
        for x, _ in sends:
            self.count(kind, x.numel() * x.element_size(), 0)
        for x, _ in receives:
            self.count(kind, 0, x.numel() * x.element_size())
        return dist.batch_isend_irecv(operations) if operations else []

    def background(
        self, work: Callable[[], T], device: torch.device, kind: str = "other"
    ) -> Callable[[], T]:
        """Start `work`, a chain of messages and arithmetic, beside what the caller does next.

        On a GPU it is put on a stream of its own at once, before other work where there is a
        choice; on a CPU a thread runs it. The returned function waits for it (on a GPU the current
        stream does) and gives its result, or raises what it raised.
        """
        traffic = self.traffic[kind]
        if device.type == "cuda":
            if not self._beside:
                here = work()
                return lambda: here
            stream = self.shared.once(("stream", device), lambda: torch.cuda.Stream(device, -1))
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                result = work()
            done = stream.record_event()

            def joined(work: Callable[[], T] = work) -> T:
                # `work` holds the tensors it reads: freed earlier, their memory could be reused
                torch.cuda.current_stream(device).wait_event(done)
                return result

            return joined
        future = self.shared.once("thread", lambda: ThreadPoolExecutor(1, "seqpar")).submit(work)

        def finished() -> T:
            begin = time.perf_counter()
            try:
                result = future.result()
            except RuntimeError as error:
                raise self.failure(error) from error
            traffic.seconds_waited += time.perf_counter() - begin
            return result

        return finished

    def all_reduce(self, x: Tensor, op: str = "sum", kind: str = "other") -> Tensor:
        """The elementwise `op` ("sum", "max" or "min") of `x` over ranks, as a new tensor."""
        out = x.clone(memory_format=torch.contiguous_format)  # as NCCL demands
        moved = x.numel() * x.element_size() * 2 * (self.size - 1) // self.size
        self.count(kind, moved, moved)
        if self.size == 1:
            return out
        work = dist.all_reduce(out, _REDUCTIONS[op], group=self.group, async_op=True)
        self.wait([work], kind)
        return out

    @property
    def timeout(self) -> timedelta:
        """How long a rank is waited for: the process group's timeout."""
        return self._agreement.timeout if self._agreement is not None else timedelta.max

    def symmetric(self, elements: int, device: torch.device) -> list[Tensor] | None:
        """Memory [elements] of every rank, by rank, that this rank's kernels can read and write.

        fp32, zeroed, kept as long as the group. All ranks call it, outside of CUDA graphs; it
        waits on the host. None, on all of them and with the reason in the log, where they cannot
        reach into each other's memory.
        """
        if self.size == 1 or device.type != "cuda":
            return None
        memory: list[Tensor] = []
        reason = self.shared.once("against symmetric", self._against_symmetric)
        if reason is None:
            try:
                memory = self._rendezvous(elements, device)
            except (RuntimeError, AttributeError, TypeError) as error:  # its interface may change
                reason = str(error).splitlines()[0]
            reason = next((each for each in self.all_gather_object(reason) if each), None)
        if reason is not None:
            self.shared.once(
                ("said", reason), partial(logger.info, "no symmetric memory: %s", reason)
            )
            return None
        return memory

    def _against_symmetric(self) -> str | None:
        hosts = set(self.all_gather_object(socket.gethostname()))
        return f"the ranks are on {len(hosts)} nodes" if len(hosts) > 1 else None

    def _rendezvous(self, elements: int, device: torch.device) -> list[Tensor]:
        import torch.distributed._symmetric_memory as symmetric

        assert self.group is not None
        own = symmetric.empty(elements, dtype=torch.float32, device=device)
        own.zero_()
        torch.cuda.synchronize(device)
        # Multicast is not used here, and where it is not supported its setting up may fail.
        name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            handle = symmetric.rendezvous(own, self.group.group_name)
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
        self.shared.once(("memory", own.data_ptr()), lambda: (own, handle))  # peers may write to it
        return [handle.get_buffer(rank, [elements], torch.float32) for rank in range(self.size)]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank (pickled: for small things, outside the step)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """The `value` of rank `src` of this group, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=src)
        return box[0]

    def barrier(self) -> None:
        """Return when every rank has called this."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def failure(self, error: RuntimeError) -> RuntimeError:
        """What to raise when a transfer failed with `error`: the same, with the ranks at fault."""
        return self._agreement.failure(error) if self._agreement is not None else error

    def count(self, kind: str, sent: int, received: int) -> None:
        """Count one call of `kind` and the bytes that it moves."""
        traffic = self.traffic[kind]
        if self.size > 1:
            traffic.calls += 1
            traffic.bytes_sent += sent
            traffic.bytes_received += received


def _tag(kind: str) -> int:
    """What tells apart messages of two kinds between two ranks. On a CPU those of one may overtake
    those of the other, for they come from another thread (`Communicator.background`)."""
    return zlib.crc32(kind.encode()) >> 1  # an int32 from 0
