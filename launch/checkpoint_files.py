"""Checkpoints as folders: their names, which one to take, whether it is whole, which to keep.

A checkpoint is written under another name, and called `step_00000100` when all its files and their
manifest, which has the size and digest of each, are on disk. Nothing here needs Megatron.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from seqpar.comm import Communicator
from seqpar.launch.failure import UserError, together

FORMAT = 2
"""Of what a checkpoint holds: another number where an older one could not be read, or would be read
as something else. Orders of weights have numbers of their own (`SequenceMixer.columns`)."""

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")
_WRITING, _REMOVED = ".writing_", ".removed_"
_NEWEST = ("latest", "auto")

logger = logging.getLogger(__name__)


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of that step."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint is of."""
    return int(path.name.removeprefix("step_"))


def while_written(path: Path) -> Path:
    """Where the files of checkpoint `path` are until they are complete."""
    return path.with_name(_WRITING + path.name)


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))


def intact(control: Communicator, folder: Path, resume: str) -> Path | None:
    """The checkpoint to take, its files verified; None: begin anew. All ranks call it.

    Args:
        resume: "latest", "auto" (likewise, but begin anew where there is none), or a step.

    Raises:
        UserError: on every rank: there is none, or none is intact.
    """
    first = control.rank == 0
    found = together(control, lambda: _choices(folder, resume) if first else [])
    found = control.broadcast_object(found)
    together(control, partial(check_seen, found[:1]))
    message = ""
    for path in found:
        every = control.all_gather_object(damage(path, control.rank, control.size))
        told = next((each for each in every if each), None)
        if told is None:
            return path
        message = f"checkpoint {path} is damaged: {told}"
        if resume not in _NEWEST:
            raise UserError(f"{message}; checkpoint.resume=latest takes the newest intact one")
        if first:
            logger.warning(message)
    if found:
        raise UserError(f"{message}; none before it is intact: start anew in another log.folder")
    return None


def check_seen(paths: Iterable[Path]) -> None:
    """Raise ValueError unless this rank's host, too, sees what another rank's does."""
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"{path} is not seen by host {socket.gethostname()}: log.folder must lie on a file "
                "system that all nodes share"
            )


def read_manifest(path: Path, common: dict[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint; ValueError unless it has `common` in common."""
    manifest = _manifest(path)
    found = manifest.get("format", 1)
    if found != FORMAT:
        raise ValueError(
            f"checkpoint {path} is of format {found}, this version of seqpar has format {FORMAT}: "
            "go on with the version that wrote it, or start anew in another log.folder"
        )
    for name, value in common.items():
        saved = manifest["common"].get(name)
        if saved != value:
            raise ValueError(
                f"checkpoint {path} is of another run: {name} is {saved!r} there and {value!r} "
                "here; resume with the settings of its run, or start anew in another "
                "log.folder without checkpoint.resume"
            )
    return manifest


def damage(path: Path, rank: int = 0, ranks: int = 1, *, contents: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint, of which each rank looks at a share.

    Args:
        contents: whether to read them; otherwise only their sizes count.
    """
    try:
        files = _manifest(path)["files"]
        for name in sorted(files)[rank::ranks]:
            size, digest = files[name]
            found = (path / name).stat().st_size
            if found != size:
                return f"file {name} has {found} bytes, its manifest says {size}"
            if contents and digested(path / name)[1] != digest:
                return f"the content of file {name} is not what was written"
    except OSError as error:
        return f"file {Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"file {MANIFEST} is not readable"
    return None


def digested(path: Path) -> tuple[int, str]:
    """(size, digest) of a file, which is on disk afterwards."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]
        os.fsync(file.fileno())
        return file.tell(), digest


def finish(path: Path, content: dict[str, Any], files: dict[str, tuple[int, str]]) -> None:
    """Make a checkpoint of what is in `while_written(path)`.

    Args:
        content: of its manifest, beside the files.
        files: those that have been digested already, by name.
    """
    folder = while_written(path)
    others = {file.name for file in folder.iterdir() if file.is_file()} - set(files)
    files = files | {name: digested(folder / name) for name in others}
    manifest = {"format": FORMAT} | content | {"files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _flush(folder / MANIFEST)
    _flush(folder)
    folder.rename(path)
    _flush(path.parent)


def set_aside(folder: Path, step: int) -> None:
    """Put checkpoints of later steps into a folder of their own: the run takes another course.

    They would be taken for its newest ones, and its own removed before them.
    """
    later = [path for path in complete(folder) if step_of(path) > step]
    if later:
        names = (folder / f"replaced_{i}" for i in range(1, 10**6))
        aside = next(name for name in names if not name.exists())
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)


def prune(folder: Path, keep: int, keep_hours: float) -> None:
    """Remove all but the newest `keep`, and what is older than `keep_hours`; never the newest.

    0 keeps all. What is half-written goes too, so nothing may be being written. What cannot be
    removed is told, and ends no run.
    """
    checkpoints = complete(folder)
    surplus = set(checkpoints[:-keep] if keep else [])
    try:
        if keep_hours:
            # by the clock of the disk, not by this machine's
            oldest = checkpoints[-1].stat().st_mtime - 3600 * keep_hours
            surplus |= {path for path in checkpoints[:-1] if path.stat().st_mtime < oldest}
        for path in surplus:
            path.rename(folder / (_REMOVED + path.name))  # whole, or out of sight
        # also what a run that was killed has left
        for path in [*folder.glob(f"{_REMOVED}*"), *folder.glob(f"{_WRITING}*")]:
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("an old checkpoint is not removed: %s", error)


def _choices(folder: Path, resume: str) -> list[Path]:
    """The checkpoint that is asked for, or all, newest first."""
    steps = {step_of(path): path for path in reversed(complete(folder))}
    if not steps and resume != "auto":
        raise ValueError(
            f"checkpoint.resume={resume}: {folder} holds no complete checkpoint; leave out "
            "checkpoint.resume to start anew, or set log.folder to the folder of the run"
        )
    if resume in _NEWEST:
        return list(steps.values())
    if int(resume) not in steps:
        nearest = min(steps, key=lambda step: abs(step - int(resume)))
        raise ValueError(
            f"checkpoint.resume={resume}: {folder} holds no checkpoint of that step, but of "
            f"{', '.join(map(str, reversed(steps)))}; nearest: {nearest}"
        )
    return [steps[int(resume)]]


def _manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return manifest


def _flush(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
