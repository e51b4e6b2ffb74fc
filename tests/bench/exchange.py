"""Time of each exchange of states alone, beside what the cost model predicts for these links.

    torchrun --nproc-per-node 2 -m tests.bench.exchange [--heads 16] [--key 128] [--value 128]
        [--node-size RANKS] [--out DIR]

Microseconds of the slowest rank. alone: from the call until the host sees the states, medians. On
GPUs also in a row: of many calls put on the stream at once; in a graph: the same captured and
replayed, so without the host. "bare all-gather" is NCCL's, of the states alone, into memory that is
there. --out writes exchange.csv and exchange.png.
"""

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from seqpar import Layout
from seqpar.comm import Communicator
from seqpar.cost import choose, measure
from seqpar.exchange import EXCHANGES, handover, ring
from seqpar.kernels.transition import Decay, Dense, Transition

REPEATS = 30
IN_A_ROW = 50
FAMILIES: dict[str, tuple[Transition, int]] = {"diagonal": (Decay(), 1), "delta": (Dense(), 0)}

Call = Callable[[], object]


@dataclass
class Row:
    """One exchange of one family. seconds: by how they were measured; predicted: None: unknown."""

    family: str
    exchange: str
    call: Call
    predicted: float | None
    chosen: bool
    seconds: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key", type=int, default=128, help="key dimension K of a head")
    parser.add_argument("--value", type=int, default=128, help="value dimension V of a head")
    parser.add_argument("--node-size", type=int, default=None, help="ranks in a row that share one")
    parser.add_argument("--out", type=Path, default=None, help="folder for a table and a plot")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    comm = Communicator(dist.group.WORLD)
    rows = rows_of(comm, device, args)
    ways = {"alone": alone} | ({"in a row": in_a_row, "in a graph": in_a_graph} if cuda else {})
    for name, way in ways.items():
        say(comm, f"\n{'family':<10}{'exchange':<22}{name:>12}{'predicted':>12}  (us)")
        for row in rows:
            seconds = torch.tensor(way(comm, row.call), device=device)
            row.seconds[name] = comm.all_reduce(seconds, "max").item()
            guess = "" if row.predicted is None else f"{1e6 * row.predicted:.1f}"
            chosen = "  <- auto" if row.chosen else ""
            measured = 1e6 * row.seconds[name]
            say(comm, f"{row.family:<10}{row.exchange:<22}{measured:>12.1f}{guess:>12}{chosen}")
    if args.out is not None and comm.rank == 0:
        write(args.out, rows, f"{comm.size} x {machine(device)}, {args.heads} heads")
    comm.barrier()
    dist.destroy_process_group()


def rows_of(comm: Communicator, device: torch.device, args: argparse.Namespace) -> list[Row]:
    """Every exchange of every family, and the figures they are predicted by, printed."""
    links = measure(comm, device, args.node_size)
    say(comm, f"{comm.size} ranks, {machine(device)}, torch {torch.__version__}\n{links}")
    chain = Layout(comm.size, comm.size).chain
    rows = []
    for family, (transition, width) in FAMILIES.items():
        A = torch.rand(1, 1, args.heads, args.key, width or args.key, device=device) / args.key
        B = torch.rand(1, 1, args.heads, args.key, args.value, device=device)
        sizes = [x[0].numel() * x.element_size() for x in (A, B)]
        auto = choose("auto", chain, links, *sizes)
        starts = {
            name: partial(start, **choose(name, chain, links, *sizes).options)
            for name, start in EXCHANGES.items()
        }
        direct = comm.size > 1 and handover(comm, B) is not None
        if direct:  # the same without peers' memory
            messages = choose("allscan", chain, replace(links, direct=0.0), *sizes)
            starts["allscan by messages"] = partial(ring, **messages.options)
            auto.seconds["allscan by messages"] = messages.seconds["allscan"]
        for name, start in starts.items():
            call = partial(finished, partial(start, transition, A, B, chain, comm))
            label = f"{name}, direct" if direct and name == "allscan" else name
            rows.append(Row(family, label, call, auto.seconds[name], name == auto.name, {}))
        for label, what in (("states", B), ("summaries", torch.cat([A.flatten(), B.flatten()]))):
            rows.append(Row(family, f"bare all-gather, {label}", bare(comm, what), None, False, {}))
    return rows


def finished(start: Callable[[], Callable[[], object]]) -> object:
    """An exchange started, and its states waited for."""
    return start()()


def bare(comm: Communicator, x: torch.Tensor) -> Call:
    """What the library's own all-gather of `x` takes."""
    out = x.new_empty(comm.size * x.numel())
    flat = x.flatten()
    if comm.size == 1:
        return lambda: out.copy_(flat)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # 2.13, 2.11
    return lambda: gather(out, flat, group=comm.group)


def alone(comm: Communicator, call: Call) -> float:
    """The median of calls whose end the host waits for."""
    times = []
    for _ in range(REPEATS):
        comm.barrier()
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[5:])


def in_a_row(comm: Communicator, call: Call) -> float:
    """One of many calls that the host does not wait for."""

    def calls() -> None:
        for _ in range(IN_A_ROW):
            call()

    calls()
    return _on_stream(comm, calls) / IN_A_ROW


def in_a_graph(comm: Communicator, call: Call) -> float:
    """One of many calls in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_ROW):
            call()
    graph.replay()
    seconds = _on_stream(comm, graph.replay) / IN_A_ROW
    torch.cuda.synchronize()
    return seconds


def _on_stream(comm: Communicator, work: Call) -> float:
    """The best of five, by the GPU's clock."""
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        comm.barrier()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return min(times)


def write(folder: Path, rows: list[Row], title: str) -> None:
    """exchange.csv, and bars of what was measured beside what was predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    ways = list(rows[0].seconds)
    with (folder / "exchange.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["family", "exchange", *ways, "predicted", "auto"])
        for row in rows:
            us = [f"{1e6 * row.seconds[way]:.2f}" for way in ways]
            guess = "" if row.predicted is None else f"{1e6 * row.predicted:.2f}"
            table.writerow([row.family, row.exchange, *us, guess, int(row.chosen)])
    figure, axes = pyplot.subplots(1, len(FAMILIES), figsize=(12, 5), sharey=True)
    for axis, family in zip(axes, FAMILIES, strict=True):
        own = [row for row in rows if row.family == family]
        bars = {way: [1e6 * row.seconds[way] for row in own] for way in ways}
        bars["predicted"] = [1e6 * (row.predicted or 0) for row in own]
        for i, (label, heights) in enumerate(bars.items()):
            places = [x + i / (len(bars) + 1) for x in range(len(own))]
            axis.bar(places, heights, 1 / (len(bars) + 1), label=label)
        axis.set_xticks(range(len(own)), [row.exchange for row in own], rotation=40, ha="right")
        axis.set_title(family)
    axes[0].set_ylabel("microseconds")
    axes[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(folder / "exchange.png")


def machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, gloo"


def say(comm: Communicator, line: str) -> None:
    if comm.rank == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
