"""Weak scaling: each function and a whole training step on P GPUs, beside one GPU in the same run.

    torchrun --nproc-per-node P -m tests.bench.layer [--tokens 32768] [--layers 24] [--out DIR]
        [--only NAME ...] [--trace]

Every rank first works alone on as many tokens as it holds later, all ranks at once; then all of
them on one sequence P times as long. Milliseconds of the slowest rank, medians. `ideal` is the time
alone, with causal softmax counted P times: its work a token grows with the sequence. Efficiency is
ideal / P GPUs.

`step` is forward, backward and AdamW of a hybrid language model (GPTModel of Megatron-Core, bf16,
each layer recomputed in the backward pass); gradients are not summed over ranks, which costs data
parallelism the same. Without a GPU everything runs over gloo, on small sizes. --trace writes, of
one layer of each kind, what the profiler saw, and draws which stream was at work when.
"""

import argparse
import csv
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import seqpar
from seqpar import Layout, SequenceParallel
from seqpar.comm import Communicator
from seqpar.cost import Links, measure

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
# name -> function, gates besides q, k, v (their width: 0 one number a head), options, layout
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, bool], dict[str, str], str]] = {
    "linear": (seqpar.linear_attention, {}, {}, "contiguous"),
    "linear scalar": (seqpar.linear_attention, {"log_decay": False}, {}, "contiguous"),
    "linear diagonal": (seqpar.linear_attention, {"log_decay": True}, {}, "contiguous"),
    "gated delta": (
        seqpar.delta_attention,
        {"beta": False, "log_decay": False},
        {},
        "contiguous",
    ),
    "kda": (seqpar.delta_attention, {"beta": False, "log_decay": True}, {}, "contiguous"),
    "softmax allgather": (seqpar.softmax_attention, {}, {"method": "allgather"}, "contiguous"),
    "softmax ring": (seqpar.softmax_attention, {}, {"method": "ring"}, "zigzag"),
    "softmax ulysses": (seqpar.softmax_attention, {}, {"method": "ulysses"}, "contiguous"),
}


@dataclass(frozen=True)
class Row:
    """One measured case; times in ms. rate: tokens a second and GPU, on P GPUs."""

    case: str
    gpus: int
    alone: float
    ideal: float
    together: float
    efficiency: float
    rate: float


@dataclass(frozen=True)
class Bench:
    """What all cases share. links: what exchanges are chosen by."""

    comm: Communicator
    links: Links
    args: argparse.Namespace

    def sp(self, size: int, kind: str = "contiguous") -> SequenceParallel:
        """This rank alone, or all ranks, with as many tokens each."""
        layout = Layout(size * self.args.tokens, size, kind)
        comm = self.comm if size > 1 else Communicator()
        return SequenceParallel(layout=layout, comm=comm, links=self.links if size > 1 else None)

    def say(self, line: str) -> None:
        if self.comm.rank == 0:
            print(line, flush=True)


def main() -> None:
    args = arguments()
    if CUDA:
        torch.cuda.set_device(DEVICE)
        os.environ.setdefault("SEQPAR_KERNELS", "triton")
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group("nccl" if CUDA else "gloo")
    else:  # without torchrun: one rank, that needs no port
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    comm = Communicator(dist.group.WORLD)
    bench = Bench(comm, measure(comm, DEVICE) if comm.size > 1 else Links((0,)), args)
    machine = torch.cuda.get_device_name(DEVICE) if CUDA else "CPU, gloo"
    bench.say(f"{comm.size} x {machine}, {args.tokens} tokens each, torch {torch.__version__}")
    bench.say(" ".join(f"{field.name:>18}" for field in fields(Row)))
    rows = []
    try:
        for name in FUNCTIONS:
            if wanted(name, args):
                rows.append(function_row(bench, name))
        if wanted("step", args) or args.trace:
            if importlib.util.find_spec("megatron") is None:
                bench.say("step and traces need megatron-core")
            else:
                rows += step_rows(bench)
    finally:
        if args.out and comm.rank == 0 and rows:
            write(rows, args.out, machine)
    comm.barrier()
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768 if CUDA else 256, help="of each rank")
    parser.add_argument("--heads", type=int, default=16 if CUDA else 4)
    parser.add_argument("--dim", type=int, default=128 if CUDA else 16, help="of a head")
    parser.add_argument("--kv-heads", type=int, default=4 if CUDA else 2, help="of softmax")
    parser.add_argument("--layers", type=int, default=24 if CUDA else 4)
    parser.add_argument("--pattern", default="LLLN", help="repeated up to the number of layers")
    parser.add_argument("--mixer", default="gla", help="what L is: gla or gated_deltanet")
    parser.add_argument("--vocabulary", type=int, default=32000 if CUDA else 64)
    parser.add_argument("--repeats", type=int, default=10 if CUDA else 3)
    parser.add_argument("--only", nargs="+", help="cases whose names hold one of these")
    parser.add_argument("--out", type=Path, help="folder for layer.csv, layer.png and traces")
    parser.add_argument("--trace", action="store_true", help="profile a layer of each kind")
    args = parser.parse_args()
    if args.trace and not args.out:
        parser.error("--trace needs --out")
    return args


def wanted(name: str, args: argparse.Namespace) -> bool:
    return not args.only or any(part in name for part in args.only)


def function_row(bench: Bench, name: str) -> Row:
    """Forward and backward of one function."""
    function, gates, options, kind = FUNCTIONS[name]
    args, size = bench.args, bench.comm.size
    softmax = function is seqpar.softmax_attention

    def call(size: int, kind: str, options: dict[str, str]) -> Callable[[], None]:
        sp = bench.sp(size, kind)
        make = torch.Generator(DEVICE).manual_seed(bench.comm.rank)
        shape = 1, args.tokens, args.heads

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, device=DEVICE, generator=make)

        kv = (1, args.tokens, args.kv_heads, args.dim) if softmax else (*shape, args.dim)
        q, k, v = rand(*shape, args.dim).to(DTYPE), rand(*kv), rand(*kv).to(DTYPE)
        k = torch.nn.functional.normalize(k, dim=-1).to(DTYPE)
        inputs = {"q": q, "k": k, "v": v}
        for gate, diagonal in gates.items():
            x = rand(*shape, args.dim) if diagonal else rand(*shape)
            inputs[gate] = x.sigmoid() if gate == "beta" else -0.1 * x.sigmoid()
        leaves = [x.requires_grad_() for x in inputs.values()]
        do = rand(*shape, args.dim).to(DTYPE)

        def both() -> None:
            o = function(**inputs, **options, sp=sp)
            torch.autograd.grad(o, leaves, do)

        return both

    alone = timed(bench, call(1, "contiguous", {}))
    together = timed(bench, call(size, kind, options)) if size > 1 else alone
    return shown(bench, name, alone, alone * size if softmax else alone, together)


def step_rows(bench: Bench) -> list[Row]:
    """The training step, and traces of its layers."""
    from seqpar.models import compat
    from seqpar.models.config import ModelConfig

    compat.install()
    args = bench.args
    letters = (args.pattern * args.layers)[: args.layers]
    model = ModelConfig(
        pattern=letters,
        linear_mixer=args.mixer,
        hidden_size=args.heads * args.dim,
        vocab_size=args.vocabulary,
        num_heads=args.heads,
        kv_heads=args.kv_heads,
    )
    network = built(bench, model)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    bench.say(f"step: {letters} of {args.mixer}, {numbers / 1e9:.2f} billion parameters")
    rows, size = [], bench.comm.size
    if wanted("step", args):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=CUDA)
        alone = timed(bench, partial(step, bench, network, optimizer, bench.sp(1)))
        together = alone
        if size > 1:
            together = timed(bench, partial(step, bench, network, optimizer, bench.sp(size)))
        ideal = alone + (size - 1) * letters.count("N") * softmax_share(bench)
        rows.append(shown(bench, "step", alone, ideal, together))
        del optimizer
    if args.trace:
        for index in {letter: letters.index(letter) for letter in letters}.values():
            trace(bench, network.decoder.layers[index])
    return rows


def built(bench: Bench, model: Any) -> Any:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from seqpar.models.language_model import build_language_model
    from seqpar.models.transformer import transformer_config

    size = bench.comm.size
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(
        model,
        context_parallel=size,
        dtype=DTYPE,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    [network] = build_language_model(model, config, groups)
    return network.to(DEVICE, DTYPE)


def step(bench: Bench, network: Any, optimizer: torch.optim.Optimizer, sp: Any) -> None:
    from seqpar.models.language_model import Batch, forward_step

    tokens = torch.arange(bench.args.tokens, device=DEVICE)[None] % bench.args.vocabulary
    batch = Batch(tokens, tokens, torch.ones(tokens.shape, device=DEVICE), sp)
    output, loss_of = forward_step(iter([batch]), network)
    loss, count, _ = loss_of(output)
    (loss / count).backward()
    optimizer.step()
    optimizer.zero_grad()


def softmax_share(bench: Bench) -> float:
    """ms that a softmax layer's attention takes one GPU in a step: forward twice, backward."""
    args = bench.args
    shapes = [(1, args.tokens, heads, args.dim) for heads in (args.heads, *[args.kv_heads] * 2)]
    q, k, v = (torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_() for shape in shapes)

    def both() -> None:
        with torch.no_grad():
            seqpar.softmax_attention(q, k, v)
        torch.autograd.grad(seqpar.softmax_attention(q, k, v), [q, k, v], q)

    return timed(bench, both)


def timed(bench: Bench, call: Callable[[], None]) -> float:
    """ms, the median of the slowest rank."""
    for _ in range(3):
        call()
    times = []
    for _ in range(bench.args.repeats):
        synchronize()
        bench.comm.barrier()
        begin = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - begin)
    own = torch.tensor(statistics.median(times) * 1e3, device=DEVICE)
    if CUDA:
        torch.cuda.empty_cache()
    return bench.comm.all_reduce(own, "max").item()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize(DEVICE)


def shown(bench: Bench, case: str, alone: float, ideal: float, together: float) -> Row:
    size = bench.comm.size
    rate = bench.args.tokens / together * 1e3
    row = Row(case, size, alone, ideal, together, ideal / together, rate)
    bench.say(" ".join(f"{x:18.3f}" if isinstance(x, float) else f"{x:>18}" for x in astuple(row)))
    return row


def trace(bench: Bench, layer: Any) -> None:
    """One layer's forward and backward under the profiler: a trace and a picture, of rank 0."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from seqpar.models.sequence import SequenceParallelParams

    name = type(layer.self_attention).__name__
    params = SequenceParallelParams(bench.sp(bench.comm.size))
    shape = bench.args.tokens, 1, layer.config.hidden_size
    x = torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_()
    dy = torch.randn_like(x)

    def both() -> None:
        with record_function("forward"):
            y, _ = layer(x, attention_mask=None, packed_seq_params=params)
        with record_function("backward"):
            y.backward(dy)

    for _ in range(3):
        both()
    synchronize()
    bench.comm.barrier()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=activities) as profiler:
        both()
        synchronize()
    if bench.comm.rank == 0:
        bench.args.out.mkdir(parents=True, exist_ok=True)
        path = bench.args.out / f"{name}.json"
        profiler.export_chrome_trace(str(path))
        spans = read_trace(path)
        draw(spans, path.with_suffix(".png"), f"{name}, forward and backward of one layer")
        if CUDA:
            hidden, total = overlap(spans)
            bench.say(f"{name}: of {total:.0f} us of transfers {hidden:.0f} beside other kernels")
    bench.comm.barrier()


@dataclass(frozen=True)
class Span:
    """Something that a stream (without a GPU: a thread) did, in us from the first."""

    row: str
    what: str
    begin: float
    length: float


KINDS = {  # by what their names hold, the first that fits
    "transfer": ("nccl", "handover", "gloo", "c10d", "memcpyptop"),
    "softmax": ("cudnn", "flash", "fmha", "sdpa"),
    "product": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "addmm", "bmm"),
    "recurrence": (
        *("run_", "fold_", "walk_", "solve_", "scan_", "enter_", "leave_", "keys_", "gate_"),
        *("steps_", "pairs_", "_start", "_finish", "_whole"),  # the last three without a GPU
    ),
    "convolution and norms": ("conv", "norm", "unit_"),
}


def kind_of(name: str) -> str:
    lower = name.lower()
    found = (kind for kind, parts in KINDS.items() if any(part in lower for part in parts))
    return next(found, "other")


def read_trace(path: Path) -> list[Span]:
    """Kernels and copies by stream; without a GPU, operators by thread."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found = kernels or outermost([e for e in events if e.get("cat") == "cpu_op"])
    first = min(e["ts"] for e in found)
    return [
        Span(
            f"stream {e['args']['stream']}" if kernels else f"thread {e['tid']}",
            kind_of(e["name"]),
            e["ts"] - first,
            e["dur"],
        )
        for e in found
    ]


def outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a known kind that no other such is part of."""
    found: list[dict[str, Any]] = []
    known = (e for e in events if kind_of(e["name"]) != "other")
    for e in sorted(known, key=lambda e: (e["tid"], e["ts"], -e["dur"])):
        last = found[-1] if found else None
        if last is None or last["tid"] != e["tid"] or last["ts"] + last["dur"] <= e["ts"]:
            found.append(e)
    return found


def overlap(spans: list[Span]) -> tuple[float, float]:
    """us of transfers beside kernels of other streams, and in all."""
    hidden = total = 0.0
    for span in (s for s in spans if s.what == "transfer"):
        total += span.length
        at, end = span.begin, span.begin + span.length
        for other in sorted((s for s in spans if s.row != span.row), key=lambda s: s.begin):
            begin, stop = max(at, other.begin), min(end, other.begin + other.length)
            if begin < stop and other.what != "transfer":
                hidden, at = hidden + stop - begin, stop
    return hidden, total


def draw(spans: list[Span], path: Path, title: str) -> None:
    """Streams as rows, time from left to right."""
    pyplot = plots()
    rows = sorted({span.row for span in spans})
    figure, axes = pyplot.subplots(figsize=(14, 1.2 + 0.7 * len(rows)))
    for color, kind in enumerate([*KINDS, "other"]):
        for index, row in enumerate(rows):
            of_kind = [s for s in spans if s.row == row and s.what == kind]
            axes.broken_barh(
                [(s.begin, s.length) for s in of_kind],
                (index - 0.4, 0.8),
                facecolors=f"C{color}",
                label=kind if index == 0 else None,
            )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("us")
    axes.set_title(title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncol=len(KINDS) + 1, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def write(rows: list[Row], folder: Path, machine: str) -> None:
    """layer.csv, and layer.png: each case alone, ideally and together."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "layer.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)
    pyplot = plots()
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.6 * len(rows)))
    for offset, name in enumerate(("alone", "ideal", "together")):
        places = [index + 0.25 * (offset - 1) for index in range(len(rows))]
        label = f"{rows[0].gpus} GPUs" if name == "together" else name
        axes.barh(places, [getattr(row, name) for row in rows], 0.22, label=label)
    for index, row in enumerate(rows):
        axes.text(row.together, index + 0.25, f" {row.efficiency:.0%}", va="center")
    axes.set_yticks(range(len(rows)), [row.case for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms, forward and backward")
    axes.set_title(f"{rows[0].gpus} x {machine}")
    axes.legend(frameon=False)
    figure.savefig(folder / "layer.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


if __name__ == "__main__":
    main()
