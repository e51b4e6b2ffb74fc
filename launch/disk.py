"""Disks that are full or gone while a checkpoint is written: told by all ranks, none left waiting.

Megatron writes small files on one rank while the others wait for it in a collective. An error there
must wait until all have met; and torch tells of a full disk by errors of its own kind.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async

T = TypeVar("T")

FAILURES = (OSError, RuntimeError)

_WRITTEN_ALONE = (
    (getattr(common, "TorchCommonSaveStrategy", None), "save_common"),  # of older Megatrons
    (filesystem_async.FileSystemWriterAsync, "finish"),
    (serialization, "save_config"),
)


@contextmanager
def errors_kept() -> Iterator[list[Exception]]:
    """Within, what fails of Megatron's own files on one rank is put into the list, not raised."""
    kept: list[Exception] = []

    def guarded(write: Callable[..., Any]) -> Callable[..., None]:
        def writes(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except FAILURES as error:
                kept.append(error)

        return writes

    originals = [(owner, name, getattr(owner, name)) for owner, name in _WRITTEN_ALONE if owner]
    for owner, name, write in originals:
        setattr(owner, name, guarded(write))
    try:
        yield kept
    finally:
        for owner, name, write in originals:
            setattr(owner, name, write)


def on_disk(folder: Path, work: Callable[[], T]) -> T:
    """The result of `work`, which writes into `folder`.

    Raises:
        OSError: it failed; says where and how much room there is.
    """
    try:
        return work()
    except FAILURES as error:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 1e9
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(
            f"cannot write to {folder}: {reason} ({free:.3g} GB are free there)"
        ) from error
