"""What benchmarks over several ranks share: their group, the time there is, rows, failing cases."""

import csv
import logging
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from seqpar.comm import Communicator
from seqpar.cost import Links, measure, nodes_of

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
MACHINE = torch.cuda.get_device_name(DEVICE) if CUDA else "CPU, gloo"
T = TypeVar("T")
LOST = timedelta(seconds=90)  # ranks that fail differently wait for each other no longer
AHEAD = 20_000_000  # cycles, about 10 ms, that a GPU waits while the host launches what is timed


class Bench:
    """All ranks of a run. Every method is called on all of them alike.

    Args:
        seconds: after how many no other case is begun.
        out: folder for what is written, or None.
        row: the dataclass of a row; its last field, `error`, is a string.
    """

    def __init__(self, seconds: float, out: Path | None, row: type) -> None:
        self._end = time.monotonic() + seconds
        if CUDA:
            torch.cuda.set_device(DEVICE)
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group("nccl" if CUDA else "gloo", timeout=LOST)
        else:  # without torchrun: one rank, that needs no port
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.comm = Communicator(dist.group.WORLD)
        self._one = torch.ones(1, device=DEVICE)
        self.rows: list[Any] = []
        self._names = [field.name for field in fields(row)]
        self._path = out / f"{Path(sys.argv[0]).stem}.csv" if out and self.comm.rank == 0 else None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self._names, "w")
        logging.basicConfig()
        if self.comm.rank == 0:  # which kernels, which operators, and why
            logging.getLogger("seqpar").setLevel(logging.INFO)
        self.say(f"{self.comm.size} x {MACHINE}, torch {torch.__version__}")

    def links(self, node_size: int | None = None) -> Links:
        """Measured; the usual ones if that fails."""
        usual = Links(nodes_of(self.comm, node_size))
        if self.comm.size == 1:
            return usual
        links, _ = self.attempt("links", lambda: measure(self.comm, DEVICE, node_size))
        self.say(str(links or usual))
        return links or usual

    def attempt(self, case: str, work: Callable[[], T]) -> tuple[T | None, str]:
        """What `work` gives, where there is time for it, and the error of a rank, "" for none.

        What fails on all ranks leaves the next case as it was. Ranks that fail differently wait for
        each other until the group's timeout ends the run; rows are written by then.
        """
        left = torch.tensor(self._end - time.monotonic(), device=DEVICE)
        if self.comm.all_reduce(left, "min").item() < 0:
            return None, "no time left"
        found, error = None, ""
        try:
            found = work()
        except Exception as failure:  # whatever it is, other cases may do
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
            print(f"{case}, rank {self.comm.rank}:\n{traceback.format_exc()}", file=sys.stderr)
        if CUDA:
            torch.cuda.empty_cache()
        error = next((each for each in self.comm.all_gather_object(error) if each), "")
        return (None if error else found), error

    def add(self, row: Any) -> None:
        """Print a row, and append it to the table at once."""
        if not self.rows:
            self.say(" ".join(f"{name:>16}" for name in self._names))
        self.rows.append(row)
        values = asdict(row).values()
        cells = [f"{x:.3f}" if isinstance(x, float) else str(x) for x in values]
        self.say(" ".join(f"{cell:>16}" for cell in cells))
        self._write(cells, "a")

    def _write(self, cells: list[str], mode: str) -> None:
        if self._path is not None:
            with open(self._path, mode, newline="") as file:
                csv.writer(file).writerow(cells)

    def say(self, line: str) -> None:
        if self.comm.rank == 0:
            print(line, flush=True)

    def milliseconds(self, call: Callable[[], object], repeats: int, longest: float = 4.0) -> float:
        """The median of the slowest rank, of fewer repeats where they take `longest` seconds.

        The first calls, which compile and make connections, are not counted.
        """
        taken = [self.seconds(call) for _ in range(3)][-1]
        fits = max(3, int(longest / max(self.slowest(taken), 1e-6)))
        times = [self.seconds(call) for _ in range(min(repeats, fits))]
        return self.slowest(statistics.median(times)) * 1e3

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call on this rank; of a GPU, on its stream: the host launches while the GPU is
        kept waiting."""
        synchronize()
        self.comm.barrier()
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(AHEAD)
            self.comm.all_reduce(self._one)  # all GPUs begin together
            begin.record()
            call()
            end.record()
            synchronize()
            return begin.elapsed_time(end) / 1e3
        before = time.perf_counter()
        call()
        return time.perf_counter() - before

    def host_milliseconds(self, call: Callable[[], object], repeats: int) -> float:
        """What launching takes the slowest rank's host, the median."""
        times = []
        for _ in range(repeats):
            synchronize()
            self.comm.barrier()
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return self.slowest(statistics.median(times)) * 1e3

    def slowest(self, own: float) -> float:
        """The largest of all ranks."""
        return self.comm.all_reduce(torch.tensor(own, device=DEVICE), "max").item()

    def end(self) -> None:
        self.comm.barrier()
        dist.destroy_process_group()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize(DEVICE)
