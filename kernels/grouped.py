"""Rows times the matrix of their group, all groups at once: the experts of a mixture.

PyTorch's grouped product is one kernel for all groups, and reads where they end from the GPU, so
the host neither waits nor launches group by group. It is taken on Hopper in bf16; on Blackwell the
kernels of some versions of PyTorch leave the gradient of a group without rows as it lay in memory.
Everywhere else each group has a product of its own.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_GROUPS = 1023
"""That PyTorch's kernel takes."""


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each row times the transpose of its group's matrix.

    Args:
        x: [rows, k], the groups' rows one after the other.
        weight: [groups, m, k].
        counts: [groups], rows of each group, integers that add up to `rows`. On the host, for it
            knows them where each group has a product of its own; in pinned memory it does not wait.

    Returns:
        [rows, m].
    """
    if at_once(x, weight):
        ends = counts.to(x.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        return _Grouped.apply(x, weight, ends)
    groups = zip(x.split(counts.tolist()), weight.unbind(), strict=True)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in groups])


def at_once(x: Tensor, weight: Tensor) -> bool:
    """Whether all groups are one product, for which rows must be multiples of 16 bytes."""
    groups, m, k = weight.shape
    fits = x.dtype == weight.dtype == torch.bfloat16 and m % 8 == 0 and k % 8 == 0
    return fits and len(x) > 0 and groups <= MOST_GROUPS and x.is_cuda and _has_kernel(x.device)


@cache
def _has_kernel(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and hasattr(F, "grouped_mm")


class _Grouped(torch.autograd.Function):
    """PyTorch's own gradient takes no gradient of y whose rows are not contiguous.

    In each product the matrices lie so that groups may have any number of rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.mT, offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        dy = dy.contiguous()
        dx = F.grouped_mm(dy, weight, offs=ends) if ctx.needs_input_grad[0] else None
        d_weight = F.grouped_mm(dy.mT, x, offs=ends) if ctx.needs_input_grad[1] else None
        return dx, d_weight, None
