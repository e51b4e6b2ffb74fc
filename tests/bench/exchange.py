"""Time of each exchange of states alone, beside what the cost model predicts for these links.

    torchrun --nproc-per-node 2 -m tests.bench.exchange [--seconds 120] [--heads 16] [--key 128]
        [--value 128] [--node-size RANKS] [--out DIR]

Microseconds of the slowest rank. alone: one exchange, medians; on GPUs the time on the stream, the
host launching ahead. On GPUs also in a row: one of many on the stream; in a graph: those captured
and replayed. "bare all-gather" is NCCL's, of the states alone, into memory that is there. --out
takes exchange.csv, a row as soon as it is measured, and exchange.png at the end.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from seqpar import Layout
from seqpar.comm import Communicator
from seqpar.cost import Links, choose
from seqpar.exchange import EXCHANGES, handover, ring
from seqpar.kernels.transition import Decay, Dense, Transition

from .ranks import CUDA, DEVICE, MACHINE, Bench

REPEATS = 30
IN_A_ROW = 50
FAMILIES: dict[str, tuple[Transition, int]] = {"diagonal": (Decay(), 1), "delta": (Dense(), 0)}

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One exchange of one family; predicted in us, None: unknown."""

    family: str
    exchange: str
    call: Call
    predicted: float | None
    chosen: bool


@dataclass(frozen=True)
class Row:
    """One case in one of the ways; times in us. auto: whether "auto" chooses it."""

    way: str
    family: str
    exchange: str
    measured: float = 0.0
    predicted: float | None = None
    auto: bool = False
    error: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing after these")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key", type=int, default=128, help="key dimension K of a head")
    parser.add_argument("--value", type=int, default=128, help="value dimension V of a head")
    parser.add_argument("--node-size", type=int, default=None, help="ranks in a row that share one")
    parser.add_argument("--out", type=Path, default=None, help="folder for a table and a plot")
    args = parser.parse_args()
    bench = Bench(args.seconds, args.out, Row)
    comm = bench.comm
    cases = list(cases_of(comm, bench.links(args.node_size), args))
    ways = {"alone": alone}
    if CUDA:  # the graph last: a capture that fails may leave its mark
        ways |= {"in a row": in_a_row, "in a graph": in_a_graph}
    for name, way in ways.items():
        for case in cases:
            label = f"{case.exchange} of {case.family}, {name}"
            measured, error = bench.attempt(label, partial(way, bench, case.call))
            given = case.family, case.exchange, measured or 0.0, case.predicted, case.chosen
            bench.add(Row(name, *given, error))
    rows = [row for row in bench.rows if not row.error]
    if args.out and comm.rank == 0 and rows and importlib.util.find_spec("matplotlib"):
        draw(rows, args.out / "exchange.png", f"{comm.size} x {MACHINE}, {args.heads} heads")
    bench.end()


def cases_of(comm: Communicator, links: Links, args: argparse.Namespace) -> Iterator[Case]:
    """Every exchange of every family beside the library's own, the most wanted first."""
    chain = Layout(comm.size, comm.size).chain
    order = ("allscan", "allgather", "ring", "doubling", "twolevel")
    for family, (transition, width) in FAMILIES.items():
        A = torch.rand(1, 1, args.heads, args.key, width or args.key, device=DEVICE) / args.key
        B = torch.rand(1, 1, args.heads, args.key, args.value, device=DEVICE)
        sizes = [x[0].numel() * x.element_size() for x in (A, B)]
        auto = choose("auto", chain, links, *sizes)
        starts = {
            name: partial(EXCHANGES[name], **choose(name, chain, links, *sizes).options)
            for name in order
        }
        direct = comm.size > 1 and handover(comm, B) is not None
        if direct:  # the same without peers' memory
            messages = choose("allscan", chain, replace(links, direct=0.0), *sizes)
            starts["allscan by messages"] = partial(ring, **messages.options)
            auto.seconds["allscan by messages"] = messages.seconds["allscan"]
        yield Case(family, "bare all-gather", bare(comm, B), None, False)
        for name, start in starts.items():
            call = partial(finished, partial(start, transition, A, B, chain, comm))
            label = f"{name}, direct" if direct and name == "allscan" else name
            yield Case(family, label, call, 1e6 * auto.seconds[name], name == auto.name)
        both = torch.cat([A.flatten(), B.flatten()])
        yield Case(family, "bare, A with B", bare(comm, both), None, False)


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


def alone(bench: Bench, call: Call) -> float:
    """us, the median of single calls."""
    return bench.milliseconds(call, REPEATS) * 1e3


def in_a_row(bench: Bench, call: Call) -> float:
    """us of one of many calls."""

    def calls() -> None:
        for _ in range(IN_A_ROW):
            call()

    calls()
    return _one(bench, calls)


def in_a_graph(bench: Bench, call: Call) -> float:
    """us of one of many calls in a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_ROW):
            call()
    graph.replay()
    return _one(bench, graph.replay)


def _one(bench: Bench, calls: Call) -> float:
    """us of one of IN_A_ROW calls, the best of five."""
    return bench.slowest(min(bench.seconds(calls) for _ in range(5))) / IN_A_ROW * 1e6


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Bars of what was measured beside what was predicted."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FAMILIES), figsize=(12, 5), sharey=True)
    for axis, family in zip(axes, FAMILIES, strict=True):
        own = [row for row in rows if row.family == family]
        names = list(dict.fromkeys(row.exchange for row in own))
        ways = [*dict.fromkeys(row.way for row in rows), "predicted"]
        bars: dict[str, dict[str, float]] = {way: {} for way in ways}
        for row in own:
            bars[row.way][row.exchange] = row.measured
            bars["predicted"][row.exchange] = row.predicted or 0.0
        for i, (label, heights) in enumerate(bars.items()):
            places = [x + i / (len(bars) + 1) for x in range(len(names))]
            values = [heights.get(name, 0.0) for name in names]
            axis.bar(places, values, 1 / (len(bars) + 1), label=label)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axis.set_title(family)
    axes[0].set_ylabel("microseconds")
    axes[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
