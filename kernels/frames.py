"""Diagonal decay taken out of q and k, frame by frame, and its gradient (frame_kernels.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.kernels import tables
from seqpar.kernels.frame_kernels import enter_kernel, leave_kernel, steps_kernel
from seqpar.kernels.launch import Launch
from seqpar.kernels.once import Once
from seqpar.kernels.pieces import Pieces
from seqpar.kernels.tuned import ceil_div, frame_warps, padded


@dataclass(frozen=True)
class Frames:
    """q and k [B, T, HV, K] relative to their frames, and what says where those lie.

    chunk: tokens of the longest frame. The rest: see frame_kernels.py.
    """

    q: Tensor
    k: Tensor
    halves: Tensor
    levels: Tensor
    steps: Tensor
    counts: Tensor
    chunk: int


def enter(
    q: Tensor,
    k: Tensor,
    gate: Tensor,
    pieces: Pieces,
    block: int,
    chunk: int,
    dtype: torch.dtype,
    plan: Once,
) -> Frames:
    """The frames of q and k [B, T, H, K] under log decays [B, T, HV, K].

    block: for `tables.piece_rows`; chunk: 16, 32 or 64; dtype: of the new q and k; plan: of calls
    like this one.
    """
    batch, tokens, heads, dim = gate.shape
    table = plan.once("chunks", lambda: tables.cut_rows(pieces, chunk, chunk, q))
    chunks, slots = len(table), len(table) * (chunk // 8)
    rows = plan.once("pieces", lambda: tables.piece_rows(pieces, block, chunk, q))
    found = Frames(
        torch.empty(gate.shape, dtype=dtype, device=q.device),
        torch.empty(gate.shape, dtype=dtype, device=q.device),
        q.new_empty(batch, slots, heads, dim, dtype=torch.float32),
        q.new_empty(batch, chunks, heads, dtype=torch.int32),
        q.new_empty(batch, heads, slots, dtype=torch.int32),
        q.new_empty(batch, heads, len(rows), dtype=torch.int32),
        chunk,
    )

    def make_enter() -> Launch:
        return Launch(
            enter_kernel,
            chunks * heads * batch,
            [batch, tokens, chunks, *q.stride()[:3], *k.stride()[:3], *gate.stride()[:3]],
            HEADS=heads,
            GROUP=heads // q.shape[2],
            DIM=dim,
            D=padded(dim),
            C=chunk,
            HALVINGS=(chunk // 8).bit_length() - 1,
            SPLIT=dtype == torch.bfloat16,
            num_warps=frame_warps(padded(dim), chunk),
        )

    def make_steps() -> Launch:
        return Launch(
            steps_kernel,
            len(rows) * heads * batch,
            [batch, len(rows), chunks],
            HEADS=heads,
            C=chunk,
            WIDTH=128,
        )

    plan.once("enter", make_enter)(q, k, gate, found.q, found.k, found.halves, found.levels, table)
    plan.once("steps", make_steps)(found.levels, found.steps, found.counts, rows)
    return found


def leave(
    frames: Frames,
    dq: Tensor,
    dk: Tensor,
    gate: Tensor,
    flows: Tensor,
    blocks: Tensor,
    dtype: torch.dtype,
    plan: Once,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and the decays [B, T, HV, K] from those of the frames' q and k, in fp32.

    flows: [B, blocks, HV, K], <S, λ> at the end of each block of the table `blocks`. The frames' q
    and k and dq are written over. The gradients of q and k are of `dtype`.
    """
    batch, tokens, heads, dim = gate.shape
    same = dtype == frames.q.dtype
    q_gradient = frames.q if same else torch.empty_like(frames.q, dtype=dtype)
    k_gradient = frames.k if same else torch.empty_like(frames.k, dtype=dtype)

    def make() -> Launch:
        columns = min(padded(dim), 32)
        return Launch(
            leave_kernel,
            ceil_div(dim, columns) * len(blocks) * heads * batch,
            [batch, tokens, frames.levels.shape[1], len(blocks), *gate.stride()[:3]],
            HEADS=heads,
            DIM=dim,
            D=columns,
            C=frames.chunk,
            SPLIT=frames.q.dtype == torch.bfloat16,
            num_warps=frame_warps(columns, frames.chunk),
            num_stages=1,
        )

    outputs = q_gradient, k_gradient, dq
    plan.once("leave", make)(
        frames.q, frames.k, dq, dk, gate, flows, *outputs, frames.levels, blocks
    )
    return outputs
