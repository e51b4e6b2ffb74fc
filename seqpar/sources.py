"""Where the keys and values of softmax attention come from: gathered, or round a ring."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seqpar.blocks import Part
from seqpar.comm import Pending
from seqpar.context import SequenceParallel

KIND = "kv"


class Gather:
    """Keys and values of the whole stream, one kv head at a time, the next one already under way.

    Their gradients go back by one reduce-scatter a head (all-gather attention, arXiv 2407.21783).
    """

    def __init__(self, sp: SequenceParallel) -> None:
        self._sp = sp
        self._longest = max(sp.layout.shard_sizes)
        self._returning: list[Pending] = []

    def parts(self, k: Tensor, v: Tensor, group: int) -> Iterator[Part]:
        layout = self._sp.layout

        def start(head: int) -> Pending:
            mine = torch.stack([k[:, :, head], v[:, :, head]])  # [2, B, T, D]
            return self._sp.comm.all_gather(_padded(mine, self._longest), KIND)

        pending = start(0)
        for head in range(k.shape[2]):
            shards = pending.wait()
            if head + 1 < k.shape[2]:
                pending = start(head + 1)
            held = [x[:, :, :size] for x, size in zip(shards, layout.shard_sizes, strict=True)]
            keys, values = layout.unshard(held, dim=2)[:, :, None]  # [B, 1, total, D] each
            queries = slice(head * group, (head + 1) * group)
            yield Part(queries, keys, values, [(0, layout.total_tokens)])

    def parts_backward(
        self, k: Tensor, v: Tensor, group: int, precise: torch.dtype
    ) -> Iterator[Part]:
        layout = self._sp.layout
        self._sp.enter("backward of softmax_attention by gathering", k=k)
        self._returning.clear()
        for part in self.parts(k, v, group):
            part.gradients = part.keys.new_zeros(2, *part.keys.shape, dtype=precise)
            yield part
            whole = part.gradients[:, :, 0]  # [2, B, total, D]
            shards = [layout.shard(whole, rank, dim=2) for rank in range(layout.world_size)]
            by_rank = torch.stack([_padded(shard, self._longest) for shard in shards])
            self._returning.append(self._sp.comm.reduce_scatter(by_rank, KIND))

    def gradients(self) -> tuple[Tensor, Tensor]:
        tokens = self._sp.layout.local_tokens(self._sp.rank)
        dk, dv = torch.stack([x.wait()[:, :, :tokens] for x in self._returning], 3)
        self._returning.clear()
        return dk, dv


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
    return torch.nn.functional.pad(x, (0, 0, 0, tokens - x.shape[-2])).contiguous()
