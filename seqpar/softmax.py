"""Softmax attention over a sequence cut over ranks, any layout, packed documents included."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.comm import Pending
from seqpar.context import SequenceParallel
from seqpar.kernels.softmax import block_backward, block_forward, merge
from seqpar.layout import Layout

METHODS = ("allgather",)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    method: str = "auto",
    sp: SequenceParallel | None = None,
) -> Tensor:
    """Softmax attention within each document.

    Args:
        q: [B, T, H, D], this rank's tokens.
        k, v: [B, T, HK, D]; HK divides H (grouped-query heads).
        causal: whether a token attends only to itself and those before it.
        scale: multiplies q; D**-0.5 by default.
        method: "allgather" gathers keys and values, one kv head at a time while the one before is
            worked on (arXiv 2407.21783); "auto" chooses it.
        sp: how the sequence is cut over ranks; None when this rank holds whole sequences.

    Returns:
        o [B, T, H, D] in q's dtype. Outputs, log-sum-exp and gradients accumulate in fp32 (fp64
        for fp64 inputs).

    Raises:
        ValueError: shapes or dtypes that do not fit each other, the layout or the method.
    """
    _check(q, k, v, method, sp)
    if sp is None:
        sp = SequenceParallel(layout=Layout(q.shape[1], 1))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Gathered.apply(q, k, v, causal, scale, sp)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, sp: SequenceParallel
    ) -> Tensor:
        group = q.shape[2] // k.shape[2]
        o = torch.empty_like(q)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_accumulator(q))
        for head, keys, values in _gathered_heads(k, v, sp):
            heads = slice(head * group, (head + 1) * group)
            for here, block_rows in _blocks(sp, causal):
                rows = _rows(q, here, heads)
                merged: tuple[Tensor, Tensor] | None = None
                for there, square in block_rows:
                    out, block_lse = block_forward(
                        rows, keys[:, :, there], values[:, :, there], square, scale
                    )
                    block = out.to(lse.dtype), block_lse.to(lse.dtype)
                    merged = block if merged is None else merge(*merged, *block)
                assert merged is not None
                o[:, here, heads] = merged[0].transpose(1, 2).to(q.dtype)
                lse[:, heads, here] = merged[1]
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.plan = causal, scale, sp
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        causal, scale, sp = ctx.plan
        group = q.shape[2] // k.shape[2]
        dq = torch.zeros_like(q, dtype=lse.dtype)
        returning: list[Pending] = []
        for head, keys, values in _gathered_heads(k, v, sp):
            heads = slice(head * group, (head + 1) * group)
            dkv = k.new_zeros(2, *keys.shape[::2], k.shape[-1], dtype=lse.dtype)  # [2, B, total, D]
            for here, block_rows in _blocks(sp, causal):
                rows, outs, grads = (_rows(x, here, heads) for x in (q, o, do))
                sums = lse[:, heads, here]
                for there, square in block_rows:
                    block_dq, dk, dv = block_backward(
                        grads,
                        rows,
                        keys[:, :, there],
                        values[:, :, there],
                        outs,
                        sums,
                        square,
                        scale,
                    )
                    dq[:, here, heads] += block_dq.transpose(1, 2)
                    dkv[0, :, there] += dk.sum(1)
                    dkv[1, :, there] += dv.sum(1)
            returning.append(sp.comm.reduce_scatter(_by_rank(dkv, sp.layout), kind="kv"))
        tokens = k.shape[1]
        both = torch.stack([pending.wait()[:, :, :tokens] for pending in returning], 3)
        return dq.to(q.dtype), both[0].to(k.dtype), both[1].to(v.dtype), None, None, None


def _gathered_heads(
    k: Tensor, v: Tensor, sp: SequenceParallel
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(head, keys, values) [B, 1, total_tokens, D] for each kv head, the next already under way.

    The block operators take one kv head for the whole group of query heads.
    """
    longest = max(sp.layout.local_tokens(rank) for rank in range(sp.comm.size))

    def start(head: int) -> Pending:
        mine = torch.stack([k[:, :, head], v[:, :, head]])  # [2, B, T, D]
        padding = longest - mine.shape[2]
        return sp.comm.all_gather(torch.nn.functional.pad(mine, (0, 0, 0, padding)), kind="kv")

    pending = start(0)
    for head in range(k.shape[2]):
        shards = pending.wait()
        if head + 1 < k.shape[2]:
            pending = start(head + 1)
        parts = [shards[r][:, :, : sp.layout.local_tokens(r)] for r in range(sp.comm.size)]
        keys, values = sp.layout.unshard(parts, dim=2)[:, :, None]  # [B, 1, total, D] each
        yield head, keys, values


def _blocks(sp: SequenceParallel, causal: bool) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """For each local segment, its tokens and the (global keys, causal square?) blocks they see."""
    for segments in sp.layout.segments(sp.rank):
        for s in segments:
            if not causal:
                yield s.local, [(slice(s.document, s.document_stop), False)]
            elif s.continues:
                past, own = slice(s.document, s.start), slice(s.start, s.stop)
                yield s.local, [(past, False), (own, True)]
            else:
                yield s.local, [(slice(s.start, s.stop), True)]


def _rows(x: Tensor, here: slice, heads: slice) -> Tensor:
    """[B, T, H, D] -> [B, heads, here, D]."""
    return x[:, here, heads].transpose(1, 2)


def _by_rank(x: Tensor, layout: Layout) -> Tensor:
    """[2, B, total_tokens, D] -> [world_size, 2, B, longest shard, D], padded with zeros."""
    shards = [layout.shard(x, rank, dim=2) for rank in range(layout.world_size)]
    longest = max(shard.shape[2] for shard in shards)
    pad = torch.nn.functional.pad
    return torch.stack([pad(shard, (0, 0, 0, longest - shard.shape[2])) for shard in shards])


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(q: Tensor, k: Tensor, v: Tensor, method: str, sp: SequenceParallel | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or min(x.shape) < 1:
            raise ValueError(
                f"{name} is {list(x.shape)}, it must be [batch, tokens, heads, dim], none empty"
            )
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}: q, k and v must share one floating dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: they must share a device")
    if v.shape != k.shape:
        raise ValueError(f"v is {list(v.shape)}, it must have k's shape {list(k.shape)}")
    if (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(
            f"k is {list(k.shape)}, it must have q's batch, tokens and dim {list(q.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} heads, it must have a divisor of q's {q.shape[2]}; nearest: "
            f"{next(n for n in range(k.shape[2], 0, -1) if q.shape[2] % n == 0)}"
        )
    if method != "auto" and method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(['auto', *METHODS])}")
    if sp is not None:
        sp.check_shard("q", q)
