"""Scan kernels launched: `family.Family.leave` and `scan`, for the families that have such."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels import tables
from seqpar.kernels.launch import plan
from seqpar.kernels.pieces import Pieces

# how many chains of pieces, over all heads; numbers and constants that scan kernels have, by name;
# A and B -> the launch of one, on A, B, arriving, states, whole_A, whole_B and the table of runs
Make = Callable[[int, dict[str, Any], Tensor, Tensor], Callable[..., None]]


def leave(
    make: Make, kind: object, A: Tensor, B: Tensor, pieces: Pieces, *, backwards: bool
) -> tuple[Tensor, Tensor]:
    """`family.Family.leave`. kind: what else than A, B and pieces tells launches apart."""
    table = tables.run_rows(pieces, backwards, B, leave=True)
    ranges = len(pieces.ranges)
    room = torch.empty if len(table) == ranges else torch.zeros
    shapes = ((ranges, x.shape[0], *x.shape[2:]) for x in (A, B))
    whole_A, whole_B = (room(shape, dtype=B.dtype, device=B.device) for shape in shapes)
    _launch(make, kind, (A, B, B, None, whole_A, whole_B), pieces, table, backwards)
    return whole_A, whole_B


def scan(
    make: Make,
    kind: object,
    A: Tensor,
    B: Tensor,
    pieces: Pieces,
    arriving: Tensor | None,
    states: Tensor,
    *,
    backwards: bool,
) -> None:
    """`family.Family.scan`; kind as in `leave`."""
    arriving = B if arriving is None else arriving  # anything
    table = tables.run_rows(pieces, backwards, B)
    _launch(make, kind, (A, B, arriving, states, A, B), pieces, table, backwards)


def _launch(
    make: Make,
    kind: object,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    pieces: Pieces,
    table: Tensor,
    backwards: bool,
) -> None:
    """tensors: A, B, arriving, states or None where the maps of ranges are wanted, and these."""
    if not len(table):
        return
    A, B, arriving, states, whole_A, whole_B = tensors
    filled = B if states is None else states
    calls = plan(pieces, kind, states is None, backwards, B, arriving, filled)

    def made() -> Callable[..., None]:
        batch, summaries, heads, DY, DZ = B.shape
        ends = ((run.source, run.target) for run in pieces.runs(backwards))
        values = {
            "batches": batch,
            "summaries": summaries,
            "slots": filled.shape[1],
            "HEADS": heads,
            "DY": DY,
            "DZ": DZ,
            "STEP": -1 if backwards else 1,
            "STORE": states is not None,
            "THROUGH": states is None and any(None not in each for each in ends),
        }
        return make(len(table) * batch * heads, values, A, B)

    calls.once("scan", made)(A, B, arriving, filled, whole_A, whole_B, table)
