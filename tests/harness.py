"""Run one function on several gloo ranks, each a fork of this process (no ports, 0.05 s a test)."""

import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


def _worker(
    rank: int, world_size: int, store: str, fn: Callable[..., Any], args: tuple, out: Connection
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        out.send_bytes(pickle.dumps((True, fn(rank, *args))))  # by value: the sender may exit
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # every failure of a worker is the test's to see
        out.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)  # a fork must not run its parent's exit handlers


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    survivors: list[int] | None = None,
) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` forked ranks; return their results by rank.

    survivors: the ranks to hear from, where others are meant to die; all by default.

    The default process group is gloo over a file store. Raises AssertionError with the traceback
    of the first rank that fails, dies, or has not answered after `timeout` seconds. Results must
    pickle; tensors travel by value.
    """
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, workers = [], []
        for rank in range(world_size):
            receive, send = context.Pipe(duplex=False)
            worker = context.Process(
                target=_worker, args=(rank, world_size, f"{folder}/store", fn, args, send)
            )
            worker.start()
            send.close()
            pipes.append(receive)
            workers.append(worker)
        try:
            return _collect([pipes[rank] for rank in survivors or range(world_size)], timeout)
        finally:
            for worker in workers:
                worker.join(0.5)
                worker.kill()
                worker.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise AssertionError(f"ranks {missing} gave no answer in {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def assert_close(
    name: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    bound: float,
    whole: torch.Tensor | None = None,
) -> None:
    """Fail unless max |actual - expected| <= bound * max |whole|; never pass on zeros or NaN.

    `whole` is the tensor `expected` is a shard of, for shards that may be small by right.
    """
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    )
    assert torch.isfinite(expected).all(), f"{name}: the expected value is not finite"
    assert torch.isfinite(actual).all(), f"{name}: the actual value is not finite"
    whole = expected if whole is None else whole
    scale = whole.abs().max().item() if expected.numel() else 0.0
    assert scale > 0, f"{name}: the expected value is all zeros, the comparison proves nothing"
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= bound, f"{name}: relative error {error:.3e} is above {bound:.0e}"
