"""The order in which a stream's ranges hand the state on, and between which of them they do."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Chain:
    """Ranges in the order of the stream (or, reversed, of the gradient).

    places: (rank, index of the range on that rank), by position.
    linked[i]: the document at the start of range i began before it, so a state enters from i-1.
    through[i]: the state that enters range i also leaves it: one document covers and exceeds it.
    """

    places: tuple[tuple[int, int], ...]
    linked: tuple[bool, ...]
    through: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.places)

    def owner(self, position: int) -> int:
        """The rank that holds the range at `position`."""
        return self.places[position][0]

    def of(self, rank: int) -> list[tuple[int, int]]:
        """(position, range index) of each range of `rank`, in the chain's order."""
        return self._by_rank.get(rank, [])

    def begin(self, position: int) -> int:
        """The first position whose summary reaches `position`; itself when no state enters."""
        if self.linked[position]:
            position -= 1
            while self.through[position]:
                position -= 1
        return position

    def sends(self, position: int) -> bool:
        """Whether a state leaves `position` for the next one."""
        return position + 1 < len(self) and self.linked[position + 1]

    @cached_property
    def _by_rank(self) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        for i, (owner, slot) in enumerate(self.places):
            found.setdefault(owner, []).append((i, slot))
        return found

    @cached_property
    def backwards(self) -> "Chain":
        """The chain of the gradient: the same links, from the last range to the first."""
        linked = (False, *reversed(self.linked[1:]))
        return Chain(self.places[::-1], linked, self.through[::-1])
