"""Softmax attention over a sequence cut over ranks, any layout, packed documents included."""

import torch
from torch import Tensor

from seqpar.blocks import attend
from seqpar.checks import check_qkv, scale_of, uncompiled
from seqpar.context import SequenceParallel, alone
from seqpar.cost import choose_softmax
from seqpar.fetch import Ranges, Routes, fetch
from seqpar.layout import Layout, Segment
from seqpar.sources import Gather, Ring
from seqpar.ulysses import ulysses

METHODS = ("allgather", "ring", "ulysses")


@uncompiled
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
        method: how keys and values meet queries. "allgather": some kv heads of the whole stream at
            a time (arXiv 2407.21783), causal work balanced by trading half of the queries with the
            mirror rank; "ring": passed from rank to rank (2310.01889), balanced under the zigzag
            layout; "ulysses": whole sequences of some heads (2309.14509); "auto": by cost.
        sp: how the sequence is cut over ranks; None when this rank holds whole sequences.

    Returns:
        o [B, T, H, D] in q's dtype. Outputs, log-sum-exp and gradients accumulate in fp32 (fp64
        for fp64 inputs).

    Raises:
        ValueError: shapes or dtypes that do not fit each other, the layout or the method.
    """
    _check(q, k, v, method, sp)
    scale, sp = scale_of(scale, q), sp or alone(q.shape[1])
    if method == "auto":
        sizes = sp.layout.total_tokens, q.shape[2], k.shape[2], q.shape[3], q.element_size()
        trades = causal and _traded(sp.layout) != sp.layout.ranges
        method = choose_softmax(sp.comm.size, *sizes, trades)
    sp.enter(f"softmax_attention, method={method}, causal={causal}", q=q, k=k)
    if method == "ulysses":
        return ulysses(q, k, v, causal, scale, sp)
    layout = sp.layout
    source = Ring(sp) if method == "ring" else Gather(sp)
    trades = causal and method == "allgather"
    held = _traded(layout) if trades else layout.ranges

    def cut() -> list[Segment]:
        return [segment for found in layout.cut(held(sp.rank)) for segment in found]

    segments = sp.once(("segments", trades), cut)
    whole = len(layout.documents) == 2
    if held == layout.ranges:
        return attend(q, k, v, segments, causal, scale, source, whole)
    there = sp.once(("queries", q.device), lambda: Routes(layout.ranges, held, sp.comm, q.device))
    back = sp.once(("o", q.device), lambda: Routes(held, layout.ranges, sp.comm, q.device))
    o = attend(fetch(q, there, sp.comm, "queries"), k, v, segments, causal, scale, source, whole)
    return fetch(o, back, sp.comm, "queries")


def _traded(layout: Layout) -> Ranges:
    """Who works on which queries so that causal work is equal: halves traded with the mirror rank.

    Of contiguous shards the last sees W times what the first does. Rank r keeps the first half of
    its queries and takes the second half of rank W-1-r's: together always the same. Keys, values
    and everything else stay where they are.
    """
    if layout.kind != "contiguous" or layout.world_size == 1 or len(set(layout.shard_sizes)) > 1:
        return layout.ranges

    def ranges(rank: int) -> list[tuple[int, int]]:
        ((start, stop),) = layout.ranges(rank)
        ((mirror, mirror_stop),) = layout.ranges(layout.world_size - 1 - rank)
        half = (stop - start) // 2
        return [(start, start + half), (mirror + half, mirror_stop)]

    return ranges


def _check(q: Tensor, k: Tensor, v: Tensor, method: str, sp: SequenceParallel | None) -> None:
    check_qkv(q, k, v)
    if q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q is {q.dtype}: on a GPU it must be torch.bfloat16 or torch.float16")
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
