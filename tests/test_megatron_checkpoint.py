"""A checkpoint of the model and its optimizer fits other numbers of ranks of every kind."""

import itertools
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron_setup import Rank, Setting, adam, tiny, train_step, whole_weights
from torch import Tensor

from seqpar.launch.optimizer_state import load_state, sharded_state
from seqpar.models.gla import GatedLinearAttention
from seqpar.models.mixer import SequenceMixer

# Megatron starts a manager process to hand over results; saving within this process needs none.
filesystem_async._results_queue = queue.SimpleQueue()

MODEL = tiny("GMKN", key_heads=2)
SEQUENCE_PARALLEL = {"sequence_parallel": True}
WAYS = {
    "one": Setting(microbatches=4),
    "context": Setting(context=4, layout="zigzag", documents=None, microbatches=4),
    "tensor and experts": Setting(
        tensor=2, context=2, expert=2, config=SEQUENCE_PARALLEL, microbatches=4
    ),
    "data, distributed": Setting(distributed=True, microbatches=1),
    "experts cut, distributed": Setting(
        context=2, expert=2, expert_tensor=2, microbatches=2, distributed=True
    ),
    "stages in turn": Setting(context=2, pipeline=2, stages=(1, 1, 0, 2), microbatches=4),
    "all, distributed": Setting(
        tensor=2,
        context=2,
        pipeline=2,
        stages=(3, 1),
        expert=4,
        distributed=True,
        microbatches=4,
        config=SEQUENCE_PARALLEL,
    ),
}
DATA = {"data, distributed": 4, "experts cut, distributed": 2}


def train(
    rank: int, spread: Setting, folder: Path, weights: dict[str, Tensor] | None
) -> list[tuple[float, int, float]]:
    """(loss sum, tokens, gradient norm) of the third and fourth of four steps.

    With weights it begins there and saves after the second step, without it resumes from `folder`.
    """
    state = Rank(MODEL, spread)
    if weights is not None:
        state.load(weights)
    optimizer = adam(state, 0.01)

    def step(number: int) -> tuple[float, int, float]:
        optimizer.zero_grad()
        found = train_step(state, number)
        return found.loss, found.tokens, float(optimizer.step()[1])

    def content(is_loading: bool) -> dict[str, Any]:
        network = {
            f"{index}.{name}": value
            for index, stage in enumerate(state.stages)
            for name, value in stage.sharded_state_dict().items()
        }
        moments = sharded_state(optimizer, network, is_loading=is_loading)
        return {"model": network, "optimizer": moments}

    if weights is not None:
        step(0), step(1)
        dist_checkpointing.save(content(False), folder)
    else:
        loaded = dist_checkpointing.load(content(True), folder)
        for index, stage in enumerate(state.stages):
            own = f"{index}."
            mine = {k.removeprefix(own): v for k, v in loaded["model"].items() if k.startswith(own)}
            stage.load_state_dict(mine)
        load_state(optimizer, loaded["optimizer"], steps=2)
    return [step(2), step(3)]


def run(
    way: str, folder: Path, weights: dict[str, Tensor] | None = None, **config: Any
) -> list[float]:
    """Mean losses and gradient norms of the last two steps."""
    spread = WAYS[way]
    spread = Setting(**{**vars(spread), "config": {**spread.config, **config}})
    ranks = spread.tensor * spread.context * spread.pipeline * DATA.get(way, 1)
    found = []
    for step in zip(*run_ranks(train, ranks, spread, folder, weights), strict=True):
        losses, tokens, norms = zip(*step, strict=True)
        found += [sum(losses) / sum(tokens), norms[0]]
    return found


def check(writer: str, readers: list[str], folder: Path, bound: float, **config: Any) -> None:
    through = run(writer, folder, whole_weights(MODEL), **config)
    for reader in readers:
        assert run(reader, folder, **config) == pytest.approx(through, rel=bound), reader


# Documents are those of the whole stream or none: a checkpoint is read with the same data.
PACKED = [way for way in WAYS if way != "context"]
WAYS["one, whole"] = Setting(microbatches=4, documents=None)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("tensor and experts", "experts cut, distributed"),
        ("experts cut, distributed", "stages in turn"),
        ("stages in turn", "data, distributed"),
        ("one, whole", "context"),
    ],
)
def test_resumes_on_other_ranks(writer: str, reader: str, tmp_path: Path) -> None:
    check(writer, [reader], tmp_path, 1e-4)


@pytest.mark.complete
@pytest.mark.parametrize("writer", PACKED)
def test_resumes_on_every_other_number_of_ranks(writer: str, tmp_path: Path) -> None:
    check(writer, PACKED, tmp_path, 1e-4)


def test_resumes_in_bfloat16_to_the_last_bit(tmp_path: Path) -> None:
    """Its main parameters and moments are in fp32, cut over ranks or not."""
    check("data, distributed", ["data, distributed"], tmp_path, 0, dtype=torch.bfloat16)


def test_bfloat16_resumes_with_the_other_optimizer(tmp_path: Path) -> None:
    """Passes are the same to the last bit; only sums of gradients, in fp32, have another order."""
    check("data, distributed", ["one"], tmp_path, 1e-6, dtype=torch.bfloat16)


def test_the_moments_matter_to_these_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through = run("one", tmp_path, whole_weights(MODEL))
    monkeypatch.setattr("seqpar.launch.optimizer_state.MOMENTS", ("exp_avg",))
    monkeypatch.setattr(f"{__name__}.load_state", lambda *_, **__: None)
    found = run("one", tmp_path)
    assert all(abs(a / b - 1) > 1e-3 for a, b in itertools.pairwise([found[3], through[3]]))


def test_weights_in_another_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("one", tmp_path, whole_weights(MODEL))
    monkeypatch.setattr(GatedLinearAttention, "columns", 9)
    with pytest.raises(AssertionError, match="in order 1, this version of seqpar has them in or"):
        run("one", tmp_path)


def test_weights_without_a_number_of_their_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions before the first number wrote none."""
    with monkeypatch.context() as older:
        older.setattr(SequenceMixer, "get_extra_state", torch.nn.Module.get_extra_state)
        run("one", tmp_path, whole_weights(MODEL))
    with pytest.raises(AssertionError, match=r"self_attention\._extra_state"):
        run("one", tmp_path)
