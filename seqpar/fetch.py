"""Tokens from wherever they are: one all-to-all brings each rank the global ranges it asks for."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqpar.checks import first_order, uncompiled
from seqpar.comm import Communicator
from seqpar.context import SequenceParallel
from seqpar.layout import Layout

# the global ranges [start, stop) of a rank, in its local order; the same function on all ranks
Ranges = Callable[[int], list[tuple[int, int]]]


@uncompiled
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
    key = "convert", target.digest, x.device
    make = partial(Routes, sp.layout.ranges, target.ranges, sp.comm, x.device)
    return fetch(x, sp.once(key, make), sp.comm, kind="convert")


def fetch(x: Tensor, routes: "Routes", comm: Communicator, kind: str) -> Tensor:
    """The tokens of the global ranges that `routes` ask for, in that order; differentiable.

    Args:
        x: [B, T, ...], the tokens that this rank holds.
        routes: made once and kept, for they hold tables on x's device; of all ranks alike.
        comm: the ranks; kind: what the traffic is counted as.

    Returns:
        [B, sum of the range lengths, ...]. Its gradient is added up where the tokens came from.
    """
    return _Fetch.apply(x, routes, comm, kind)


class Routes:
    """Which local tokens go to each rank, and where those received belong.

    Args:
        held: which tokens each rank holds, as global ranges; no token may be held twice.
        wanted: which each asks for; every rank must pass the same two functions.
        comm: the ranks.
        device: of the tensors that will travel.
        room: how many rows of the result each wanted range has, its tokens being the last of them;
            None for as many as it has tokens.
    """

    def __init__(
        self,
        held: Ranges,
        wanted: Ranges,
        comm: Communicator,
        device: torch.device,
        room: int | None = None,
    ) -> None:
        rank, everyone = comm.rank, range(comm.size)
        mine = wanted(rank)
        sends = [_pieces(held(rank), wanted(target), room) for target in everyone]
        receives = [_pieces(held(source), mine, room) for source in everyone]
        self.rows = sum(stop - start for start, stop in mine) if room is None else room * len(mine)
        self.send_rows = [sum(length for _, _, length in pieces) for pieces in sends]
        self.receive_rows = [sum(length for _, _, length in pieces) for pieces in receives]
        sent = _index((local, length) for pieces in sends for local, _, length in pieces)
        placed = _index((at, length) for pieces in receives for _, at, length in pieces)
        self._repeats = len(sent.unique()) < len(sent)
        self._sent, self._placed = sent.to(device), placed.to(device)

    def bring(self, x: Tensor, comm: Communicator, kind: str) -> Tensor:
        """The rows asked for, [rows, B, ...], of x [B, T, ...]; zeros where nothing was."""
        sent = x.transpose(0, 1).index_select(0, self._sent)
        came = comm.all_to_all(sent, self.send_rows, self.receive_rows, kind).wait()
        full = self.rows == len(came)
        out = came.new_empty(came.shape) if full else came.new_zeros(self.rows, *came.shape[1:])
        return out.index_copy_(0, self._placed, came)

    def give_back(self, rows: Tensor, dx: Tensor, comm: Communicator, kind: str) -> None:
        """Add the gradient of what `bring` returned to dx [B, T, ...], wherever the rows were."""
        sent = rows.index_select(0, self._placed)
        back = comm.all_to_all(sent, self.receive_rows, self.send_rows, kind).wait()
        tokens = dx.transpose(0, 1)
        if self._repeats:  # in a fixed order, which index_add_ on a GPU does not keep
            tokens.index_put_((self._sent,), back, accumulate=True)
        else:
            tokens.index_add_(0, self._sent, back)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: Routes, comm: Communicator, kind: str) -> Tensor:
        ctx.routes, ctx.comm, ctx.kind, ctx.shape = routes, comm, kind, x.shape
        comm.reach(f"exchange of {kind}, [{x.shape[0]}, T, {list(x.shape[2:])}] {x.dtype}")
        return routes.bring(x, comm, kind).transpose(0, 1)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        ctx.comm.reach(f"backward of the exchange of {ctx.kind}, {dout.dtype}")
        batch, tokens, *rest = ctx.shape
        dx = dout.new_zeros(tokens, batch, *rest).transpose(0, 1)
        ctx.routes.give_back(dout.transpose(0, 1), dx, ctx.comm, ctx.kind)
        return dx, None, None, None


def _pieces(
    held: list[tuple[int, int]], wanted: list[tuple[int, int]], room: int | None
) -> list[tuple[int, int, int]]:
    """(local token, place in the result, length) of every run of wanted tokens that is held."""
    found, rows = [], 0
    for start, stop in wanted:
        offset, rows = 0, rows + (stop - start if room is None else room)
        at = rows - (stop - start)
        for first, last in held:
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                found.append((offset + begin - first, at + begin - start, end - begin))
            offset += last - first
    return found


def _index(pieces: Iterable[tuple[int, int]]) -> Tensor:
    parts = [torch.arange(start, start + length) for start, length in pieces]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
