"""Softmax attention by heads: one all-to-all gives each rank whole sequences of some heads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.blocks import attend
from seqpar.checks import first_order
from seqpar.context import SequenceParallel
from seqpar.layout import Layout
from seqpar.sources import Gather

KIND = "heads"
Heads = Callable[[int], tuple[int, int]]  # the heads [first, stop) of a rank


def ulysses(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, sp: SequenceParallel
) -> Tensor:
    """o [B, T, H, D]; query heads are dealt as evenly as they go, kv heads to those that need them.

    DeepSpeed-Ulysses (arXiv 2309.14509), here for any number of heads and ranks: a rank may have
    one head more than another, or none, and a kv head may be wanted by several ranks.
    """
    heads, group, ranks = q.shape[2], q.shape[2] // k.shape[2], sp.comm.size

    def mine(rank: int) -> tuple[int, int]:
        return rank * heads // ranks, (rank + 1) * heads // ranks

    def kv_mine(rank: int) -> tuple[int, int]:
        first, stop = mine(rank)
        return first // group, -(-stop // group) if stop > first else first // group

    owned = mine, kv_mine, kv_mine
    whole_q, whole_k, whole_v = _ToHeads.apply(owned, sp, q, k, v)  # [B, total, own heads, D]

    def make() -> SequenceParallel:
        layout = sp.layout
        return SequenceParallel(layout=Layout(layout.total_tokens, 1, cu_seqlens=layout.cu_seqlens))

    here = sp.once("whole stream", make)
    segments = [s for found in here.layout.segments(0) for s in found]
    whole = len(sp.layout.documents) == 2
    first, stop = mine(sp.rank)
    kv_first, kv_stop = kv_mine(sp.rank)
    kv_heads = list(range(kv_first, kv_stop))
    steps = [slice(head, head + 1) for head in kv_heads]  # of several, some served in part
    if (first, stop) == (kv_first * group, kv_stop * group):
        steps = [slice(kv_first, kv_stop)] if kv_heads else []
    outs = [whole_q[:, :, :0]]  # a rank without heads takes part in the backward exchange too
    for step in steps:
        served = slice(max(step.start * group - first, 0), min(step.stop * group, stop) - first)
        own = slice(step.start - kv_first, step.stop - kv_first)
        kv = whole_k[:, :, own], whole_v[:, :, own]
        outs.append(
            attend(whole_q[:, :, served], *kv, segments, causal, scale, Gather(here), whole)
        )
    return _FromHeads.apply(torch.cat(outs, 2), mine, heads, sp)


class _ToHeads(torch.autograd.Function):
    """[B, T, H, D] of this rank's tokens -> [B, total, own heads, D], several at once."""

    @staticmethod
    def forward(
        ctx: Any, owned: Sequence[Heads], sp: SequenceParallel, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.plan = [(held, x.shape[2]) for held, x in zip(owned, tensors, strict=True)], sp
        # A checkpoint runs again what keeps tensors: all ranks have to, also those without heads.
        ctx.save_for_backward(tensors[0].new_empty(0))
        return tuple(_to_heads(tensors, owned, sp))

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [_] = ctx.saved_tensors
        return None, None, *_from_heads(gradients, *ctx.plan)


class _FromHeads(torch.autograd.Function):
    """[B, total, own heads, D] -> [B, T, H, D] of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owned: Heads, heads: int, sp: SequenceParallel) -> Tensor:
        ctx.plan = [owned], sp
        return _from_heads([x], [(owned, heads)], sp)[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _to_heads([dout], *ctx.plan)[0], None, None, None


def _to_heads(
    tensors: Sequence[Tensor], owned: Sequence[Heads], sp: SequenceParallel
) -> list[Tensor]:
    ranks, sizes = range(sp.comm.size), sp.layout.shard_sizes
    pairs = list(zip(tensors, owned, strict=True))
    sent = [[x[:, :, slice(*held(rank))] for x, held in pairs] for rank in ranks]
    kept = [(x, held(sp.rank)) for x, held in pairs]
    shapes = [[(x.shape[0], size, b - a, x.shape[3]) for x, (a, b) in kept] for size in sizes]
    came = _swap(sent, shapes, sp)
    return [sp.layout.unshard([parts[i] for parts in came]) for i in range(len(tensors))]


def _from_heads(
    tensors: Sequence[Tensor], owned: Sequence[tuple[Heads, int]], sp: SequenceParallel
) -> list[Tensor]:
    """Heads that several ranks hold are added up: the adjoint of `_to_heads`."""
    ranks, tokens = range(sp.comm.size), sp.layout.local_tokens(sp.rank)
    sent = [[sp.layout.shard(x, rank) for x in tensors] for rank in ranks]
    spans = [[held(rank) for held, _ in owned] for rank in ranks]
    batch, dim = tensors[0].shape[0], tensors[0].shape[3]
    shapes = [[(batch, tokens, b - a, dim) for a, b in found] for found in spans]
    came = _swap(sent, shapes, sp)
    outs = []
    for i, (x, (_, heads)) in enumerate(zip(tensors, owned, strict=True)):
        held, parts = [found[i] for found in spans], [found[i] for found in came]
        if sum(b - a for a, b in held) == heads:  # in order, each once
            outs.append(torch.cat(parts, 2))
            continue
        out = x.new_zeros(batch, tokens, heads, dim)
        for (a, b), part in zip(held, parts, strict=True):
            out[:, :, a:b] += part
        outs.append(out)
    return outs


def _swap(
    sent: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, int, int, int]]],
    sp: SequenceParallel,
) -> list[list[Tensor]]:
    """One all-to-all of some tensors for each rank; those received, of the given shapes."""
    sp.enter("exchange of heads")
    sizes = [[torch.Size(shape).numel() for shape in found] for found in shapes]
    send_rows = [sum(x.numel() for x in tensors) for tensors in sent]
    flat = sent[0][0].new_empty(sum(send_rows))
    pieces = [x for tensors in sent for x in tensors]
    for x, place in zip(pieces, flat.split([x.numel() for x in pieces]), strict=True):
        place.view(x.shape).copy_(x)
    came = sp.comm.all_to_all(flat, send_rows, [sum(found) for found in sizes], KIND).wait()
    parts = iter(came.split([size for found in sizes for size in found]))
    return [[next(parts).view(shape) for shape in found] for found in shapes]
