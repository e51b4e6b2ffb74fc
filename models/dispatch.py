"""Tokens on their way to experts and back, by gathers alone.

Megatron's own permutation adds with atomics: where a token's rows come back from its experts, and
where their gradients do. That is slow, and the bits differ from run to run. Here the rows of each
token are listed once, and both sums gather them, in fp32, always in the same order.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe import moe_utils
from torch import Tensor
from torch.autograd.function import once_differentiable

_OTHERS = ("fused", "drop_and_pad", "align_size")  # permutations that remain Megatron's
_PADS = "align_size" in inspect.signature(moe_utils.permute).parameters  # not in 0.16


@dataclass(frozen=True)
class Order:
    """Which row is whose; rows are sorted by expert, those of an expert by token.

    tokens [rows]: the token of each row. rows [rows]: the rows of the first token, of the second,
    and so on; those of token t begin at begins[t], of begins [tokens + 1].
    """

    tokens: Tensor
    rows: Tensor
    begins: Tensor

    def spread(self, x: Tensor) -> Tensor:
        """[tokens, h] -> [rows, h], a copy for each expert."""
        return x.index_select(0, self.tokens)

    def gathered(self, x: Tensor) -> Tensor:
        """[rows, h] -> [tokens, h], the sum of each token's rows."""
        return F.embedding_bag(self.rows, x, self.begins, mode="sum", include_last_offset=True)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return order.spread(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.order.gathered(dy.contiguous()), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return order.gathered(x.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.order.spread(dy), None


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | Tensor | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """In the place of `moe_utils.permute`: a row for each True of routing_map [tokens, experts].

    Returns the rows [num_out_tokens, h], what probs [tokens, experts] are there, and in the place
    of Megatron's indices an `Order`, for `unpermute`; where Megatron returns more, what it would.
    num_out_tokens is how many there are, so that the host need not wait to know it. Padded and
    fused permutations remain Megatron's.
    """
    if num_out_tokens is None or any(options.get(name) for name in _OTHERS):
        return moe_utils.permute(tokens, routing_map, probs, num_out_tokens, **options)
    count = len(tokens)
    by_expert = routing_map.bool().T.reshape(-1)
    places = by_expert.nonzero_static(size=int(num_out_tokens))[:, 0]
    of_rows = places % count
    begins = F.pad(routing_map.sum(1).cumsum(0), (1, 0))
    order = Order(of_rows, of_rows.argsort(stable=True), begins)
    of_probs = None if probs is None else probs.T.reshape(-1).index_select(0, places)
    found = _Spread.apply(tokens, order), of_probs, order
    return (*found, None, options.get("tokens_per_expert")) if _PADS else found


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor | Order,
    restore_shape: torch.Size,
    probs: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """In the place of `moe_utils.unpermute`: the sum of the rows of each token."""
    if isinstance(sorted_indices, Order):
        return _Gathered.apply(permuted_tokens, sorted_indices)
    return moe_utils.unpermute(permuted_tokens, sorted_indices, restore_shape, probs, **options)
