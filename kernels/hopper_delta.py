"""The (gated) delta rule on Hopper, by kernels of its own, launched.

As in delta_triton.py, but in steps of 64 tokens. Those are the chunks of the passes, so rounded
scores are the same in all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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

# a thread, of the warpgroups that walk; the one that brings their tiles needs few
REGISTERS = 232


@dataclass(slots=True)
class HopperDelta:
    """Implements `seqpar.kernels.family.Prepared`.

    given: q and k of the call. q, plus, minus: q⁺, k⁺ and k⁻ of delta_kernels.py, of frames;
    without any q, k and k.
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
        A, B = (self._states(table, x.shape[3]) for x in (self.minus, self.v))
        if len(table):
            self._walk(self.v, self.v, B, A, B, table, summary=True)
        return A, B

    def run(self, entering: Late) -> Tensor:
        states = entering()
        u = self._like_v()
        self._walk(u, u, states, states, states, self.passes.table)
        self._solved = None  # their room is o's
        operands = self.q, self.minus, u
        return self.passes.run("o", operands, states, self.scale, self.v.dtype, exact=True)

    def summarize_backward(self, do: Tensor) -> Tensor:
        table = self._summaries(reverse=True)
        B = self._states(table, self.v.shape[3])
        if len(table):
            self._walk_back(do, do, do, B, B, B, table, summary=True)
        return B

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        passes, minus, found = self.passes, self.minus, self.passes.frames
        decayed, dtype = passes.decay != "none", self.v.dtype if found is None else torch.float32
        u, r = self._like_v(), self._like_v()
        self._walk(u, r, entering, entering, entering, passes.table, residual=True)
        traces = passes.traces(minus, self.v, minus.shape[3] // 16) if decayed else None
        forth = partial(
            passes.run, states=entering, dtype=dtype, transposed=True, split=decayed, exact=True
        )
        dq = forth("dq", (do, u, minus), scale=self.scale, other=self.q, traces=traces)
        adjoints = leaving()
        dx, d_beta = self._values_back(do, r, adjoints)
        del r
        self._solved = None  # their room is for what follows
        of_plus = traces if found is None else None  # otherwise `frames.leave` finds its share
        d_plus = forth(
            "d_plus", (dx, u, minus), scale=-1.0, strict=True, other=self.plus, traces=of_plus
        )
        dk = self._keys_back(u, do, dx, d_plus, adjoints, traces)
        gradients = [d_beta.to(self.beta.dtype)]
        if traces is not None:
            gate = passes.gate
            if found is not None:
                kept = gate, traces.flows, passes.blocks, self.given[0].dtype, passes.calls
                dq, dk, d_gate = frames.leave(found, dq, dk, *kept, d_plus)
            else:
                d_gate = passes.d_gate(traces)
            gradients.append(d_gate.to(gate.dtype))
        return [*map(ungroup, (dq, dk), self.given), dx, *gradients]

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
        """For U and R, or summaries, of the pieces in `table`."""
        T, W = self.solved
        K, V = self.minus.shape[3], self.v.shape[3]

        def make() -> Callable[..., None]:
            parts = (min(K, V) if summary else V) // 64
            blocks = (K + V if summary else V) // (64 * parts)
            options = {"num_warps": 4} | ({"maxnreg": 168} if parts == 2 else {})
            launch = Launch(
                walk_hopper_kernel,
                blocks * self._programs(table),
                [*self._counts(entering), *(x.stride(2) for x in (self.minus, self.v)), *self._at],
                **self._constants,
                PARTS=parts,
                SUMMARY=summary,
                RESIDUAL=residual,
                STAGES=3 if summary else 2,
                REGISTERS=REGISTERS,
                **options,
            )
            of_k, of_v = tiles(W, self.minus), tiles(self.v, u, r, width=64)
            of_T = tiles(_rows(T))

            def run(T: Tensor, W: Tensor, *rest: Tensor) -> None:
                v, minus, u, r, *others = rest
                w_tiles, minus_tiles = of_k(W, minus)
                v_tiles, u_tiles, r_tiles = of_v(v, u, r)
                tiled = w_tiles, minus_tiles, v_tiles, *of_T(_rows(T)), u_tiles, r_tiles
                launch(*tiled, u, r, *others)

            return run

        walk = self.passes.calls.once(("walk", summary, residual, entering.shape[1]), make)
        inputs = self.v, self.minus, u, r, self.beta, self.passes.gate
        walk(T, W, *inputs, entering, A, B, *self.passes.framed, table)

    def _values_back(self, do: Tensor, r: Tensor, adjoints: Tensor) -> tuple[Tensor, Tensor]:
        """dX and dβ [B, T, HV, 1]."""
        batch, tokens, heads, V = r.shape
        dx = self._like_v()
        shares = r.new_empty(batch, heads, V // 16, tokens, dtype=torch.float32)
        self._walk_back(do, r, dx, shares, adjoints, adjoints, self.passes.table)
        return dx, shares.sum(2).transpose(1, 2)[..., None]

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
        T, _ = self.solved

        def make() -> Callable[..., None]:
            strides = (x.stride(2) for x in (self.q, self.plus, do))
            launch = Launch(
                walk_back_hopper_kernel,
                self._programs(table),
                [self.scale, *self._counts(leaving), *strides, *self._at],
                **self._constants,
                SUMMARY=summary,
                STAGES=2,
                num_warps=self.v.shape[3] // 16,
            )
            tiled = tiles(self.q, self.plus, self.minus, do, r, _rows(T), dx)
            return lambda *tensors: launch(*tiled(*tensors[:7]), *tensors[6:])

        walk = self.passes.calls.once(("walk back", summary, leaving.shape[1]), make)
        inputs = self.q, self.plus, self.minus, do, r, _rows(T), dx
        gates = self.beta, self.passes.gate
        walk(*inputs, shares, *gates, leaving, B, *self.passes.framed, table)

    def _keys_back(
        self,
        u: Tensor,
        do: Tensor,
        dx: Tensor,
        d_plus: Tensor,
        adjoints: Tensor,
        traces: Traces | None,
    ) -> Tensor:
        """The gradient of k⁻; without frames, of k."""
        passes, dk = self.passes, torch.empty_like(d_plus)
        saved = shares = flows = adjoints
        if traces is not None:
            saved, flows, shares = traces.saved, traces.flows, traces.shares.get("dk", adjoints)

        def make() -> Callable[..., None]:
            counts = *self._counts(adjoints), saved.shape[1], len(passes.blocks)
            strides = (x.stride(2) for x in (do, self.q, self.plus))
            launch = Launch(
                keys_hopper_kernel,
                self._programs(passes.table),
                [self.scale, *counts, *strides, *self._at[3:]],
                **self._constants,
                SPAN=passes.block,
                STAGES=2,
                num_warps=self.minus.shape[3] // 16,
            )
            tiled = tiles(u, do, dx, self.q, self.plus, dk)
            return lambda *tensors: launch(*tiled(*tensors[:6]), *tensors[6:])

        keys = passes.calls.once(("keys", adjoints.shape[1]), make)
        inputs = u, do, dx, self.q, self.plus, dk, d_plus, dk, passes.gate, adjoints, saved
        keys(*inputs, shares, flows, *passes.framed, passes.table)
        return dk

    @property
    def solved(self) -> tuple[Tensor, Tensor]:
        """T [B, HV, T, 64] and W [B, T, HV, K] of hopper_solve.py."""
        if self._solved is None:
            self._solved = self._solve()
        return self._solved

    def _solve(self) -> tuple[Tensor, Tensor]:
        passes, (batch, tokens, heads, _) = self.passes, self.v.shape
        T = self.v.new_empty(batch, heads, tokens, CHUNK)
        W = self.v.new_empty(batch, tokens, heads, self.minus.shape[3])
        table = passes.calls.once(
            "chunks", lambda: tables.cut_rows(passes.pieces, CHUNK, CHUNK, self.v)
        )

        def make() -> Launch:
            kept = {name: self._constants[name] for name in ("HEADS", "GROUP", "DK", "DECAY")}
            numbers = [batch, tokens, len(table), *self.minus.stride()[:3], *self._at]
            return Launch(
                solve_hopper_kernel, len(table) * heads * batch, numbers, **kept, num_warps=1
            )

        levels = table if passes.frames is None else passes.frames.levels
        solve = passes.calls.once("solve", make)
        solve(self.plus, self.minus, self.beta, passes.gate, T, W, levels, table)
        return T, W

    def _summaries(self, *, reverse: bool) -> Tensor:
        """`tables.summary_rows`."""
        passes = self.passes
        return passes.calls.once(
            ("summaries", reverse),
            lambda: tables.summary_rows(passes.pieces, reverse, CHUNK, self.v),
        )

    def _states(self, table: Tensor, columns: int) -> Tensor:
        """Room for A or B of the pieces in `table`."""
        batch, _, heads, _ = self.v.shape
        shape = batch, len(table), heads, self.minus.shape[3], columns
        return self.v.new_empty(shape, dtype=torch.float32)

    def _like_v(self) -> Tensor:
        """Room for U, R or dX."""
        return torch.empty_like(self.v, memory_format=torch.contiguous_format)

    def _counts(self, states: Tensor) -> tuple[int, ...]:
        """batches, tokens, pieces, chunks, slots."""
        chunks = 0 if self.passes.frames is None else self.passes.frames.levels.shape[1]
        return *self.v.shape[:2], len(self.passes.table), chunks, states.shape[1]

    def _programs(self, table: Tensor) -> int:
        return self.v.shape[0] * self.v.shape[2] * len(table)

    @property
    def _at(self) -> tuple[int, ...]:
        """Strides of β and of the gate."""
        return *self.beta.stride()[:3], *self.passes.gate.stride()[:3]

    @property
    def _constants(self) -> dict[str, Any]:
        heads, decay = self.v.shape[2], self.passes.decay
        return {
            "HEADS": heads,
            "GROUP": heads // self.q.shape[2],
            "DK": self.minus.shape[3],
            "DV": self.v.shape[3],
            "C": CHUNK,
            "DECAY": "frames" if decay == "diagonal" else decay,
        }


def _rows(T: Tensor) -> Tensor:
    """T [B, H, T, 64] as one matrix, [1, rows, 1, 64]."""
    return T.view(1, -1, 1, T.shape[3])
