"""Softmax attention of this rank's queries over keys that arrive in parts, forward and backward.

Keys and values come from a `Source`: parts of the stream, some heads at a time, in any order. Each
query segment meets each part in at most one block that needs no mask and one causal square. Output,
log-sum-exp and all gradients accumulate in fp32 (fp64 for fp64 inputs): in bf16 their error grows
like the square root of the number of parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from seqpar.checks import first_order
from seqpar.kept import recall, remember
from seqpar.kernels.softmax import block_backward, block_forward, merge, uses_cudnn
from seqpar.layout import Segment


@dataclass
class Part:
    """Some keys and values: [B, heads, tokens, D] of the global `ranges`, one after the other.

    queries: the query heads they serve. gradients [2, B, heads, tokens, D]: where those of keys and
    values are added up, in the backward pass.
    """

    queries: slice
    keys: Tensor
    values: Tensor
    ranges: list[tuple[int, int]]
    gradients: Tensor | None = None


class Source(Protocol):
    """How keys and values reach this rank, and their gradients the ranks they belong to."""

    def parts(self, k: Tensor, v: Tensor, group: int) -> Iterator[Part]:
        """Every part the queries need, from this rank's own k, v [B, T, HK, D].

        group: how many query heads share a kv head.
        """

    def parts_backward(
        self, k: Tensor, v: Tensor, group: int, precise: torch.dtype
    ) -> Iterator[Part]:
        """The same with `gradients` to add to, each taken away before the next is given."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """dk, dv [B, T, HK, D] of this rank's tokens, after all parts."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: list[Segment],
    causal: bool,
    scale: float,
    source: Source,
    whole: bool,
) -> Tensor:
    """o [B, T, H, D] for the queries q of `segments`, over what `source` makes of k and v.

    whole: whether the stream is one document, so that each call has the same blocks.
    """
    return _Attend.apply(q, k, v, segments, causal, scale, source, uses_cudnn(q, whole))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: list[Segment],
        causal: bool,
        scale: float,
        source: Source,
        cudnn: bool,
    ) -> Tensor:
        known = recall(large=True)
        out, lse = known or _forward(q, k, v, segments, causal, scale, source, cudnn)
        remember(out, lse, large=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = segments, causal, scale, source, cudnn
        assert out is not None
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        segments, causal, scale, source, cudnn = ctx.plan
        rows, outs, grads = (x.transpose(1, 2) for x in (q, out, do))
        found: dict[tuple[int | None, int], Tensor] = {}
        places = {}
        for part in source.parts_backward(k, v, q.shape[2] // k.shape[2], lse.dtype):
            assert part.gradients is not None
            for here, there, square in _blocks(segments, part.ranges, causal):
                at = (slice(None), part.queries, here)
                block_dq, dk, dv = block_backward(
                    grads[at],
                    rows[at],
                    part.keys[:, :, there],
                    part.values[:, :, there],
                    outs[at],
                    lse[at],
                    square,
                    scale,
                    cudnn,
                )
                place = part.queries.start, here.start
                if place in found:
                    block_dq = found[place].to(lse.dtype).add_(block_dq)
                found[place], places[place] = block_dq, at
                part.gradients[0, :, :, there] += dk
                part.gradients[1, :, :, there] += dv
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for place, at in places.items():
            dq.transpose(1, 2)[at] = found.pop(place)
        dk, dv = source.gradients()
        return dq, dk.to(k.dtype), dv.to(v.dtype), *[None] * 5


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: list[Segment],
    causal: bool,
    scale: float,
    source: Source,
    cudnn: bool,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] and its log-sum-exp [B, H, T]."""
    rows = q.transpose(1, 2)  # [B, H, T, D]
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    found: dict[tuple[int | None, int], tuple[Tensor, Tensor]] = {}
    places = {}
    for part in source.parts(k, v, q.shape[2] // k.shape[2]):
        for here, there, square in _blocks(segments, part.ranges, causal):
            at = (slice(None), part.queries, here)
            out, sums = block_forward(
                rows[at], part.keys[:, :, there], part.values[:, :, there], square, scale, cudnn
            )
            sums = sums.to(precise)
            place = part.queries.start, here.start
            if place in found:
                o, lse = found[place]
                out, sums = merge(o.to(precise), lse, out.to(precise), sums)
            found[place], places[place] = (out, sums), at
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = rows.new_empty(rows.shape[:3], dtype=precise)
    for place, at in places.items():
        out.transpose(1, 2)[at], lse[at] = found.pop(place)
    return out, lse


def _blocks(
    segments: list[Segment], ranges: list[tuple[int, int]], causal: bool
) -> Iterator[tuple[slice, slice, bool]]:
    """(query tokens, key tokens, causal square?) of every block with anything to see."""
    for s in segments:
        offset = 0
        for start, stop in ranges:
            last = s.start if causal else s.document_stop
            first, past = max(start, s.document), min(stop, last)
            if first < past:
                yield s.local, slice(offset + first - start, offset + past - start), False
            if causal and start <= s.start < stop:
                own = offset + s.start - start
                yield s.local, slice(own, own + s.stop - s.start), True
            offset += stop - start
