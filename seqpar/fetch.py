"""Tokens from wherever they are: one all-to-all brings each rank the global ranges it asks for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.context import SequenceParallel
from seqpar.layout import Layout

Wanted = Callable[[int], list[tuple[int, int]]]


def fetch(x: Tensor, wanted: Wanted, sp: SequenceParallel, kind: str) -> Tensor:
    """The tokens of the global ranges `wanted(rank)`, in that order; differentiable.

    Args:
        x: [B, T, ...], this rank's shard.
        wanted: the ranges [start, stop) each rank asks for; every rank must pass the same function.
        sp: who holds which tokens.
        kind: what the traffic is counted as.

    Returns:
        [B, sum of the range lengths, ...]. Its gradient is added up where the tokens came from.
    """
    return _Fetch.apply(x, _Routes(sp.layout, sp.rank, wanted), sp, kind)


class _Routes:
    """Which local tokens go to each rank, and where those received belong."""

    def __init__(self, layout: Layout, rank: int, wanted: Wanted) -> None:
        ranks = range(layout.world_size)
        sends = [_sources(layout, wanted(target))[rank] for target in ranks]
        receives = _sources(layout, wanted(rank))
        self.send_rows = [sum(length for _, _, length in pieces) for pieces in sends]
        self.receive_rows = [sum(length for _, _, length in pieces) for pieces in receives]
        self.sent = _index((local, length) for pieces in sends for local, _, length in pieces)
        self.placed = _index((at, length) for pieces in receives for _, at, length in pieces)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: _Routes, sp: SequenceParallel, kind: str) -> Tensor:
        ctx.routes, ctx.sp, ctx.kind, ctx.shape = routes, sp, kind, x.shape
        rows = x.transpose(0, 1)  # [T, B, ...]
        sent = rows.index_select(0, routes.sent.to(x.device))
        came = sp.comm.all_to_all(sent, routes.send_rows, routes.receive_rows, kind).wait()
        out = torch.empty_like(came)
        out[routes.placed.to(x.device)] = came
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        routes: _Routes = ctx.routes
        sent = dout.transpose(0, 1).index_select(0, routes.placed.to(dout.device))
        back = ctx.sp.comm.all_to_all(sent, routes.receive_rows, routes.send_rows, ctx.kind).wait()
        batch, tokens, *rest = ctx.shape
        dx = back.new_zeros(tokens, batch, *rest)
        dx.index_add_(0, routes.sent.to(dout.device), back)
        return dx.transpose(0, 1), None, None, None


def _sources(layout: Layout, wanted: list[tuple[int, int]]) -> list[list[tuple[int, int, int]]]:
    """By source rank: (its local token, place in the result, length) of every piece wanted."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(layout.world_size)]
    at = 0
    for start, stop in wanted:
        for rank in range(layout.world_size):
            offset = 0
            for first, last in layout.ranges(rank):
                begin, end = max(start, first), min(stop, last)
                if begin < end:
                    found[rank].append((offset + begin - first, at + begin - start, end - begin))
                offset += last - first
        at += stop - start
    return found


def _index(pieces: Any) -> Tensor:
    parts = [torch.arange(start, start + length) for start, length in pieces]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
