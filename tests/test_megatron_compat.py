"""Megatron without a GPU: what is changed, and that nothing is where there is one."""

import importlib
import itertools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron_setup import Rank, Setting, tiny, train_step
from torch import Tensor

from seqpar.models import compat


def constants(code: types.CodeType) -> Iterator[Any]:
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from constants(value)
        else:
            yield from value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", compat._MODULES_WITH_LITERALS)
def test_no_device_literal_is_left(name: str) -> None:
    functions = list(compat._functions_of(importlib.import_module(name)))
    assert len(functions) >= 3
    left = [c for f in functions for c in constants(f.__code__) if isinstance(c, str)]
    assert "cuda" not in left
    assert not any(text.startswith("torch.cuda.") for text in left)


def test_literals_are_found_wherever_they_are() -> None:
    def example() -> Any:
        def inner() -> bool:
            return "torch.cuda.FloatTensor" in ("torch.cuda.HalfTensor", "torch.cuda.FloatTensor")

        return inner, torch.zeros(1, device="cuda"), "cuda graphs stay"

    example.__code__ = compat._without_cuda(example.__code__)
    inner, tensor, text = example()
    assert inner()
    assert tensor.device.type == "cpu"
    assert text == "cuda graphs stay"


def test_installing_again_changes_nothing() -> None:
    before = torch.cuda.current_device, torch.Tensor.cuda
    compat.install()
    assert (torch.cuda.current_device, torch.Tensor.cuda) == before
    assert torch.cuda.current_device() == torch.device("cpu")


def test_nothing_is_changed_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compat, "_answer_for_torch_cuda", lambda: pytest.fail("changed"))
    compat.install()
    assert not compat._installed


def draw(rank: int) -> tuple[Tensor, bool]:
    Rank(tiny("G"), Setting(tensor=2, expert=2, config={"sequence_parallel": True}))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3)
    return inside, bool((torch.get_rng_state() == before).all())


def test_random_state_of_tensor_parallel_ranks() -> None:
    (first, restored), (second, _) = run_ranks(draw, 2)
    assert restored
    assert not torch.equal(first, second)


def bfloat16_steps(rank: int) -> list[float]:
    state = Rank(tiny("GN"), Setting(context=2, config={"dtype": torch.bfloat16}))
    options = OptimizerConfig(lr=0.01, bf16=True, params_dtype=torch.bfloat16, clip_grad=1.0)
    optimizer = get_megatron_optimizer(options, state.ddp)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(train_step(state).loss)
        optimizer.step()
    return losses


def test_bfloat16_with_fp32_main_parameters_trains() -> None:
    losses = [sum(step) for step in zip(*run_ranks(bfloat16_steps, 2), strict=True)]
    assert all(later < before for before, later in itertools.pairwise(losses))
