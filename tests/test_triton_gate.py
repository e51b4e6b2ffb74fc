"""The Triton gate of experts under the interpreter, fp32, against plain PyTorch in fp64."""

import pytest
import torch
from harness import assert_close

from seqpar.kernels.gate import gated_silu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


# the second has more columns than a program takes at once, the last no rows
@pytest.mark.parametrize(("rows", "dim"), [(37, 24), (5, 1500), (1, 1), (0, 24)])
def test_gated_silu_and_all_gradients(rows: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(rows)
    x, scale = torch.randn(rows, 2 * dim).double() * 2, torch.randn(rows).double()
    dy = torch.randn(dim, rows).double().mT
    results = []
    for kernels, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        monkeypatch.setenv("SEQPAR_KERNELS", kernels)
        leaves = [each.to(dtype).requires_grad_() for each in (x, scale)]
        y = gated_silu(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
    for name, expected, found in zip(("y", "dx", "d_scale"), *results, strict=True):
        assert found.shape == expected.shape
        if rows:
            assert_close(name, found, expected, 1e-6)
