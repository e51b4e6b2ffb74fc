"""A linear recurrence over a sequence cut over ranks: kernels strung together with the exchange."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.chain import Chain
from seqpar.context import SequenceParallel
from seqpar.exchange import EXCHANGES, States
from seqpar.kernels.chunked import Family
from seqpar.kernels.transition import Transition
from seqpar.layout import Layout, Segment


def recurrence(
    family: Family,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    scale: float,
    sp: SequenceParallel | None,
) -> Tensor:
    """o [B, T, H, V] of this rank's tokens, for q, k [B, T, H, K], v, and gates [B, T, H, D]."""
    if sp is None:
        sp = SequenceParallel(layout=Layout(q.shape[1], 1))
    return _Recurrence.apply(family, sp, scale, q, k, v, *gates)


class _Recurrence(torch.autograd.Function):
    """Forward: summarise, exchange, run. Backward: the same with gradients, in the other order.

    Both directions run their exchange on every rank, whether or not its result matters there: a
    rank that left the collective out would leave the others waiting.
    """

    @staticmethod
    def forward(
        ctx: Any,
        family: Family,
        sp: SequenceParallel,
        scale: float,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *gates: Tensor,
    ) -> Tensor:
        ranges = sp.layout.segments(sp.rank)
        lengths = (s.stop - s.start for segments in ranges for s in segments)
        offsets = [0, *accumulate(lengths)]
        exchanged = any(sp.layout.chain.linked)

        A = k.new_zeros(0)
        arriving: States | None = None
        if exchanged:
            summaries = [
                family.summarize(k[:, part], v[:, part], [g[:, part] for g in gates])
                for part in (segments[-1].local for segments in ranges)
            ]
            A = torch.stack([A for A, _ in summaries])
            B = torch.stack([B for _, B in summaries])
            arriving = _start(sp, family.transition, A, B, sp.layout.chain)

        state_dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        blank = k.new_zeros(
            k.shape[0], len(offsets) - 1, *k.shape[2:], v.shape[-1], dtype=state_dtype
        )
        entering = _place(blank, ranges, first=True, states=arriving)
        o = family.run(q, k, v, gates, scale, offsets, entering)
        ctx.save_for_backward(q, k, v, A, blank, *gates)  # blank now holds the entering states
        ctx.plan = family, sp, scale, ranges, offsets, exchanged
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, A, entering, *gates = ctx.saved_tensors
        family, sp, scale, ranges, offsets, exchanged = ctx.plan

        arriving: States | None = None
        if exchanged:
            parts = [segments[0].local for segments in ranges]
            dS = torch.stack(
                [
                    family.summarize_backward(
                        q[:, part],
                        k[:, part],
                        v[:, part],
                        [g[:, part] for g in gates],
                        scale,
                        do[:, part],
                    )
                    for part in parts
                ]
            )
            back = family.transition.adjoint(A)
            arriving = _start(sp, family.transition, back, dS, sp.layout.chain.backwards)

        leaving = _place(torch.zeros_like(entering), ranges, first=False, states=arriving)
        gradients = family.run_backward(
            q, k, v, gates, scale, offsets, entering, do.contiguous(), leaving
        )
        return None, None, None, *gradients


def _start(
    sp: SequenceParallel, transition: Transition, A: Tensor, B: Tensor, chain: Chain
) -> States:
    sizes = (x[0].numel() * x.element_size() for x in (A, B))
    choice = sp.choice(*sizes)
    start = EXCHANGES[choice.name]
    return start(transition, A.contiguous(), B, chain, sp.comm, **choice.options)


def _place(
    blank: Tensor, ranges: list[list[Segment]], *, first: bool, states: States | None
) -> Callable[[], Tensor]:
    """Late: `blank` [B, N, H, K, V] with the state of each range's first (or last) segment."""

    def fill() -> Tensor:
        end = 0
        for segments, state in zip(
            ranges, states() if states else [None] * len(ranges), strict=True
        ):
            begin, end = end, end + len(segments)
            if state is not None:
                blank[:, begin if first else end - 1] = state
        return blank

    return fill
