"""DPLR (RWKV-7, arXiv 2503.14456) on GPUs: the delta rule with two tokens for each of its own.

S_t = (diag(e^g_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ. Relative to the middle of a frame nothing decays
(frame_kernels.py), and a token is two of the rule S' = S + k⁻ (v - k⁺ᵀ S)ᵀ of walks.py, β being 1:

              k⁺     k⁻    v    q
    first    -a⁺     b⁻    0    0        S + b⁻ (a⁺ᵀ S)
    second    0      k⁻    v    q⁺       S + k⁻ vᵀ

The state stays one, which matters: what a and b take from it and k and v add to it may each be much
larger than what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seqpar.kernels import frames, tables
from seqpar.kernels.family import Prepared
from seqpar.kernels.launch import plan
from seqpar.kernels.passes import Passes, is_for_hopper, operand_dtype, ungroup
from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.strides import dense
from seqpar.kernels.tuned import BLOCK, HOPPER_WIDTHS, run_config
from seqpar.kernels.walks import PART, DeltaPrepared, WalkFamily, prepared


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
    ) -> Prepared:
        q, k, dense_v, a, b, gate = map(dense, (q, k, v, *gates))
        calls = plan(pieces, "dplr", scale, q, k, dense_v, a, b, gate)
        fits = k.shape[3] in HOPPER_WIDTHS
        hopper = calls.once("hopper", lambda: fits and is_for_hopper(dense_v))
        chunk = 64 if hopper else run_config(k.shape[3], v.shape[3], v.dtype).chunk
        operand, block = operand_dtype(q.dtype), BLOCK["diagonal"]
        part = chunk if hopper else PART
        found = frames.enter(q, k, gate, pieces, block, chunk, operand, calls, part, (a, b))
        passes = Passes("diagonal", pieces.stretched(2), calls, hopper, chunk, gate, found)
        values = _second(dense_v)
        beta = calls.once("beta", lambda: torch.ones(1, device=v.device)).expand(values.shape[:3])
        made = found.q, found.plus, found.k, values, beta
        rule = prepared(passes, scale, operand, (q, k), *made)
        return _Prepared(rule, pieces, (q, k, v, *gates))


@dataclass(slots=True)
class _Prepared:
    """Implements `seqpar.kernels.family.Prepared`; given: the tensors of the call."""

    rule: DeltaPrepared
    pieces: Pieces
    given: tuple[Tensor, ...]
    _do: Tensor | None = field(default=None, init=False)  # as the second of two, once made

    def summarize(self) -> tuple[Tensor, Tensor]:
        return self.rule.summarize()

    def run(self, entering: Late) -> Tensor:
        return self.rule.run(entering)[:, 1::2].contiguous()

    def summarize_backward(self, do: Tensor) -> Tensor:
        self._do = _second(do)
        return self.rule.summarize_backward(self._do)

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        q, _, v, *_ = self.given
        passes = self.rule.passes
        do = _second(do) if self._do is None else self._do
        dq, dk, d_plus, dx, _, traces = self.rule.gradients(entering, do, leaving)
        assert passes.frames is not None
        assert traces is not None
        blocks = passes.calls.once(
            "blocks of inputs",
            lambda: tables.cut_rows(self.pieces, passes.block // 2, passes.chunk // 2, v),
        )
        kept = passes.gate, traces.flows, blocks, q.dtype, passes.calls
        dq, dk, d_gate, da, db = frames.leave(passes.frames, dq, dk, *kept, d_plus)
        dv = dx[:, 1::2].to(v.dtype, memory_format=torch.contiguous_format)
        found = *map(ungroup, (dq, dk), self.given[:2]), dv, da, db, d_gate
        return [dx.to(x.dtype) for dx, x in zip(found, self.given, strict=True)]


def _second(x: Tensor) -> Tensor:
    """x [B, T, H, D] as the second of every two tokens, of which the first are 0."""
    pairs = x.new_zeros(*x.shape[:2], 2, *x.shape[2:])
    pairs[:, :, 1] = x
    return pairs.flatten(1, 2)
