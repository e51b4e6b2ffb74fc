"""The (gated) delta rule on GPUs: the Triton kernels, launched.

Forward: take diagonal decay out of q and k (frames.py), solve the steps' systems, summarise the
pieces that hand a state on, scan, walk for U; then o is linear attention's. Backward: the same,
walk back for dX; dq and dk are linear attention's again. Nothing is kept from the forward pass but
the states that entered the pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from seqpar.kernels import frames
from seqpar.kernels.delta_back_kernels import keys_kernel
from seqpar.kernels.family import Prepared
from seqpar.kernels.launch import Launch, plan
from seqpar.kernels.passes import (
    Passes,
    Traces,
    is_for_hopper,
    operand_dtype,
    traced,
    ungroup,
)
from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.strides import dense
from seqpar.kernels.tuned import (
    BLOCK,
    HOPPER_WIDTHS,
    Config,
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
    ) -> Prepared:
        given = q, k
        q, k, v = dense(q), dense(k), dense(v)
        beta, gate = gates[0], dense(gates[1]) if self.decayed else k
        decay = "none"
        if self.decayed:
            decay = "scalar" if gate.shape[3] == 1 else "diagonal"
        calls = plan(pieces, "delta", decay, scale, q, k, v, beta, gate)
        found, chunk, plus, operand = None, 64, k, operand_dtype(q.dtype)
        framed = decay == "diagonal"
        fits = k.shape[3] in HOPPER_WIDTHS and (decay != "scalar" or scale > 0)
        fits = fits and (framed or is_for_hopper(q, k))
        hopper = calls.once("hopper", lambda: fits and is_for_hopper(v))
        if framed:
            chunk = 64 if hopper else run_config(k.shape[3], v.shape[3], v.dtype).chunk
            part = chunk if hopper else PART
            found = frames.enter(q, k, gate, pieces, BLOCK[decay], chunk, operand, calls, part)
            q, k, plus = found.q, found.k, found.plus
        passes = Passes(decay, pieces, calls, hopper, chunk, gate, found)
        kind = DeltaPrepared
        if hopper:
            from seqpar.kernels.hopper_delta import HopperDelta  # Gluon only where it is used

            kind = HopperDelta
        return kind(passes, scale, operand, given, q, plus, k, None, v, beta)


class DeltaPrepared(Walks):
    """Implements `seqpar.kernels.family.Prepared`; `given` are the q and k of the call."""

    def run(self, entering: Late) -> Tensor:
        states = entering()
        u = self._empty()
        self._walk(u, u, states, states, states, self.passes.table)
        self._solved = None  # its room is o's
        operands = self.q, self.minus, u
        return self.passes.run("o", operands, states, self.scale, self.v.dtype, exact=True)

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        passes, minus, found = self.passes, self.minus, self.passes.frames
        decayed = passes.decay != "none"
        dtype = self.given[0].dtype if found is None else torch.float32
        u, r = self._empty(), self._empty()
        self._walk(u, r, entering, entering, entering, passes.table, residual=True)
        traces = passes.traces(minus, self.v, self._key_lines) if decayed else None
        # rounding would not cancel in the gradient of the decays
        forth = partial(
            passes.run, states=entering, dtype=dtype, transposed=True, split=decayed, exact=True
        )
        dq = forth("dq", (do, u, minus), scale=self.scale, other=self.q, traces=traces)
        adjoints = leaving()
        dx, d_beta = self._values_back(do, r, adjoints)
        del r
        self._solved = None  # their room is for what follows
        of_plus = traces if found is None else None  # otherwise `frames.leave` finds its share
        operands = dx, u, minus
        d_plus = forth("d_plus", operands, scale=-1.0, strict=True, other=self.plus, traces=of_plus)
        dk = self._keys_back(u, do, dx, d_plus, adjoints, traces)
        gradients: list[Tensor | None] = [d_beta.to(self.beta.dtype)]
        if traces is not None:
            gate = passes.gate
            if found is not None:
                kept = gate, traces.flows, passes.blocks, self.given[0].dtype, passes.calls
                dq, dk, d_gate = frames.leave(found, dq, dk, *kept, d_plus)
            else:
                d_gate = passes.d_gate(traces)
            gradients.append(d_gate.to(gate.dtype))
        return [*map(ungroup, (dq, dk), self.given), dx.to(self.v.dtype), *gradients]

    def _values_back(self, do: Tensor, r: Tensor, adjoints: Tensor) -> tuple[Tensor, Tensor]:
        """dX and dβ [B, T, HV, 1]."""
        batch, tokens, heads, _ = r.shape
        dx = self._empty()
        shares = r.new_empty(batch, heads, self._value_lines, tokens, dtype=torch.float32)
        self._walk_back(do, r, dx, shares, adjoints, adjoints, self.passes.table)
        return dx, shares.sum(2).transpose(1, 2)[..., None]

    @property
    def _value_lines(self) -> int:
        """How many shares of dβ there are."""
        return ceil_div(self.v.shape[3], self._config.columns)

    @property
    def _key_lines(self) -> int:
        """How many shares of the decays' gradient the keys' kernel leaves."""
        return ceil_div(self.minus.shape[3], self._keys_config.columns)

    @property
    def _keys_config(self) -> Config:
        """Of the keys' kernel: rows of v, columns of k."""
        (batch, _, heads, V), K = self.v.shape, self.minus.shape[3]
        walks = batch * heads * len(self.passes.table)
        framed = self.passes.frames is not None
        return walk_config(V, K, self.v.dtype, framed, walks, self.v.device)

    def _keys_back(
        self,
        u: Tensor,
        do: Tensor,
        dx: Tensor,
        d_plus: Tensor,
        adjoints: Tensor,
        traces: Traces | None,
    ) -> Tensor:
        """The gradient of k⁻; without frames, of k, in d_plus's room."""
        passes = self.passes
        dk = d_plus if passes.frames is None else torch.empty_like(d_plus)
        saved, shares, flows = traced(traces, "dk", adjoints)

        def make() -> Launch:
            tensors = do, self.q, self.plus, passes.gate
            strides = (s for x in tensors for s in x.stride()[:3])
            blocks = len(passes.blocks)
            numbers = [self.scale, *self._counts(adjoints), saved.shape[1], blocks, *strides]
            config = self._keys_config
            given = self._constants | {
                "BK": config.columns,
                "BV": config.rows,
                "SPAN": passes.block,
                "num_warps": config.warps,
                "STAGES": config.stages,
            }
            programs = self._key_lines * self._programs(passes.table)
            return Launch(keys_kernel, programs, numbers, **given)

        keys = passes.calls.once(("keys", adjoints.shape[1]), make)
        tensors = u, do, dx, self.q, self.plus, d_plus, dk, passes.gate, adjoints, saved
        keys(*tensors, shares, flows, *self._parts, passes.table)
        return dk
