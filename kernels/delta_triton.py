"""The (gated) delta rule on GPUs: the Triton kernels, launched.

Forward: take decay out of q and k (frames.py), solve the steps' systems, summarise the pieces that
hand a state on, scan, walk for U; then o is linear attention's. Backward: the same, walk back for
dX; dq and dk are linear attention's again. Nothing is kept from the forward pass but the states
that entered the pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from seqpar.kernels import frames
from seqpar.kernels.delta_back_kernels import keys_kernel
from seqpar.kernels.launch import Launch, plan
from seqpar.kernels.passes import Passes, is_for_hopper, operand_dtype, ungroup
from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.strides import dense
from seqpar.kernels.tuned import (
    BLOCK,
    HOPPER_WIDTHS,
    ceil_div,
    run_config,
    walk_config,
)
from seqpar.kernels.walks import PART, WalkFamily, Walks


@dataclass(frozen=True)
class TritonDelta(WalkFamily):
    """Implements `seqpar.kernels.family.Family`: gates beta and, if decayed, log_decay."""

    decayed: bool

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
        beta, gate = gates[0], dense(gates[1]) if self.decayed else k
        calls = plan(pieces, "delta", self.decayed, scale, q, k, v, beta, gate)
        decay, found, chunk, plus = "diagonal" if self.decayed else "none", None, 64, k
        operand = operand_dtype(q.dtype)
        fits = k.shape[3] in HOPPER_WIDTHS and (self.decayed or is_for_hopper(q, k))
        hopper = calls.once("hopper", lambda: fits and is_for_hopper(v))
        if self.decayed:
            chunk = 64 if hopper else run_config(k.shape[3], v.shape[3], v.dtype).chunk
            found = frames.enter(q, k, gate, pieces, BLOCK[decay], chunk, operand, calls, PART)
            q, k, plus = found.q, found.k, found.plus
        passes = Passes(decay, pieces, calls, hopper, chunk, gate, found)
        return _Prepared(passes, scale, operand, given, q, plus, k, None, v, beta)


class _Prepared(Walks):
    """Implements `seqpar.kernels.family.Prepared`; `given` are the q and k of the call."""

    def run(self, entering: Late) -> Tensor:
        states = entering()
        u = self._empty()
        self._walk(u, u, states, states, states, states, self.passes.table)
        return self.passes.run("o", (self.q, self.minus, u), states, self.scale, self.v.dtype)

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        passes, minus = self.passes, self.minus
        traces = passes.traces(minus, self.v) if passes.frames is not None else None
        dtype = torch.float32 if passes.frames is not None else self.given[0].dtype
        u, r = self._empty(), self._empty()
        saved, flows = (traces.saved, traces.flows) if traces else (entering, entering)
        unused = entering, entering, passes.table
        self._walk(u, r, entering, saved, *unused, residual=True)
        # rounding does not cancel in the gradient of the decays, as steps are not these chunks
        forth = partial(
            passes.run, states=entering, transposed=True, split=passes.frames is not None
        )
        dq = forth("dq", (do, u, minus), scale=self.scale, dtype=dtype)
        adjoints = leaving()
        dx, d_beta = self._values_back(do, r, adjoints)
        d_plus = forth("d_plus", (dx, u, minus), scale=-1.0, dtype=torch.float32, strict=True)
        dk = self._keys_back(u, do, dx, d_plus, adjoints, saved, flows, dtype)
        found = [d_beta.to(self.beta.dtype)]
        if passes.frames is not None and traces is not None:
            gate = passes.gate
            kept = gate, traces.flows, passes.blocks, self.given[0].dtype, passes.calls
            dq, dk, d_gate = frames.leave(passes.frames, dq, dk, *kept, d_plus)
            if gate.shape[3] == 1:
                d_gate = d_gate.sum(3, keepdim=True)
            found.append(d_gate.to(gate.dtype))
        return [*map(ungroup, (dq, dk), self.given), dx.to(self.v.dtype), *found]

    def _values_back(self, do: Tensor, r: Tensor, adjoints: Tensor) -> tuple[Tensor, Tensor]:
        """dX and dβ [B, T, HV, 1]."""
        batch, tokens, heads, V = r.shape
        lines = ceil_div(V, self._config.columns)
        dx = self._empty()
        shares = r.new_empty(batch, heads, lines, tokens, dtype=torch.float32)
        self._walk_back(do, r, dx, shares, adjoints, adjoints, self.passes.table, residual=True)
        return dx, shares.sum(2).transpose(1, 2)[..., None]

    def _keys_back(
        self,
        u: Tensor,
        do: Tensor,
        dx: Tensor,
        d_plus: Tensor,
        adjoints: Tensor,
        saved: Tensor,
        flows: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """The gradient of k⁻; without decay, of k."""
        passes = self.passes
        dk = torch.empty_like(d_plus, dtype=dtype)

        def make() -> Launch:
            strides = (s for x in (do, self.q, self.plus) for s in x.stride()[:3])
            blocks = len(passes.blocks)
            numbers = [self.scale, *self._counts(adjoints), saved.shape[1], blocks, *strides]
            K, (batch, _, heads, V) = dk.shape[3], self.v.shape
            walks = batch * heads * len(passes.table)
            framed = passes.frames is not None
            config = walk_config(V, K, self.v.dtype, framed, walks, dk.device)
            given = self._constants | {
                "BK": config.columns,
                "BV": config.rows,
                "SPAN": passes.block,
                "num_warps": config.warps,
                "STAGES": config.stages,
            }
            return Launch(keys_kernel, walks * ceil_div(K, config.columns), numbers, **given)

        keys = passes.calls.once(("keys", adjoints.shape[1]), make)
        tensors = u, do, dx, self.q, self.plus, d_plus, dk, adjoints, saved, flows
        keys(*tensors, *self._parts, passes.table)
        return dk
