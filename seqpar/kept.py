"""What a layer that is run again in the backward pass need not exchange or compute again.

A function whose result is costly to make and small to keep recalls it in the second run, or makes
it and remembers it in the first:

    known = recall()
    states = made() if known is None else known[0]
    remember(states)

Outside of `Kept.first` and `Kept.second` neither does anything. Both runs recall and remember in
the same order, which is how a second run finds what the first made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

Row = tuple[Tensor | None, ...]


class Kept:
    """What is kept of one run of one layer.

    Args:
        large: whether also what grows with the tokens is kept.

    Attributes: rows, what was remembered, in order; sums, what was added up, by its owner; outer,
        what surrounds it: a second run of a layer is the first one of parts that run a third time.
    """

    def __init__(self, large: bool = False) -> None:
        self.large = large
        self.rows: list[Row] = []
        self.sums: dict[Any, Tensor] = {}
        self.again = False
        self.outer: Kept | None = None

    @contextmanager
    def first(self) -> Iterator[None]:
        """Within it things are remembered."""
        self.outer = _current.get()
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @contextmanager
    def second(self) -> Iterator[None]:
        """Within it they are recalled, each once."""
        self.again = True
        with self.first():
            yield


_current: ContextVar[Kept | None] = ContextVar("kept", default=None)


def kept() -> Kept | None:
    """What is being filled or used here; None in an ordinary run."""
    return _current.get()


def recall(large: bool = False) -> Row | None:
    """What the first run remembered here; None in any other run. large: see `remember`."""
    now = _current.get()
    while now is not None and not now.again:
        now = now.outer
    return None if now is None or (large and not now.large) else now.rows.pop(0)


def remember(*row: Tensor | None, large: bool = False) -> None:
    """Keep `row` for a second run, if there is one. large: whether it grows with the tokens."""
    now = _current.get()
    while now is not None and not now.again:
        if now.large or not large:
            now.rows.append(row)
        now = now.outer
