"""Experts on a GPU: `pytest -m gpu tests/test_gpu_experts.py` on one GPU.

Outputs and gradients against fp64; at most twice the error of one product for each expert.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpu_checks import error
from torch import Tensor

from seqpar.kernels.gate import gated_silu
from seqpar.kernels.grouped import at_once, grouped_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LEAST = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # errors that are never too large

# tokens of each expert, hidden size, width of an expert
CASES: dict[str, tuple[list[int], int, int]] = {
    "uneven": ([1, 700, 0, 3, 129, 0, 64, 2], 256, 128),
    "none at the ends": ([0, 0, 37, 5000, 0], 1024, 896),
    "one has all": ([0, 1000, 0, 0], 512, 8),
    "one row": ([0, 0, 1], 64, 24),
    "one expert": ([300], 128, 64),
    "no rows": ([0, 0, 0], 64, 64),
    "many": ([(7 * i) % 50 for i in range(200)], 64, 32),
}


def experts(x: Tensor, first: Tensor, second: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
    hidden = gated_silu(grouped_linear(x, first, counts), scale)
    return grouped_linear(hidden, second, counts)


def one_by_one(x: Tensor, first: Tensor, second: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
    parts = [each.split(counts.tolist()) for each in (x, scale)]
    found = []
    for rows, factor, wide, narrow in zip(*parts, first, second, strict=True):
        gate, value = F.linear(rows, wide).chunk(2, -1)
        hidden = (F.silu(gate) * value * factor[:, None]).to(x.dtype)
        found.append(F.linear(hidden, narrow))
    return torch.cat(found)


def differentiate(
    function: Callable[..., Tensor], given: dict[str, Tensor], dtype: torch.dtype, counts: Tensor
) -> dict[str, Tensor]:
    """y and the gradient of each input, of a sum of y in which each channel has its weight."""
    leaves = {
        name: x.to(torch.promote_types(dtype, torch.float32) if name == "scale" else dtype)
        for name, x in given.items()
    }
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    y = function(**leaves, counts=counts)
    dy = torch.linspace(-1, 2, y.shape[1], device="cuda").to(dtype).expand(y.shape)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("dtype", LEAST, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_experts_and_all_gradients_equal_fp64(name: str, dtype: torch.dtype) -> None:
    counts, hidden, width = CASES[name]
    numbers = torch.tensor(counts).pin_memory()
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16().double()

    given = {
        "x": randn(sum(counts), hidden),
        "first": randn(len(counts), 2 * width, hidden) / hidden**0.5,
        "second": randn(len(counts), hidden, width) / width**0.5,
        "scale": randn(sum(counts)).abs(),
    }
    given = {name: x.bfloat16().double() for name, x in given.items()}
    hopper = torch.cuda.get_device_capability()[0] == 9
    taken = at_once(given["x"].to(dtype), given["first"].to(dtype))
    assert taken == (hopper and dtype == torch.bfloat16 and any(counts))
    right = differentiate(one_by_one, given, torch.float64, numbers)
    plain = differentiate(one_by_one, given, dtype, numbers)
    found = differentiate(experts, given, dtype, numbers)
    again = differentiate(experts, given, dtype, numbers)
    empty = numbers.cuda() == 0
    for key, x in found.items():
        assert x.shape == right[key].shape
        assert x.dtype == plain[key].dtype
        assert torch.equal(x, again[key]), f"{key} differs between two runs"
        if key in ("first", "second"):
            assert not x[empty].any(), f"{key}: an expert without tokens has a gradient"
        if any(counts) and x.numel() > 1:  # the error of one number is a matter of chance
            off, usual = error(x.double(), right[key]), error(plain[key].double(), right[key])
            print(f"{name} {dtype} {key}: {off:.1e}, one by one {usual:.1e}")
            assert off <= max(2 * usual, LEAST[dtype]), f"{key}: {off:.2e}, usual {usual:.2e}"


def test_tokens_go_and_come_back_alike_each_time_and_the_host_does_not_wait() -> None:
    """32K tokens, 8 of 64 experts each, in bf16, against fp64; no atomics decide on the bits."""
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    from seqpar.models.dispatch import permute, unpermute

    tokens, hidden, most = 1 << 15, 256, 8
    probs = torch.rand(tokens, 64, device="cuda")
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.topk(most)[1], True)
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    weight = torch.randn(tokens * most, 1, device="cuda")

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_(), probs.requires_grad_()]
        rows, share, order, *_ = permute(
            leaves[0], chosen, probs=leaves[1], num_out_tokens=most * tokens
        )
        y = unpermute((rows * share[:, None] * weight).to(dtype), order, restore_shape=x.shape)
        return [y.detach(), *torch.autograd.grad(y, leaves, x.flip(0).to(dtype))]

    run(torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, again = run(torch.bfloat16), run(torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    right = run(torch.float64)
    for name, one, two, exact in zip(("y", "dx", "d_probs"), found, again, right, strict=True):
        assert torch.equal(one, two), f"{name} differs between two runs"
        assert error(one.double(), exact.double()) < 4e-3, name


def test_the_host_does_not_wait() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("PyTorch's grouped product is taken on Hopper only")
    counts = torch.tensor([100, 0, 28]).pin_memory()
    shapes = {"x": (128, 64), "first": (3, 64, 64), "second": (3, 64, 32), "scale": (128,)}
    given = {
        name: torch.randn(shape, device="cuda").bfloat16().requires_grad_()
        for name, shape in shapes.items()
    }
    experts(**given, counts=counts).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(**given, counts=counts).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
