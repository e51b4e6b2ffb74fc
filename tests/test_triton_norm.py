"""The Triton norms of heads under the interpreter, fp32, against plain PyTorch in fp64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import assert_close
from torch import Tensor

from seqpar.kernels.norm import gated_rms_norm, unit

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")


def norm_formula(
    x: Tensor, gate: Tensor, weight: Tensor, activation: str = "silu", gate_first: bool = False
) -> Tensor:
    opened = gate.sigmoid() * (gate if activation == "silu" else 1)
    x, after = (x * opened, 1) if gate_first else (x, opened)
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight * after


def unit_formula(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def check(
    function: Callable[..., Tensor], formula: Callable[..., Tensor], *given: Tensor, bound: float
) -> None:
    """y and all gradients; fp64 inputs, exact in fp32, of which views are taken by `given`."""
    results = []
    for dtype, called in ((torch.float64, formula), (torch.float32, function)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in given]
        y = called(*leaves)
        dy = torch.linspace(-1, 2, y.numel()).to(dtype).reshape(y.shape[::-1])
        dy = dy.permute(*reversed(range(y.dim())))  # strides of its own
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        assert_close(str(i), found, expected, bound)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()


# the fourth has more tiles than programs
SHAPES = [(2, 19, 3, 16), (5, 24), (2, 1, 3, 2, 8), (1, 2100, 1, 128), (1, 3, 1, 300)]


# SiLU of the gate after the norm; the sigmoid, as KDA has it; before it, as Mamba-2 has it
KINDS = [("silu", False), ("sigmoid", False), ("silu", True), ("sigmoid", True)]


@pytest.mark.parametrize(("activation", "first"), KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_norm_and_all_gradients(shape: tuple[int, ...], activation: str, first: bool) -> None:
    def ours(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, weight, 1e-3, activation=activation, gate_first=first)

    formula = partial(norm_formula, activation=activation, gate_first=first)
    inputs = randn(*shape), randn(*shape).roll(1, 0) * 3, randn(shape[-1])
    check(ours, formula, *inputs, bound=1e-5)


@pytest.mark.parametrize("shape", [(2, 19, 3, 16), (1, 70, 2, 128), (7,), (2, 1, 3, 2, 8)], ids=str)
def test_unit_and_its_gradient(shape: tuple[int, ...]) -> None:
    check(unit, unit_formula, randn(*shape), bound=1e-5)


def test_slices_of_a_packed_projection_are_read_where_they_lie() -> None:
    """[tokens, batch, heads, packed], as Megatron's projections give them, in another order."""
    packed = randn(9, 2, 3, 40)

    def parts(packed: Tensor) -> tuple[Tensor, Tensor]:
        x, gate, _ = packed.transpose(0, 1).split([16, 16, 8], -1)
        return x, gate

    def ours(packed: Tensor, weight: Tensor) -> Tensor:
        x, gate = parts(packed)
        return gated_rms_norm(unit(x), gate, weight, 1e-3)

    def formula(packed: Tensor, weight: Tensor) -> Tensor:
        x, gate = parts(packed)
        return norm_formula(unit_formula(x), gate, weight)

    check(ours, formula, packed, randn(16), bound=1e-5)


def test_a_vector_of_zeros_stays_and_has_a_finite_gradient() -> None:
    x = torch.zeros(1, 2, 1, 8, requires_grad=True)
    y = unit(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not y.any()
    assert_close("dx", dx, torch.full_like(dx, 1e3), 1e-5)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"gate is .* must have x's shape"):
        gated_rms_norm(x, x[:, :2], torch.zeros(8))
    with pytest.raises(ValueError, match=r"weight is \[7\], it must be \[dim=8\]"):
        gated_rms_norm(x, x, torch.zeros(7))
    with pytest.raises(ValueError, match="activation='relu' must be one of silu, sigmoid"):
        gated_rms_norm(x, x, torch.zeros(8), activation="relu")
    with pytest.raises(ValueError, match="dim=2000 must be at most 1024"):
        unit(torch.zeros(1, 1, 1, 2000))
