"""Linear-MoE's A0.3B-2B on real text, cut in three ways: losses, speed, memory, exchanges.

    python -m tests.bench.training --out DIR [--seconds 330] [--steps 50] [--data PREFIX]
        [--ways one again tensor context] [section.key=value ...]

The text is the Python standard library's, in 16K kinds of tokens learned from it; it is prepared at
PREFIX if it is not there (--prepare does nothing else). Each way is a run of seqpar.launch.train by
torchrun, from the same weights, with an equal share of the time that is left; one that runs out of
it or of memory is told by what it did until then. `again` is one GPU once more, from weights that
differ by what bf16 rounds off: what losses of other ways may differ by. DIR gets losses.csv,
table.md and, where matplotlib is, the plot losses.png; --report makes them anew from the runs in
DIR. Each run's folder has kernels.txt, what took longest in one step.

exchanging: share of one step, profiled on rank 0, in which the GPU sends or receives, or waits for
others to; exposed: in which it does nothing else.
"""

import argparse
import csv
import json
import math
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from .trace import read_trace

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "launch/configs/a0.3b-2b.yaml"
VOCABULARY = 16384
PROFILED = 5  # the step whose exchanges are looked at
WARM = 6  # steps before those that are timed
# ranks, settings; experts are recomputed so that one GPU of 80 GB holds it all
WAYS = {
    "one": (1, ["parallel.context=1"]),
    "again": (1, ["parallel.context=1"]),  # from weights that differ by a rounding: the noise
    "tensor": (2, ["parallel.tensor=2", "parallel.context=1"]),
    "context": (2, ["parallel.context=2", "parallel.expert=2"]),
}
Spans = list[tuple[float, float]]


def prepare_text(prefix: Path, vocabulary: int = VOCABULARY) -> None:
    """The standard library as a corpus, its tokenizer beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from seqpar.launch.demo import library_files
    from seqpar.launch.prepare import prepare

    files = library_files()
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learned.train([str(path) for path in files], trainer)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = f"{prefix}.tokenizer.json"
    learned.save(tokenizer)
    [corpus] = prepare(files, str(prefix), tokenizer=tokenizer)
    print(f"prepared {prefix}: {corpus.tokens:,} tokens", flush=True)


class Enough(Exception):
    """All steps are done; the checkpoint at the end is left out."""


def one_rank(words: list[str]) -> None:
    """What torchrun starts: the trainer, one of its steps profiled."""
    from seqpar.launch import step
    from seqpar.launch.failure import UserError, leave
    from seqpar.launch.ranks import start_ranks
    from seqpar.launch.terminal import plain_messages
    from seqpar.launch.train import Command, train

    plain_messages()
    control = start_ranks()
    module: Any = step
    train_step, done = module.train_step, 0

    def observed(run: Any, *args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 1:
            begin_alike(run)
        if done == run.config.train.steps:
            raise Enough
        if done != PROFILED:
            return train_step(run, *args)
        with profile() as profiler:
            begin = time.perf_counter()
            result = train_step(run, *args)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        most = control.all_reduce(torch.tensor([memory]), "max").item()
        if control.rank == 0:
            folder = Path(run.config.log.folder)
            trace = folder / "trace.json"
            profiler.export_chrome_trace(str(trace))
            where = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = profiler.key_averages().table(where, row_limit=40, max_name_column_width=70)
            (folder / "kernels.txt").write_text(table)
            found = {"memory": most, "device": device_name(), **shares(trace, seconds)}
            (folder / "profiled.json").write_text(json.dumps(found) + "\n")
        return result

    module.train_step = observed
    try:
        train(Command(words[0], tuple(words[1:])), control)
    except Enough:
        control.barrier()
    except UserError as error:
        leave(str(error), control.rank)


def begin_alike(run: Any) -> None:
    """Take the weights of the way that came first: cut otherwise, others would be drawn."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    vars(filesystem_async)["_results_queue"] = queue.SimpleQueue()  # or it starts a process for it
    folder = Path(run.config.log.folder).parent / "initial"
    [stage] = run.model
    weights = stage.module.sharded_state_dict()
    if run.control.broadcast_object(folder.exists()):
        stage.module.load_state_dict(dist_checkpointing.load(weights, str(folder)))
        if Path(run.config.log.folder).name == "again":
            torch.manual_seed(1)
            for p in stage.parameters():
                p.data.addcmul_(p.data, torch.randn_like(p), value=2**-9)
        run.optimizer.reload_model_params()
        return
    if run.control.rank == 0:
        folder.mkdir()
    run.control.barrier()
    dist_checkpointing.save(weights, str(folder))


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def shares(trace: Path, seconds: float) -> dict[str, float]:
    """Of a profiled step: the share of exchanges, and that in which nothing else is done."""
    spans = read_trace(trace)
    ends = [(s.begin, s.begin + s.length, s.what == "transfer") for s in spans]
    exchanges = merged((begin, end) for begin, end, transfer in ends if transfer)
    other = merged((begin, end) for begin, end, transfer in ends if not transfer)
    either = merged([*exchanges, *other])
    alone = length(either) - length(other)
    return {
        "exchanging": length(exchanges) / 1e6 / seconds,
        "exposed": alone / 1e6 / seconds,
    }


def merged(spans: Iterable[tuple[float, float]]) -> Spans:
    """The union of `spans` as spans that do not touch, in order."""
    found: Spans = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def length(spans: Spans) -> float:
    return sum(stop - start for start, stop in spans)


@dataclass
class Ran:
    """What one way came to: its steps (loss, seconds), what was profiled, why it ended early."""

    way: str
    losses: list[float]
    seconds: list[float]
    tokens: int  # a step
    profiled: dict[str, Any]
    error: str

    @classmethod
    def read(cls, folder: Path) -> "Ran":
        metrics, profiled = folder / "metrics.jsonl", folder / "profiled.json"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        steps = [json.loads(line) for line in lines if line.endswith("}")]
        log = folder.with_suffix(".log")
        return cls(
            way=folder.name,
            losses=[step["loss"] for step in steps],
            seconds=[step["seconds"] for step in steps],
            tokens=int(steps[0]["tokens"]) if steps else 0,
            profiled=json.loads(profiled.read_text()) if profiled.exists() else {},
            error=reason(log.read_text()) if log.exists() else "",
        )

    @property
    def speed(self) -> float | None:
        """Tokens a second: of the median step, once warm."""
        timed = self.seconds[WARM:]
        return self.tokens / statistics.median(timed) if timed else None


def reason(log: str) -> str:
    """The line of a run's output that says why it ended early; empty if it did not."""
    if "time is up" in log:
        return "time is up"
    found = re.findall(r"(?:OutOfMemoryError|[A-Z]\w*Error|error): .*", log)
    return found[0][:200] if found and "all steps done" not in log else ""


def run(way: str, out: Path, seconds: float, words: list[str]) -> None:
    ranks, settings = WAYS[way]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    rank = ["-m", "tests.bench.training", "--rank", str(CONFIG), *settings, *words]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with out.joinpath(f"{way}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *torchrun, *rank, f"log.folder={out / way}"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        try:
            code = process.wait(timeout=max(seconds, 1))
            log.write("all steps done\n" if code == 0 else "")
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            process.wait()
            log.write("time is up\n")


def report(out: Path) -> None:
    """losses.csv, table.md and losses.png of the runs in `out`."""
    found = [Ran.read(out / way) for way in WAYS if out.joinpath(f"{way}.log").exists()]
    with (out / "losses.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["way", "step", "loss", "seconds"])
        for ran in found:
            for step, values in enumerate(zip(ran.losses, ran.seconds, strict=True), 1):
                table.writerow([ran.way, step, *values])
    one = next((ran.losses for ran in found if ran.way == "one"), [])
    text = "\n".join([HEAD, *(row(ran, one) for ran in found)]) + "\n"
    (out / "table.md").write_text(text)
    if find_spec("matplotlib"):
        plot(out, found)
    print(text, flush=True)


HEAD = """\
| way | ranks | settings | steps | loss, first and last | from one: most, rms | tokens/s \
| memory, GB | exchanging | exposed | |
|---|---|---|---|---|---|---|---|---|---|---|"""


def row(ran: Ran, one: list[float]) -> str:
    ranks, settings = WAYS[ran.way]
    apart = [abs(own - other) for own, other in zip(ran.losses, one, strict=False)]
    rms = math.sqrt(sum(x * x for x in apart) / max(1, len(apart)))
    profiled = ran.profiled
    cells = [
        ran.way,
        f"{ranks} x {profiled.get('device', '?')}",
        " ".join(word.removeprefix("parallel.") for word in settings),
        str(len(ran.losses)),
        f"{ran.losses[0]:.4f}, {ran.losses[-1]:.4f}" if ran.losses else "",
        f"{max(apart):.1e}, {rms:.1e}" if apart and ran.way != "one" else "",
        f"{ran.speed:,.0f}" if ran.speed else "",
        f"{profiled['memory'] / 1e9:.1f}" if profiled else "",
        f"{profiled['exchanging']:.1%}" if profiled else "",
        f"{profiled['exposed']:.1%}" if profiled else "",
        ran.error,
    ]
    return f"| {' | '.join(cells)} |"


def plot(out: Path, found: list[Ran]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for ran, style in zip(found, ("-", "-.", "--", ":"), strict=False):
        axes.plot(range(1, len(ran.losses) + 1), ran.losses, style, label=ran.way)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out / "losses.png", dpi=150)
    pyplot.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        one_rank(sys.argv[2:])
        return
    from seqpar.launch.terminal import plain_messages

    plain_messages()
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=330.0, help="for everything")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--data", type=Path, default=ROOT / "runs/data/library-16k")
    parser.add_argument("--prepare", action="store_true", help="only the text")
    parser.add_argument("--report", action="store_true", help="only the tables and the plot")
    args, words = parser.parse_known_args()
    if not args.report and not Path(f"{args.data}.idx").exists():
        prepare_text(args.data)
    if args.prepare:
        return
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "initial", ignore_errors=True)
    settings = [
        f"train.steps={args.steps + 1}",  # the last one is not done
        "train.global_batch=1",
        "train.evaluate_every=0",
        "memory.recompute=[mlp]",
        f"data.path={args.data.resolve()}",
        "data.held_out=null",
        "data.sequence_length=32K",
        f"model.vocab_size={VOCABULARY}",
        f"optimizer.warmup_steps={min(10, args.steps - 1)}",
        "log.every=1",
        "log.tensorboard=false",
        *words,
    ]
    for index, way in enumerate(args.ways if not args.report else []):
        left = args.seconds - (time.monotonic() - begin)
        run(way, out, left / (len(args.ways) - index), settings)
        report(out)
    shutil.rmtree(out / "initial", ignore_errors=True)
    if args.report:
        report(out)


if __name__ == "__main__":
    main()
