"""A tiny corpus, a tiny configuration, and training on forked ranks, for the tests of launch/."""

import contextlib
import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from harness import run_ranks

from seqpar.comm import Communicator
from seqpar.launch.failure import UserError
from seqpar.launch.prepare import prepare

with warnings.catch_warnings():  # imported once here, for all forks
    warnings.simplefilter("ignore")
    import matplotlib.pyplot  # noqa: F401
    import megatron.core.optimizer  # noqa: F401

from seqpar.launch.train import Command, train

CONFIG = """
train: {steps: 20, evaluate_sequences: 2}
data: {sequence_length: 256}
model: {pattern: LN, hidden_size: 32, vocab_size: 257, num_heads: 2, num_experts: 4, gate_rank: 4}
optimizer: {lr: 2e-3, min_lr: 1e-3, warmup_steps: 3}
log: {tensorboard: false}
"""


def write_documents(folder: Path, count: int = 40, seed: int = 0) -> list[Path]:
    """Text files of 1 to 400 characters, words in random order."""
    draw = random.Random(seed)
    words = ["state", "scan", "rank", "token", "layer", "chunk", "decay", "gate", "head", "Grüße"]
    folder.mkdir(parents=True)
    files = []
    for i in range(count):
        text = " ".join(draw.choices(words, k=80))[: draw.randint(1, 400)]
        files.append(folder / f"{i:03d}.txt")
        files[-1].write_text(text)
    return files


def workplace(folder: Path) -> str:
    """A corpus with a held-out part, and a configuration that names them; its path."""
    write_documents(folder / "text")
    prepare([folder / "text"], str(folder / "data/words"), held_out=0.2)
    names = [f"data: {{path: {folder}/data/words, held_out: {folder}/data/words.held_out}}"]
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("data: {", names[0][:-1] + ", "))
    return str(path)


def _train(
    rank: int, config: str, words: tuple[str, ...], before: Callable[[int], None] | None
) -> tuple[str, str | None]:
    printed = io.StringIO()
    if before:
        before(rank)
    with contextlib.redirect_stdout(printed):
        try:
            train(Command(config, words), Communicator(dist.group.WORLD))
        except UserError as error:
            return printed.getvalue(), str(error)
    return printed.getvalue(), None


def train_on(
    ranks: int, config: str, *words: str, before: Callable[[int], None] | None = None
) -> str:
    """Train on forked ranks and return what rank 0 printed; the others must print nothing.

    before: called on each rank first, to break something there. Raises UserError as the ranks did;
    they must all have raised the same.
    """
    results: list[Any] = run_ranks(_train, ranks, config, words, before)
    errors = {error for _, error in results}
    assert len(errors) == 1, f"ranks end differently: {errors}"
    assert not any(text for text, _ in results[1:])
    if (error := errors.pop()) is not None:
        raise UserError(error)
    return str(results[0][0])


def losses(folder: Path) -> dict[int, tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) by step; where a step is there twice, the later one."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {v["step"]: (v["loss"], v["grad_norm"], v["lr"]) for v in lines if "loss" in v}
