"""The (gated) delta rule on GPUs: the Triton kernels, launched.

Forward: take decay out of q and k (frames.py), solve the steps' systems, summarise the pieces that
hand a state on, scan, walk for U; then o is linear attention's. Backward: the same, walk back for
dX; dq and dk are linear attention's again. Nothing is kept from the forward pass but the states
that entered the pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from seqpar.kernels import frames, tables
from seqpar.kernels.chunked import scan
from seqpar.kernels.delta_back_kernels import keys_kernel, walk_back_kernel
from seqpar.kernels.delta_kernels import STEP, solve_kernel, walk_kernel
from seqpar.kernels.launch import Launch, plan
from seqpar.kernels.passes import Passes, dense, is_for_hopper, products, ungroup
from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.transition import Dense, Transition
from seqpar.kernels.tuned import (
    BLOCK,
    Config,
    delta_piece_tokens,
    run_config,
    walk_config,
)

PART = STEP.value


@dataclass(frozen=True)
class TritonDelta:
    """Implements `seqpar.kernels.family.Family`: gates beta and, if decayed, log_decay."""

    decayed: bool

    @property
    def transition(self) -> Transition:
        return Dense()

    def piece_tokens(self, k: Tensor, v: Tensor) -> int | None:
        return delta_piece_tokens(v.shape[1], v.shape[0] * v.shape[2], v.device)

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
        operand = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        fits = k.shape[3] in (64, 128) and (self.decayed or is_for_hopper(q, k))
        hopper = calls.once("hopper", lambda: fits and is_for_hopper(v))
        if self.decayed:
            chunk = 64 if hopper else run_config(k.shape[3], v.shape[3], v.dtype).chunk
            found = frames.enter(q, k, gate, pieces, BLOCK[decay], chunk, operand, calls, PART)
            q, k, plus = found.q, found.k, found.plus
        passes = Passes(decay, pieces, calls, hopper, chunk, gate, found)
        return _Prepared(passes, scale, operand, given, q, plus, k, v, beta)

    def scan(
        self,
        A: Tensor,
        B: Tensor,
        pieces: Pieces,
        arriving: Tensor,
        states: Tensor | None,
        *,
        backwards: bool,
    ) -> Tensor:
        return scan(self.transition, A, B, pieces, arriving, states, backwards=backwards)


@dataclass(slots=True)
class _Prepared:
    """Implements `seqpar.kernels.family.Prepared`.

    operand: what products are formed of. given: the q and k of the call. q, plus, minus: q⁺, k⁺ and
    k⁻ of delta_kernels.py; without decay q, k and k. solved: T, when it is first needed.
    """

    passes: Passes
    scale: float
    operand: torch.dtype
    given: tuple[Tensor, Tensor]
    q: Tensor
    plus: Tensor
    minus: Tensor
    v: Tensor
    beta: Tensor
    _solved: Tensor | None = None

    def summarize(self) -> tuple[Tensor, Tensor]:
        A, B, table = self._summaries(reverse=False)
        if len(table):
            self._walk(B, B, B, B, A, B, table, summary="AB")
        return A, B

    def run(self, entering: Late) -> Tensor:
        states = entering()
        u = self._empty()
        self._walk(u, u, states, states, states, states, self.passes.table)
        return self.passes.run("o", (self.q, self.minus, u), states, self.scale, self.v.dtype)

    def summarize_backward(self, do: Tensor) -> tuple[Tensor, Tensor]:
        A, B, table = self._summaries(reverse=True)
        if len(table):
            self._walk(B, B, B, B, A, B, table, summary="A")
            self._walk_back(do, do, do, B, B, B, table, summary=True)
        return A.mT, B

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

    def _summaries(self, *, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Room for A and B, and `tables.summary_rows`."""
        passes, (batch, _, heads, V) = self.passes, self.v.shape
        table = passes.calls.once(
            ("summaries", reverse),
            lambda: tables.summary_rows(passes.pieces, reverse, passes.chunk, self.v),
        )
        K = self.minus.shape[3]
        A, B = (
            self.v.new_empty(batch, len(table), heads, K, columns, dtype=torch.float32)
            for columns in (K, V)
        )
        return A, B, table

    def _empty(self) -> Tensor:
        """Room for U, R or dX."""
        return torch.empty(self.v.shape, dtype=self.operand, device=self.v.device)

    def _values_back(self, do: Tensor, r: Tensor, adjoints: Tensor) -> tuple[Tensor, Tensor]:
        """dX and dβ [B, T, HV, 1]."""
        batch, tokens, heads, V = r.shape
        lines = triton.cdiv(V, self._config.columns)
        dx = self._empty()
        shares = r.new_empty(batch, heads, lines, tokens, dtype=torch.float32)
        self._walk_back(do, r, dx, shares, adjoints, adjoints, self.passes.table)
        return dx, shares.sum(2).transpose(1, 2)[..., None]

    @property
    def _config(self) -> Config:
        """Of the walks."""
        batch, _, heads, V = self.v.shape
        walks = batch * heads * len(self.passes.pieces.spans)
        framed = self.passes.frames is not None
        return walk_config(self.minus.shape[3], V, self.v.dtype, framed, walks, self.v.device)

    def _walk(
        self,
        u: Tensor,
        r: Tensor,
        entering: Tensor,
        saved: Tensor,
        A: Tensor,
        B: Tensor,
        table: Tensor,
        *,
        summary: str = "",
        residual: bool = False,
    ) -> None:
        """For U and R, or summaries ("AB" or "A"), of the pieces in `table`."""

        def make() -> Launch:
            strides = self.minus.stride()[:3], self.v.stride()[:3], self.beta.stride()[:3]
            counts = *self._counts(entering), saved.shape[1]
            numbers = [*counts, *(stride for x in strides for stride in x)]
            given = self._constants | {"SUMMARY": summary, "RESIDUAL": residual}
            given["SPAN"] = self.passes.block
            wanted = {"": (B,), "A": (A,), "AB": (A, B)}[summary]
            columns = (x.shape[4] for x in wanted)
            return Launch(walk_kernel, self._programs(table, *columns), numbers, **given)

        kind = "walk", summary, residual, entering.shape[1]
        walk = self.passes.calls.once(kind, make)
        inputs = self.plus, self.minus, self.v, self.beta, self.solved
        walk(*inputs, u, r, entering, saved, A, B, *self._parts, table)

    def _walk_back(
        self,
        do: Tensor,
        r: Tensor,
        dx: Tensor,
        shares: Tensor,
        leaving: Tensor,
        B: Tensor,
        table: Tensor,
        *,
        summary: bool = False,
    ) -> None:
        def make() -> Launch:
            strides = (x.stride()[:3] for x in (self.q, self.minus, do, self.beta))
            numbers = [self.scale, *self._counts(leaving), *(s for x in strides for s in x)]
            given = self._constants | {"SUMMARY": summary}
            programs = self._programs(table, self.v.shape[3])
            return Launch(walk_back_kernel, programs, numbers, **given)

        walk = self.passes.calls.once(("walk back", summary, leaving.shape[1]), make)
        inputs = self.q, self.plus, self.minus, do, r, self.beta, self.solved
        walk(*inputs, dx, shares, leaving, B, *self._parts, table)

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
            return Launch(keys_kernel, walks * triton.cdiv(K, config.columns), numbers, **given)

        keys = passes.calls.once(("keys", adjoints.shape[1]), make)
        tensors = u, do, dx, self.q, self.plus, d_plus, dk, adjoints, saved, flows
        keys(*tensors, *self._parts, passes.table)
        return dk

    @property
    def solved(self) -> Tensor:
        """T [B, HV, T, 32]."""
        if self._solved is None:
            self._solved = self._solve()
        return self._solved

    def _solve(self) -> Tensor:
        passes, (batch, tokens, heads, _) = self.passes, self.v.shape
        solved = self.v.new_empty(batch, heads, tokens, PART, dtype=self.operand)
        chunk = passes.chunk
        table = passes.calls.once(
            "chunks", lambda: tables.cut_rows(passes.pieces, chunk, chunk, self.v)
        )

        def make() -> Launch:
            strides = (s for x in (self.minus, self.beta) for s in x.stride()[:3])
            given = self._constants
            kept = ("HEADS", "GROUP", "DK", "BK", "C", "FRAMED", "OPERAND", "PRECISION")
            return Launch(
                solve_kernel,
                len(table) * (chunk // PART) * heads * batch,
                [batch, tokens, len(table), *strides],
                **{name: given[name] for name in kept},
                num_warps=1,
            )

        levels = table if passes.frames is None else passes.frames.levels
        solve = passes.calls.once("solve", make)
        solve(self.plus, self.minus, self.beta, solved, levels, table)
        return solved

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """halves, steps and counts of the parts of frames; any tensors where there are none."""
        found = self.passes.frames
        return self.passes.framed if found is None else (found.halves, *found.parts)

    def _counts(self, states: Tensor) -> tuple[int, ...]:
        """batches, tokens, pieces, chunks, slots."""
        chunks = 0 if self.passes.frames is None else self.passes.frames.levels.shape[1]
        return *self.v.shape[:2], len(self.passes.table), chunks, states.shape[1]

    def _programs(self, table: Tensor, *columns: int) -> int:
        blocks = sum(triton.cdiv(count, self._config.columns) for count in columns)
        return blocks * self.v.shape[0] * self.v.shape[2] * len(table)

    @property
    def _constants(self) -> dict[str, Any]:
        config = self._config
        heads = self.v.shape[2]
        operand, precision = products(self.v.dtype)
        return {
            "HEADS": heads,
            "GROUP": heads // self.q.shape[2],
            "DK": self.minus.shape[3],
            "DV": self.v.shape[3],
            "BK": config.rows,
            "BV": config.columns,
            "C": self.passes.chunk,
            "FRAMED": self.passes.frames is not None,
            "OPERAND": operand,
            "PRECISION": precision,
            "STAGES": config.stages,
            "num_warps": config.warps,
        }
