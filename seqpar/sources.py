"""Where the keys and values of softmax attention come from: gathered, or round a ring."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from seqpar.blocks import Part
from seqpar.comm import Pending
from seqpar.context import SequenceParallel

KIND = "kv"
ROOM = 1 << 30  # bytes of gathered keys and values with their gradients


class Gather:
    """Keys and values of the whole stream, some kv heads at a time, the next already under way.

    Their gradients go back by reduce-scatters (all-gather attention, arXiv 2407.21783).
    One rank has them all: nothing is gathered.
    """

    def __init__(self, sp: SequenceParallel) -> None:
        self._sp = sp
        self._longest = max(sp.layout.shard_sizes)
        self._returning: list[Pending] = []
        self._whole: Tensor | None = None  # gradients of one rank

    def parts(self, k: Tensor, v: Tensor, group: int) -> Iterator[Part]:
        layout, comm = self._sp.layout, self._sp.comm
        if comm.size == 1:
            yield Part(slice(None), k.transpose(1, 2), v.transpose(1, 2), layout.ranges(0))
            return

        def start(heads: slice) -> Pending:
            mine = torch.stack([k[:, :, heads], v[:, :, heads]]).transpose(2, 3)
            return comm.all_gather(_padded(mine, self._longest), KIND)  # [2, B, heads, T, D]

        steps = self._steps(k)
        pending = start(steps[0])
        for heads, following in zip_longest(steps, steps[1:]):
            shards = pending.wait()
            if following is not None:
                pending = start(following)
            held = [x[..., :size, :] for x, size in zip(shards, layout.shard_sizes, strict=True)]
            keys, values = layout.unshard(held, dim=3)  # [B, heads, total, D] each
            queries = slice(heads.start * group, heads.stop * group)
            yield Part(queries, keys, values, [(0, layout.total_tokens)])

    def parts_backward(
        self, k: Tensor, v: Tensor, group: int, precise: torch.dtype
    ) -> Iterator[Part]:
        layout, comm = self._sp.layout, self._sp.comm
        self._sp.enter("backward of softmax_attention by gathering", k=k)
        self._returning.clear()
        for part in self.parts(k, v, group):
            part.gradients = part.keys.new_zeros(2, *part.keys.shape, dtype=precise)
            yield part
            if comm.size == 1:
                self._whole = part.gradients
                continue
            if self._returning:  # what was sent before is free then
                self._returning[-1].wait()
            shards = (layout.shard(part.gradients, rank, dim=3) for rank in range(comm.size))
            by_rank = torch.stack([_padded(shard, self._longest) for shard in shards])
            self._returning.append(comm.reduce_scatter(by_rank, KIND))
            del by_rank

    def gradients(self) -> tuple[Tensor, Tensor]:
        if self._whole is not None:
            dk, dv = self._whole.transpose(2, 3)
            self._whole = None
            return dk, dv
        tokens = self._sp.layout.local_tokens(self._sp.rank)
        dk, dv = torch.cat([x.wait()[..., :tokens, :] for x in self._returning], 2).transpose(2, 3)
        self._returning.clear()
        return dk, dv

    def _steps(self, k: Tensor) -> list[slice]:
        """kv heads at a time: half, that transfers may overlap, as long as there is room."""
        heads, (dim, precise) = k.shape[2], (k.shape[3], max(k.element_size(), 4))
        one = 2 * k.shape[0] * self._sp.layout.total_tokens * dim * (k.element_size() + precise)
        count = max(1, min(heads // 2, ROOM // one))
        return [slice(first, min(first + count, heads)) for first in range(0, heads, count)]


class Ring:
    """Keys and values of one rank at a time, passed on to the next (arXiv 2310.01889).

    Their gradients travel one hop behind them, in fp32, and are home after as many hops as there
    are ranks.
    """

    def __init__(self, sp: SequenceParallel) -> None:
        self._sp = sp
        self._home: Tensor | None = None

    def parts(self, k: Tensor, v: Tensor, group: int) -> Iterator[Part]:
        layout, size = self._sp.layout, self._sp.comm.size
        longest = max(layout.shard_sizes)
        here = _padded(torch.stack([k, v]).transpose(2, 3), longest)  # [2, B, HK, T, D]
        for step in range(size):
            owner = (self._sp.rank - step) % size
            arriving, works = torch.empty_like(here), []
            if step + 1 < size:
                works = self._pass_on(here, arriving)
            tokens = slice(layout.shard_sizes[owner])
            keys, values = here[:, :, :, tokens]
            yield Part(slice(None), keys, values, layout.ranges(owner))
            self._sp.comm.wait(works, KIND)
            here = arriving

    def parts_backward(
        self, k: Tensor, v: Tensor, group: int, precise: torch.dtype
    ) -> Iterator[Part]:
        layout, size = self._sp.layout, self._sp.comm.size
        longest = max(layout.shard_sizes)
        self._sp.enter("backward of softmax_attention round the ring", k=k)
        arriving: Tensor | None = None
        works: list[Any] = []
        total = k.new_zeros(0)  # kept until the next hop: it may still be on its way out
        for part in self.parts(k, v, group):
            part.gradients = part.keys.new_zeros(2, *part.keys.shape, dtype=precise)
            yield part
            own = _padded(part.gradients, longest)
            self._sp.comm.wait(works, KIND)
            total = own if arriving is None else own + arriving
            if size > 1:
                arriving = torch.empty_like(total)
                works = self._pass_on(total, arriving)
        self._sp.comm.wait(works, KIND)
        self._home = total if arriving is None else arriving

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self._home is not None
        tokens = self._sp.layout.local_tokens(self._sp.rank)
        dk, dv = self._home[:, :, :, :tokens].transpose(2, 3)
        self._home = None
        return dk, dv

    def _pass_on(self, x: Tensor, into: Tensor) -> list[Any]:
        rank, size = self._sp.rank, self._sp.comm.size
        sends, receives = [(x, (rank + 1) % size)], [(into, (rank - 1) % size)]
        return self._sp.comm.send_receive(sends, receives, KIND)


def _padded(x: Tensor, tokens: int) -> Tensor:
    """x [..., T, D] with zeros up to `tokens`, contiguous: ranks may hold different lengths."""
    missing = tokens - x.shape[-2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
