"""A sum over groups of heads, of which one group's activations exist at a time.

A mixer is the sum of what its heads give to the output. The forward pass adds the groups up; the
backward pass makes one after the other again, differentiates it, and adds up the gradients. Only
the last group, which the backward pass comes to first, is kept as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from seqpar.kept import Kept


@dataclass(frozen=True)
class Heads:
    """The heads [first, stop) of the `of` that a rank has."""

    first: int
    stop: int
    of: int

    @property
    def whole(self) -> bool:
        return self.stop - self.first == self.of

    def part(self, x: Tensor, dim: int = 0) -> Tensor:
        """What belongs to them of x, laid out head by head along `dim`."""
        width = x.shape[dim] // self.of
        return x if self.whole else x.narrow(dim, self.first * width, len(self) * width)

    def by_head(self, x: Tensor) -> Tensor:
        """[s, b, heads · width] -> [b, s, heads, width]."""
        return x.transpose(0, 1).unflatten(-1, (len(self), -1))

    def __len__(self) -> int:
        return self.stop - self.first

    def split(self, groups: int) -> "list[Heads]":
        """In equal groups."""
        step = len(self) // groups
        return [Heads(at, at + step, self.of) for at in range(self.first, self.stop, step)]


Run = Callable[..., Tensor]
"""What some heads add to the output, from them and the tensors that all heads share."""


def add_up(
    run: Run, groups: list[Heads], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """The sum of run(heads, *inputs), in the dtype of the inputs; sums are made in fp32.

    parameters: all that `run` uses and that have gradients.
    """
    if torch.is_grad_enabled():
        return _AddUp.apply(run, groups, len(inputs), *inputs, *parameters)
    total = None
    for heads in groups:
        total = plus(total, run(heads, *inputs))
    assert total is not None
    return total.to(inputs[0].dtype)


class _AddUp(torch.autograd.Function):
    """What the groups that are made again have computed at great cost is kept for it."""

    @staticmethod
    def forward(ctx: Any, run: Run, groups: list[Heads], count: int, *tensors: Tensor) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in tensors[:count]]
        total, again = None, []
        for heads in groups[:-1]:
            kept = Kept(large=True)
            with kept.first():
                total = plus(total, run(heads, *leaves))
            again.append((heads, kept))
        with torch.enable_grad():
            last = run(groups[-1], *leaves)
        ctx.plan = run, leaves, tensors[count:], again, get_gradient_edge(last)
        dtype, total = last.dtype, plus(total, last.detach())
        assert total is not None
        del last  # as large as what is returned
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run, leaves, parameters, again, edge = ctx.plan
        del ctx.plan
        sources = [*leaves, *parameters]
        sums = gradients(edge, sources, dy)
        for heads, kept in again:
            with kept.second(), torch.enable_grad():
                edge = get_gradient_edge(run(heads, *leaves))
            found = gradients(edge, sources, dy)
            while found:  # each is given up before the next is added
                sums.append(plus(sums.pop(0), found.pop(0)))
        typed = zip(sums, sources, strict=True)
        return None, None, None, *(None if x is None else x.to(like.dtype) for x, like in typed)


def gradients(edge: GradientEdge, sources: list[Tensor], dy: Tensor) -> list[Tensor | None]:
    """Of the sources, given that of what the edge leads to: a result that need not exist any more.

    None of those that have no part in it.
    """
    return list(torch.autograd.grad([edge], sources, [dy], allow_unused=True))


def plus(total: Tensor | None, x: Tensor | None) -> Tensor | None:
    """The sum, in fp32 at least; where there is a total, it may be given up for it."""
    if x is None:
        return total
    precise = torch.promote_types(x.dtype, torch.float32)
    return x.to(precise) if total is None else total.to(precise).add_(x)
