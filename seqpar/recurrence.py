"""A linear recurrence over a sequence cut over ranks: kernels strung together with the exchange.

The scan of states runs at three levels, the same algebra at each: chunks within a segment (in the
kernels), segments within a rank (here), ranks (the exchange).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqpar.checks import first_order, uncompiled
from seqpar.context import SequenceParallel, alone
from seqpar.exchange import EXCHANGES
from seqpar.kept import recall, remember
from seqpar.kernels.chunked import CHUNK
from seqpar.kernels.family import Family
from seqpar.kernels.pieces import Late, Pieces


def recurrence(
    name: str,
    family: Family,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    scale: float,
    sp: SequenceParallel | None,
    *,
    beside: bool,
) -> Late:
    """Start on the tokens of this rank: q, k [B, T, H, K], v, and gates [B, T, HV, D] by name.

    What the caller does before it calls the returned function, once, for o [B, T, HV, V] runs while
    states travel between ranks; its backward pass, while their gradients do: autograd takes what
    was recorded last first.

    name: the public function's, for messages. beside: whether the caller does anything before.
    """
    call = _Call(name, family, sp or alone(q.shape[1]), scale, tuple(gates), beside)
    with torch.cuda.device_of(q):  # where Triton launches; nothing on a CPU
        start = _Start.apply(call, q, k, v, *gates.values())

    return partial(_finish, call, start)


@uncompiled
def _finish(call: "_Call", start: Tensor) -> Tensor:
    with torch.cuda.device_of(start):
        return _Finish.apply(call, start)


class _Call:
    """One call in two halves each way: the first ends where an exchange is under way.

    Forward: summarise, exchange, run. Backward: the same with gradients, in the other order. Both
    directions run their exchange on every rank, whether or not its result matters there: a rank
    that left the collective out would leave the others waiting.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        sp: SequenceParallel,
        scale: float,
        gates: tuple[str, ...],
        beside: bool,
    ) -> None:
        self.name, self.family, self.sp, self.scale, self.gates = name, family, sp, scale, gates
        self.beside = beside
        self._half: list[Any] = []  # what the first half leaves to the second

    def start(self, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> None:
        family, sp = self.family, self.sp
        self.pieces = pieces = sp.pieces(sp.segment_tokens or family.piece_tokens(k, v))
        prepared = family.prepare(q, k, v, gates, self.scale, pieces)
        known = recall()
        states, A = known or (_states(k, v, len(pieces.entered)), None)
        assert states is not None
        entering = _ready(states)
        if known is None and (pieces.left or sp.exchanges):
            if sp.exchanges:
                named = dict(zip(self.gates, gates, strict=True))
                sp.enter(self.name, q=q, v=v, **named)
            A, B = prepared.summarize()
            entering = self._scan(pieces, A, B, states, backwards=False)
        remember(states, A)
        self._half = [prepared, entering, (q, k, v, states, A, *gates)]

    def finish(self, ctx: Any) -> Tensor:
        prepared, entering, saved = self._half
        self._half = []
        o = prepared.run(entering)
        ctx.save_for_backward(*saved)  # the states are filled by now
        return o

    def start_backward(self, ctx: Any, do: Tensor) -> None:
        q, k, v, entering, A, *gates = ctx.saved_tensors
        family, sp, pieces = self.family, self.sp, self.pieces
        do = do.contiguous()
        if do.data_ptr() % 16:  # kernels load 16 bytes at once
            do = do.clone()
        adjoints = _states(k, v, len(pieces.left))
        leaving = _ready(adjoints)
        if sp.exchanges:
            sp.enter(f"backward of {self.name}", q=q, v=v)
        prepared = family.prepare(q, k, v, gates, self.scale, pieces)
        if pieces.entered or sp.exchanges:
            dB = prepared.summarize_backward(do)
            back = family.transition.adjoint(pieces.passed(A))
            leaving = self._scan(pieces, back, dB, adjoints, backwards=True)
        self._half = [prepared, entering, do, leaving]

    def finish_backward(self, wanted: Sequence[bool]) -> list[Tensor | None]:
        """wanted: whether a gradient is, of the call, q, k, v and each gate."""
        prepared, *rest = self._half
        self._half = []
        return [None, *prepared.run_backward(*rest, wanted[4:])]

    def _scan(
        self, pieces: Pieces, A: Tensor, B: Tensor, states: Tensor, *, backwards: bool
    ) -> Late:
        """Start the scan over the pieces of all ranks; the result waits, and fills in `states`.

        A, B: the summaries [B, N, HV, ...] of those that hand a state on; backwards, A is
        transposed.
        """
        family, sp = self.family, self.sp
        if not sp.exchanges:
            family.scan(A, B, pieces, None, states, backwards=backwards)
            return _ready(states)

        whole_A, whole_B = family.leave(A, B, pieces, backwards=backwards)
        A_bytes, B_bytes = (x.shape[1:].numel() * x.element_size() for x in (whole_A, whole_B))
        batch, heads, key, value = whole_B.shape[1:]
        work = 2 * batch * heads * CHUNK * (key + value)  # scores and their product with v
        choice = sp.choice(A_bytes, B_bytes, work)
        chain = sp.layout.chain.backwards if backwards else sp.layout.chain
        comm = sp.comm if self.beside else sp.comm.in_line()
        start = EXCHANGES[choice.name]
        arriving = start(family.transition, whole_A, whole_B, chain, comm, **choice.options)

        def late() -> Tensor:
            family.scan(A, B, pieces, _together(arriving()), states, backwards=backwards)
            return states

        return late


class _Start(torch.autograd.Function):
    """The first half forwards, the second backwards; an empty tensor links it to `_Finish`."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Tensor:
        ctx.call = call
        with _full_precision(inputs[0]):
            call.start(*inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, end: Tensor) -> tuple[Tensor | None, ...]:
        with _full_precision(end):
            return tuple(ctx.call.finish_backward(ctx.needs_input_grad))


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, start: Tensor) -> Tensor:
        ctx.call = call
        with _full_precision(start):
            return call.finish(ctx)

    @staticmethod
    @first_order
    def backward(ctx: Any, do: Tensor) -> tuple[None, Tensor]:
        with _full_precision(do):
            ctx.call.start_backward(ctx, do)
        return None, do.new_empty(0)


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast would multiply states and summaries in half precision."""
    device = x.device.type
    wanted = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if wanted else nullcontext()


def _together(arrived: list[Tensor | None]) -> Tensor | None:
    """[ranges, ...], anything where nothing arrived; one alone is not copied."""
    known = [state for state in arrived if state is not None]
    if not known:
        return None
    if len(arrived) == 1:
        return known[0][None]
    return torch.stack([known[0] if state is None else state for state in arrived])


def _ready(states: Tensor) -> Late:
    return lambda: states


def _states(k: Tensor, v: Tensor, count: int) -> Tensor:
    """Room for states [B, count, HV, K, V], to be filled in by a scan."""
    precise = torch.float64 if k.dtype == torch.float64 else torch.float32
    return v.new_empty(v.shape[0], count, v.shape[2], k.shape[3], v.shape[3], dtype=precise)
