"""What `seqpar eval` measures and writes, from the checkpoint of a run."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from launch_setup import train_on


@pytest.fixture(scope="module")
def trained(config: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A configuration, and the word that names the folder of a run of it on two ranks."""
    word = f"log.folder={tmp_path_factory.mktemp('runs')}/run"
    train_on(2, config, word, "model.pattern=GDN")
    return config, word


def evaluated(trained: tuple[str, str], *words: str) -> str:
    """What the command prints, or its last words."""

    def work(rank: int) -> str:
        import contextlib
        import io

        import torch.distributed as dist

        from seqpar.launch import eval as command

        dist.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                command.main([*trained, "model.pattern=GDN", *words])
        except SystemExit as leaving:
            return str(leaving.code)
        return printed.getvalue()

    text: str = run_ranks(work, 1)[0]
    return text


def test_loss_by_position(trained: tuple[str, str]) -> None:
    lines = evaluated(trained, "--documents", "3", "--length", "128").splitlines()
    rows = [line.replace(",", "").split() for line in lines[3:]]
    bounds = [(int(row[0]), int(row[1])) for row in rows]
    assert bounds == [(0, 15), (16, 31), (32, 63), (64, 127)]
    assert [int(row[2]) for row in rows] == [48, 48, 96, 192]
    for _, _, _, loss, alone in rows:
        assert 1 < float(loss) < math.log(257)
        assert 1 < float(alone) < math.log(257)
    assert rows[0][3] == rows[0][4]  # within the first part nothing came before
    assert rows[3][3] != rows[3][4]


def test_losses_by_position_are_those_of_training(trained: tuple[str, str]) -> None:
    """Their sum over a document is the parallel forward pass's, with the state carried on."""

    def work(rank: int) -> tuple[float, float]:
        from seqpar import Layout, SequenceParallel
        from seqpar.launch.config import load_config
        from seqpar.launch.data import open_corpus
        from seqpar.launch.eval import by_position
        from seqpar.launch.generate import load_model
        from seqpar.models.sequence import SequenceParallelParams

        config = load_config(trained[0], [trained[1], "model.pattern=GDN"])
        model, _ = load_model(config)
        corpus = open_corpus(config, "held_out")
        rows = by_position(model, corpus, 1, 200)
        text = torch.from_numpy(corpus.read(int(np.argmax(corpus.lengths)), 0, 201))[None]
        params = SequenceParallelParams(SequenceParallel(layout=Layout(200, 1)))
        with torch.no_grad():
            inputs: dict[str, Any] = {"position_ids": None, "attention_mask": None}
            losses = model(text[:, :-1], labels=text[:, 1:], packed_seq_params=params, **inputs)
        return sum(row.loss * row.tokens for row in rows), float(losses.sum())

    [(found, expected)] = run_ranks(work, 1)
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected > 100


def test_a_needle_is_found_by_a_model_that_can(trained: tuple[str, str]) -> None:
    """A stand-in that looks the answer up in what it has read, and one that forgets a part."""

    def work(rank: int) -> list[Any]:
        from seqpar.launch import eval as command
        from seqpar.launch.config import load_config
        from seqpar.launch.data import open_corpus
        from seqpar.launch.tokenizer import ByteTokenizer

        class Remembers:
            """Says what followed the last six bytes where they stood before."""

            def __init__(self, model: Any) -> None:
                self.text: list[int] = []

            def read_long(self, tokens: torch.Tensor) -> Any:
                for piece in tokens.split(64):
                    yield self.read(piece)

            def read(self, tokens: torch.Tensor) -> torch.Tensor:
                logits = torch.zeros(len(tokens), 257)
                for i, token in enumerate(tokens.tolist()):
                    self.text.append(token)
                    found = bytes(self.text[:-1]).rfind(bytes(self.text[-6:]))
                    if found >= 0:
                        logits[i, self.text[found + 6]] = 9
                return logits

        module: Any = command
        module.Reader = Remembers
        config = load_config(trained[0], [trained[1]])
        corpus = open_corpus(config, "held_out")
        return command.needle(None, corpus, ByteTokenizer(), 300, [0, 0.5, 1], 3, 7)  # type: ignore[arg-type]

    [rows] = run_ranks(work, 1)
    assert [row.depth for row in rows] == [0, 0.5, 1]
    for row in rows:
        assert row.found == 1
        assert row.loss < 0.1
        assert row.without > 3


def test_the_needle_of_a_trained_model(trained: tuple[str, str]) -> None:
    lines = evaluated(trained, "--needle", "--length=0.25K", "--depths=0,1").splitlines()
    assert lines[1] == "a number hidden in 256 tokens, 4 times at each depth"
    assert [line.split()[0] for line in lines[3:]] == ["0%", "100%"]


def test_writing_on(trained: tuple[str, str]) -> None:
    text = evaluated(trained, "--prompt", "state scan", "--tokens", "20")
    assert text.splitlines()[0].startswith("checkpoint ")
    assert "state scan" in text
    assert text == evaluated(trained, "--prompt", "state scan", "--tokens", "20")
    drawn = evaluated(trained, "--prompt", "state scan", "--tokens", "20", "--temperature", "3")
    assert drawn != text


WRONG = [
    (["--step", "7"], "no checkpoint of that step, but of 20; nearest: 20"),
    (["model.hidden_size=64"], "model.hidden_size is 32 there and 64 here"),
    (["--length", "8k"], "--length=8k must be a whole number; did you mean 8K?"),
    (["--needle", "--length", "20"], "--length=20 must be at least"),
    (["--depths", "0,2", "--needle"], "--depths=0,2 must be numbers from 0 to 1"),
    (["--depths", "all", "--needle"], "--depths=all must be numbers from 0 to 1"),
    (["--prompt", ""], "--prompt is empty"),
    (["--documents", "0"], "--documents=0 must be a whole number from 1"),
    (["--temperature", "-1"], "--temperature=-1.0 must be at least 0"),
    (["--step", "newest"], '--step=newest must be "latest" or the step of a checkpoint'),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_what_cannot_be(words: list[str], message: str, trained: tuple[str, str]) -> None:
    text = evaluated(trained, *words)
    assert message in text
    assert text.startswith("error: ")


def test_nothing_is_written_by_it(trained: tuple[str, str]) -> None:
    folder = Path(trained[1].partition("=")[2])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    evaluated(trained)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
