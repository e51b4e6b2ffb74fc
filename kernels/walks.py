"""What the delta rule and DPLR share on GPUs: their steps' systems solved, and the walks, launched.

See delta_kernels.py. Nothing is kept from the forward pass but the states that entered the pieces.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels import tables
from seqpar.kernels.chunked import scan
from seqpar.kernels.delta_back_kernels import walk_back_kernel
from seqpar.kernels.delta_kernels import STEP, solve_kernel, walk_kernel
from seqpar.kernels.launch import Launch
from seqpar.kernels.passes import Passes, products
from seqpar.kernels.pieces import Pieces
from seqpar.kernels.transition import Dense, Transition
from seqpar.kernels.tuned import (
    HOPPER_WIDTHS,
    Config,
    ceil_div,
    delta_piece_tokens,
    dplr_config,
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
        if is_hopper(B.device) and {A.shape[-1], B.shape[-1]} <= {*HOPPER_WIDTHS}:
            from seqpar.kernels.hopper_delta import scan_states  # Gluon only where it is used

            return scan_states(A, B, pieces, arriving, states, backwards=backwards)
        return scan(self.transition, A, B, pieces, arriving, states, backwards=backwards)


@dataclass(slots=True)
class Walks:
    """Implements half of `seqpar.kernels.family.Prepared`: the maps of pieces.

    operand: what products are formed of. q, plus, minus: q⁺, k⁺ and k⁻ of delta_kernels.py; without
    decay q, k and k. keys: by which values are written, where those are not `minus`; beta is -1
    then. given: the tensors of the call that some of these were made of.
    """

    passes: Passes
    scale: float
    operand: torch.dtype
    given: tuple[Tensor, ...]
    q: Tensor
    plus: Tensor
    minus: Tensor
    keys: Tensor | None
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
        if self.keys is not None:
            return dplr_config(K, V, dtype, walks, device)
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
            strides = (x.stride()[:3] for x in (self.minus, self.v, self.beta, self.passes.gate))
            numbers = [*self._counts(entering), *(stride for x in strides for stride in x)]
            given = self._constants | {"SUMMARY": summary, "RESIDUAL": residual}
            given |= {"KEYS": self.keys is not None}
            columns = (x.shape[4] for x in ((A, B) if summary else (B,)))
            blocks = sum(ceil_div(count, self._config.columns) for count in columns)
            return Launch(walk_kernel, blocks * self._programs(table), numbers, **given)

        kind = "walk", summary, residual, entering.shape[1]
        walk = self.passes.calls.once(kind, make)
        inputs = self.plus, self.minus, self._keys, self.v, self.beta, self.passes.gate
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
        """For dX and shares of dβ, of DPLR for dX alone, or summaries, of the pieces in `table`."""

        def make() -> Launch:
            tensors = self.q, self.minus, do, self.beta, self.passes.gate
            strides = (s for x in tensors for s in x.stride()[:3])
            numbers = [self.scale, *self._counts(leaving), *strides]
            residual = not summary and self.keys is None
            given = self._constants | {"SUMMARY": summary, "RESIDUAL": residual}
            blocks = ceil_div(self.v.shape[3], self._config.columns)
            return Launch(walk_back_kernel, blocks * self._programs(table), numbers, **given)

        walk = self.passes.calls.once(("walk back", summary, leaving.shape[1]), make)
        inputs = self.q, self.plus, self.minus, do, r, self.beta, self.passes.gate
        walk(*inputs, *self.solved, dx, shares, leaving, B, *self._parts, table)

    @property
    def _keys(self) -> Tensor:
        """By which values are written."""
        return self.minus if self.keys is None else self.keys

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
            strides = (s for x in (self.minus, self.beta, passes.gate) for s in x.stride()[:3])
            given = self._constants
            kept = ("HEADS", "GROUP", "DK", "BK", "C", "DECAY", "OPERAND", "PRECISION")
            return Launch(
                solve_kernel,
                len(table) * (chunk // PART) * heads * batch,
                [batch, tokens, len(table), *strides],
                **{name: given[name] for name in kept},
                num_warps=1,
            )

        levels = table if passes.frames is None else passes.frames.levels
        solve = passes.calls.once("solve", make)
        solve(self.plus, self.minus, self.beta, passes.gate, solved, levels, table)
        return (solved,)

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """halves, steps and counts of the parts of frames; any tensors where there are none."""
        found = self.passes.frames
        return self.passes.framed if found is None else (found.halves, *found.parts)

    def _counts(self, states: Tensor) -> tuple[int, ...]:
        """batches, tokens, pieces, chunks, slots."""
        chunks = 0 if self.passes.frames is None else self.passes.frames.levels.shape[1]
        return *self.v.shape[:2], len(self.passes.table), chunks, states.shape[1]

    def _programs(self, table: Tensor) -> int:
        """One for each head of each piece in `table`."""
        return self.v.shape[0] * self.v.shape[2] * len(table)

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
            "DECAY": "frames" if self.passes.decay == "diagonal" else self.passes.decay,
            "OPERAND": operand,
            "PRECISION": precision,
            "STAGES": config.stages,
            "num_warps": config.warps,
        }
