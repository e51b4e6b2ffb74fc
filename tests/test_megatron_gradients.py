"""Megatron's schedule, DDP and gradient finalisation give the mean over global valid tokens.

The expected gradients come from one process by autograd alone: nothing may be scaled by the number
of context-parallel ranks, of data-parallel ranks or of micro-batches.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron_setup import (
    Rank,
    Setting,
    Step,
    adam,
    assert_same_gradients,
    tiny,
    train_step,
    whole_step,
    whole_weights,
)
from torch import Tensor

from seqpar.models.config import ModelConfig


def reduced_step(
    rank: int, model: ModelConfig, setting: Setting, weights: dict[str, Tensor]
) -> Step:
    state = Rank(model, setting)
    state.load(weights)
    return train_step(state)


@pytest.mark.parametrize(
    ("data", "context", "layout"),
    [(1, 1, "contiguous"), (1, 2, "zigzag"), (2, 1, "contiguous"), (2, 2, "contiguous")],
)
def test_reduction_over_data_and_context_ranks(data: int, context: int, layout: str) -> None:
    model = tiny("DN")
    microbatches = 2
    setting = Setting(context=context, layout=layout, microbatches=microbatches)
    steps = run_ranks(reduced_step, data * context, model, setting, whole_weights(model))
    whole = whole_step(model, microbatches=data * microbatches)

    assert sum(step.tokens for step in steps) == whole.tokens
    assert sum(step.loss for step in steps) == pytest.approx(whole.loss, rel=1e-5)
    mean = {name: gradient / whole.tokens for name, gradient in whole.gradients.items()}
    for step in steps:
        assert_same_gradients(step.gradients, mean, 5e-5)


def order(rank: int, model: ModelConfig, setting: Setting) -> list[str]:
    """In a second step: when messages set out, and how far the passes are."""
    state, notes = Rank(model, setting), list[str]()
    optimizer = adam(state, 0.01)

    def noted(name: str, started: Callable[..., None]) -> Callable[..., None]:
        def start(*words: Any, **others: Any) -> None:
            notes.append(name)
            started(*words, **others)

        return start

    for group in state.ddp[0].bucket_groups:
        vars(group)["start_grad_sync"] = noted("gradients", group.start_grad_sync)
        vars(group)["start_param_sync"] = noted("parameters", group.start_param_sync)
    layers = state.network.decoder.layers
    layers[-1].register_forward_pre_hook(lambda *_: notes.append("last layer"))
    layers[0].register_full_backward_hook(lambda *_: notes.append("first layer's gradient"))
    for step in range(2):
        notes.clear()  # of the first step, in which Megatron learns the order of gradients
        optimizer.zero_grad()
        train_step(state, step)
        optimizer.step()
    return notes


def test_gradients_and_parameters_travel_beside_the_passes() -> None:
    setting = Setting(context=2, distributed=True, overlap=True)
    for notes in run_ranks(order, 2, tiny("GDN", num_experts=0), setting):
        forward, backward = notes.index("last layer"), notes.index("first layer's gradient")
        assert "parameters" in notes[forward:]
        assert notes[forward:backward].count("gradients") > 2


def bfloat16_step(
    rank: int, model: ModelConfig, setting: Setting, weights: dict[str, Tensor]
) -> Step:
    state = Rank(model, setting)
    state.load(weights)
    step = train_step(state)
    assert {parameter.dtype for _, parameter in state.parameters()} == {torch.bfloat16}
    assert {gradient.dtype for gradient in step.gradients.values()} == {torch.float32}
    return step


@pytest.mark.parametrize("recompute", [{}, {"recompute_granularity": "selective"}])
def test_bfloat16_gradients_add_up_in_fp32(recompute: dict[str, str]) -> None:
    """Over micro-batches and ranks, with at most twice the error that one rank has in bfloat16."""
    model, config = tiny("GDN", num_experts=0), {"dtype": torch.bfloat16, **recompute}
    weights = whole_weights(model)
    exact = run_ranks(reduced_step, 1, model, Setting(microbatches=6), weights)[0].gradients

    def error(found: dict[str, Tensor]) -> float:
        assert found.keys() == exact.keys()
        return math.sqrt(sum((found[k] - exact[k]).square().sum().item() for k in exact))

    alone = Setting(microbatches=6, config=config)
    cut = Setting(context=2, microbatches=3, layout="zigzag", config=config)
    one = error(run_ranks(bfloat16_step, 1, model, alone, weights)[0].gradients)
    assert one > 0
    for step in run_ranks(bfloat16_step, 4, model, cut, weights):
        assert error(step.gradients) <= 2 * one
