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
    *args: str,
    size: int = 2,
    timeout: float = 300.0,
    group_timeout: float = 120.0,
    survivors: list[int] | None = None,
) -> list[Ended]:
    """Call `function(rank, size, *args)` of test module `module` on `size` ranks; how each ended.

    survivors: the ranks to wait for, all by default; the others are killed then. group_timeout: of
    the NCCL process group. Ranks that have not ended after `timeout` seconds are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        begin, outputs, ranks = time.monotonic(), [], []
        for rank in range(size):
            found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, found)]),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "PYTHONUNBUFFERED": "1",  # what a rank said before it was killed
                "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # takes its time
            }
            words = [module, function, str(rank), str(size), f"{folder}/store", str(group_timeout)]
            outputs.append(open(f"{folder}/{rank}", "w+"))  # noqa: SIM115
            ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, *words, *args],
                    env=environment,
                    stdout=outputs[-1],
                    stderr=subprocess.STDOUT,
                )
            )
        waited: dict[int, float] = {}
        wanted = survivors if survivors is not None else list(range(size))
        deadline = begin + timeout
        while len(waited) < len(wanted) and time.monotonic() < deadline:
            for rank in wanted:
                if rank not in waited and ranks[rank].poll() is not None:
                    waited[rank] = time.monotonic() - begin
                    if ranks[rank].returncode:  # the others will not get further
                        deadline = min(deadline, time.monotonic() + 5)
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


def main() -> None:
    """One rank: MODULE FUNCTION RANK SIZE STORE TIMEOUT ARGS."""
    module, function, rank, size, store, timeout, *args = sys.argv[1:]
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()  # without, to try the tests themselves, as far as that goes
    if cuda:
        torch.cuda.set_device(int(rank))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=float(timeout)),
    )
    getattr(importlib.import_module(module), function)(int(rank), int(size), *args)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
