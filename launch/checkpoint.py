"""Checkpoints: Megatron's distributed format, written beside training if that is wanted.

Here is what they hold, and who writes it; checkpoint_files.py is how they lie on disk.
"""

import dataclasses
import queue
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)

from seqpar.cost import Links
from seqpar.launch import checkpoint_files
from seqpar.launch.data import Corpus
from seqpar.launch.disk import errors_kept, on_disk
from seqpar.launch.failure import UserError, together
from seqpar.launch.optimizer_state import load_state, sharded_state
from seqpar.launch.setup import Run
from seqpar.models import compat
from seqpar.models.config import ModelConfig, resolved

T = TypeVar("T")

# (size, digest) of files, by name.
Files = dict[str, tuple[int, str]]


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


@dataclass
class _UnderWay:
    """A checkpoint that is being written: its place, its manifest, Megatron's request, and the
    thread's answer, this rank's files.
    """

    path: Path
    content: dict[str, Any]
    request: Any
    written: Future[Files]


class Saver:
    """Saves a run into `folder`, one checkpoint at a time; all ranks call it together.

    Args:
        common: what `identity` gives.
        step: that the folder's newest checkpoint is of.
        told: called with the path of each that is complete.

    Raises:
        UserError: on every rank, by all that it does, when one cannot write. What is half-written
            has been removed then.
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
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: _UnderWay | None = None

    def save(self, progress: Progress, *, wait: bool) -> None:
        """Save the run as it is now, unless that has been done; `wait` until it is complete."""
        self.go_on(wait=True)
        if progress.step != self._step:
            self._begin(progress)
            self._step = progress.step
        self.go_on(wait=wait)

    def go_on(self, *, wait: bool) -> None:
        """Complete what is under way once all ranks have written their files, or `wait` for it."""
        if self._under_way is None:
            return
        ready = torch.tensor([wait or self._under_way.written.done()], dtype=torch.int32)
        if self._run.control.all_reduce(ready, "min").item():
            under_way, self._under_way = self._under_way, None
            self._complete(under_way)

    def _begin(self, progress: Progress) -> None:
        run, path = self._run, checkpoint_files.path_of(self._folder, progress.step)
        temporary = checkpoint_files.while_written(path)

        def make_folder() -> None:
            if run.control.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
                temporary.mkdir(parents=True)

        self._together(path, make_folder)
        run.complete_parameters()
        # Megatron would start a process for this queue, which outlives a run that is killed.
        vars(filesystem_async)["_results_queue"] = queue.Queue()
        # ranks that hold the same write a part each
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), parallelization_group=run.groups.dp_cp
        )
        with self._errors_told(path):
            request = dist_checkpointing.save(
                _state(run, is_loading=False),
                str(temporary),
                strategy,
                async_sharded_save=True,
                **compat.asynchronous_save_options(),
            )
        written = self._thread.submit(_write, request, _snapshot(request))
        content = dataclasses.asdict(progress) | {"common": self._common}
        if run.links is not None:
            content["links"] = dataclasses.asdict(run.links)
        self._under_way = _UnderWay(path, content, request, written)

    def _complete(self, under_way: _UnderWay) -> None:
        path, control = under_way.path, self._run.control
        files = self._together(path, under_way.written.result)
        with self._errors_told(path):
            for finalize in under_way.request.finalize_fns:
                finalize()
        shares = control.all_gather_object(files)

        def finish() -> None:
            if control.rank == 0:
                everything = {name: entry for share in shares for name, entry in share.items()}
                checkpoint_files.finish(path, under_way.content, everything)

        self._together(path, finish)
        if control.rank == 0:
            wanted = self._run.config.checkpoint
            checkpoint_files.prune(self._folder, wanted.keep, wanted.keep_hours)
        self._told(path)

    @contextmanager
    def _errors_told(self, path: Path) -> Iterator[None]:
        """Within, Megatron meets other ranks; after it they learn what failed of its own files."""
        with errors_kept() as errors:
            yield

        def raise_first() -> None:
            if errors:
                raise errors[0]

        self._together(path, raise_first)

    def _together(self, path: Path, work: Callable[[], T]) -> T:
        """The result of `work`, which writes checkpoint `path`."""
        temporary = checkpoint_files.while_written(path)
        try:
            return together(self._run.control, lambda: on_disk(temporary, work))
        except UserError as error:
            if self._run.control.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(
                f"the checkpoint {path.name} is not saved: {error}; put that right, then go on "
                "with checkpoint.resume=latest"
            ) from None


def _snapshot(request: Any) -> list[Any]:
    """What is to be written, on the host, and apart from what training goes on to change."""
    if request.preload_fn is None:
        return []
    copied = torch.cuda.is_available()  # from the GPU
    return [
        (path, name, (raw, [(item, x if copied else x.clone()) for item, x in tensors]))
        for path, name, (raw, tensors) in request.preload_fn()
    ]


def _write(request: Any, buckets: list[Any]) -> Files:
    """Write this rank's files, one after the other, and leave the results where Megatron looks."""
    if request.async_fn is None:
        return {}
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
    return {name: checkpoint_files.digested(Path(path)) for path, name, _ in buckets}


def load(run: Run, folder: Path, resume: str, common: dict[str, Any]) -> Progress:
    """Continue from a checkpoint in `folder`, see `checkpoint_files.intact`.

    All ranks call it. They may be other numbers of every kind of parallelism than the writer's.

    Raises:
        UserError: on every rank: there is none, none is intact, it is of another model, data, seed
            or version.
    """
    path = checkpoint_files.intact(run.control, folder, resume)
    if path is None:
        return Progress()
    manifest = together(run.control, lambda: checkpoint_files.read_manifest(path, common))
    state = dist_checkpointing.load(_state(run, is_loading=True), str(path))
    stages = [stage.module for stage in run.model]
    together(run.control, lambda: _set_weights(stages, state["model"]))
    load_state(run.optimizer, state["optimizer"], manifest["step"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.links = _links(run, manifest.get("links"))
    return Progress(manifest["step"], manifest["sequence"])


def load_weights(stages: list[Any], groups: Any, path: Path) -> None:
    """Load the model alone, into its stages on this rank, from an intact checkpoint.

    Raises:
        ValueError: its weights are in another order than this version's.
    """
    state = dist_checkpointing.load({"model": _weights(stages, groups)}, str(path))
    _set_weights(stages, state["model"])


def _links(run: Run, saved: dict[str, Any] | None) -> Links | None:
    """The figures a run began by, so that it chooses as before; its own on other ranks."""
    if run.links is None or saved is None or len(saved["nodes"]) != len(run.links.nodes):
        return run.links
    return Links(**saved | {"nodes": run.links.nodes})


def _state(run: Run, is_loading: bool) -> dict[str, Any]:
    model = _weights([stage.module for stage in run.model], run.groups)
    return {
        "model": model,
        "optimizer": sharded_state(run.optimizer, model, is_loading=is_loading),
        "scheduler": run.scheduler.state_dict(),
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
