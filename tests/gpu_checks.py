"""What the GPU tests of a family share: how its outputs and gradients are held against fp64."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

GATES = ("log_decay", "beta")  # whose dtype is at least fp32
Inputs = dict[str, Tensor]

# tokens, heads, values' heads a head, K, V
SIZES = [
    (1, 2, 1, 128, 128),
    (63, 2, 1, 128, 128),
    (300, 2, 2, 128, 128),
    (300, 2, 1, 64, 128),
    (300, 2, 1, 128, 64),
    (257, 1, 2, 64, 64),
    (200, 1, 1, 16, 16),
    (200, 1, 2, 32, 32),
    (150, 1, 1, 96, 40),
    (150, 1, 1, 256, 256),
    (5000, 2, 1, 128, 128),
]


def draws(tokens: int) -> int:
    """How many sequences are drawn: errors of few numbers are a matter of chance."""
    return max(1, min(16, 4096 // tokens))


def differentiate(
    function: Callable[..., Tensor], given: Inputs, dtype: torch.dtype, do: Tensor
) -> Inputs:
    """o and the gradient of each input, in fp64; gates stay fp32."""
    leaves = {
        name: x.to(torch.promote_types(dtype, torch.float32) if name in GATES else dtype)
        for name, x in given.items()
    }
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    o = function(**leaves)
    gradients = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
    found = {"o": o.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: x.double() for name, x in found.items()}


def error(x: Tensor, right: Tensor) -> float:
    assert torch.isfinite(x).all()
    assert right.norm() > 0
    return ((x - right).norm() / right.norm()).item()


def hold(
    function: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    specification: Callable[..., Tensor],
    given: Inputs,
    dtype: torch.dtype,
    usual: float,
    least: Callable[[str], float],
    idle: Iterable[str] = ("log_decay",),
) -> None:
    """Twice the error of `plain` in the same dtype at most, and the same bits in two runs.

    usual: the error to be expected of plain PyTorch beyond 300 tokens, where it is not run. least:
    the bound of each output that is never undercut. idle: inputs that do nothing to one token.
    """
    tokens = given["q"].shape[1]
    do = (torch.randn_like(given["v"]) * 4).round().double() / 4
    right = differentiate(specification, given, torch.float64, do)
    found = differentiate(function, given, dtype, do)
    again = differentiate(function, given, dtype, do)
    expected = dict.fromkeys(right, usual)
    if tokens <= 300:
        expected = {
            name: error(x, right[name]) if right[name].any() else 0.0
            for name, x in differentiate(plain, given, dtype, do).items()
        }
    for name, x in found.items():
        assert torch.equal(x, again[name]), f"{name} differs between two runs"
        if name in idle and tokens == 1:  # a difference of equals
            assert x.abs().max() < 1e-6 * (found["q"] * given["q"]).abs().max()
            continue
        off, bound = error(x, right[name]), max(2 * expected[name], least(name))
        print(f"{dtype} {tokens} {name}: {off:.1e}, plain {expected[name]:.1e}")
        assert off <= bound, f"{name}: {off:.2e} is above {bound:.2e}"
