"""Decay taken out of q and k, frame by frame, and its gradient (frame_kernels.py)."""

from dataclasses import dataclass, replace

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

    Or, as q and k, a and b of DPLR. plus: k⁺, if the delta rule asked for it, else k. chunk: tokens
    of the longest frame. parts: steps and counts of the parts of frames, if it asked, else of
    frames. The rest: see frame_kernels.py.
    """

    q: Tensor
    k: Tensor
    plus: Tensor
    halves: Tensor
    levels: Tensor
    steps: Tensor
    counts: Tensor
    parts: tuple[Tensor, Tensor]
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
    parts: int | None = None,
    beside: Frames | None = None,
) -> Frames:
    """The frames of q and k [B, T, H, K] under log decays [B, T, HV, K].

    block: for `tables.piece_rows`; chunk: 16, 32 or 64; dtype: of the new q and k; plan: of calls
    like this one; parts: for the delta rule, the most tokens that a part of a frame may have.
    beside: q and k are a and b of DPLR, and these are its q and k under the same decays.
    """
    batch, tokens, heads, _ = gate.shape
    dim = k.shape[3]
    table = plan.once("chunks", lambda: tables.cut_rows(pieces, chunk, chunk, q))
    chunks, slots = len(table), len(table) * (chunk // 8)
    rows = plan.once("pieces", lambda: tables.piece_rows(pieces, block, chunk, q))

    def factored() -> Tensor:
        return torch.empty(batch, tokens, heads, dim, dtype=dtype, device=q.device)

    q_out, k_out = factored(), factored()
    plus = factored() if parts else k_out
    if beside is not None:  # the same again is written there
        halves, levels = beside.halves, beside.levels
    else:
        halves = q.new_empty(batch, slots, heads, dim, dtype=torch.float32)
        levels = q.new_empty(batch, chunks, heads, dtype=torch.int32)

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
            PLUS=parts is not None,
            BEFORE=beside is not None,
            SPLIT=dtype == torch.bfloat16,
            num_warps=frame_warps(padded(dim), chunk) * (1 if beside is None else 2),
        )

    start = plan.once(("enter", beside is None), make_enter)
    start(q, k, gate, q_out, k_out, plus, halves, levels, table)
    if beside is not None:
        return replace(beside, q=q_out, k=k_out, plus=plus)

    def listed(most: int) -> tuple[Tensor, Tensor]:
        def make() -> Launch:
            return Launch(
                steps_kernel,
                len(rows) * heads * batch,
                [batch, len(rows), chunks],
                HEADS=heads,
                C=chunk,
                MOST=most,
                WIDTH=128,
            )

        steps = q.new_empty(batch, heads, slots, dtype=torch.int32)
        counts = q.new_empty(batch, heads, len(rows), dtype=torch.int32)
        plan.once(("steps", most), make)(levels, steps, counts, rows)
        return steps, counts

    whole = listed(chunk)
    shorter = listed(parts) if parts and parts < chunk else whole
    return Frames(q_out, k_out, plus, halves, levels, *whole, shorter, chunk)


def leave(
    frames: Frames,
    dq: Tensor,
    dk: Tensor,
    gate: Tensor,
    flows: Tensor,
    blocks: Tensor,
    dtype: torch.dtype,
    plan: Once,
    d_plus: Tensor | None = None,
    beside: tuple[Frames, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and the decays [B, T, HV, K] from those of the frames' q and k, in fp32.

    d_plus: the gradient of k⁺. flows: [B, blocks, HV, K], <S, λ> at the end of each block of the
    table `blocks`. The frames' q and k and dq are written over. The gradients of q and k are of
    `dtype`.

    beside: of DPLR, the frames of a and b, and their gradients, which become those of a and b.
    """
    batch, tokens, heads, dim = frames.k.shape
    same = dtype == frames.q.dtype
    q_gradient = frames.q if same else torch.empty_like(frames.q, dtype=dtype)
    k_gradient = frames.k if same else torch.empty_like(frames.k, dtype=dtype)
    plus, minus, d_minus = frames.plus, frames.k, dk
    if beside is not None:
        (plus, minus), (d_plus, d_minus) = (beside[0].q, beside[0].k), beside[1:]

    def make() -> Launch:
        columns = min(padded(dim), 32 if beside is None else 16)  # tiles of more tensors
        return Launch(
            leave_kernel,
            ceil_div(dim, columns) * len(blocks) * heads * batch,
            [batch, tokens, frames.levels.shape[1], len(blocks), *gate.stride()[:3]],
            HEADS=heads,
            DIM=dim,
            D=columns,
            C=frames.chunk,
            PLUS=d_plus is not None,
            BEFORE=beside is not None,
            SPLIT=frames.q.dtype == torch.bfloat16,
            num_warps=frame_warps(columns, frames.chunk),
            num_stages=1,
        )

    of_plus = dk if d_plus is None else d_plus
    inputs = frames.q, frames.k, plus, minus, dq, dk, of_plus, d_minus, gate, flows
    outputs = q_gradient, k_gradient, of_plus, d_minus, dq
    plan.once("leave", make)(*inputs, *outputs, frames.levels, blocks)
    return q_gradient, k_gradient, dq
