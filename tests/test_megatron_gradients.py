"""Megatron's schedule, DDP and gradient finalisation give the mean over global valid tokens.

The expected gradients come from one process by autograd alone: nothing may be scaled by the number
of context-parallel ranks, of data-parallel ranks or of micro-batches.
"""

import pytest
from harness import run_ranks
from megatron_setup import (
    Rank,
    Setting,
    Step,
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
