"""Decay taken out of q and k, frame by frame, and its gradient (frame_kernels.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.kernels import tables
from seqpar.kernels.frame_kernels import enter_kernel, leave_kernel, steps_kernel
from seqpar.kernels.launch import Launch
from seqpar.kernels.once import Once
from seqpar.kernels.pieces import Pieces
from seqpar.kernels.strides import named
from seqpar.kernels.tuned import ceil_div, frame_warps, leave_tile, padded


@dataclass(frozen=True)
class Frames:
    """q and k [B, T, HV, K] relative to their frames, and what says where those lie.

    plus: k⁺, if the delta rule asked for it, else k. chunk: tokens of the longest frame. parts:
    steps and counts of the parts of frames, if it asked, else of frames. every: 2 for DPLR, where
    all tokens but those of its inputs are counted twice, else 1. The rest: see frame_kernels.py.
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
    every: int


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
    pairs: tuple[Tensor, Tensor] | None = None,
) -> Frames:
    """The frames of q and k [B, T, H, K] under log decays [B, T, HV, K].

    block: for `tables.piece_rows`; chunk: 16, 32 or 64; dtype: of the new q and k; plan: of calls
    like this one; parts: for the delta rule, the most tokens that a part of a frame may have.
    pairs: a and b [B, T, HV, K] of DPLR; block, chunk and parts count each token twice then.
    """
    batch, tokens, heads, _ = gate.shape
    dim, every = k.shape[3], 1 if pairs is None else 2
    size = chunk // every
    table = plan.once("entering", lambda: tables.cut_rows(pieces, size, size, q))
    chunks, slots = len(table), len(table) * (chunk // 8)
    rows = plan.once("pieces", lambda: tables.piece_rows(pieces.stretched(every), block, chunk, q))

    def factored() -> Tensor:
        return torch.empty(batch, every * tokens, heads, dim, dtype=dtype, device=q.device)

    q_out, k_out = factored(), factored()
    plus = factored() if parts else k_out
    halves = q.new_empty(batch, slots, heads, dim, dtype=torch.float32)
    levels = q.new_empty(batch, chunks, heads, dtype=torch.int32)

    def start(x: Tensor, y: Tensor, x_out: Tensor, *, before: bool) -> None:
        def make() -> Launch:
            return Launch(
                enter_kernel,
                chunks * heads * batch,
                tokens=tokens,
                chunks=chunks,
                **named(q=x, k=y, g=gate),
                HEADS=heads,
                GROUP=heads // x.shape[2],
                DIM=dim,
                D=padded(dim),
                C=size,
                HALVINGS=(size // 8).bit_length() - 1,
                PLUS=parts is not None and pairs is None,
                PAIRS=pairs is not None,
                BEFORE=before,
                SPLIT=dtype == torch.bfloat16,
                num_warps=frame_warps(padded(dim), size) * (2 if before else 1),
            )

        launch = plan.once(("enter", before), make)
        launch(x, y, gate, x_out, k_out, plus, halves, levels, table)

    start(q, k, q_out, before=False)
    if pairs is not None:
        start(*pairs, plus, before=True)

    def listed(most: int) -> tuple[Tensor, Tensor]:
        def make() -> Launch:
            return Launch(
                steps_kernel,
                len(rows) * heads * batch,
                pieces=len(rows),
                chunks=chunks,
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
    return Frames(q_out, k_out, plus, halves, levels, *whole, shorter, chunk, every)


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
) -> tuple[Tensor, ...]:
    """Gradients of q, k and the decays [B, T, HV, K] from those of the frames' q and k, in fp32.

    Of DPLR, those of a and b follow. d_plus: the gradient of k⁺. flows: [B, blocks, HV, K],
    <S, λ> at the end of each block of the table `blocks`, of the inputs' tokens. All may be written
    over. The gradients but the decays' are of `dtype`.
    """
    batch, tokens, heads, dim = *gate.shape[:3], frames.k.shape[3]
    size, pairs = frames.chunk // frames.every, frames.every == 2

    def room(x: Tensor, dtype: torch.dtype) -> Tensor:
        """In x's own room, where that is of this form."""
        if x.dtype == dtype and not pairs:
            return x
        return x.new_empty(batch, tokens, heads, dim, dtype=dtype)

    found = room(frames.q, dtype), room(frames.k, dtype)
    more = (room(frames.plus, dtype), room(frames.k, dtype)) if pairs else ()
    d_gate = room(dq, torch.float32)

    def make() -> Launch:
        columns, warps = leave_tile(dim, size, pairs)
        return Launch(
            leave_kernel,
            ceil_div(dim, columns) * len(blocks) * heads * batch,
            tokens=tokens,
            chunks=frames.levels.shape[1],
            blocks=len(blocks),
            **named(g=gate),
            HEADS=heads,
            DIM=dim,
            D=columns,
            C=size,
            PLUS=d_plus is not None,
            PAIRS=pairs,
            SPLIT=frames.q.dtype == torch.bfloat16,
            num_warps=warps,
            num_stages=1,
        )

    of_plus = dk if d_plus is None else d_plus
    inputs = frames.q, frames.k, frames.plus, dq, dk, of_plus, gate, flows
    outputs = *found, *(more or found), d_gate
    plan.once("leave", make)(*inputs, *outputs, frames.levels, blocks)
    return *found, d_gate, *more
