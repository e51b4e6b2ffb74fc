"""The pieces of a rank's tokens that are worked on side by side, and how states pass between them.

A piece is a run of tokens of one document. States are kept only where one passes: those that enter
are [B, slots, H, K, V] over the pieces that one enters, in order, and summaries likewise over the
pieces that one leaves. A rank with ten thousand short documents keeps none.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from seqpar.kernels.once import Once

# hands over a state [B, slots, H, K, V] when it is first needed
Late = Callable[[], Tensor]


@dataclass(frozen=True)
class Run:
    """Consecutive pieces of which each hands its state to the next, in the order it travels.

    summaries: of those that hand a state on. slots: of the states that enter pieces. source: the
    arriving state it begins with, or None. target: what its last state leaves to, or None.
    """

    summaries: range
    slots: range
    source: int | None
    target: int | None

    @property
    def row(self) -> tuple[int, ...]:
        """[first summary, summaries, first slot, source, target], -1 for none."""
        ends = (-1 if end is None else end for end in (self.source, self.target))
        return self.summaries.start, len(self.summaries), self.slots.start, *ends


class Pieces(Once):
    """Spans [start, stop) of a rank's tokens, in order, and how states pass between them.

    enters, leaves: whether a state enters a span, from the one before it or from another rank, and
    whether one leaves it. ranges: (first span, one past the last) of each range of the rank; a
    state crosses from one range to another only through the exchange.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        enters: Sequence[bool],
        leaves: Sequence[bool],
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__()
        self.spans = tuple(spans)
        self.ranges = tuple(ranges)
        self.entered = tuple(i for i, here in enumerate(enters) if here)
        self.left = tuple(i for i, here in enumerate(leaves) if here)

    @cached_property
    def forward(self) -> list[Run]:
        """The runs of states: summaries are of `left`, slots of `entered`."""
        orders = [range(*bounds) for bounds in self.ranges]
        return _runs(orders, self.entered, self.left)

    @cached_property
    def backward(self) -> list[Run]:
        """The runs of their gradients: summaries are of `entered`, slots of `left`."""
        orders = [range(*bounds)[::-1] for bounds in self.ranges]
        return _runs(orders, self.left, self.entered)

    def runs(self, backwards: bool) -> list[Run]:
        """Of states, or of their gradients."""
        return self.backward if backwards else self.forward

    def stretched(self, times: int) -> "Pieces":
        """The same pieces where each token is `times` tokens."""

        def make() -> Pieces:
            enters, leaves = (
                [i in set(x) for i in range(len(self.spans))] for x in (self.entered, self.left)
            )
            spans = [(times * start, times * stop) for start, stop in self.spans]
            return Pieces(spans, enters, leaves, self.ranges)

        return self if times == 1 else self.once(("stretched", times), make)

    def passed(self, A: Tensor) -> Tensor:
        """A [B, entered, ...] of the pieces that a state enters, for A [B, left, ...].

        Of any other where none leaves: what it is applied to is zero.
        """
        if not A.shape[1]:
            return A.new_zeros(A.shape[0], len(self.entered), *A.shape[2:])
        places = {piece: place for place, piece in enumerate(self.left)}
        rows = [places.get(piece, 0) for piece in self.entered]
        if rows == list(range(A.shape[1])):
            return A
        return A.index_select(1, self.table("passed", lambda: [rows], A.device)[0])

    def table(
        self, name: Hashable, rows: Callable[[], Iterable[Sequence[int]]], device: torch.device
    ) -> Tensor:
        """int32 rows for a kernel, made once."""
        made = partial(torch.tensor, dtype=torch.int32, device=device)
        return self.once((name, device), lambda: made(list(rows())))


def _runs(orders: Iterable[range], entered: Sequence[int], left: Sequence[int]) -> list[Run]:
    slots = {piece: slot for slot, piece in enumerate(entered)}
    summaries = {piece: summary for summary, piece in enumerate(left)}
    found = []
    for place, order in enumerate(orders):
        step = order.step
        source = place if order and order[0] in slots else None
        passed: list[int] = []  # the pieces of the run so far that hand a state on
        for piece in order:
            if piece in summaries:
                passed.append(piece)
            last = piece == order[-1]
            if passed or source is not None:
                if piece in summaries and not last:
                    continue
                target = place if piece in summaries else None
                reached = [] if source is None else [order[0]]
                reached += [p + step for p in passed[: len(passed) - (target is not None)]]
                found.append(
                    Run(
                        _range([summaries[p] for p in passed], step),
                        _range([slots[p] for p in reached], step),
                        source,
                        target,
                    )
                )
            passed, source = [], None
    return found


def _range(values: Sequence[int], step: int) -> range:
    """Consecutive values as a range."""
    return range(values[0], values[-1] + step, step) if values else range(0, 0, step)
