"""The output layer and its cross-entropy in one, a chunk of tokens at a time.

Logits [tokens, vocab] are by far the largest tensor of a long sequence: 64K tokens over a
vocabulary of 150K take 18 GiB in bf16, and more for each step of a softmax. They never exist whole
here. Of the forward pass one number a token is kept, the log of the sum of exponentials; the
backward pass makes each chunk's logits again, four products instead of three.

PyTorch's `linear_cross_entropy` does the same for a whole vocabulary; this one is for a vocabulary
cut over tensor-parallel ranks as well.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.comm import Communicator

KIND = "loss"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int = 0,
    tp_group: Any = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """The cross-entropy of `hidden weightᵀ` with `labels`, of each token.

    Args:
        hidden: [s, b, h]; with sequence_parallel this rank's part of s, otherwise the same on all
            tensor-parallel ranks.
        weight: [v, h], this tensor-parallel rank's rows of the output layer, in order of ranks.
        labels: int64 [b, s], of the whole vocabulary and of all of s.
        chunk_tokens: tokens whose logits exist at a time; 0: all.
        tp_group: the tensor-parallel group; None for one rank.
        sequence_parallel: whether `hidden` is cut over that group.

    Returns:
        losses [b, s], fp32 (fp64 for fp64 inputs); the same on all tensor-parallel ranks.
    """
    comm = Communicator(tp_group)
    return _Loss.apply(hidden, weight, labels, chunk_tokens, comm, sequence_parallel)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        comm: Communicator,
        cut: bool,
    ) -> Tensor:
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ranks = comm.size if cut else 1
        # the tokens in the order in which chunks hold them: [b, ranks, tokens of a rank]
        labels = labels.unflatten(1, (ranks, -1))
        losses, logs = (labels.new_empty(labels.shape, dtype=precise) for _ in range(2))
        for at, x in _chunks(hidden, chunk_tokens, comm, cut):
            logits = (x @ weight.T).to(precise)
            inside, row = _rows(labels[at], weight, comm)
            largest = comm.all_reduce(logits.amax(-1), "max", KIND)
            own = logits.gather(-1, row[..., None])[..., 0].masked_fill(~inside, 0)
            total = logits.sub_(largest[..., None]).exp_().sum(-1)
            total, label = comm.all_reduce(torch.stack([total, own]), kind=KIND)
            logs[at] = total.log() + largest
            losses[at] = logs[at] - label
            del logits  # before the next chunk's
        ctx.save_for_backward(hidden, weight, labels, logs)
        ctx.plan = chunk_tokens, comm, cut
        return losses.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, logs = ctx.saved_tensors
        chunk_tokens, comm, cut = ctx.plan
        d_losses = d_losses.unflatten(1, (labels.shape[1], -1))
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=logs.dtype)  # a sum over many chunks
        first = 0
        for at, x in _chunks(hidden, chunk_tokens, comm, cut):
            chances = (x @ weight.T).to(logs.dtype).sub_(logs[at][..., None]).exp_()
            inside, row = _rows(labels[at], weight, comm)
            chances.scatter_add_(-1, row[..., None], -inside.to(logs.dtype)[..., None])
            d_logits = chances.mul_(d_losses[at][..., None]).to(x.dtype)
            d_weight += d_logits.flatten(0, -2).T @ x.flatten(0, -2)
            dx = (d_logits @ weight).movedim(0, 2).contiguous()  # [ranks, tokens, b, h]
            dx = comm.reduce_scatter(dx, KIND).wait() if cut else comm.all_reduce(dx[0], kind=KIND)
            del chances, d_logits
            d_hidden[first : first + len(dx)] = dx
            first += len(dx)
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def _chunks(
    hidden: Tensor, tokens: int, comm: Communicator, cut: bool
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Of each chunk: where in [b, ranks, tokens of a rank]; hidden states [b, ranks, tokens, h]."""
    ranks = comm.size if cut else 1
    step = max(1, tokens // ranks) if tokens else max(1, len(hidden))
    for first in range(0, len(hidden), step):
        x = hidden[first : first + step]
        x = comm.all_gather(x, KIND).wait() if cut else x[None]  # [ranks, tokens, b, h]
        yield (slice(None), slice(None), slice(first, first + x.shape[1])), x.movedim(2, 0)


def _rows(labels: Tensor, weight: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Whether this rank has each label's row of the weight; which it is, 0 where it has not."""
    row = labels - comm.rank * len(weight)
    inside = (row >= 0) & (row < len(weight))
    return inside, row.masked_fill(~inside, 0)
