"""The (gated) delta rule on Hopper, by kernels of its own, launched.

The flow is that of walks.py, in steps of 64 tokens. Those are the chunks of the passes, so
rounded scores are the same in all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels import scans, tables
from seqpar.kernels.hopper import CHUNK, tiles
from seqpar.kernels.hopper_keys_kernels import keys_hopper_kernel
from seqpar.kernels.hopper_scan_kernels import COLUMNS, scan_hopper_kernel
from seqpar.kernels.hopper_solve_kernels import solve_hopper_kernel
from seqpar.kernels.hopper_walk_back_kernels import walk_back_hopper_kernel
from seqpar.kernels.hopper_walk_kernels import walk_hopper_kernel
from seqpar.kernels.launch import Launch
from seqpar.kernels.passes import Traces, traced
from seqpar.kernels.pieces import Pieces
from seqpar.kernels.walks import DeltaPrepared


class HopperDelta(DeltaPrepared):
    """Implements `seqpar.kernels.family.Prepared`."""

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
            given = self._values(entering, v=self.v) | {"SUMMARY": summary, "RESIDUAL": residual}
            given |= {"PARTS": parts, "num_warps": 4} | ({"maxnreg": 168} if parts == 2 else {})
            launch = Launch(walk_hopper_kernel, blocks * self._programs(table), **given)
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
        T = self.solved[0]

        def make() -> Callable[..., None]:
            given = self._values(leaving, o=do)
            given |= {"SUMMARY": summary, "num_warps": self.v.shape[3] // 16}
            launch = Launch(walk_back_hopper_kernel, self._programs(table), **given)
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
        """The gradient of k⁻; without frames, of k, in d_plus's room."""
        passes = self.passes
        dk = d_plus if passes.frames is None else torch.empty_like(d_plus)
        saved, shares, flows = traced(traces, "dk", adjoints)

        def make() -> Callable[..., None]:
            given = self._values(adjoints, o=do)
            given |= {"saves": saved.shape[1], "num_warps": self.minus.shape[3] // 16}
            launch = Launch(keys_hopper_kernel, self._programs(passes.table), **given)
            tiled = tiles(u, do, dx, self.q, self.plus, d_plus, dk)
            return lambda *tensors: launch(*tiled(*tensors[:7]), *tensors[6:])

        keys = passes.calls.once(("keys", adjoints.shape[1]), make)
        inputs = u, do, dx, self.q, self.plus, d_plus, dk, passes.gate, adjoints, saved
        keys(*inputs, shares, flows, *passes.framed, passes.table)
        return dk

    def _solve(self) -> tuple[Tensor, ...]:
        """T [B, HV, T, 64] and W [B, T, HV, K] of hopper_solve_kernels.py."""
        passes, (batch, tokens, heads, _) = self.passes, self.v.shape
        T = self.v.new_empty(batch, heads, tokens, CHUNK)
        W = self.v.new_empty(batch, tokens, heads, self.minus.shape[3])
        table = passes.calls.once(
            "chunks", lambda: tables.cut_rows(passes.pieces, CHUNK, CHUNK, self.v)
        )

        def make() -> Callable[..., None]:
            given = self._values(self.v) | {"chunks": len(table), "num_warps": 4}
            launch = Launch(solve_hopper_kernel, len(table) * heads * batch, **given)
            tiled = tiles(self.plus, self.minus)
            return lambda *tensors: launch(*tiled(*tensors[:2]), *tensors[2:])

        levels = table if passes.frames is None else passes.frames.levels
        solve = passes.calls.once("solve", make)
        solve(self.plus, self.minus, self.beta, passes.gate, T, W, levels, table)
        return T, W

    @property
    def _value_lines(self) -> int:
        return self.v.shape[3] // 16

    @property
    def _key_lines(self) -> int:
        return self.minus.shape[3] // 16


def leave_ranges(A: Tensor, B: Tensor, pieces: Pieces, *, backwards: bool) -> tuple[Tensor, Tensor]:
    """`family.Family.leave` for dense transitions."""
    make, kind, A = _along(A)
    return scans.leave(make, kind, A, B, pieces, backwards=backwards)


def scan_states(
    A: Tensor,
    B: Tensor,
    pieces: Pieces,
    arriving: Tensor | None,
    states: Tensor,
    *,
    backwards: bool,
) -> None:
    """`family.Family.scan` for dense transitions."""
    make, kind, A = _along(A)
    scans.scan(make, kind, A, B, pieces, arriving, states, backwards=backwards)


def _along(A: Tensor) -> tuple[scans.Make, object, Tensor]:
    """What `scans` needs for A, which may be transposed, and A as it lies in memory."""
    transposed = not A.is_contiguous()
    make = partial(_scan, transposed)
    return make, ("dense", transposed), A.mT.contiguous() if transposed else A


def _scan(
    transposed: bool, chains: int, values: dict[str, Any], A: Tensor, B: Tensor
) -> Callable[..., None]:
    """See `scans.Make`."""
    K, V = values["DY"], values["DZ"]
    columns = V + K if values["THROUGH"] else V
    launch = Launch(
        scan_hopper_kernel,
        chains * columns // COLUMNS.value,
        **values,
        DK=K,
        DV=V,
        TRANSPOSED=transposed,
        num_warps=K // 16,
    )
    tiled = tiles(_rows(A), rows=K)
    return lambda A, *tensors: launch(*tiled(_rows(A)), *tensors)


def _rows(x: Tensor) -> Tensor:
    """A contiguous tensor as one matrix, [1, rows, 1, columns]."""
    return x.view(1, -1, 1, x.shape[-1])
