"""Ranks that do different things find out, and say which: before they exchange, and when one fails.

A collective whose ranks disagree hangs, aborts, or gives wrong numbers. So every call is announced
with what all ranks must have in common. What was announced before costs nothing; something new is
compared through the process group's store, in three small messages a rank whatever their number.
"""

import time
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from seqpar.kernels.once import Once

REMEMBERED = 4096
"""How many calls are known by heart. Layouts of packed documents are new at every step."""

PATIENCE = timedelta(seconds=3)
"""How long a rank that failed waits for the others to say where they are."""


class ExchangeError(RuntimeError):
    """An exchange failed: names the call, and the ranks that are elsewhere or gone."""


# One for each process group, for its calls are counted: not per object that uses the group.
_agreements: WeakKeyDictionary[dist.ProcessGroup, "Agreement"] = WeakKeyDictionary()


def agreement_of(group: dist.ProcessGroup) -> "Agreement":
    """The agreement of the ranks of `group`, one and the same for all who use the group."""
    if group not in _agreements:
        _agreements[group] = Agreement(group)
    return _agreements[group]


class Agreement(Once):
    """What the ranks of one process group announced to each other, and whatever else there must be
    one of for each group.

    It is of the host alone: capturing a CUDA graph announces like any call, a replay does not.

    Attributes: timeout, the process group's.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._store = PrefixStore(f"seqpar/{group.group_name}", _get_default_store())
        self.timeout = _timeout(group)
        self._agreed: set[str] = set()
        self._calls, self._current = 0, "nothing yet"
        self._last_key: str | None = None

    def reach(self, call: str) -> None:
        """Announce a call; return when every rank has announced the same.

        Raises:
            ValueError: another rank announced something else at this point.
            ExchangeError: a rank did not come here within the process group's timeout.
        """
        self._calls, self._current = self._calls + 1, call
        if call in self._agreed:
            return
        try:
            self._compare(call)
        except dist.DistError as lost:
            raise self.failure(lost) from lost
        if len(self._agreed) > REMEMBERED:  # on all ranks alike
            self._agreed.clear()
        self._agreed.add(call)

    def _compare(self, call: str) -> None:
        key = f"call {self._calls}"
        mine = f"rank {self._rank} {call}"
        first = self._store.compare_set(key, "", mine).decode()
        if first.split(" ", 2)[2] != call:
            self._tell()
            raise ValueError(
                f"ranks disagree at call {self._calls}: {mine!r} here, but {first!r}; every rank "
                "of a sequence must make the same calls with the same shapes, dtypes and layout"
            )
        if self._store.add(f"{key} arrived", 1) == self._size:
            self._store.set(f"{key} complete", "yes")
            self._forget(self._last_key)  # nobody looks at it any more
        deadline, pause = time.monotonic() + self.timeout.total_seconds(), 0.0005
        while not self._store.check([f"{key} complete"]):
            if time.monotonic() > deadline or self._store.check(["failed"]):
                raise self.failure(None)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)  # many ranks share one store
        self._last_key = key

    def failure(self, error: Exception | None) -> ExchangeError:
        """What to raise when a transfer of the current call failed with `error`."""
        try:
            lines = self._elsewhere()
        except dist.DistError:
            lines = ["the rank that keeps the process group's store has died: nobody can be asked"]
        reason = f": {str(error).splitlines()[0]}" if error else ""
        return ExchangeError(
            f"the exchange of rank {self._rank} in {self._where()} failed{reason}\n"
            + "\n".join(lines or ["all ranks were in the same call: a link between them failed"])
        )

    def _elsewhere(self) -> list[str]:
        """The ranks that are not where this one is, a line each."""
        self._tell()
        deadline = time.monotonic() + PATIENCE.total_seconds()
        others = [rank for rank in range(self._size) if rank != self._rank]
        while time.monotonic() < deadline and not all(self._told(rank) for rank in others):
            time.sleep(0.05)
        lines = []
        for rank in others:
            if not self._told(rank):
                lines.append(f"rank {rank} gave no answer: it has died, or is stuck elsewhere")
            elif (there := self._store.get(f"rank {rank}").decode()) != self._where():
                lines.append(f"rank {rank} is in {there}")
        return lines

    def _forget(self, key: str | None) -> None:
        for suffix in ("", " arrived", " complete"):
            if key is not None:
                self._store.delete_key(key + suffix)

    def _tell(self) -> None:
        self._store.set(f"rank {self._rank}", self._where())
        self._store.set("failed", "yes")

    def _told(self, rank: int) -> bool:
        return bool(self._store.check([f"rank {rank}"]))

    def _where(self) -> str:
        return f"call {self._calls}, {self._current}"


def _timeout(group: dist.ProcessGroup) -> timedelta:
    for device in ("cuda", "cpu"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return timedelta(minutes=10)
