"""Run one function of a test module on several GPUs, a process each, as torchrun would."""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (None: it had to be killed), output, and after how long."""

    code: int | None
    output: str
    seconds: float


def run_on_gpus(
    module: str,
    function: str,
    *,
    size: int = 2,
    timeout: float = 300.0,
    group_timeout: float = 120.0,
    survivors: list[int] | None = None,
) -> list[Ended]:
    """Call `function(rank, size)` of test module `module` on `size` ranks; how each one ended.

    survivors: the ranks to wait for, all by default; the others are killed then. group_timeout: of
    the NCCL process group. Ranks that have not ended after `timeout` seconds are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        begin, outputs, ranks = time.monotonic(), [], []
        for rank in range(size):
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
            }
            words = [module, function, str(rank), str(size), f"{folder}/store", str(group_timeout)]
            outputs.append(open(f"{folder}/{rank}", "w+"))  # noqa: SIM115
            ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, *words],
                    env=environment,
                    stdout=outputs[-1],
                    stderr=subprocess.STDOUT,
                )
            )
        waited: dict[int, float] = {}
        wanted = survivors if survivors is not None else list(range(size))
        while len(waited) < len(wanted) and time.monotonic() < begin + timeout:
            for rank in wanted:
                if rank not in waited and ranks[rank].poll() is not None:
                    waited[rank] = time.monotonic() - begin
            time.sleep(0.05)
        ended = []
        for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
            code = process.poll()
            process.kill()
            process.wait()
            output.seek(0)
            ended.append(Ended(code, output.read(), waited.get(rank, time.monotonic() - begin)))
            output.close()
        return ended


def check_on_gpus(module: str, function: str, size: int = 2) -> None:
    """The same, and fail with what a rank printed unless all end well."""
    for rank, ended in enumerate(run_on_gpus(module, function, size=size)):
        assert ended.code == 0, f"rank {rank} ended with {ended.code}:\n{ended.output[-6000:]}"
        print(f"rank {rank}: {ended.output}")


def main() -> None:
    """One rank: MODULE FUNCTION RANK SIZE STORE TIMEOUT."""
    module, function, rank, size, store, timeout = sys.argv[1:]
    torch.set_num_threads(1)
    torch.cuda.set_device(int(rank))
    dist.init_process_group(
        "nccl",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=float(timeout)),
    )
    getattr(importlib.import_module(module), function)(int(rank), int(size))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
