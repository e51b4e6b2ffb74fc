"""Decayed causal scores within a chunk, safe for any decay.

    P[i,j] = Σ_d x[i,d] y[j,d] exp(total[i,d] - total[j,d])     for j <= i, else 0

Factored as (x e^total)(y e^-total)ᵀ this overflows for strong decays. Only differences <= 0 are
exponentiated: pair by pair within blocks of 16 tokens, and across blocks relative to the total at
the later block's start, which lies between the two (secondary chunking, arXiv 2312.06635).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 16


def decayed_scores(x: Tensor, y: Tensor, total: Tensor | None) -> Tensor:
    """P [..., C, C] for x, y [..., C, D] and total None, [..., C, 1] or [..., C, D].

    total: running sums of log decays from the chunk's start; None means no decay.
    """
    if total is None:
        return (x @ y.mT).tril()
    if total.shape[-1] == 1:
        future = _future(x.shape[-2], x.device)
        return (x @ y.mT) * (total - total.mT).masked_fill(future, -torch.inf).exp()
    return _Diagonal.apply(x, y, total)


class _Diagonal(torch.autograd.Function):
    """Written by hand because autograd would keep three tensors of [C, 16, D]; this keeps none.

    dx[i] = Σ_j dP[i,j] y[j] e[i,j];  dy[j] = Σ_i dP[i,j] x[i] e[i,j];  dtotal = x dx - y dy
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, total)
        scores = x.new_zeros(*x.shape[:-1], x.shape[-2])
        for start in range(0, x.shape[-2], BLOCK):
            here, factor = slice(start, start + BLOCK), _pairs(total, start)
            near = (factor * y[..., None, here, :]) @ x[..., here, :, None]  # [..., 16, 16, 1]
            scores[..., here, here] = near.squeeze(-1)
            if start:
                later, earlier = _across(total, start)
                scores[..., here, :start] = (x[..., here, :] * later) @ (
                    y[..., :start, :] * earlier
                ).mT
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, total = ctx.saved_tensors
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for start in range(0, x.shape[-2], BLOCK):
            here = slice(start, start + BLOCK)
            factor = _pairs(total, start) * d_scores[..., here, here, None]
            dx[..., here, :] = (factor * y[..., None, here, :]).sum(-2)
            dy[..., here, :] += (factor * x[..., here, None, :]).sum(-3)
            if start:
                later, earlier = _across(total, start)
                far = d_scores[..., here, :start]
                dx[..., here, :] += later * (far @ (y[..., :start, :] * earlier))
                dy[..., :start, :] += earlier * (far.mT @ (x[..., here, :] * later))
        return dx, dy, x * dx - y * dy


def _pairs(total: Tensor, start: int) -> Tensor:
    """e^(total[i] - total[j]) within the block at `start`, 0 for j > i: [..., 16, 16, D]."""
    sums = total[..., start : start + BLOCK, :]
    future = _future(BLOCK, total.device)[:, :, None]
    return (sums[..., :, None, :] - sums[..., None, :, :]).masked_fill(future, -torch.inf).exp()


def _across(total: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Decay from the block's start to its tokens, and from each earlier token to that start."""
    base = total[..., start - 1 : start, :]
    later = (total[..., start : start + BLOCK, :] - base).exp()
    return later, (base - total[..., :start, :]).exp()


def _future(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
