"""The whole model cut over ranks: the loss and every parameter's gradient are one rank's."""

from typing import Any

import pytest
from harness import run_ranks
from megatron_setup import (
    DOCUMENTS,
    Setting,
    assert_same_gradients,
    own_share,
    tiny,
    whole_step,
    whole_weights,
)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["stream", "documents"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradient_of_every_parameter(ranks: int, layout: str, documents: Any) -> None:
    model = tiny("GDN")
    setting = Setting(context=ranks, layout=layout, documents=documents)
    steps = run_ranks(own_share, ranks, model, setting, whole_weights(model))
    whole = whole_step(model, documents)

    assert sum(step.tokens for step in steps) == whole.tokens
    assert sum(step.loss for step in steps) == pytest.approx(whole.loss, rel=1e-5)
    total = {name: sum(step.gradients[name] for step in steps) for name in whole.gradients}
    assert_same_gradients(total, whole.gradients, 5e-5)
