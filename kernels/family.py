"""What a family of recurrences offers to the layer above: functions over the pieces of one rank."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.transition import Transition


class Prepared(Protocol):
    """The functions of one family of recurrences, for inputs made ready by `Family.prepare`."""

    def summarize(self) -> tuple[Tensor, Tensor]:
        """The map S_out = A S_in + B of each piece that a state leaves: A [B, left, HV, ...], B."""

    def run(self, entering: Late) -> Tensor:
        """o, given the state that enters each piece of `pieces.entered`, asked for late."""

    def summarize_backward(self, do: Tensor) -> Tensor:
        """dB of the map dS_in = Aᵀ dS_out + dB of each piece that a state enters."""

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of q, k, v and each gate; the last call.

        entering: the states that entered; leaving: hands over the gradients of those that left,
        when needed. wanted: of which gates a gradient is wanted; None may stand for the others.
        """


class Family(Protocol):
    """One family of recurrences, over tensors [B, T, H, D] on one device.

    q, k [B, T, H, K]; v, o, do [B, T, HV, V], HV a multiple of H (grouped heads); gates [B, T, HV,
    D'] each; scale multiplies q. States are [B, slots, HV, K, V] in fp32, or fp64 for fp64 inputs,
    one for each piece that one enters (`pieces.entered`) or leaves (`pieces.left`), in order.
    """

    @property
    def transition(self) -> Transition:
        """The structure of A."""

    def piece_tokens(self, k: Tensor, v: Tensor) -> int | None:
        """How many tokens a piece should have at most; None: leave runs whole."""

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
    ) -> Prepared:
        """What the functions of one direction share."""

    def leave(
        self, A: Tensor, B: Tensor, pieces: Pieces, *, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        """The map of each range, from those of its pieces: A and B [ranges, B, HV, ...].

        Along `pieces.forward` or, backwards, the other way. B is what leaves the range if nothing
        enters it; A is of any value where none passes through.
        """

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
        """Hand states from piece to piece, and fill in `states`: those that enter pieces.

        Backwards, the gradients of those that leave. arriving [ranges, B, HV, K, V]: those that
        come from other ranks, where a run begins with one; None if none does.
        """
