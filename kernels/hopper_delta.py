"""The (gated) delta rule on Hopper: kernels of its own, launched.

As in delta_triton.py, but in steps of 64 tokens, which are the chunks of the passes; so one decay a
head needs no frames, and rounded scores are the same in all passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels import frames, tables
from seqpar.kernels.hopper import CHUNK, tiles
from seqpar.kernels.hopper_keys import keys_hopper_kernel
from seqpar.kernels.hopper_solve import solve_hopper_kernel
from seqpar.kernels.hopper_walk import walk_hopper_kernel
from seqpar.kernels.hopper_walk_back import walk_back_hopper_kernel
from seqpar.kernels.launch import Launch
from seqpar.kernels.passes import Passes, Traces, ungroup
from seqpar.kernels.pieces import Late

REGISTERS = 232  # a thread, of the warpgroups that walk; the one that brings tiles needs few


@dataclass(slots=True)
class HopperDelta:
    """Implements `seqpar.kernels.family.Prepared`.

    given: q and k of the call. q, plus, minus: q⁺, k⁺ and k⁻ of delta_kernels.py, where there are
    frames; otherwise q, k and k.
    """

    passes: Passes
    scale: float
    given: tuple[Tensor, Tensor]
    q: Tensor
    plus: Tensor
    minus: Tensor
    v: Tensor
    beta: Tensor
    _solved: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def summarize(self) -> tuple[Tensor, Tensor]:
        table = self._summaries(reverse=False)
        A, B = (self._states(len(table), x.shape[3]) for x in (self.minus, self.v))
        if len(table):
            self._walk(self.v, self.v, B, A, B, table, summary=True)
        return A, B

    def run(self, entering: Late) -> Tensor:
        states = entering()
        u = self._like(self.v)
        self._walk(u, u, states, states, states, self.passes.table)
        operands = self.q, self.minus, u
        return self.passes.run("o", operands, states, self.scale, self.v.dtype, exact=True)

    def summarize_backward(self, do: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        table = self._summaries(reverse=True)
        dB = self._states(len(table), self.v.shape[3])
        if len(table):
            self._walk_back(do, do, do, dB, dB, dB, table, summary=True)
        return self.passes.pieces.passed(A).mT, dB

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        passes, minus = self.passes, self.minus
        framed, decayed = passes.frames is not None, passes.decay != "none"
        traces = passes.traces(minus, self.v) if decayed else None
        dtype = torch.float32 if framed else self.v.dtype
        u, r = self._like(self.v), self._like(self.v)
        self._walk(u, r, entering, entering, entering, passes.table, residual=True)
        how: dict[str, Any] = {"transposed": True, "split": decayed, "exact": True}
        rest = entering, self.scale, dtype
        dq = passes.run("dq", (do, u, minus), *rest, other=self.q, traces=traces, **how)
        adjoints = leaving()
        dx = self._like(self.v)
        shares = torch.empty_like(u[..., 0], dtype=torch.float32)
        shares = self._shares(self.v)
        self._walk_back(do, r, dx, shares, adjoints, adjoints, passes.table)
        del r
        d_beta = shares.sum(2).transpose(1, 2)[..., None].to(self.beta.dtype)
        how |= {"strict": True, "other": minus, "traces": None if framed else traces}
        d_plus = passes.run("d_plus", (dx, u, minus), entering, 1.0, dtype, **how)
        dk, shares = self._keys_back(u, do, dx, d_plus, adjoints, traces)
        found = [d_beta]
        if traces is not None and passes.frames is not None:
            kept = passes.gate, traces.flows, passes.blocks, self.v.dtype, passes.calls
            dq, dk, d_gate = frames.leave(passes.frames, dq, dk, *kept, d_plus)
            if passes.gate.shape[3] == 1:
                d_gate = d_gate.sum(3, keepdim=True)
            found.append(d_gate.to(passes.gate.dtype))
        elif traces is not None:
            found.append(passes.d_gate(traces).to(passes.gate.dtype))
        return [*map(ungroup, (dq, dk), self.given), dx, *found]
