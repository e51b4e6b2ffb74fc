"""One training step of 1.3B models on longer and longer sequences, beside what the plan says of it.

    python -m tests.bench.memory --out DIR [--seconds 360] [--only linear hybrid] [--lengths 64K 1M]
    torchrun --nproc-per-node P -m tests.bench.memory ...      one sequence over P GPUs

Models have 24 layers, hidden 2048, bf16: `hybrid` is launch/configs/hybrid-1.3b.yaml (`LLLN`,
grouped queries), `linear` the same with linear layers only. A step is the trainer's: forward,
backward, AdamW. Each length is run with the fastest way to save memory that the plan says fits, or
the most saving one if it says that none does; the shortest length also with slower ones, each of
which saves a tenth more. What is timed is one step, after one of few tokens that compiles the
kernels, and, if it takes less than half a minute, after another like it, which finds pinned memory
ready.

DIR takes memory.csv, a row as soon as it is measured, and memory.png: memory by part as planned,
and measured peaks. The fastest cases come first; one that would not end in time is a row that says
so. Without a GPU models are tiny, in fp32: that shows that the benchmark works and nothing else.
"""

import argparse
import csv
import gc
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from seqpar import Layout, SequenceParallel
from seqpar.comm import Communicator
from seqpar.launch.cluster import CLUSTERS, Cluster
from seqpar.launch.config import CONFIGS, Config, load_config
from seqpar.launch.plan import GIB, Change, Plan, changed, make_plan, savers, words
from seqpar.launch.ranks import start_ranks

CUDA = torch.cuda.is_available()
LENGTHS = ["64K", "128K", "256K", "512K", "1M", "2M"] if CUDA else ["1K", "2K"]
MODELS = {"linear": "LLLL" * 6, "hybrid": "LLLN" * 6}
WARM = 4096 if CUDA else 128  # tokens of a rank in the step that compiles
SPARE = 20.0  # seconds to build a model and warm up
TINY = [
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.vocab_size=512",
    "train.precision=fp32",
]


@dataclass
class Row:
    model: str
    tokens: int
    gpus: int
    saved: str  # what the run changes to save memory
    planned_gib: float
    planned_seconds: float
    peak_gib: float = 0.0  # most that PyTorch had given out
    held_gib: float = 0.0  # most that it held
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    loss: float = 0.0
    error: str = ""


def cases(args: argparse.Namespace, gpus: int, cluster: Cluster) -> list[tuple[str, Plan, Change]]:
    """(model, plan, how memory is saved), the fastest first."""
    found = []
    for model in args.only:
        for length in args.lengths:
            config = load_config(
                str(CONFIGS / "hybrid-1.3b.yaml"),
                [
                    f"model.pattern={MODELS[model] if CUDA else MODELS[model][:4]}",
                    f"data.sequence_length={length}",
                    f"parallel.context={gpus}",
                    f"optimizer.distributed={str(gpus > 1).lower()}",
                    *([] if CUDA else TINY),
                ],
            )
            plans: dict[float, tuple[Plan, Change]] = {}  # without those that change nothing
            for way in savers(config):
                plan = make_plan(changed(config, way), gpus, cluster)
                plans.setdefault(sum(plan.memory.values()), (plan, way))
            fitting = [each for each in plans.values() if each[0].fits] or [(plan, way)]
            fitting.sort(key=lambda each: sum(each[0].seconds.values()))
            chosen, least = fitting[:1], sum(fitting[0][0].memory.values())
            for each in fitting if length == args.lengths[0] else []:
                if (size := sum(each[0].memory.values())) < 0.9 * least:
                    chosen, least = [*chosen, each], size
            found += [(model, *each) for each in chosen]
    return sorted(found, key=lambda each: sum(each[1].seconds.values()))


def measure(row: Row, plan: Plan, control: Communicator) -> Row:
    """The row with what a step took; all ranks call it."""
    from megatron.core import parallel_state

    from seqpar.launch.setup import build
    from seqpar.launch.step import train_step

    try:
        run = build(plan.config, plan.sizes, control)
        for tokens in (WARM * plan.gpus, *[row.tokens] * steps(row.planned_seconds)):
            config: Config = changed(plan.config, {"data.sequence_length": tokens})
            run = replace(run, config=config)
            layout = Layout(tokens, plan.gpus)
            sp = SequenceParallel(layout=layout, comm=run.sequence, links=run.links)
            batch = batch_of(tokens // plan.gpus, plan.config.model.vocab_size, run.device, sp)
            if CUDA:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            result = train_step(run, [batch])
            if CUDA:
                torch.cuda.synchronize()
            row.seconds = time.perf_counter() - begin
        row.tokens_per_second = row.tokens / row.seconds
        row.loss = result.loss
        if CUDA:
            row.peak_gib = torch.cuda.max_memory_allocated() / GIB
            row.held_gib = torch.cuda.max_memory_reserved() / GIB
    finally:
        parallel_state.destroy_model_parallel()
    return row


def steps(seconds: float) -> int:
    """How many are run of a case; the last is timed."""
    return 2 if seconds < 30 else 1


def batch_of(tokens: int, vocabulary: int, device: torch.device, sp: SequenceParallel):  # type: ignore[no-untyped-def]
    """Random tokens of one document."""
    from seqpar.models.language_model import Batch

    draw = torch.Generator().manual_seed(sp.rank)
    stream = torch.randint(0, vocabulary, (1, tokens + 1), generator=draw).to(device)
    mask = torch.ones(1, tokens, device=device)
    return Batch(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), mask, sp)


def machine(ranks: int) -> Cluster:
    """The cluster whose GPU this is, with the memory there is."""
    name = torch.cuda.get_device_name() if CUDA else "none"
    known = next((each for each in CLUSTERS.values() if each.gpu in name), CLUSTERS["h200"])
    memory = torch.cuda.mem_get_info()[1] / GIB if CUDA else 2.0
    host = 0.9 * psutil.virtual_memory().available / GIB / ranks
    return replace(known, memory=memory, host_memory=host)


def rows(args: argparse.Namespace, control: Communicator) -> Iterator[tuple[Row, Plan]]:
    end = time.monotonic() + args.seconds
    for model, plan, way in cases(args, control.size, machine(control.size)):
        seconds = sum(plan.seconds.values())
        planned = sum(plan.memory.values()) / GIB
        length = plan.config.data.sequence_length
        row = Row(model, length, control.size, words(way), planned, seconds)
        left = torch.tensor(end - time.monotonic() - 1.3 * steps(seconds) * seconds - SPARE)
        if CUDA and control.all_reduce(left, "min").item() < 0:
            row.error = "no time left"
        elif plan.host > plan.cluster.host_memory * GIB:
            row.error = f"needs {plan.host / GIB:.0f} GiB of the host, which has less"
        else:
            try:
                row = measure(row, plan, control)
            except Exception as error:  # whatever it is, other cases may do
                row.error = f"{type(error).__name__}: {error}".splitlines()[0]
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        yield row, plan


def plot(found: list[tuple[Row, Plan]], path: Path) -> None:
    """Planned memory by part, stacked, and measured peaks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = sorted(found, key=lambda each: (each[0].model, each[0].tokens, each[0].planned_gib))
    parts = list(dict.fromkeys(part for _, plan in found for part in plan.memory))
    figure, axes = plt.subplots(figsize=(2 + 0.6 * len(found), 6))
    places, floor = range(len(found)), [0.0] * len(found)
    for part in parts:
        heights = [plan.memory.get(part, 0.0) / GIB for _, plan in found]
        axes.bar(places, heights, bottom=floor, label=part)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    measured = [(place, row.peak_gib) for place, (row, _) in enumerate(found) if row.peak_gib]
    if measured:
        axes.plot(*zip(*measured, strict=True), "kD", label="measured peak")
    labels = [f"{row.model} {row.tokens >> 10}K\n{row.saved}" for row, _ in found]
    axes.set_xticks(list(places), labels, rotation=90, fontsize=6)
    axes.set_ylabel("GiB")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", default=LENGTHS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.ERROR)
    control = start_ranks()
    leader = control.rank == 0
    table = args.out / "memory.csv"
    names = [field.name for field in fields(Row)]
    if leader:
        args.out.mkdir(parents=True, exist_ok=True)
        table.write_text(",".join(names) + "\n")
    found = []
    for row, plan in rows(args, control):
        found.append((row, plan))
        if leader:
            print(row, flush=True)
            with open(table, "a", newline="") as file:
                csv.writer(file).writerow(asdict(row).values())
            plot(found, args.out / "memory.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
