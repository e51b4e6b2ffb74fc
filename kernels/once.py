"""Things made when they are first asked for, and kept: tables, routes, launches."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Once:
    """Holds what follows from an object that does not change."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when this key was first asked for."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made
