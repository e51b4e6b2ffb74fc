"""Megatron's distributed checkpoint of the model and its plain optimizer fits other rank counts."""

import queue
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron_setup import Rank, Setting, tiny, train_step, whole_weights
from torch import Tensor

from seqpar.models.config import ModelConfig

# Megatron starts a manager process to hand over results; saving within this process needs none.
filesystem_async._results_queue = queue.SimpleQueue()


def train(
    rank: int, model: ModelConfig, setting: Setting, folder: Path, weights: dict[str, Tensor]
) -> list[tuple[float, float]]:
    """(loss sum, gradient norm) of the second and third of three steps.

    With weights it begins there and saves after the first step, without it resumes from `folder`.
    """
    state = Rank(model, setting)
    if weights is not None:
        state.load(weights)
    # Clipping bites, so that a wrong gradient norm changes what follows.
    options = OptimizerConfig(optimizer="adam", lr=0.01, weight_decay=0.1, clip_grad=0.5)
    optimizer = get_megatron_optimizer(options, state.ddp)

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        loss = train_step(state).loss
        return loss, optimizer.step()[1]

    def content(is_loading: bool) -> dict[str, Any]:
        network = state.network.sharded_state_dict()
        moments = optimizer.sharded_state_dict(network, is_loading=is_loading)
        return {"model": network, "optimizer": moments}

    if weights is not None:
        step()
        dist_checkpointing.save(content(False), folder)
    else:
        loaded = dist_checkpointing.load(content(True), folder)
        state.network.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    return [step() for _ in range(2)]


def weights_only(rank: int, model: ModelConfig, setting: Setting, folder: Path) -> float:
    state = Rank(model, setting)
    loaded = dist_checkpointing.load({"model": state.network.sharded_state_dict()}, folder)
    state.network.load_state_dict(loaded["model"])
    return train_step(state).loss


def losses_and_norms(results: list, setting: Setting) -> list[float]:
    """The steps of all ranks: the whole loss (tensor-parallel ranks all see theirs), the norm."""
    steps = list(zip(*results, strict=True))
    losses = [sum(loss for loss, _ in step) / setting.tensor for step in steps]
    return losses + [step[0][1] for step in steps]


def run(
    model: ModelConfig,
    setting: Setting,
    ranks: int,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> Any:
    results = run_ranks(train, ranks, model, setting, folder, weights)
    return pytest.approx(losses_and_norms(results, setting), rel=1e-4)


def test_optimizer_resumes_exactly_on_other_ranks(tmp_path: Path) -> None:
    model = tiny("GDN", num_experts=0)
    through = run(model, Setting(context=2), 2, tmp_path, whole_weights(model))
    for setting in (Setting(), Setting(tensor=2), Setting(context=4, layout="zigzag")):
        ranks = setting.tensor * setting.context
        assert run(model, setting, ranks, tmp_path) == through.expected


def test_mixture_of_experts_resumes_and_its_weights_reshard(tmp_path: Path) -> None:
    model = tiny("GDN")
    through = run(model, Setting(context=2), 2, tmp_path, whole_weights(model))
    assert run(model, Setting(), 1, tmp_path) == through.expected
    cut = Setting(tensor=2, expert=2, config={"sequence_parallel": True})
    losses = run_ranks(weights_only, 2, model, cut, tmp_path)
    assert losses == pytest.approx([through.expected[0]] * 2, rel=1e-5)
