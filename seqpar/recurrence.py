"""A linear recurrence over a sequence cut over ranks: kernels strung together with the exchange.

The scan of states runs at three levels, the same algebra at each: chunks within a segment (in the
kernels), segments within a rank (here), ranks (the exchange).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.context import SequenceParallel
from seqpar.exchange import EXCHANGES, through
from seqpar.kernels.chunked import CHUNK, Family, Late
from seqpar.kernels.transition import Transition
from seqpar.layout import Layout


def recurrence(
    name: str,
    family: Family,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    scale: float,
    sp: SequenceParallel | None,
) -> Tensor:
    """o [B, T, H, V] of this rank's tokens, for q, k [B, T, H, K], v, and gates [B, T, H, D].

    name: the public function's, for messages.
    """
    if sp is None:
        sp = SequenceParallel(layout=Layout(q.shape[1], 1))
    return _Recurrence.apply(name, family, sp, scale, q, k, v, *gates)


class _Recurrence(torch.autograd.Function):
    """Forward: summarise, exchange, run. Backward: the same with gradients, in the other order.

    Both directions run their exchange on every rank, whether or not its result matters there: a
    rank that left the collective out would leave the others waiting.
    """

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        family: Family,
        sp: SequenceParallel,
        scale: float,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *gates: Tensor,
    ) -> Tensor:
        own = _Segments(sp)
        precise = torch.float64 if k.dtype == torch.float64 else torch.float32
        states = k.new_zeros(k.shape[0], len(own.spans), *k.shape[2:], v.shape[-1], dtype=precise)
        A, entering = k.new_zeros(0), _nothing(states)
        if own.exchanged:
            sp.enter(name, q=q, v=v)
        if own.linked:
            found = family.summarize(k, v, gates, [own.spans[i] for i in own.continued])
            A, B = (_spread(x, own.continued, len(own.spans)) for x in found)
            entering = own.scan(family.transition, A, B, states, backwards=False)
        o = family.run(q, k, v, gates, scale, own.spans, entering)
        ctx.save_for_backward(q, k, v, A, states, *gates)  # the states are filled by now
        ctx.plan = name, family, sp, own, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, A, entering, *gates = ctx.saved_tensors
        name, family, sp, own, scale = ctx.plan
        do, adjoints = do.contiguous(), torch.zeros_like(entering)
        leaving = _nothing(adjoints)
        if own.exchanged:
            sp.enter(f"backward of {name}", q=q, v=v)
        if own.linked:
            spans = [own.spans[i] for i in own.continues]
            pulled = family.summarize_backward(q, k, v, gates, scale, spans, do)
            back = family.transition.adjoint(A)
            dS = _spread(pulled, own.continues, len(own.spans))
            leaving = own.scan(family.transition, back, dS, adjoints, backwards=True)
        gradients = family.run_backward(q, k, v, gates, scale, own.spans, entering, do, leaving)
        return None, None, None, None, *gradients


class _Segments:
    """This rank's segments, long ones split, and the scan that ties them to those of other ranks.

    spans: their local tokens [start, stop). continues, continued: which of them a state enters,
    and from which one is handed on. exchanged: whether any rank hands a state to another; linked:
    or this one to itself.
    """

    def __init__(self, sp: SequenceParallel) -> None:
        self._sp = sp
        parts = [
            [part for segment in segments for part in segment.split(sp.segment_tokens)]
            for segments in sp.layout.segments(sp.rank)
        ]
        flat = [s for segments in parts for s in segments]
        self.spans = [(s.local.start, s.local.stop) for s in flat]
        self.continues = [i for i, s in enumerate(flat) if s.continues]
        self.continued = [i for i, s in enumerate(flat) if s.continued]
        self.exchanged = any(sp.layout.chain.linked)
        self.linked = self.exchanged or bool(self.continued)
        ends = [sum(map(len, parts[: r + 1])) for r in range(len(parts))]
        self._ranges = [range(end - len(s), end) for end, s in zip(ends, parts, strict=True)]

    def scan(
        self, transition: Transition, A: Tensor, B: Tensor, states: Tensor, *, backwards: bool
    ) -> Late:
        """Start the scan; the result waits, and fills in `states` [B, N, H, K, V] those that enter.

        A, B: the segments' summaries [B, N, H, ...]; backwards, A is transposed.
        """
        chain = self._sp.layout.chain.backwards if backwards else self._sp.layout.chain
        enters = set(self.continued if backwards else self.continues)
        orders = [list(reversed(r)) if backwards else list(r) for r in self._ranges]

        def fold(order: list[int], state: Tensor | None) -> Tensor:
            """The state that leaves the range that `state` enters."""
            for i in order:
                if i not in enters:
                    state = None
                if state is not None:
                    states[:, i] = state
                state = through(transition, A[:, i], B[:, i], state)
            assert state is not None
            return state

        arriving = None
        if self.exchanged:
            whole_B = torch.stack([fold(order, None) for order in orders])
            whole_A = torch.stack([self._product(transition, A, order) for order in orders])
            A_bytes, B_bytes = (x[0].numel() * x.element_size() for x in (whole_A, whole_B))
            batch, heads, key, value = whole_B.shape[1:]
            work = 2 * batch * heads * CHUNK * (key + value)  # scores and their product with v
            choice = self._sp.choice(A_bytes, B_bytes, work)
            start = EXCHANGES[choice.name]
            arriving = start(transition, whole_A, whole_B, chain, self._sp.comm, **choice.options)

        def late() -> Tensor:
            arrived = arriving() if arriving else [None] * len(orders)
            for order, state in zip(orders, arrived, strict=True):
                fold(order, state)
            return states

        return late

    @staticmethod
    def _product(transition: Transition, A: Tensor, order: list[int]) -> Tensor:
        total = A[:, order[0]]
        for i in order[1:]:
            total = transition.product(A[:, i], total)
        return total


def _nothing(states: Tensor) -> Late:
    return lambda: states


def _spread(x: Tensor, segments: list[int], count: int) -> Tensor:
    """x [B, len(segments), ...] as [B, count, ...], zero for the other segments."""
    out = x.new_zeros(x.shape[0], count, *x.shape[2:])
    out[:, segments] = x
    return out
