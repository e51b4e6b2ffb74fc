"""Decays of the mixers: the logarithm of what is left of a state after a token, in fp32."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def log_decay(x: Tensor, rate: Tensor) -> Tensor:
    """rate · logsigmoid(x), in fp32.

    Only the result is kept for the gradient, which a recurrence keeps in any case.

    Args:
        x: [..., heads], or [..., heads, K] for one decay a key channel.
        rate: above 0, fp32, of a shape that broadcasts to x's.
    """
    return _LogDecay.apply(x, rate)


def first_rates(heads: int) -> Tensor:
    """[heads], logarithms of rates drawn from [1, 16), as Mamba-2 (arXiv 2405.21060) does."""
    return torch.empty(heads).uniform_(1, 16).log()


def first_steps(count: int) -> Tensor:
    """[count], what softplus takes to steps drawn log-uniformly from [0.001, 0.1], likewise."""
    step = torch.empty(count).uniform_(math.log(0.001), math.log(0.1)).exp()
    return step + (-(-step).expm1()).log()


class _LogDecay(torch.autograd.Function):
    """The derivative of y = r logsigmoid(x) is r (1 - exp(y / r)) by x, and y / r by r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: Tensor) -> Tensor:
        y = F.logsigmoid(x.float()).mul_(rate)
        ctx.save_for_backward(y, rate)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, rate = ctx.saved_tensors
        dx = d_rate = None
        if ctx.needs_input_grad[1]:
            d_rate = (dy * y).sum_to_size(rate.shape) / rate
        if ctx.needs_input_grad[0]:
            dx = (y / rate).expm1_().mul_(dy).mul_(-rate).to(ctx.dtype)
        return dx, d_rate
