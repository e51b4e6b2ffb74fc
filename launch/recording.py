"""Recorded for a closer look: a profile of chosen steps, the memory of a GPU that is full."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from seqpar.launch.config import Config
from seqpar.launch.failure import LoneError
from seqpar.launch.ranks import SETTINGS

logger = logging.getLogger(__name__)

_LONGEST_HISTORY = 200_000  # allocations and frees


@contextmanager
def profiled(config: Config, step: int, rank: int) -> Iterator[None]:
    """Within: a step, profiled into log.folder/profile if that is asked for."""
    if step not in config.log.profile_steps or rank not in config.log.profile_ranks:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        yield
    folder = Path(config.log.folder) / "profile"
    try:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"step_{step}_rank_{rank}.json.gz"))
    except (OSError, RuntimeError) as error:  # of one rank, and nothing to end a run for
        logger.warning("rank %d: the profile of step %d is not written: %s", rank, step, error)


@contextmanager
def advice_on_memory(config: Config, rank: int) -> Iterator[None]:
    """Within: LoneError where the GPU's memory is full, with what may help and a snapshot of it."""
    if config.log.memory_history and torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=_LONGEST_HISTORY)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LoneError(_out_of_memory(config, rank, error)) from error


def _out_of_memory(config: Config, rank: int, error: torch.OutOfMemoryError) -> str:
    path = Path(config.log.folder) / f"memory_rank_{rank}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        told = f"snapshot {path} (open it at pytorch.org/memory_viz)"
    except (OSError, RuntimeError) as failure:
        told = f"no snapshot ({failure})"
    reserved, used = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    advice = [
        f"more ranks a sequence (parallel.context, here {config.parallel.context or 'all left'})",
        "optimizer.distributed=true" if not config.optimizer.distributed else "",
        "train.precision=bf16" if config.train.precision != "bf16" else "",
        "parallel.tensor or parallel.pipeline for the weights",
        f"a shorter data.sequence_length (here {config.data.sequence_length})",
    ]
    if reserved > 1.2 * used and (own := sorted(SETTINGS & os.environ.keys())):
        advice.insert(0, f"{own[0]} unset, or expandable_segments:True, for much is fragmented")
    history = "" if config.log.memory_history else "; log.memory_history=true adds who allocated it"
    return (
        f"out of GPU memory: {str(error).splitlines()[0]} What may help: "
        f"{'; '.join(each for each in advice if each)}. {told}{history}"
    )
