"""Linear attention with no, scalar or diagonal decay on GPUs: the Triton kernels, launched.

Forward: fold the pieces that hand a state on, scan, run. Backward: the same with gradients; dq goes
forward through the tokens again, dk and dv backwards, and nothing is kept from the forward pass but
the states that entered the pieces. Diagonal decay is first taken out of q and k (frames.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels import frames, scans, tables
from seqpar.kernels.launch import Launch, plan
from seqpar.kernels.passes import Passes, is_for_hopper, operand_dtype, products, ungroup
from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.state_kernels import fold_kernel, scan_kernel
from seqpar.kernels.strides import dense, named
from seqpar.kernels.transition import Decay, Identity, Transition
from seqpar.kernels.tuned import (
    BLOCK,
    HOPPER_WIDTHS,
    ceil_div,
    fold_config,
    padded,
    piece_tokens,
    run_config,
    scan_rows,
)


@dataclass(frozen=True)
class TritonLinear:
    """Implements `seqpar.kernels.family.Family`. decay: "none", "scalar" or "diagonal"."""

    decay: str

    @property
    def transition(self) -> Transition:
        return Identity() if self.decay == "none" else Decay()

    def piece_tokens(self, k: Tensor, v: Tensor) -> int:
        heads = v.shape[0] * v.shape[2]
        if is_for_hopper(k, v):  # a processor holds one program, two of small ones
            held = 1 if max(k.shape[3], v.shape[3]) > 64 else 2
            return piece_tokens(v.shape[1], ceil_div(heads, held), v.device)
        columns = run_config(k.shape[3], v.shape[3], v.dtype).columns
        held = 4
        programs = heads * ceil_div(v.shape[3], columns)
        return piece_tokens(v.shape[1], ceil_div(programs, held), v.device)

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
    ) -> "_Prepared":
        given = q, k
        q, k, v = dense(q), dense(k), dense(v)
        gate = dense(gates[0]) if gates else k
        calls = plan(pieces, self.decay, scale, q, k, v, gate)
        found, chunk = None, 64
        if self.decay != "diagonal":
            hopper = calls.once("hopper", lambda: scale > 0 and is_for_hopper(q, k, v))
        else:
            fits = scale > 0 and k.shape[3] in HOPPER_WIDTHS
            hopper = calls.once("hopper", lambda: fits and is_for_hopper(v))
            chunk = 64 if hopper else run_config(k.shape[3], v.shape[3], v.dtype).chunk
            operand = operand_dtype(q.dtype)
            found = frames.enter(q, k, gate, pieces, BLOCK[self.decay], chunk, operand, calls)
            q, k = found.q, found.k
        passes = Passes(self.decay, pieces, calls, hopper, chunk, gate, found)
        return _Prepared(passes, scale, given, q, k, v)

    def leave(
        self, A: Tensor, B: Tensor, pieces: Pieces, *, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        return scans.leave(self._scan, self.decay, A, B, pieces, backwards=backwards)

    def scan(
        self,
        A: Tensor,
        B: Tensor,
        pieces: Pieces,
        arriving: Tensor | None,
        states: Tensor,
        *,
        backwards: bool,
    ) -> None:
        scans.scan(self._scan, self.decay, A, B, pieces, arriving, states, backwards=backwards)

    def _scan(self, chains: int, values: dict[str, Any], A: Tensor, B: Tensor) -> Launch:
        """See `scans.Make`."""
        rows, columns = scan_rows(chains, values["DY"], B.device), padded(values["DZ"])
        return Launch(
            scan_kernel,
            chains * ceil_div(values["DY"], rows),
            **values,
            BY=rows,
            PADDED=columns,
            DECAY="key" if self.decay == "diagonal" else self.decay,
            num_warps=max(1, rows * columns // 256),
        )


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Implements `seqpar.kernels.family.Prepared`.

    given: the q and k of the call; with diagonal decay q and k are those of the passes' frames, at
    v's heads.
    """

    passes: Passes
    scale: float
    given: tuple[Tensor, Tensor]
    q: Tensor
    k: Tensor
    v: Tensor

    def summarize(self) -> tuple[Tensor, Tensor]:
        return self._fold(self.k, self.v, 1.0, reverse=False)

    def run(self, entering: Late) -> Tensor:
        operands = self.q, self.k, self.v
        return self.passes.run("o", operands, entering(), self.scale, self.v.dtype)

    def summarize_backward(self, do: Tensor) -> Tensor:
        return self._fold(self.q, do, self.scale, reverse=True)[1]

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        q, k, v, passes = self.q, self.k, self.v, self.passes
        framed = passes.frames is not None
        traces = passes.traces(k, v) if framed or any(wanted) else None
        dtype = torch.float32 if framed else v.dtype
        # what scalar decay is multiplied with is rounded, and that does not cancel
        split = passes.decay == "scalar" and traces is not None and not passes.hopper
        back = partial(
            passes.run, scale=self.scale, dtype=dtype, transposed=True, split=split, traces=traces
        )
        dq = back("dq", (do, v, k), entering, other=q)
        adjoints = leaving()
        dk = back("dk", (v, do, q), adjoints, reverse=True, other=k)
        dv = passes.run("dv", (k, q, do), adjoints, self.scale, v.dtype, reverse=True)
        found: list[Tensor | None] = []
        if passes.frames is not None and traces is not None:
            kept = passes.gate, traces.flows, passes.blocks, self.given[0].dtype, passes.calls
            dq, dk, d_gate = frames.leave(passes.frames, dq, dk, *kept)
            found = [d_gate.to(passes.gate.dtype)]
        elif traces is not None:
            found = [passes.d_gate(traces).to(passes.gate.dtype)]
        elif passes.decay != "none":
            found = [None]
        return [*map(ungroup, (dq, dk), self.given), dv, *found]

    def _fold(self, y: Tensor, z: Tensor, scale: float, *, reverse: bool) -> tuple[Tensor, Tensor]:
        passes = self.passes
        batch, _, heads, DZ = z.shape
        DY = y.shape[-1]
        table = passes.calls.once(
            ("summaries", reverse),
            lambda: tables.summary_rows(passes.pieces, reverse, passes.chunk, z),
        )
        width = {"none": 0, "scalar": 1, "diagonal": DY}[passes.decay]
        summaries = len(table)
        A = z.new_empty(batch, summaries, heads, width, int(width > 0), dtype=torch.float32)
        B = z.new_empty(batch, summaries, heads, DY, DZ, dtype=torch.float32)
        if not summaries:
            return A, B

        def make() -> Launch:
            hopper = passes.hopper and passes.frames is None
            config = fold_config(DY, DZ, z.dtype, hopper)
            blocks = ceil_div(DY, config.rows) * ceil_div(DZ, config.columns)
            operand, precision = products(z.dtype)
            return Launch(
                fold_kernel,
                blocks * heads * batch * summaries,
                scale=scale,
                batches=batch,
                pieces=len(passes.table),
                chunks=passes.chunks,
                **named(y=y, z=z, g=passes.gate),
                HEADS=heads,
                Y_GROUP=heads // y.shape[2],
                Z_GROUP=1,
                DY=DY,
                DZ=DZ,
                BY=config.rows,
                BZ=config.columns,
                C=passes.chunk if passes.frames else config.chunk,
                DECAY="key" if passes.decay == "diagonal" else passes.decay,
                REVERSE=reverse,
                OPERAND=operand,
                PRECISION=precision,
                num_warps=config.warps,
                STAGES=config.stages,
            )

        fold = passes.calls.once(("fold", reverse, z.stride()), make)
        fold(y, z, passes.gate, *passes.framed, A, B, table)
        return A, B
