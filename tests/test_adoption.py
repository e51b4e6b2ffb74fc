"""Another Megatron project takes this library up: what it changes, and that its loss stays."""

import difflib
import importlib.util
import queue
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from harness import run_ranks
from megatron.core.dist_checkpointing.strategies import filesystem_async

from seqpar.models.compat import install

install()
filesystem_async._results_queue = queue.SimpleQueue()
EXAMPLES = Path(__file__).parents[1] / "docs/examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, ranks: int, *words: str) -> list[float]:
    module = script(name)
    module.__file__ = str(EXAMPLES / "pretrain_gpt.py")  # both learn the same text
    results: list[Any] = run_ranks(lambda rank: module.main(words), ranks)
    assert all(result == pytest.approx(results[0], rel=1e-6) for result in results)
    return list(results[0])


def changes() -> list[str]:
    before, after = (
        re.sub(r'^"""(.*?)"""', "", (EXAMPLES / name).read_text(), flags=re.DOTALL).splitlines()
        for name in ("pretrain_gpt.py", "pretrain_gpt_long.py")
    )
    lines = difflib.unified_diff(before, after, n=0, lineterm="")
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


def test_it_changes_at_most_fifteen_lines_which_the_page_shows() -> None:
    changed = changes()
    assert 5 < len(changed) <= 15
    assert "\n".join(changed) in (EXAMPLES.parent / "adoption.md").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """The losses of the changed script on one rank, and what it saved."""
    folder = tmp_path_factory.mktemp("adoption") / "saved"
    return run("pretrain_gpt_long", 1, "--save", str(folder)), folder


def test_the_unchanged_script_trains() -> None:
    losses = run("pretrain_gpt", 1)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(("ranks", "words"), [(2, ["--context", "2"]), (4, ["--context", "4"])])
def test_its_loss_is_that_of_one_rank(
    ranks: int, words: list[str], alone: tuple[list[float], Path]
) -> None:
    expected = alone[0]
    assert expected[-1] < expected[0] - 0.3
    assert run("pretrain_gpt_long", ranks, *words) == pytest.approx(expected, rel=1e-4)


def test_its_checkpoint_fits_other_ranks(alone: tuple[list[float], Path]) -> None:
    load = ["--load", str(alone[1]), "--steps", "2"]
    expected = run("pretrain_gpt_long", 1, *load)
    assert expected[0] < alone[0][0] - 0.3
    cut = run("pretrain_gpt_long", 4, "--tensor", "2", "--context", "2", *load)
    assert cut == pytest.approx(expected, rel=1e-4)
