"""DPLR (RWKV-7) on GPUs: the Triton kernels, launched (dplr_kernels.py).

Forward: take decay out of q, k, a and b (frames.py), solve the steps' systems, summarise the pieces
that hand a state on, scan, walk for U, and a pass for o. Backward: the same, walk back for dX, and
passes for the gradients. Nothing is kept from the forward pass but the states that entered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.kernels import frames
from seqpar.kernels.dplr_kernels import pairs_kernel
from seqpar.kernels.frames import Frames
from seqpar.kernels.launch import Launch, plan
from seqpar.kernels.passes import Passes, Traces, operand_dtype, products, traced, ungroup
from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.strides import dense
from seqpar.kernels.tuned import BLOCK, ceil_div, dplr_config
from seqpar.kernels.walks import PART, WalkFamily, Walks


@dataclass(frozen=True)
class TritonDPLR(WalkFamily):
    """Implements `seqpar.kernels.family.Family`: gates a, b and log_decay, [B, T, HV, K] each."""

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
    ) -> "_Prepared":
        v = dense(v)
        a, b, gate = map(dense, gates)
        inputs = dense(q), dense(k)
        calls = plan(pieces, "dplr", scale, *inputs, v, a, b, gate)
        operand = operand_dtype(q.dtype)
        kept = gate, pieces, BLOCK["diagonal"], PART, operand, calls
        outer = frames.enter(inputs[0], inputs[1], *kept)
        inner = frames.enter(a, b, *kept, beside=outer)
        passes = Passes("diagonal", pieces, calls, False, PART, gate, outer)
        beta = calls.once("beta", lambda: -torch.ones(1, device=v.device)).expand(v.shape[:3])
        made = outer.q, inner.q, inner.k, outer.k, v, beta
        return _Prepared(passes, scale, operand, (q, k, *gates), *made, outer, inner)


@dataclass(slots=True)
class _Prepared(Walks):
    """Implements `seqpar.kernels.family.Prepared`.

    given: q, k and the gates of the call. plus, minus and keys are a⁺, b⁻ and k⁻. outer, inner: the
    frames of q and k, and of a and b.
    """

    outer: Frames
    inner: Frames

    def run(self, entering: Late) -> Tensor:
        states = entering()
        u = self._empty()
        self._walk(u, u, states, states, states, self.passes.table)
        o = torch.empty_like(self.v, memory_format=torch.contiguous_format)
        self._pass("o", (self.q, self.q, self.minus, u, self._keys, self.v), o, o, states)
        return o

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        passes, a, b, k, v = self.passes, self.plus, self.minus, self._keys, self.v
        traces = passes.traces(k, v)
        u, dx = self._empty(), self._empty()
        self._walk(u, u, entering, entering, entering, passes.table)
        adjoints = leaving()
        self._walk_back(do, u, dx, u, adjoints, adjoints, passes.table)
        dv = torch.empty_like(v, memory_format=torch.contiguous_format)
        self._pass("dv", (k, k, self.q, do, a, dx), dv, dv, adjoints)
        dq, da, dk, db = (torch.empty_like(k, dtype=torch.float32) for _ in range(4))
        self._pass("dq", (do, dx, u, b, v, k), dq, da, entering, traces)
        self._pass("dk", (v, u, do, self.q, dx, a), dk, db, adjoints, traces)
        kept = passes.gate, traces.flows, passes.blocks, self.given[0].dtype, passes.calls
        dq, dk, d_gate = frames.leave(self.outer, dq, dk, *kept, beside=(self.inner, da, db))
        gates = zip((da, db, d_gate), self.given[2:], strict=True)
        ungrouped = map(ungroup, (dq, dk), self.given[:2])
        return [*ungrouped, dv, *(dx.to(gate.dtype) for dx, gate in gates)]

    def _pass(
        self,
        name: str,
        operands: tuple[Tensor, ...],
        out1: Tensor,
        out2: Tensor,
        states: Tensor,
        traces: Traces | None = None,
    ) -> None:
        """A pass of `pairs_kernel` over x1, x2, y1, z1, y2, z2; traces: of one with two outputs."""
        passes, (batch, _, heads, DZ) = self.passes, out1.shape
        saved, _, flows = traced(traces, name, states)

        def make() -> Launch:
            DY = operands[0].shape[3]
            walks = batch * heads * len(passes.table)
            config = dplr_config(DY, DZ, self.v.dtype, walks, self.v.device)
            operand, precision = products(self.v.dtype)
            counts = *self._counts(states), saved.shape[1], len(passes.blocks)
            strides = (stride for x in operands for stride in x.stride()[:3])
            return Launch(
                pairs_kernel,
                ceil_div(DZ, config.columns) * walks,
                [self.scale, *counts, *strides],
                HEADS=heads,
                DY=DY,
                DZ=DZ,
                BY=config.rows,
                BZ=config.columns,
                C=passes.chunk,
                SPAN=passes.block,
                REVERSE=name in ("dv", "dk"),
                TWO=traces is not None,
                OPERAND=operand,
                PRECISION=precision,
                STAGES=config.stages,
                num_warps=config.warps,
            )

        run = passes.calls.once((name, states.shape[1]), make)
        run(*operands, out1, out2, states, saved, flows, *passes.framed, passes.table)
