"""Whatever happens to a run from outside is named, and loses nothing that could be kept."""

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch_setup import losses, train_on
from megatron.core.dist_checkpointing.strategies import common

from seqpar.launch.failure import Stopped, UserError


def _kill_after(seconds: float, victim: int, number: int) -> Callable[[int], None]:
    """Kill rank `victim` when it has trained for so many seconds, wherever it is then."""

    def arrange(rank: int) -> None:
        if rank == victim:
            threading.Timer(seconds, os.kill, (os.getpid(), number)).start()

    return arrange


@pytest.mark.parametrize(
    ("kills", "steps"), [(2, 20), pytest.param(20, 200, marks=pytest.mark.complete)]
)
def test_a_run_that_is_killed_at_random_is_the_same_run(
    kills: int, steps: int, config: str, tmp_path: Path
) -> None:
    words = [f"train.steps={steps}", "checkpoint.every=1", "checkpoint.asynchronous=true"]
    words += ["checkpoint.keep=3", "checkpoint.resume=auto", "optimizer.distributed=true"]
    train_on(2, config, f"log.folder={tmp_path}/whole", *words)
    draw = random.Random(kills)
    for _ in range(kills):
        arrange = _kill_after(draw.uniform(0.3, 2), draw.randrange(2), signal.SIGKILL)
        with pytest.raises(AssertionError, match=r"died without a word|Connection"):
            train_on(2, config, f"log.folder={tmp_path}/run", *words, before=arrange)
    train_on(2, config, f"log.folder={tmp_path}/run", *words)
    assert "trained to step" in train_on(2, config, f"log.folder={tmp_path}/run", *words)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")  # to the last bit
    left = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert sorted(left) == [f"step_{step:08d}" for step in range(steps - 2, steps + 1)]


# /dev/full is a disk without room. The files of Megatron and ours that may meet one.
FULL = {
    "Megatron's common file": "common.pt",
    "a rank's part": "__1_0.distcp",
    "Megatron's index": ".metadata.tmp",
    "Megatron's version": "metadata.json",
    "the manifest": "manifest.json",
}


def _no_room_for(name: str) -> Callable[[int], None]:
    """Of the second checkpoint, at step 8."""

    def arrange(rank: int) -> None:
        from seqpar.launch import checkpoint

        module: Any = checkpoint
        state = module._state

        def states(run: Any, is_loading: bool) -> Any:
            folder = Path(run.config.log.folder) / "checkpoints/.writing_step_00000008"
            if rank == 0 and folder.exists():
                (folder / name).symlink_to("/dev/full")
            run.control.barrier()
            return state(run, is_loading)

        module._state = states

    return arrange


@pytest.mark.parametrize(
    ("what", "asynchronous"),
    [
        ("a rank's part", True),
        ("the manifest", True),
        *(
            pytest.param(what, asynchronous, marks=pytest.mark.complete)
            for what in FULL
            for asynchronous in (True, False)
            if (what, asynchronous) not in (("a rank's part", True), ("the manifest", True))
        ),
    ],
)
def test_a_full_disk_is_told_by_all_ranks(
    what: str, asynchronous: bool, config: str, tmp_path: Path
) -> None:
    if FULL[what] == "common.pt" and not hasattr(common, "TorchCommonSaveStrategy"):
        pytest.skip("this Megatron writes no such file")
    words = [f"log.folder={tmp_path}/run", "train.steps=12", "checkpoint.every=4"]
    words.append(f"checkpoint.asynchronous={asynchronous}")
    with pytest.raises(UserError, match="the checkpoint step_00000008 is not saved") as error:
        train_on(2, config, *words, before=_no_room_for(FULL[what]))
    assert f"cannot write to {tmp_path}/run/checkpoints" in str(error.value)
    assert "GB are free there" in str(error.value)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000004"]
    train_on(2, config, *words, "checkpoint.resume=latest")
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))


def test_metrics_on_a_full_disk(config: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    words = [f"log.folder={tmp_path}/run", "checkpoint.resume=auto"]
    with pytest.raises(UserError, match=r"cannot write to .*/run: No space left on device"):
        train_on(2, config, *words)


def _at_step(number: int, work: Callable[[], None]) -> Callable[[int], None]:
    def arrange(rank: int) -> None:
        from seqpar.launch import step

        module: Any = step
        read, calls = module.read, [0]

        def reads(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == number and rank == 0:
                work()
            args[0].control.barrier()
            return read(*args)

        module.read = reads

    return arrange


def _corpus(config: str, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the corpus of `config` to break, and the words that name it."""
    source = Path(config).parent / "data"
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"words{suffix}").write_bytes((source / f"words{suffix}").read_bytes())
    return tmp_path / "words.bin", [f"data.path={tmp_path}/words", f"log.folder={tmp_path}/run"]


def _wrong_token(data: Path) -> None:
    tokens = np.full(data.stat().st_size // 2, 300, dtype=np.uint16)
    with data.open("r+b") as file:
        file.write(tokens.tobytes())


BROKEN = {
    "vanished": (Path.unlink, r"No such file or directory: '.*words\.bin'"),
    "cut": (lambda data: os.truncate(data, 100), r"words\.bin has 100 bytes now, \d+ when"),
    "wrong token": (_wrong_token, r"document \d+ has token id 300, ids must be below model\.vocab"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_data_that_breaks_is_named_and_the_run_saved(
    what: str, config: str, tmp_path: Path
) -> None:
    data, words = _corpus(config, tmp_path)
    whole = data.read_bytes()
    work, message = BROKEN[what]
    with pytest.raises(UserError, match=message) as error:
        train_on(2, config, *words, "train.steps=8", before=_at_step(6, lambda: work(data)))
    assert "the run is saved up to step 5" in str(error.value)
    data.write_bytes(whole)
    train_on(2, config, *words, "train.steps=8", "checkpoint.resume=latest")
    train_on(2, config, *words, "train.steps=8", f"log.folder={tmp_path}/whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_documents_longer_than_a_sequence_are_cut_and_counted(config: str, tmp_path: Path) -> None:
    words = [f"log.folder={tmp_path}/run", "train.steps=4", "data.sequence_length=64"]
    text = train_on(2, config, *words)
    assert "documents longer than a sequence, cut at its end" in text
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_steps_and_ranks_without_a_token_to_predict(config: str, tmp_path: Path) -> None:
    """Documents of one token have none; such a step changes nothing, and says so."""
    from seqpar.launch.prepare import CorpusWriter
    from seqpar.launch.tokenizer import ByteTokenizer

    writer = CorpusWriter(tmp_path / "short", ByteTokenizer())
    for _ in range(600):
        writer.add(np.array([256]))
    writer.finish()
    words = [f"data.path={tmp_path}/short", f"log.folder={tmp_path}/run", "train.steps=2"]
    text = train_on(2, config, *words, "optimizer.warmup_steps=0")
    assert text.count("no token to predict") == 2
    assert [loss for loss, *_ in losses(tmp_path / "run").values()] == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_ends_all(
    number: signal.Signals, config: str, tmp_path: Path
) -> None:
    words = ["train.steps=12", "checkpoint.resume=auto"]
    signalled = _at_step(5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(UserError, match="stopped as asked, and saved, after step 5"):
        train_on(2, config, f"log.folder={tmp_path}/run", *words, before=signalled)
    assert Stopped.code == 75
    train_on(2, config, f"log.folder={tmp_path}/run", *words)
    train_on(2, config, f"log.folder={tmp_path}/whole", *words)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
