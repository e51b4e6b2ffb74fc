"""A sequence that arrives in parts on one rank: generation, and texts too long for one pass.

To a layer a part looks like the shard of a rank in the middle of a chain. What it would fetch from
the rank before it is what the parts before left; what it would hand to the rank after it is kept
for the next. So every layer that works on a cut sequence works incrementally, with the state of a
recurrence, the last inputs of a convolution, the keys and values of softmax attention.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqpar.comm import Communicator, Pending
from seqpar.context import SequenceParallel
from seqpar.cost import Links
from seqpar.kernels.conv import WIDEST
from seqpar.layout import Layout

T = TypeVar("T")


class Incremental:
    """One sequence (batch of any size, no packed documents) that is given in parts, in order.

    Softmax layers must take their keys round a ring (method="ring"). No gradients.

    Attributes: past, the tokens that have been worked on.
    """

    def __init__(self) -> None:
        self.past = 0
        self._kept: dict[tuple[str, int], Tensor] = {}

    def part(self, tokens: int) -> SequenceParallel:
        """How the next `tokens` of the sequence are cut; for one forward pass of the whole model.

        Calling it again goes on to the part after that.
        """
        sizes = [self.past, tokens, 1] if self.past else [tokens, 1]
        layout = Layout(sum(sizes), len(sizes), shard_sizes=sizes)
        neighbours = _Neighbours(self._kept, self.past, tokens)
        self.past, self._kept = self.past + tokens, neighbours.kept
        links = Links((0,) * len(sizes))
        return SequenceParallel(layout=layout, exchange="ring", comm=neighbours, links=links)


class _Work:
    """A message that has arrived."""

    def wait(self) -> None:
        """Nothing is left to do."""


class _Neighbours(Communicator):
    """Stands for the ranks before and after: gives what was kept, keeps what is sent.

    before: what the parts before left, by kind and number of the call, which are alike in each
    forward pass; kept: what this one leaves.
    """

    def __init__(self, before: dict[tuple[str, int], Tensor], past: int, tokens: int) -> None:
        super().__init__(None)
        self.rank, self.size = (1, 3) if past else (0, 2)
        self.kept: dict[tuple[str, int], Tensor] = {}
        self._before, self._past, self._tokens = before, past, tokens
        self._calls: Counter[str] = Counter()

    def _next(self, what: str, kind: str) -> tuple[str, int]:
        self._calls[what + kind] += 1
        return kind, self._calls[what + kind] - 1

    def reach(self, call: str) -> None:
        """All agree with themselves."""
        if call.startswith("backward"):
            raise ValueError(f"{call}: a sequence in parts has no gradients; use torch.no_grad()")

    def all_gather(self, x: Tensor, kind: str = "other") -> Pending:
        """There is nobody to gather from."""
        raise ValueError("softmax attention over a sequence in parts must have method='ring'")

    def background(
        self, work: Callable[[], T], device: torch.device, kind: str = "other"
    ) -> Callable[[], T]:
        """Nothing travels, so nothing is gained by waiting."""
        result = work()
        return lambda: result

    def send(self, x: Tensor, to: int, kind: str = "other") -> Any:
        """A state that goes to the rank after this."""
        self.kept[self._next("sent ", kind)] = x
        return _Work()

    def receive(self, out: Tensor, source: int, kind: str = "other") -> Any:
        """A state that comes from the rank before this."""
        out.copy_(self._before[self._next("received ", kind)])
        return _Work()

    def all_to_all(
        self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], kind: str = "other"
    ) -> Pending:
        """The last inputs [rows, ...] of a convolution."""
        if kind != "halo":
            return self.all_gather(x)
        key = self._next("halo ", kind)
        before = self._before.get(key, x[:0])
        self.kept[key] = torch.cat([before, x])[-WIDEST:]
        return Pending(before[len(before) - sum(receive_rows) :], None)

    def send_receive(
        self,
        sends: Sequence[tuple[Tensor, int]],
        receives: Sequence[tuple[Tensor, int]],
        kind: str = "other",
    ) -> list[Any]:
        """Keys and values [2, B, heads, tokens, D] round the ring: the first hop brings the past's,
        the next those of the rank after, which none of this part sees."""
        self._calls[kind] += 1
        hops = self.size - 1
        number, hop = divmod(self._calls[kind] - 1, hops)
        ((mine, _),), ((into, _),) = sends, receives
        into.zero_()
        if hop == 0:
            own = mine[..., : self._tokens, :]
            if self._past:
                before = self._before[kind, number]
                into[..., : self._past, :] = before
                own = torch.cat([before, own], -2)
            self.kept[kind, number] = own.contiguous()
        return []
