"""A run that is killed and resumed goes on as if nothing had been, or says what is wrong."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch_setup import losses, train_on

from seqpar.launch import checkpoint_files
from seqpar.launch.failure import UserError

SAVING = ["train.steps=12", "checkpoint.every=4"]


@pytest.fixture(scope="module")
def whole(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps on two ranks that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_on(2, config, f"log.folder={folder}", *SAVING)
    return folder


@pytest.fixture
def half(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run as it was after step 8."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/step_00000012")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:8]))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _kill_at(number: int) -> Callable[[int], None]:
    def arrange(rank: int) -> None:
        from seqpar.launch import step

        module: Any = step
        train_step, calls = module.train_step, [0]

        def dies(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return train_step(*args)

        module.train_step = dies

    return arrange


def test_killed_and_resumed_is_the_same_run(config: str, whole: Path, tmp_path: Path) -> None:
    words = [f"log.folder={tmp_path}/run", *SAVING]
    with pytest.raises(AssertionError, match="died without a word"):
        train_on(2, config, *words, before=_kill_at(7))
    assert sorted(losses(tmp_path / "run")) == list(range(1, 7))
    text = train_on(2, config, *words, "checkpoint.resume=latest")
    assert "resumed after step 4" in text
    assert losses(tmp_path / "run") == losses(whole)  # to the last bit
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "grad_norm" in line]
    assert steps == [*range(1, 7), *range(5, 13)]


@pytest.mark.parametrize(("ranks", "words"), [(1, []), (4, []), (2, ["parallel.layout=zigzag"])])
def test_resumes_on_other_ranks(
    ranks: int, words: list[str], config: str, half: Path, whole: Path
) -> None:
    train_on(ranks, config, f"log.folder={half}", *SAVING, "checkpoint.resume=latest", *words)
    found, expected = losses(half), losses(whole)
    assert sorted(found) == sorted(expected)
    for step in range(9, 13):
        assert found[step][0] == pytest.approx(expected[step][0], abs=1e-4)
        assert found[step][2] == expected[step][2]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, ["parallel.context=1", "parallel.expert=2", "train.global_batch=2"]),
        (4, ["parallel.tensor=2", "parallel.expert=2", "model.vocab_size=258"]),
        (2, ["parallel.pipeline=2", "train.global_batch=2"]),
        (2, ["train.precision=bf16", "optimizer.distributed=true", "checkpoint.asynchronous=true"]),
    ],
)
def test_resumes_exactly_with_every_kind_of_parallelism(
    ranks: int, words: list[str], config: str, tmp_path: Path
) -> None:
    words = [f"log.folder={tmp_path}/run", "train.steps=6", "checkpoint.every=3", *words]
    train_on(ranks, config, *words)
    expected = losses(tmp_path / "run")
    assert expected[6][0] < expected[1][0] - 0.05
    (tmp_path / "run/metrics.jsonl").write_text("")
    train_on(ranks, config, *words, "checkpoint.resume=3")
    assert losses(tmp_path / "run") == {step: expected[step] for step in (4, 5, 6)}


EXPERTS_OVER_ALL = ["parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=2"]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (4, [*EXPERTS_OVER_ALL, "optimizer.distributed=true"]),
        (4, ["parallel.pipeline=2", "model.pattern=L N", "parallel.stages=[1,0,0,1]"]),
    ],
    ids=["experts over all", "stages in turn"],
)
def test_resumes_with_other_kinds_of_parallelism(
    ranks: int, words: list[str], config: str, tmp_path: Path
) -> None:
    same = [f"log.folder={tmp_path}/run", *SAVING, "model.vocab_size=258", "train.global_batch=2"]
    pattern = [word for word in words if word.startswith("model.")]
    train_on(2, config, *same, *pattern)
    expected = losses(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("")
    train_on(ranks, config, *same, "checkpoint.resume=4", *words)
    found = losses(tmp_path / "run")
    assert sorted(found) == list(range(5, 13))
    for step in found:
        assert found[step][0] == pytest.approx(expected[step][0], abs=1e-4)
        assert found[step][1] == pytest.approx(expected[step][1], rel=1e-3)


def _slow(rank: int) -> None:
    from seqpar.launch import checkpoint

    module: Any = checkpoint
    write = module._write

    def waits(*args: Any) -> Any:
        time.sleep(0.3 * (rank + 1))
        return write(*args)

    module._write = waits


def test_training_goes_on_while_a_checkpoint_is_written(
    config: str, whole: Path, tmp_path: Path
) -> None:
    """What is written is the state at its step, however long it takes; the result is the same."""

    words = [f"log.folder={tmp_path}/run", *SAVING, "checkpoint.asynchronous=true"]
    text = train_on(2, config, *words, before=_slow)
    lines = text.splitlines()
    saved = [lines.index(f"checkpoint {tmp_path}/run/checkpoints/step_{n:08d}") for n in (4, 8, 12)]
    assert saved == sorted(saved)
    assert any(line.startswith("step  5/12") for line in lines[: saved[0]])
    assert losses(tmp_path / "run") == losses(whole)
    train_on(2, config, *words, "checkpoint.resume=8")
    assert losses(tmp_path / "run") == losses(whole)


def test_a_checkpoint_under_way_is_finished_before_a_run_ends(config: str, tmp_path: Path) -> None:
    def diverges(rank: int) -> None:
        from seqpar.launch import step

        module: Any = step
        train_step, results = module.train_step, []

        def breaks(*args: Any) -> Any:
            results.append(train_step(*args))
            broken = "layer 1 is NaN" if len(results) == 5 else None
            return dataclasses.replace(results[-1], nonfinite=broken)

        module.train_step = breaks
        _slow(rank)

    words = [f"log.folder={tmp_path}/run", *SAVING, "checkpoint.asynchronous=true"]
    with pytest.raises(UserError, match="step 5: layer 1 is NaN: training has diverged"):
        train_on(2, config, *words, before=diverges)
    left = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert left == ["step_00000004"]


def test_a_resumed_run_chooses_its_exchanges_by_the_figures_it_began_with(
    config: str, tmp_path: Path
) -> None:
    words = [f"log.folder={tmp_path}/run", "checkpoint.every=1", "parallel.measure_links=true"]
    words.append("optimizer.warmup_steps=0")
    train_on(2, config, *words, "train.steps=1")
    train_on(2, config, *words, "train.steps=2", "checkpoint.resume=latest")
    first, second = (
        json.loads((tmp_path / f"run/checkpoints/step_0000000{step}/manifest.json").read_text())
        for step in (1, 2)
    )
    assert first["links"]["nodes"] == [0, 0]
    assert first["links"]["latency"] > 0
    assert second["links"] == first["links"]  # measured anew, they would differ


def test_half_a_line_of_metrics_spoils_no_other(config: str, half: Path) -> None:
    path = half / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 9, "lo')
    train_on(2, config, f"log.folder={half}", *SAVING, "checkpoint.resume=latest")
    lines = path.read_text().splitlines()
    assert lines.pop(8) == '{"step": 9, "lo'
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 13), 12]


def test_the_optimizer_state_matters_to_these_tests(config: str, half: Path, whole: Path) -> None:
    """Resuming without it gives other losses, so equal losses show that it came back."""

    def forget(rank: int) -> None:
        from seqpar.launch import checkpoint

        module: Any = checkpoint
        module.load_state = lambda *_: None

    words = [f"log.folder={half}", *SAVING, "checkpoint.resume=latest"]
    train_on(2, config, *words, before=forget)
    assert abs(losses(half)[12][0] - losses(whole)[12][0]) > 1e-3


def test_killed_while_saving(config: str, half: Path, whole: Path) -> None:
    """Every rank dies when its files of the first checkpoint are written."""

    def arrange(rank: int) -> None:
        from seqpar.launch import checkpoint

        module: Any = checkpoint
        write = module._write

        def dies(*args: Any) -> None:
            write(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        module._write = dies

    words = [f"log.folder={half}", *SAVING]
    before = files(half / "checkpoints")
    with pytest.raises(AssertionError, match="died without a word"):
        train_on(2, config, f"log.folder={half}-2", *SAVING, before=arrange)
    left = [path.name for path in Path(f"{half}-2/checkpoints").iterdir()]
    assert left == [".writing_step_00000004"]
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        train_on(2, config, f"log.folder={half}-2", *SAVING, "checkpoint.resume=latest")
    # beside good ones it is passed over; written anew, or removed
    for step in (11, 12):
        shutil.copytree(
            f"{half}-2/checkpoints/.writing_step_00000004",
            half / f"checkpoints/.writing_step_000000{step}",
        )
    train_on(2, config, *words, "checkpoint.resume=latest")
    assert losses(half) == losses(whole)
    after = files(half / "checkpoints")
    assert {name: after[name] for name in before} == before
    assert not list((half / "checkpoints").glob(".writing*"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("__0_0.distcp", _cut, r"file __0_0\.distcp has \d+ bytes, its manifest says \d+"),
    ("__1_0.distcp", _flip, r"the content of file __1_0\.distcp is not what was written"),
    (".metadata", Path.unlink, r"file \.metadata: No such file"),
    ("metadata.json", _flip, r"the content of file metadata\.json"),
    ("manifest.json", Path.unlink, r"file manifest\.json: No such file"),
    ("manifest.json", lambda path: os.truncate(path, 99), r"file manifest\.json is not readable"),
    ("manifest.json", lambda path: path.write_text("{}"), r"file manifest\.json is not readable"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damage_is_found(
    name: str, damage: Callable[[Path], Any], message: str, half: Path
) -> None:
    path = half / "checkpoints/step_00000008"
    assert checkpoint_files.damage(path) is None
    damage(path / name)
    assert re.search(message, checkpoint_files.damage(path) or "")
    assert (checkpoint_files.damage(path, contents=False) is None) == (damage is _flip)


def test_a_damaged_one_that_is_asked_for_is_refused(config: str, half: Path) -> None:
    newest = half / "checkpoints/step_00000008"
    _flip(newest / "__1_0.distcp")
    before = files(half)
    words = [f"log.folder={half}", *SAVING, "checkpoint.resume=8"]
    with pytest.raises(UserError, match=r"of file __1_0.distcp is not .*resume=latest") as error:
        train_on(2, config, *words)
    assert str(newest) in str(error.value)
    assert files(half) == before


def test_the_newest_intact_one_is_taken_and_the_damaged_one_named(
    config: str, half: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = half / "checkpoints/step_00000008"
    _flip(newest / "__1_0.distcp")
    words = [f"log.folder={half}", *SAVING, "checkpoint.resume=auto"]
    text = train_on(2, config, *words, before=lambda rank: logging.basicConfig(force=True))
    assert "resumed after step 4" in text
    told = f"checkpoint {newest} is damaged: the content of file __1_0.distcp is not what was"
    assert capfd.readouterr().err.count(told) == 1
    assert losses(half) == losses(whole)


def test_the_remedy_works_and_sets_the_damaged_one_aside(
    config: str, half: Path, whole: Path
) -> None:
    newest = half / "checkpoints/step_00000008"
    _flip(newest / "metadata.json")
    broken = files(newest)
    train_on(2, config, f"log.folder={half}", *SAVING, "checkpoint.resume=4")
    assert losses(half) == losses(whole)
    assert files(half / "checkpoints/replaced_1/step_00000008") == broken
    assert files(newest) != broken


def test_when_nothing_is_intact(config: str, half: Path) -> None:
    for path in (half / "checkpoints").iterdir():
        _flip(path / "metadata.json")
    with pytest.raises(
        UserError, match=r"step_00000004 is damaged: .*; none before it is intact: start"
    ):
        train_on(2, config, f"log.folder={half}", *SAVING, "checkpoint.resume=latest")


OTHER = [
    ("model.pattern=LL", r"model\.pattern is 'LN' there and 'LL' here"),
    ("model.hidden_size=64", r"model\.hidden_size is 32 there and 64 here"),
    ("data.sequence_length=128", r"data\.sequence_length is 256 there and 128 here"),
    ("train.seed=1", r"train\.seed is 1234 there and 1 here"),
    ("checkpoint.resume=7", r"no checkpoint of that step, but of 4, 8; nearest: 8"),
    ("checkpoint.resume=newest", r'must be "latest", "auto" or the step of a checkpoint'),
    ("train.steps=8", r"the checkpoint is of step 8, nothing is left to train"),
]


@pytest.mark.parametrize(("word", "message"), OTHER)
def test_a_checkpoint_that_does_not_fit_is_refused(
    word: str, message: str, config: str, half: Path
) -> None:
    before = files(half)
    words = [f"log.folder={half}", *SAVING, "checkpoint.resume=latest"]
    with pytest.raises(UserError, match=message):
        train_on(1, config, *words, word)
    assert files(half) == before


def test_random_numbers_go_on(config: str, tmp_path: Path) -> None:
    """Of torch and of Megatron's tracker, drawn in each step; on other ranks, too."""

    def draw(rank: int) -> None:
        import torch
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        from seqpar.launch import step

        module: Any = step
        train_step = module.train_step

        def draws(*args: Any) -> Any:
            result = train_step(*args)
            with get_cuda_rng_tracker().fork():
                tracked = torch.rand(1).item()
            with (tmp_path / f"drawn_{rank}").open("a") as file:
                file.write(f"{torch.rand(1).item()} {tracked}\n")
            return result

        module.train_step = draws

    words = [f"log.folder={tmp_path}/run", "train.steps=4", "checkpoint.every=2"]
    train_on(1, config, *words, before=draw)
    train_on(2, config, *words, "checkpoint.resume=2", before=draw)
    lines = (tmp_path / "drawn_0").read_text().splitlines()
    assert lines[2:4] == lines[4:6] == (tmp_path / "drawn_1").read_text().splitlines()
    assert len({number for line in lines[:4] for number in line.split()}) == 8


def test_a_checkpoint_of_another_format_is_refused(config: str, half: Path) -> None:
    path = half / "checkpoints/step_00000008/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["format"]  # the first had no number
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is of format 1, this version of seqpar has format 2"):
        train_on(2, config, f"log.folder={half}", *SAVING, "checkpoint.resume=latest")


def test_weights_in_another_order_are_refused(config: str, half: Path) -> None:
    def arrange(rank: int) -> None:
        from seqpar.models.gla import GatedLinearAttention

        vars_of: Any = GatedLinearAttention
        vars_of.columns = 7

    words = [f"log.folder={half}", *SAVING, "checkpoint.resume=latest"]
    told = "of GatedLinearAttention in order 1, this version of seqpar has them in order 7"
    with pytest.raises(UserError, match=told):
        train_on(2, config, *words, before=arrange)


def test_a_run_that_turns_back_keeps_its_own_checkpoints(config: str, half: Path) -> None:
    """Not those of the course it has left, though their steps are later."""
    folder = half / "checkpoints"
    left = files(folder / "step_00000008")
    words = [f"log.folder={half}", "checkpoint.every=1", "checkpoint.keep=1"]
    train_on(2, config, *words, "train.steps=6", "checkpoint.resume=4")
    assert sorted(path.name for path in folder.iterdir()) == ["replaced_1", "step_00000006"]
    assert files(folder / "replaced_1/step_00000008") == left


def test_only_the_newest_are_kept(config: str, tmp_path: Path) -> None:
    words = ["train.steps=5", "checkpoint.every=1", "checkpoint.keep=2"]
    train_on(1, config, f"log.folder={tmp_path}/run", *words)
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000005"]


def test_old_ones_are_removed_but_never_the_newest(config: str, half: Path) -> None:
    for path in (half / "checkpoints").iterdir():
        os.utime(path, (0, time.time() - 2 * 3600))
    words = ["checkpoint.keep_hours=1.5", "checkpoint.resume=latest"]
    train_on(1, config, f"log.folder={half}", *SAVING, *words)
    assert [path.name for path in (half / "checkpoints").iterdir()] == ["step_00000012"]


def test_a_changed_learning_rate_counts_after_resuming(config: str, half: Path) -> None:
    words = [f"log.folder={half}", *SAVING, "checkpoint.resume=latest"]
    words += ["optimizer.schedule=constant", "optimizer.lr=3e-3"]
    train_on(1, config, *words)
    assert [losses(half)[step][2] for step in range(9, 13)] == [3e-3] * 4
