"""The delta rule on GPUs, of which DPLR is made as well: the Triton kernels, launched.

See delta_kernels.py. Forward: solve the steps' systems, summarise the pieces that hand a state on,
scan, walk for U; then o is linear attention's. Backward: the same, walk back for dX; dq and dk are
linear attention's again. Nothing is kept from the forward pass but the states that entered the
pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels import frames, tables
from seqpar.kernels.chunked import leave, scan
from seqpar.kernels.delta_back_kernels import keys_kernel, walk_back_kernel
from seqpar.kernels.delta_kernels import STEP, solve_kernel, walk_kernel
from seqpar.kernels.launch import Launch
from seqpar.kernels.passes import Passes, Traces, products, traced, ungroup
from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.strides import named
from seqpar.kernels.transition import Dense, Transition
from seqpar.kernels.tuned import (
    HOPPER_WIDTHS,
    Config,
    ceil_div,
    delta_piece_tokens,
    is_hopper,
    walk_config,
)

PART: int = STEP.value


class WalkFamily:
    """Implements `seqpar.kernels.family.Family` but for `prepare`."""

    @property
    def transition(self) -> Transition:
        return Dense()

    def piece_tokens(self, k: Tensor, v: Tensor) -> int | None:
        return delta_piece_tokens(v.shape[1], v.shape[0] * v.shape[2], v.device)

    def leave(
        self, A: Tensor, B: Tensor, pieces: Pieces, *, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        if not _scans_on_hopper(A, B):
            return leave(self.transition, A, B, pieces, backwards=backwards)
        from seqpar.kernels.hopper_delta import leave_ranges  # Gluon only where it is used

        return leave_ranges(A, B, pieces, backwards=backwards)

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
        if not _scans_on_hopper(A, B):
            scan(self.transition, A, B, pieces, arriving, states, backwards=backwards)
            return
        from seqpar.kernels.hopper_delta import scan_states

        scan_states(A, B, pieces, arriving, states, backwards=backwards)


def _scans_on_hopper(A: Tensor, B: Tensor) -> bool:
    """Whether Hopper's kernel passes states on; where nothing is, there is no A to bring."""
    fits = {A.shape[-1], B.shape[-1]} <= {*HOPPER_WIDTHS}
    return bool(A.shape[1]) and is_hopper(B.device) and fits


@dataclass(slots=True)
class DeltaPrepared:
    """Implements `seqpar.kernels.family.Prepared`, on Hopper by hopper_delta.py's launches.

    operand: what products are formed of. q, plus, minus: q⁺, k⁺ and k⁻ of delta_kernels.py; without
    decay q, k and k. given: the tensors of the call that some of these were made of.
    """

    passes: Passes
    scale: float
    operand: torch.dtype
    given: tuple[Tensor, ...]
    q: Tensor
    plus: Tensor
    minus: Tensor
    v: Tensor
    beta: Tensor
    _solved: tuple[Tensor, ...] | None = field(default=None, init=False)

    def summarize(self) -> tuple[Tensor, Tensor]:
        A, B, table = self._summaries(reverse=False)
        if len(table):
            self._walk(self.v, self.v, B, A, B, table, summary=True)
        return A, B

    def summarize_backward(self, do: Tensor) -> Tensor:
        _, B, table = self._summaries(reverse=True)
        if len(table):
            self._walk_back(do, do, do, B, B, B, table, summary=True)
        return B

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
        passes, found, given = self.passes, self.passes.frames, self.given
        dq, dk, d_plus, dx, d_beta, traces = self.gradients(entering, do, leaving)
        gradients: list[Tensor | None] = [d_beta.to(self.beta.dtype)]
        if traces is not None:
            if found is not None:
                kept = passes.gate, traces.flows, passes.blocks, given[0].dtype, passes.calls
                dq, dk, d_gate = frames.leave(found, dq, dk, *kept, d_plus)
            else:
                d_gate = passes.d_gate(traces)
            gradients.append(d_gate.to(passes.gate.dtype))
        return [*map(ungroup, (dq, dk), given), dx.to(self.v.dtype), *gradients]

    def gradients(
        self, entering: Tensor, do: Tensor, leaving: Late
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Traces | None]:
        """Of q⁺, k⁻, k⁺, V and β, and what remains for that of the decays.

        In fp32 if there are frames; without, that of k⁻ is of k, and has that of k⁺ in it.
        """
        passes, minus, found = self.passes, self.minus, self.passes.frames
        decayed = passes.decay != "none"
        dtype = self.given[0].dtype if found is None else torch.float32
        u, r = self._empty(), self._empty()
        self._walk(u, r, entering, entering, entering, passes.table, residual=True)
        self._solved = self.solved[:1]  # T; what the walk alone needed makes room
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
        return dq, dk, d_plus, dx, d_beta, traces

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

    @property
    def _config(self) -> Config:
        """Of the walks."""
        batch, _, heads, V = self.v.shape
        walks = batch * heads * len(self.passes.pieces.spans)
        K, dtype, device = self.minus.shape[3], self.v.dtype, self.v.device
        return walk_config(K, V, dtype, self.passes.frames is not None, walks, device)

    def _walk(
        self,
        u: Tensor,
        r: Tensor,
        entering: Tensor,
        A: Tensor,
        B: Tensor,
        table: Tensor,
        *,
        summary: bool = False,
        residual: bool = False,
    ) -> None:
        """For U, and R if wanted, or summaries, of the pieces in `table`."""

        def make() -> Launch:
            columns = (x.shape[4] for x in ((A, B) if summary else (B,)))
            blocks = sum(ceil_div(count, self._config.columns) for count in columns)
            given = self._values(entering, v=self.v) | {"SUMMARY": summary, "RESIDUAL": residual}
            return Launch(walk_kernel, blocks * self._programs(table), **given)

        kind = "walk", summary, residual, entering.shape[1]
        walk = self.passes.calls.once(kind, make)
        inputs = self.plus, self.minus, self.v, self.beta, self.passes.gate
        walk(*inputs, *self.solved, u, r, entering, A, B, *self._parts, table)

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
        """For dX and shares of dβ, or summaries, of the pieces in `table`."""

        def make() -> Launch:
            blocks = ceil_div(self.v.shape[3], self._config.columns)
            given = self._values(leaving, o=do) | {"SUMMARY": summary}
            return Launch(walk_back_kernel, blocks * self._programs(table), **given)

        walk = self.passes.calls.once(("walk back", summary, leaving.shape[1]), make)
        inputs = self.q, self.plus, self.minus, do, r, self.beta, self.passes.gate
        walk(*inputs, *self.solved, dx, shares, leaving, B, *self._parts, table)

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
            config = self._keys_config
            given = self._values(adjoints, o=do) | {
                "saves": saved.shape[1],
                "BK": config.columns,
                "BV": config.rows,
                "num_warps": config.warps,
                "STAGES": config.stages,
            }
            programs = self._key_lines * self._programs(passes.table)
            return Launch(keys_kernel, programs, **given)

        keys = passes.calls.once(("keys", adjoints.shape[1]), make)
        tensors = u, do, dx, self.q, self.plus, d_plus, dk, passes.gate, adjoints, saved
        keys(*tensors, shares, flows, *self._parts, passes.table)
        return dk

    @property
    def solved(self) -> tuple[Tensor, ...]:
        """What is found of keys alone, for all steps at once: T [B, HV, T, 32]."""
        if self._solved is None:
            self._solved = self._solve()
        return self._solved

    def _solve(self) -> tuple[Tensor, ...]:
        passes, (batch, tokens, heads, _) = self.passes, self.v.shape
        solved = self.v.new_empty(batch, heads, tokens, PART, dtype=self.operand)
        chunk = passes.chunk
        table = passes.calls.once(
            "chunks", lambda: tables.cut_rows(passes.pieces, chunk, chunk, self.v)
        )

        def make() -> Launch:
            programs = len(table) * (chunk // PART) * heads * batch
            given = self._values(self.v) | {"chunks": len(table), "num_warps": 1}
            return Launch(solve_kernel, programs, **given)

        levels = table if passes.frames is None else passes.frames.levels
        solve = passes.calls.once("solve", make)
        solve(self.plus, self.minus, self.beta, passes.gate, solved, levels, table)
        return (solved,)

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """halves, steps and counts of the parts of frames; any tensors where there are none."""
        found = self.passes.frames
        return self.passes.framed if found is None else (found.halves, *found.parts)

    def _programs(self, table: Tensor) -> int:
        """One for each head of each piece in `table`."""
        return self.v.shape[0] * self.v.shape[2] * len(table)

    def _values(self, states: Tensor, **more: Tensor) -> dict[str, Any]:
        """Numbers and constants of all kernels, by name.

        states: those the kernel reads, any tensor if none. more: tensors whose strides some take.
        """
        passes, (batch, tokens, heads, V) = self.passes, self.v.shape
        config = self._config
        operand, precision = products(self.v.dtype)
        return {
            "scale": self.scale,
            "batches": batch,
            "tokens": tokens,
            "pieces": len(passes.table),
            "chunks": passes.chunks,
            "slots": states.shape[1],
            "blocks": len(passes.blocks),
            **named(q=self.q, k=self.minus, b=self.beta, g=passes.gate, **more),
            "HEADS": heads,
            "GROUP": heads // self.q.shape[2],
            "DK": self.minus.shape[3],
            "DV": V,
            "BK": config.rows,
            "BV": config.columns,
            "C": passes.chunk,
            "SPAN": passes.block,
            "DECAY": "frames" if passes.decay == "diagonal" else passes.decay,
            "OPERAND": operand,
            "PRECISION": precision,
            "STAGES": config.stages,
            "num_warps": config.warps,
        }


def prepared(passes: Passes, *rest: Any) -> DeltaPrepared:
    """`DeltaPrepared`, or what does the same on Hopper if its passes are for that."""
    if passes.hopper:
        from seqpar.kernels.hopper_delta import HopperDelta  # Gluon only where it is used

        return HopperDelta(passes, *rest)
    return DeltaPrepared(passes, *rest)
