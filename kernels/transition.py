"""The algebra of affine state maps S -> A·S + B, one class for each structure of A.

States S and B are [..., K, V]. A is [..., K, 1] for decays (one per key channel; [..., 1, 1] for
one per head), [..., K, K] for dense transitions, and empty, [..., 0, 0], for the identity. The maps
compose, (A2, B2) ∘ (A1, B1) = (A2 A1, A2 B1 + B2), and the gradient of a chain is the same chain
run backwards with A transposed; so one scan serves chunks, segments and ranks, both ways.
"""

from typing import Protocol

from torch import Tensor


class Transition(Protocol):
    """A structure of A."""

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        """A S."""

    def product(self, A2: Tensor, A1: Tensor) -> Tensor:
        """A2 A1."""

    def adjoint(self, A: Tensor) -> Tensor:
        """Aᵀ."""

    def gradient(self, A: Tensor, out: Tensor, state: Tensor) -> Tensor:
        """The gradient of A for S_out = A S: out Sᵀ restricted to A's structure."""


class Identity:
    """A = I: linear attention without decay. A is empty, nothing of it is kept or sent."""

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return state

    def product(self, A2: Tensor, A1: Tensor) -> Tensor:
        return A1

    def adjoint(self, A: Tensor) -> Tensor:
        return A

    def gradient(self, A: Tensor, out: Tensor, state: Tensor) -> Tensor:
        return A


class Decay:
    """A = diag(decay): one factor per head (A [..., 1, 1]) or per key channel (A [..., K, 1])."""

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return A * state

    def product(self, A2: Tensor, A1: Tensor) -> Tensor:
        return A2 * A1

    def adjoint(self, A: Tensor) -> Tensor:
        return A

    def gradient(self, A: Tensor, out: Tensor, state: Tensor) -> Tensor:
        return (out * state).sum(-1, keepdim=True).sum_to_size(A.shape)


class Dense:
    """A is any K x K matrix: products of decays and rank-one updates (the delta rule)."""

    def apply(self, A: Tensor, state: Tensor) -> Tensor:
        return A @ state

    def product(self, A2: Tensor, A1: Tensor) -> Tensor:
        return A2 @ A1

    def adjoint(self, A: Tensor) -> Tensor:
        return A.mT

    def gradient(self, A: Tensor, out: Tensor, state: Tensor) -> Tensor:
        return out @ state.mT
