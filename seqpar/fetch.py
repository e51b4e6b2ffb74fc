"""Tokens from wherever they are: one all-to-all brings each rank the global ranges it asks for."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.comm import Communicator
from seqpar.context import SequenceParallel
from seqpar.layout import Layout

# the global ranges [start, stop) of a rank, in its local order; the same function on all ranks
Ranges = Callable[[int], list[tuple[int, int]]]


def convert(x: Tensor, target: Layout, sp: SequenceParallel) -> Tensor:
    """This rank's tokens under another layout of the same stream, in one all-to-all.

    Args:
        x: [B, T, ...], this rank's shard under `sp.layout`.
        target: the layout wanted; its documents do not matter.
        sp: who holds which tokens now.

    Returns:
        [B, T', ...]; differentiable.

    Raises:
        ValueError: `target` is of another stream length or number of ranks.
    """
    sp.check_shard("x", x)
    for name in ("total_tokens", "world_size"):
        if getattr(target, name) != getattr(sp.layout, name):
            raise ValueError(
                f"target has {name}={getattr(target, name)}, the layout of x has "
                f"{getattr(sp.layout, name)}: only the order over the same ranks can change"
            )
    sp.enter(f"convert to {target!r}", x=x)
    return fetch(x, sp.layout.ranges, target.ranges, sp.comm, kind="convert")


def fetch(x: Tensor, held: Ranges, wanted: Ranges, comm: Communicator, kind: str) -> Tensor:
    """The tokens of the global ranges `wanted(rank)`, in that order; differentiable.

    Args:
        x: [B, T, ...], the tokens of `held(rank)`.
        held: which tokens each rank holds; no token may be held twice.
        wanted: which each asks for; every rank must pass the same two functions.
        comm: the ranks; kind: what the traffic is counted as.

    Returns:
        [B, sum of the range lengths, ...]. Its gradient is added up where the tokens came from.
    """
    return _Fetch.apply(x, _Routes(held, wanted, comm.rank, comm.size), comm, kind)


class _Routes:
    """Which local tokens go to each rank, and where those received belong."""

    def __init__(self, held: Ranges, wanted: Ranges, rank: int, size: int) -> None:
        sends = [_pieces(held(rank), wanted(target)) for target in range(size)]
        receives = [_pieces(held(source), wanted(rank)) for source in range(size)]
        self.send_rows = [sum(length for _, _, length in pieces) for pieces in sends]
        self.receive_rows = [sum(length for _, _, length in pieces) for pieces in receives]
        self.sent = _index((local, length) for pieces in sends for local, _, length in pieces)
        self.placed = _index((at, length) for pieces in receives for _, at, length in pieces)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: _Routes, comm: Communicator, kind: str) -> Tensor:
        ctx.routes, ctx.comm, ctx.kind, ctx.shape = routes, comm, kind, x.shape
        comm.reach(f"exchange of {kind}, [{x.shape[0]}, T, {list(x.shape[2:])}] {x.dtype}")
        rows = x.transpose(0, 1)  # [T, B, ...]
        sent = rows.index_select(0, routes.sent.to(x.device))
        came = comm.all_to_all(sent, routes.send_rows, routes.receive_rows, kind).wait()
        out = torch.empty_like(came)
        out[routes.placed.to(x.device)] = came
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        routes: _Routes = ctx.routes
        ctx.comm.reach(f"backward of the exchange of {ctx.kind}, {dout.dtype}")
        sent = dout.transpose(0, 1).index_select(0, routes.placed.to(dout.device))
        back = ctx.comm.all_to_all(sent, routes.receive_rows, routes.send_rows, ctx.kind).wait()
        batch, tokens, *rest = ctx.shape
        dx = back.new_zeros(tokens, batch, *rest)
        dx.index_add_(0, routes.sent.to(dout.device), back)
        return dx.transpose(0, 1), None, None, None


def _pieces(
    held: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """(local token, place in the result, length) of every run of wanted tokens that is held."""
    found, at = [], 0
    for start, stop in wanted:
        offset = 0
        for first, last in held:
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                found.append((offset + begin - first, at + begin - start, end - begin))
            offset += last - first
        at += stop - start
    return found


def _index(pieces: Iterable[tuple[int, int]]) -> Tensor:
    parts = [torch.arange(start, start + length) for start, length in pieces]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
