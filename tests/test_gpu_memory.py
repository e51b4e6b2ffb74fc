"""What is made again and offloaded on a GPU: `pytest -m gpu tests/test_gpu_memory.py`."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar.models.offload import Offloader
from seqpar.models.recompute import Here, Part, Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LAYERS, TOKENS, WIDTH = 12, 1 << 16, 512
INPUT = TOKENS * WIDTH * 2  # bytes of a layer's input


def run(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return x + layer(x)


def gradients(kind: str) -> tuple[list[Tensor], int]:
    """Of a chain of layers, in two passes; and the most memory that was in use in the second."""
    torch.manual_seed(0)
    layers = [
        torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.SiLU(), torch.nn.Linear(2 * WIDTH, WIDTH)
        ).to("cuda", torch.bfloat16)
        for _ in range(LAYERS)
    ]
    parameters = [p for layer in layers for p in layer.parameters()]
    first = torch.randn(TOKENS, 1, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    offloader = Offloader()
    for _ in range(2):  # the second finds the host's memory ready
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        x: Tensor = first
        for number, layer in enumerate(layers):
            stored: Any = offloader.begin(number) if kind == "offload" else Here()
            part = Part(partial(run, layer), list(layer.parameters()))
            x = run(layer, x) if kind == "keep" else Run(stored)([part], x)
        found = list(torch.autograd.grad(x.float().square().mean(), [first, *parameters]))
        del x
    return found, torch.cuda.max_memory_allocated()


def test_gradients_are_the_same_bits_and_memory_shrinks() -> None:
    kept, most = gradients("keep")
    again, less = gradients("recompute")
    away, least = gradients("offload")
    for one, two, three in zip(kept, again, away, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert less < most - 3 * (LAYERS - 2) * INPUT  # activations of all layers but one
    assert least < less - (LAYERS - 4) * INPUT  # inputs of all layers but a few
