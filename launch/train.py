"""Training: `torchrun ... -m seqpar.launch.train CONFIG [section.key=value ...]`.

One process without torchrun: `seqpar train CONFIG [section.key=value ...]`.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from seqpar.agreement import ExchangeError
from seqpar.comm import Communicator
from seqpar.launch import checkpoint_files
from seqpar.launch.checks import Sizes, check
from seqpar.launch.config import Config, load_config, to_container, to_yaml
from seqpar.launch.failure import (
    EXIT_CODE_FILE,
    LoneError,
    Stopped,
    UserError,
    agree,
    leave,
    together,
)
from seqpar.launch.metrics import METRICS
from seqpar.launch.ranks import start_ranks
from seqpar.launch.recording import advice_on_memory, profiled
from seqpar.launch.signals import StopRequests
from seqpar.launch.terminal import command_parser, plain_messages

if TYPE_CHECKING:
    from seqpar.launch.checkpoint import Progress, Saver

MOST_SKIPPED = 5
"""How many steps in a row may be passed over."""


@dataclass(frozen=True)
class Command:
    """What was asked for: a YAML file, and words "section.key=value" that change it."""

    config: str
    overrides: tuple[str, ...] = ()

    def again(self, *changes: str) -> str:
        """The shell command of this run with some settings changed."""
        keys = {change.partition("=")[0] for change in changes}
        words = [word for word in self.overrides if word.partition("=")[0] not in keys]
        words = [self.config, *words, *changes]
        if EXIT_CODE_FILE in os.environ:  # set by this script
            names = {"NNODES", "RENDEZVOUS", "RANKS_PER_NODE"} & os.environ.keys()
            nodes = [f"{name}={os.environ[name]}" for name in sorted(names)]
            return shlex.join([*nodes, _short(Path(__file__).with_name("torchrun.sh")), *words])
        start = [_short(Path(sys.executable))]
        if "LOCAL_WORLD_SIZE" in os.environ:
            ranks, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = ["--standalone"] if local == ranks else ["--nnodes", str(ranks // local)]
            start += ["-m", "torch.distributed.run", *nodes, "--nproc-per-node", str(local)]
        return shlex.join([*start, "-m", "seqpar.launch.train", *words])


def train(command: Command, control: Communicator) -> None:
    """Train as `command` says. Every rank calls it, with a communicator of all ranks.

    Raises:
        UserError: on every rank, for whatever the user can put right.
        LoneError: on one rank.
    """
    config = together(control, lambda: load_config(command.config, command.overrides))
    sizes = together(control, lambda: check(config, control.size))
    sections = to_container(config).items()
    agree(control, {f"{name}.{key}": x for name, section in sections for key, x in section.items()})
    with advice_on_memory(config, control.rank):
        _train(command, config, sizes, control)


def _train(command: Command, config: Config, sizes: Sizes, control: Communicator) -> None:
    # Megatron takes seconds to import; mistakes found before are told at once.
    from seqpar.launch.checkpoint import Progress, Saver, identity, load
    from seqpar.launch.data import open_stream
    from seqpar.launch.disk import on_disk
    from seqpar.launch.report import Clock, Report
    from seqpar.launch.setup import build, seed_ranks
    from seqpar.launch.step import held_out_loss, read, train_step

    data, steps = config.data, config.train.steps
    folder = Path(config.log.folder)
    saved = folder / "checkpoints"
    leader = control.rank == 0
    together(control, lambda: _check_folder(config) if leader else None)
    stream = together(control, lambda: open_stream(config, "path"))
    held_out = together(control, lambda: open_stream(config, "held_out")) if data.held_out else None
    tokens = {"path": stream.corpus.tokens, "held_out": held_out and held_out.corpus.tokens}
    agree(control, {f"data.{field} (number of tokens)": n for field, n in tokens.items()})
    run = together(control, lambda: build(config, sizes, control))
    common = identity(run, stream.corpus)
    done = Progress()
    if config.checkpoint.resume is not None:
        done = load(run, saved, config.checkpoint.resume, common)
    if config.checkpoint.resume == "auto" and done.step >= steps:
        if leader:
            print(f"{folder} is trained to step {done.step} already")
        return
    # a resumed run may have other settings than the one it continues
    settings = folder / (f"config_from_step_{done.step}.yaml" if done.step else "config.yaml")
    together(control, lambda: _begin_folder(config, done.step, settings) if leader else None)
    together(control, lambda: checkpoint_files.check_seen([settings]))
    clock = Clock(config.train.global_batch * data.sequence_length)

    def new_report() -> Report | None:
        return Report(run, done.step, stream, held_out, clock) if leader else None

    report = together(control, lambda: on_disk(folder, new_report))

    def tell(what: Callable[[Report], None]) -> None:
        """On the first rank; if its disk is full, all leave."""
        together(control, lambda: on_disk(folder, lambda: what(report) if report else None))

    saver = Saver(run, saved, common, done.step, lambda path: tell(lambda r: r.checkpoint(path)))
    stop = StopRequests()
    skipped = 0
    try:
        while done.step < steps:
            sequences = range(done.sequence, done.sequence + config.train.global_batch)
            clock.start()
            with _kept(saver, done):
                batches = read(run, stream, sequences)
            seed_ranks(config.train.seed + done.step + 1)
            with profiled(config, done.step + 1, control.rank):
                result = train_step(run, batches)
            clock.stop()
            done = Progress(done.step + 1, sequences.stop)
            tell(lambda r: r.step(done.step, result, sequences))  # noqa: B023
            skipped = skipped + 1 if result.nonfinite else 0
            if result.nonfinite and (config.train.on_nonfinite == "stop" or skipped > MOST_SKIPPED):
                raise UserError(_diverged(config, done.step, result.nonfinite))
            if held_out and _due(config.train.evaluate_every, done.step, steps):
                with _kept(saver, done):
                    loss = held_out_loss(run, held_out)
                tell(lambda r: r.held_out(done.step, loss))  # noqa: B023
            if _due(config.checkpoint.every, done.step, steps):
                wait = done.step == steps or not config.checkpoint.asynchronous
                saver.save(done, wait=wait)
            else:
                saver.go_on(wait=False)
            if done.step < steps and stop.asked(control):
                saver.save(done, wait=True)
                raise Stopped(f"stopped as asked, and saved, after step {done.step}")
    except UserError:
        saver.go_on(wait=True)  # what is being written may be the last good one
        raise
    finally:
        if report:
            report.close()
    more = steps + max(1, steps // 2)
    tell(lambda r: r.end(command.again("checkpoint.resume=latest", f"train.steps={more}")))


def _diverged(config: Config, step: int, where: str) -> str:
    return (
        f"step {step}: {where}: training has diverged; lower optimizer.lr={config.optimizer.lr} or "
        "optimizer.clip_grad, or raise optimizer.warmup_steps; train.on_nonfinite=skip passes over "
        "such steps"
    )


@contextmanager
def _kept(saver: "Saver", done: "Progress") -> Iterator[None]:
    """Save what has been learned before a mistake in the data ends the run."""
    try:
        yield
    except UserError as error:
        saver.save(done, wait=True)
        raise UserError(f"{error} (the run is saved up to step {done.step})") from None


def _due(every: int, step: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _check_folder(config: Config) -> None:
    """Refuse to mix a new run with the files of an old one."""
    folder = Path(config.log.folder)
    written = [name for name in ("config.yaml", METRICS, "checkpoints") if (folder / name).exists()]
    if config.checkpoint.resume is None and written:
        raise ValueError(
            f"log.folder={folder} holds a run already ({', '.join(written)}); continue it with "
            "checkpoint.resume=latest, or choose another log.folder"
        )


def _begin_folder(config: Config, step: int, settings: Path) -> None:
    if step >= config.train.steps:
        raise ValueError(
            f"train.steps={config.train.steps}: the checkpoint is of step {step}, nothing is left "
            f"to train; set train.steps above {step}"
        )
    settings.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_files.set_aside(settings.parent / "checkpoints", step)
    settings.write_text(to_yaml(config))


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


EXAMPLES = """examples:
  seqpar train launch/configs/demo.yaml train.steps=20 log.folder=runs/short
  torchrun --nproc-per-node 8 -m seqpar.launch.train CONFIG data.sequence_length=1M

Any setting of the file can be given as section.key=value; whole numbers take K and M. The config
that a run wrote into its log.folder lists them all.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser(
        "seqpar train",
        "Train a language model on sequences cut over all ranks of torchrun.",
        EXAMPLES,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, see launch/configs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(argv)
    plain_messages()
    control = start_ranks()
    ending: UserError | None = None
    try:
        train(Command(args.config, tuple(args.overrides)), control)
    except (
        ExchangeError,
        LoneError,
    ) as error:  # the others are gone or fail likewise: nothing to wait for
        leave(f"rank {control.rank}: {error}", 0)
    except UserError as error:
        ending = error
    control.barrier()  # a rank that leaves first would break the others' connections
    dist.destroy_process_group()
    if ending is not None:
        leave(str(ending), control.rank, ending.code)


if __name__ == "__main__":
    main()
