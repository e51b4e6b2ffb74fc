"""Checkpoints: Megatron's distributed format, complete or not there, verified when read.

A checkpoint is written to a temporary folder, which gets its name `step_00000100` only when all its
files and their manifest (sizes and digests) are on disk. Reading compares the manifest first.
Writing and digesting go on in a thread, beside training if that is wanted.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import queue
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)

from seqpar.comm import Communicator
from seqpar.cost import Links
from seqpar.launch.config import CheckpointSection
from seqpar.launch.data import Corpus
from seqpar.launch.disk import errors_kept, on_disk
from seqpar.launch.failure import UserError, together
from seqpar.launch.optimizer_state import load_state, sharded_state
from seqpar.launch.setup import Run
from seqpar.models import compat
from seqpar.models.config import ModelConfig, resolved

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")
_TEMPORARY, _REMOVED = ".writing_", ".removed_"
NEWEST = ("latest", "auto")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, and the index of the next packed sequence."""

    step: int = 0
    sequence: int = 0


def identity(run: Run, corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must have in common, by name of setting."""
    train = run.config.train
    return model_identity(run.config.model) | {
        "train.seed": train.seed,
        "train.precision": train.precision,
        "data.sequence_length": run.config.data.sequence_length,
        "data.path (number of documents)": len(corpus.lengths),
        "data.path (number of tokens)": corpus.tokens,
    }


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """The part of `identity` that is the model's."""
    return {f"model.{k}": v for k, v in dataclasses.asdict(resolved(model)).items()}


class Saving:
    """Checkpoint `folder`/step_N under way, from the state that the run has now.

    All ranks make one, and call `finished` together until it is. A folder of that name, from a
    later part of a run that was resumed before it, is set aside.

    Attributes: path, of the finished checkpoint.

    Raises:
        UserError: on every rank, when one cannot write; `finished` as well.
    """

    def __init__(self, run: Run, folder: Path, progress: Progress, common: dict[str, Any]) -> None:
        self._run, self._folder = run, folder
        self._content = dataclasses.asdict(progress) | {
            "common": common,
            "drawn_by": _drawn_by(run),
        }
        if run.links is not None:
            self._content["links"] = dataclasses.asdict(run.links)
        self.path = folder / f"step_{progress.step:08d}"
        self._temporary = folder / f"{_TEMPORARY}{self.path.name}"
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._stages = self._work()
        self._under_way = next(self._stages)

    def finished(self, *, wait: bool) -> bool:
        """Whether it is complete on every rank.

        Args:
            wait: until it is; otherwise this returns at once.
        """
        while True:
            done = torch.tensor([wait or self._under_way.done()], dtype=torch.int32)
            if not self._run.control.all_reduce(done, "min").item():
                return False
            self._together(self._under_way.result)
            try:
                self._under_way = next(self._stages)
            except StopIteration:
                self._thread.shutdown()
                return True

    def _together(self, work: Callable[[], Any]) -> None:
        """`work`, which writes; what is half-written is removed if it fails on any rank."""
        try:
            together(self._run.control, lambda: on_disk(self._temporary, work))
        except UserError as error:
            if self._run.control.rank == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise UserError(
                f"the checkpoint {self.path.name} is not saved: {error}; free some room, then go "
                "on with checkpoint.resume=latest"
            ) from None

    def _work(self) -> Iterator[Future[Any]]:
        """What is done here together with other ranks; between, what the thread does."""
        run, control, temporary = self._run, self._run.control, self._temporary
        first = control.rank == 0

        def begin() -> None:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
                temporary.mkdir(parents=True)

        self._together(begin)
        run.complete_parameters()
        # Megatron would start a process for this queue, which outlives a run that is killed.
        vars(filesystem_async)["_results_queue"] = queue.Queue()
        with errors_kept() as errors:
            request = dist_checkpointing.save(
                _state(run, is_loading=False),
                str(temporary),
                # ranks that hold the same write a part each
                FullyParallelSaveStrategyWrapper(
                    get_default_save_sharded_strategy(), parallelization_group=run.groups.dp_cp
                ),
                async_sharded_save=True,
                **compat.asynchronous_save_options(),
            )
        self._together(functools.partial(_raise_first, errors))
        write = functools.partial(_write, request, _snapshot(request))
        yield self._thread.submit(write)

        with errors_kept() as errors:
            for finalize in request.finalize_fns:
                finalize()
        self._together(functools.partial(_raise_first, errors))  # every rank's files are there
        digest = functools.partial(_digests, temporary, _share(control, _files(temporary)))
        under_way = self._thread.submit(digest)
        yield under_way

        shares = control.all_gather_object(under_way.result())

        def finish() -> None:
            if first:
                files = {name: entry for share in shares for name, entry in share.items()}
                content = self._content | {"files": files}
                (temporary / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
                for path in (temporary / MANIFEST, temporary):
                    _flush(path)
                if self.path.exists():
                    self.path.rename(_free_name(self.path))
                temporary.rename(self.path)
                _flush(self._folder)
                _prune(self._folder, run.config.checkpoint)

        self._together(finish)


class Saver:
    """Saves a run into `folder`, one checkpoint at a time; all ranks call it together.

    Args:
        step: that the folder's newest checkpoint is of.
        told: called with the path of each that is complete.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        common: dict[str, Any],
        step: int,
        told: Callable[[Path], None],
    ) -> None:
        self._run, self._folder, self._common, self._told = run, folder, common, told
        self._step = step
        self._saving: Saving | None = None

    def go_on(self, *, wait: bool) -> None:
        """Bring what is under way forward; to its end, if `wait`."""
        if self._saving and self._saving.finished(wait=wait):
            self._told(self._saving.path)
            self._saving = None

    def save(self, progress: Progress, *, wait: bool) -> None:
        """Save the run as it is now, unless that has been done; `wait` until it is complete."""
        self.go_on(wait=True)
        if progress.step != self._step:
            self._saving = Saving(self._run, self._folder, progress, self._common)
            self._step = progress.step
        self.go_on(wait=wait)


def _snapshot(request: Any) -> list[Any]:
    """What is to be written, on the host, and apart from what training goes on to change."""
    if request.preload_fn is None:
        return []
    copied = torch.cuda.is_available()  # from the GPU
    return [
        (name, key, (raw, [(item, x if copied else x.clone()) for item, x in tensors]))
        for name, key, (raw, tensors) in request.preload_fn()
    ]


def _write(request: Any, buckets: list[Any]) -> None:
    """Write this rank's files, one after the other, and leave the results where Megatron looks."""
    if request.async_fn is None:
        return
    transforms, *_ = request.async_fn.args
    results: dict[int, Any] = {}
    found: queue.Queue[Any] = queue.Queue()
    for index, bucket in enumerate(buckets):
        count: queue.Queue[int] = queue.Queue()
        count.put(index)
        write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
        write(transforms, index, bucket, found, count, use_fsync=True)
        _, results[index] = found.get()
        if isinstance(results[index], Exception):
            raise results[index]
    request.async_fn_args[2].put(results)


def _raise_first(errors: list[Exception]) -> None:
    if errors:
        raise errors[0]


def load(run: Run, folder: Path, resume: str, common: dict[str, Any]) -> Progress:
    """Continue from a checkpoint in `folder`: the newest intact one, or that of a step ("100").

    All ranks call it. They may be other numbers of every kind of parallelism than the writer's.

    Args:
        resume: "latest", "auto" (likewise, but begin anew where there is none), or a step.

    Raises:
        UserError: on every rank: there is none, none is intact, it is of another model, data or
            seed. Nothing of the run has been changed then.
    """
    path = intact(run.control, folder, resume)
    if path is None:
        return Progress()
    manifest = together(run.control, lambda: checked_manifest(path, common))
    wanted = _state(run, is_loading=True)
    if manifest["drawn_by"] != _drawn_by(run):
        # each of these ranks would continue another one's random numbers: they begin anew
        del wanted["random"]
    state = dist_checkpointing.load(wanted, str(path))
    _set_weights([stage.module for stage in run.model], state["model"])
    load_state(run.optimizer, state["optimizer"], manifest["step"])
    run.scheduler.load_state_dict(state["scheduler"])
    if "random" in wanted:
        _set_random_state(state["random"])
    run.links = _links(run, manifest.get("links"))
    return Progress(manifest["step"], manifest["sequence"])


def load_weights(stages: list[Any], groups: Any, path: Path) -> None:
    """Load the model alone, into its stages on this rank, from what `intact` gave."""
    state = dist_checkpointing.load({"model": _weights(stages, groups)}, str(path))
    _set_weights(stages, state["model"])


def intact(control: Communicator, folder: Path, resume: str) -> Path | None:
    """The checkpoint to take, its files verified; None: begin anew. See `load`."""
    found = control.broadcast_object(together(control, lambda: _find(folder, resume)))
    damages: list[str] = []
    good = None
    for path in map(Path, found):
        damage = _damage(control, path)
        if damage is None:
            good = path
            break
        damages.append(f"checkpoint {path} is damaged: {damage}")
    if damages and good is None:
        raise UserError(
            f"{damages[0]}; no checkpoint in {folder} is intact: start anew in another log.folder"
        )
    if damages and resume not in NEWEST:
        step = _step(path)
        raise UserError(
            f"{damages[0]}; the newest intact checkpoint is step {step}: set "
            f"checkpoint.resume={step}"
        )
    for damage in damages if control.rank == 0 else []:
        logger.warning("%s; the one before it is taken", damage)
    return good


def checked_manifest(path: Path, common: dict[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint; ValueError unless it has `common` in common."""
    manifest = _manifest(path)
    for name, value in common.items():
        saved = manifest["common"].get(name)
        if saved != value:
            raise ValueError(
                f"checkpoint {path} is of another run: {name} is {saved!r} there and {value!r} "
                "here; resume with the settings of its run, or start anew in another "
                "log.folder without checkpoint.resume"
            )
    return manifest


def _drawn_by(run: Run) -> list[int]:
    """The numbers of ranks whose random numbers differ."""
    return [run.sizes.tensor, run.sizes.pipeline, run.sizes.expert, run.sizes.expert_tensor]


def _links(run: Run, saved: dict[str, Any] | None) -> Links | None:
    """The figures a run began by, so that it chooses as before; its own on other ranks."""
    if run.links is None or saved is None or len(saved["nodes"]) != len(run.links.nodes):
        return run.links
    return Links(**saved | {"nodes": run.links.nodes})


def _state(run: Run, is_loading: bool) -> dict[str, Any]:
    model = _weights([stage.module for stage in run.model], run.groups)
    tp, pp = run.groups.tp, run.groups.pp
    return {
        "model": model,
        "optimizer": sharded_state(run.optimizer, model, is_loading=is_loading),
        "scheduler": run.scheduler.state_dict(),
        # alike on data- and context-parallel ranks, so their number may change
        "random": ShardedObject(
            "random",
            _random_state(),
            (pp.size(), tp.size()),
            (pp.rank(), tp.rank()),
            replica_id=run.groups.dp_cp.rank(),
        ),
    }


def _weights(stages: list[Any], groups: Any) -> dict[str, Any]:
    metadata = {"dp_cp_group": groups.dp_cp}
    return {
        f"{index}.{name}": value
        for index, stage in enumerate(stages)
        for name, value in stage.sharded_state_dict(metadata=metadata).items()
    }


def _set_weights(stages: list[Any], state: dict[str, Any]) -> None:
    for index, stage in enumerate(stages):
        prefix = f"{index}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        stage.load_state_dict(own)


def _random_state() -> dict[str, Any]:
    state: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
        "numpy": (kind, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])


def _find(folder: Path, resume: str) -> list[str]:
    """The checkpoint that is asked for, then the others, newest first."""
    steps = {_step(path): path for path in reversed(_all(folder))}
    half = sorted(path.name for path in folder.glob(f"{_TEMPORARY}*"))
    hint = f" ({', '.join(half)} there is half-written and of no use)" if half else ""
    if not steps and resume != "auto":
        raise ValueError(
            f"checkpoint.resume={resume}: {folder} holds no checkpoint{hint}; leave out "
            "checkpoint.resume to start anew, or set log.folder to the folder of the run"
        )
    if resume not in NEWEST:
        if int(resume) not in steps:
            nearest = min(steps, key=lambda step: abs(step - int(resume)))
            raise ValueError(
                f"checkpoint.resume={resume}: {folder} holds no checkpoint of that step{hint}, but "
                f"of {', '.join(map(str, reversed(steps)))}; nearest: {nearest}"
            )
        steps = {int(resume): steps.pop(int(resume)), **steps}
    return [str(path) for path in steps.values()]


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return manifest


def _damage(control: Communicator, path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, one answer on every rank; None: nothing."""
    found: str | None = None
    try:
        files = _manifest(path)["files"]
        for name in _share(control, sorted(files)):
            if not (path / name).is_file():
                found = f"file {name} is missing"
                break
            size, digest = _digests(path, [name])[name]
            if size != files[name][0]:
                found = f"file {name} has {size} bytes, its manifest says {files[name][0]}"
                break
            if digest != files[name][1]:
                found = f"the content of file {name} is not what was written"
                break
    except OSError as error:
        what = "it is half-written, " if not (path / MANIFEST).exists() else ""
        found = f"{what}file {Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        found = f"file {MANIFEST} is not readable"
    return next((each for each in control.all_gather_object(found) if each), None)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _share(control: Communicator, names: list[str]) -> list[str]:
    return names[control.rank :: control.size]


def _digests(folder: Path, names: list[str]) -> dict[str, tuple[int, str]]:
    """(size, digest) of each file, which is on disk afterwards."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]
            found[name] = (file.tell(), digest)
            os.fsync(file.fileno())
    return found


def _flush(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _free_name(path: Path) -> Path:
    return next(
        name for i in range(1, 10**6) if not (name := Path(f"{path}.replaced_{i}")).exists()
    )


def _prune(folder: Path, wanted: CheckpointSection) -> None:
    """Remove all but the newest `keep`, and what is older than `keep_hours`; never the newest."""
    checkpoints = _all(folder)
    surplus = set(checkpoints[: -wanted.keep] if wanted.keep else [])
    if wanted.keep_hours:
        oldest = time.time() - 3600 * wanted.keep_hours
        surplus |= {x for x in checkpoints[:-1] if x.stat().st_mtime < oldest}
    for left in folder.glob(f"{_REMOVED}*"):  # by a run that was killed
        shutil.rmtree(left)
    for path in surplus:
        shutil.rmtree(path.rename(folder / f"{_REMOVED}{path.name}"))  # whole, or out of sight
