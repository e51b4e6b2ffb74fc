"""The Triton convolution, norms and gate on a GPU against fp64: `pytest -m gpu` on one GPU.

The bound is twice the error of plain PyTorch on the same inputs and dtype, or one unit in the last
place of fp32.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import seqpar
from seqpar.kernels.gate import gated_silu
from seqpar.kernels.norm import gated_rms_norm, unit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Inputs = dict[str, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def differentiate(function: Callable[..., Tensor], given: Inputs, dy: Tensor) -> Inputs:
    """y and the gradient of each input."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    y = function(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def error(x: Tensor, right: Tensor) -> float:
    assert torch.isfinite(x).all()
    assert right.norm() > 0
    return ((x.double() - right).norm() / right.norm()).item()


def check(
    function: Callable[..., Tensor],
    given: Inputs,
    dy: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    part: Callable[[Inputs], Inputs] = lambda given: given,
) -> None:
    """part: of inputs and gradients alike, what fp64 has room for."""
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")
    found = differentiate(function, given, dy)
    again = differentiate(function, given, dy)
    for name, x in found.items():
        assert torch.equal(x, again[name]), f"{name} differs between two runs"
    del again
    monkeypatch.setenv("SEQPAR_KERNELS", "torch")
    given = part(given)
    dy, found = part({"y": dy})["y"], part(found)
    usual = differentiate(function, given, dy)
    right = differentiate(function, {name: x.double() for name, x in given.items()}, dy.double())
    for name, x in found.items():
        off, plain = error(x, right[name]), error(usual[name], right[name])
        print(f"{name} {x.dtype} {list(x.shape)}: {off:.1e}, plain {plain:.1e}")
        assert off <= max(2 * plain, 2**-23), f"{name}: {off:.2e}, plain PyTorch {plain:.2e}"


def conv_inputs(batch: int, tokens: int, channels: int, width: int, dtype: torch.dtype) -> Inputs:
    shapes = {"x": (batch, tokens, channels), "weight": (channels, width), "bias": (channels,)}
    return {name: randn(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


# batch, tokens, channels, width, bias, activation
CONVOLUTIONS: list[tuple[int, int, int, int, bool, str | None]] = [
    (1, 1, 768, 4, True, "silu"),
    (2, 63, 384, 4, False, "silu"),
    (1, 300, 200, 3, True, None),
    (3, 1001, 96, 2, True, "silu"),
    (1, 2000, 512, 1, True, "silu"),
    (1, 700, 130, 8, True, "silu"),
    (1, 16384, 2048, 4, True, "silu"),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution(dtype: torch.dtype, case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, tokens, channels, width, bias, activation = case
    given = conv_inputs(batch, tokens, channels, width, dtype)
    if not bias:
        del given["bias"]

    def function(**given: Any) -> Tensor:
        return seqpar.causal_conv1d(**given, activation=activation)

    check(function, given, randn(batch, tokens, channels, seed=9), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution_of_the_size_of_a_layer(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp64 looks at 128 channels at either end: they do not know of one another."""

    def function(**given: Any) -> Tensor:
        return seqpar.causal_conv1d(**given, activation="silu")

    def ends(given: Inputs) -> Inputs:
        columns = torch.cat([torch.arange(128), torch.arange(6016, 6144)]).cuda()
        return {
            name: x.index_select(2 if x.dim() == 3 else 0, columns) for name, x in given.items()
        }

    given = conv_inputs(1, 65536, 6144, 4, dtype)
    dy = randn(1, 65536, 6144, seed=9).to(dtype)
    check(function, given, dy, monkeypatch, ends)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution_of_packed_documents(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [0, 1, 3, 6, 10, 15, 16, 490, 502, 1000]
    sp = seqpar.SequenceParallel(layout=seqpar.Layout(1000, 1, kind, documents))

    def function(**given: Any) -> Tensor:
        return seqpar.causal_conv1d(**given, activation="silu", sp=sp)

    def one_by_one(x: Tensor, **rest: Any) -> Tensor:
        parts = [x[:, a:b] for a, b in pairwise(documents)]
        return torch.cat([seqpar.causal_conv1d(p, activation="silu", **rest) for p in parts], 1)

    given, dy = conv_inputs(1, 1000, 256, 4, dtype), randn(1, 1000, 256, seed=9)
    check(function, given, dy, monkeypatch)
    exact = {name: x.double() for name, x in given.items()}
    alone = differentiate(one_by_one, exact, dy.to(dtype).double())
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")
    for name, x in differentiate(function, given, dy).items():
        assert error(x, alone[name]) < 5e-3, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [514, 516, 520])
def test_slices_of_a_packed_projection(
    packed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that lie 514 channels apart can be loaded in pairs only."""

    def function(x: Tensor, taps: Tensor, weight: Tensor) -> Tensor:
        qkv, gate, _ = x.transpose(0, 1).split([384, 128, packed - 512], -1)
        q, k, v = seqpar.causal_conv1d(qkv, taps, activation="silu").split(128, -1)
        return gated_rms_norm(unit(q) + unit(k) + v, gate, weight)

    given = {
        "x": randn(301, 2, 3, packed).to(dtype),
        "taps": randn(3 * 384, 4, seed=1).to(dtype),
        "weight": randn(128, seed=2).to(dtype),
    }
    check(function, given, randn(2, 301, 3, 128, seed=3), monkeypatch)


@pytest.mark.parametrize(
    "shape", [(1, 300, 3, 128), (2, 63, 4, 64), (5000, 96), (1, 65536, 16, 128)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "x": randn(*shape).to(dtype),
        "gate": randn(*shape, seed=1).to(dtype),
        "weight": randn(shape[-1], seed=2).to(dtype),
    }
    dy = randn(*shape, seed=3).to(dtype)
    kinds: tuple[dict[str, Any], ...] = {}, {"activation": "sigmoid"}, {"gate_first": True}
    for kind in kinds:
        check(partial(gated_rms_norm, **kind), given, dy, monkeypatch)
    check(unit, {"x": given["x"]}, dy, monkeypatch)


@pytest.mark.parametrize(
    "shape", [(1, 8), (301, 24), (1000, 896), (17, 3000), (65536, 896)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_of_experts(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, dim = shape
    given = {"x": randn(rows, 2 * dim).to(dtype), "scale": randn(rows, seed=1)}
    check(gated_silu, given, randn(rows, dim, seed=2).to(dtype), monkeypatch)


def test_more_than_two_billion_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tokens of 2^31 numbers and more are where they should be."""
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")
    tokens, channels = 2**19 + 64, 4096
    x = torch.zeros(1, tokens, channels, device="cuda", dtype=torch.bfloat16)
    x[:, -32:] = randn(1, 32, channels).bfloat16()
    weight = randn(channels, 4).bfloat16()
    end = x[:, -64:].clone()
    x.requires_grad_()
    y = seqpar.causal_conv1d(x, weight)
    assert torch.equal(y[:, -64:], seqpar.causal_conv1d(end, weight))
    (dx,) = torch.autograd.grad(y, x, x.detach())
    assert torch.equal(dx[:, -64 + 3 :], _last(end, weight)[:, 3:])


def _last(end: Tensor, weight: Tensor) -> Tensor:
    end = end.clone().requires_grad_()
    return torch.autograd.grad(seqpar.causal_conv1d(end, weight), end, end.detach())[0]
