"""Training runs: the same losses however the sequence is cut, and one message for what is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from launch_setup import CONFIG, losses, train_on

from seqpar.comm import Communicator
from seqpar.launch.data import Corpus
from seqpar.launch.failure import UserError, together


@pytest.fixture(scope="module")
def alone(config: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run on one rank, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    words = [f"log.folder={folder}", "train.global_batch=2", "train.evaluate_every=8"]
    return folder, train_on(1, config, *words)


PARALLEL = {
    "cp2": (2, ["parallel.context=2"]),
    "cp2 zigzag": (2, ["parallel.layout=zigzag"]),
    "cp4": (4, ["parallel.context=4", "parallel.measure_links=true"]),
    "dp2": (2, ["parallel.context=1"]),
    "cp2 dp2": (4, ["parallel.context=2"]),
    "cp2, as little memory as possible": (
        2,
        [
            "memory.recompute=[linear,softmax,mlp]",
            "memory.keep_attention=false",
            "memory.mlp_tokens=50",
            "memory.loss_tokens=50",
            "memory.offload_layers=1",
        ],
    ),
}  # other kinds of parallelism draw other first weights, see test_checkpoint.py


@pytest.mark.parametrize("name", PARALLEL)
def test_losses_do_not_depend_on_how_the_work_is_spread(
    name: str, alone: tuple[Path, str], config: str, tmp_path: Path
) -> None:
    ranks, words = PARALLEL[name]
    train_on(ranks, config, f"log.folder={tmp_path / 'run'}", "train.global_batch=2", *words)
    expected, found = losses(alone[0]), losses(tmp_path / "run")
    assert sorted(expected) == sorted(found) == list(range(1, 21))
    assert expected[20][0] < expected[1][0] - 1  # it learned something that can be compared
    for step in expected:
        assert found[step][0] == pytest.approx(expected[step][0], abs=1e-4), step
        assert found[step][1] == pytest.approx(expected[step][1], rel=1e-3), step
        assert found[step][2] == expected[step][2]


def test_what_is_printed(alone: tuple[Path, str]) -> None:
    folder, text = alone
    lines = text.splitlines()
    first = next(line for line in lines if line.startswith("step  1/20"))
    parts = ["loss 5.", "grad ", "lr ", "tokens/s (", " a rank)", "exchanged 0 B, waited 0.00 s"]
    for part in [*parts, "memory ", "ETA 0:"]:
        assert part in first
    held_out = [line for line in lines if "held-out loss" in line and "unigram entropy" in line]
    assert [line.split(":")[0] for line in held_out] == ["step 8", "step 16", "step 20"]
    end = dict(line.split(maxsplit=1) for line in lines[lines.index("") + 1 :])
    assert end["checkpoint"] == f"{folder}/checkpoints/step_00000020"
    assert (folder / "metrics.jsonl").stat().st_size
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "checkpoint.resume=latest" in end["to"]
    assert "train.steps=30" in end["to"]


def test_exchanged_bytes_and_tokens_are_counted_once(config: str, tmp_path: Path) -> None:
    words = [f"log.folder={tmp_path}/run", "train.steps=2", "optimizer.warmup_steps=0"]
    text = train_on(2, config, *words, "train.evaluate_sequences=1")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["tokens"] for line in lines if "tokens" in line] == [256, 512]
    assert all(line["bytes_exchanged"] > 0 for line in lines if "loss" in line)
    assert all(
        {"bytes_state", "waited_state", "bytes_heads"} < set(x) for x in lines if "loss" in x
    )
    assert "exchanged 0 B" not in text


WRONG = [
    ("data.sequence_lenght=8K", "did you mean data.sequence_length?"),
    ("data.sequence_length=255", "data.sequence_length=255 must be a multiple of cp=2"),
    ("data.path=nowhere", "cannot read nowhere.idx"),
    ("model.pattern=LXN", "unknown letter 'X'"),
    ("model.vocab_size=256", "model.vocab_size=256 must be at least 257"),
    ("data.sequence_length=1M", "data.sequence_length=1048576 is more than all"),
    ("parallel.stages=[1,2]", "parallel.stages=[1, 2] must be layers of each stage and add up"),
    ("checkpoint.resume=latest", "holds no complete checkpoint"),
    ("log.folder=/proc/nowhere", "/proc/nowhere"),
    ("model.num_heads=3", "model.num_heads=3 must divide model.hidden_size=32"),
    ("parallel.expert=3", "parallel.expert=3 must divide"),
]


@pytest.mark.parametrize(("word", "message"), WRONG)
def test_a_mistake_ends_all_ranks_with_one_message(
    word: str, message: str, config: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        train_on(2, config, f"log.folder={tmp_path}/run", word)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(config: str, alone: tuple[Path, str]) -> None:
    before = {path: path.read_bytes() for path in alone[0].rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"holds a run already.*checkpoint\.resume=latest"):
        train_on(1, config, f"log.folder={alone[0]}")
    assert before == {path: path.read_bytes() for path in alone[0].rglob("*") if path.is_file()}


def test_a_mistake_of_one_rank_ends_all(config: str, tmp_path: Path) -> None:
    """Only rank 1 cannot read its tokens, in the middle of training."""

    def break_reading(rank: int) -> None:
        from seqpar.launch.data import Corpus

        read, calls = Corpus.read, [0]

        def fails(self: Corpus, *args: Any) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] > 20:
                raise OSError(5, "Input/output error", "words.bin")
            return read(self, *args)

        vars_of: Any = Corpus
        vars_of.read = fails

    with pytest.raises(UserError, match=r"Input/output error.*words.bin"):
        train_on(2, config, f"log.folder={tmp_path}/run", before=break_reading)
    assert 0 < len(losses(tmp_path / "run")) < 20


def _with_other_settings(rank: int) -> None:
    from seqpar.launch import train

    module: Any = train
    load = module.load_config
    words = ["train.steps=5"] if rank == 1 else []
    module.load_config = lambda path, overrides: load(path, [*overrides, *words])


def _with_other_data(rank: int) -> None:
    from seqpar.launch import data

    vars(data)["open_corpus"] = lambda config, field: Corpus(
        config.data.path + (".held_out" if rank == 1 else ""), 257
    )


def _with_another_disk(rank: int) -> None:
    exists = Path.exists
    if rank == 1:
        vars_of: Any = Path
        vars_of.exists = lambda path: path.name != "config.yaml" and exists(path)


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_with_other_settings, "train.steps is 20 on rank 0 and 5 on rank 1; start all nodes with"),
        (_with_other_data, r"data\.path \(number of tokens\) is \d+ on rank 0 and \d+ on rank 1"),
        (_with_another_disk, "config.yaml is not seen by host .*: log.folder must lie on a file"),
    ],
)
def test_nodes_that_differ_are_told(
    arrange: Callable[[int], None], message: str, config: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_on(2, config, f"log.folder={tmp_path}/run", before=arrange)


def test_divergence_is_told(config: str, tmp_path: Path) -> None:
    words = ["optimizer.lr=1e30", "optimizer.clip_grad=0", "optimizer.warmup_steps=0"]
    with pytest.raises(UserError, match=r"diverged; lower optimizer.lr=1e\+30"):
        train_on(1, config, f"log.folder={tmp_path}/run", *words)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("distributed", [False, True])
def test_adam_is_one_kernel(distributed: bool, config: str, tmp_path: Path) -> None:
    def arrange(rank: int) -> None:
        for several in ("_single_tensor_adam", "_multi_tensor_adam"):
            setattr(sys.modules[torch.optim.AdamW.__bases__[0].__module__], several, None)

    words = [f"log.folder={tmp_path}/run", f"optimizer.distributed={distributed}", "train.steps=4"]
    assert "step 4" in train_on(1, config, *words, before=arrange)


def _together(rank: int) -> str:
    import torch.distributed as dist

    comm = Communicator(dist.group.WORLD)
    assert together(comm, lambda: rank) == rank

    def work() -> None:
        if rank:
            raise ValueError(f"rank {rank} says no")

    try:
        together(comm, work)
    except UserError as error:
        return str(error)
    return "nothing"


def test_all_ranks_learn_of_the_lowest_failure() -> None:
    assert run_ranks(_together, 3) == ["rank 1 says no"] * 3


def _command(config: str, *words: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", "2", "-m", "seqpar.launch.train", config, *words]


def test_torchrun_ends_with_the_message(tmp_path: Path) -> None:
    """The workers print it once and no traceback; torchrun's own report quotes it at its end."""
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    command = _command(str(config), "data.path=x", f"log.folder={tmp_path}/run", "model.patern=L")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    message = "error: model.patern is not a setting; did you mean model.pattern?"
    own, _, report = done.stderr.partition("Traceback (most recent call last)")
    assert done.returncode == 1
    assert own.count(message) == 1
    assert message in report.splitlines()[-2]
    assert "seqpar/launch" not in report  # the traceback is torchrun's
