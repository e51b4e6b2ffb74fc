"""Plain-PyTorch recurrences by chunks: one scan for every family.

Within a chunk of C tokens every linear recurrence is affine in the state S that enters it:

    S' = A S + B        o = Q S + O        A: transition, B [K, V], Q [C, K], O [C, V]

A family gives these four maps, for all chunks at once; everything else is here: running
the state through the chunks, and the gradients, which are the same scan backwards with A
transposed (λ is the gradient of the state that leaves a chunk):

    dS = Aᵀ λ + Qᵀ do      dA = λ Sᵀ      dB = λ      dQ = do Sᵀ      dO = do

Chunks are padded with tokens that change nothing (k = v = beta = log_decay = 0), so segments of any
length, laid end to end, need no masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from seqpar.kernels.transition import Transition

CHUNK = 64

# tensors are [B, n, H, C, D]; k, v, gates -> A, B
StateMaps = Callable[[Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]
# q, k, v, gates -> A, B, Q, O
Maps = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor, Tensor, Tensor]]
# hands over a state [B, N, H, K, V] when it is first needed
Late = Callable[[], Tensor]


@dataclass(frozen=True)
class Family:
    """The four functions of one family of recurrences, over tensors [B, T, H, D] on one device.

    gates are [B, T, H, D'] each; scale multiplies q. offsets are the bounds of the N segments laid
    end to end, from 0 to T. States are fp32, or fp64 for fp64 inputs.
    """

    transition: Transition
    state_maps: StateMaps
    maps: Maps

    def summarize(self, k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The map S_out = A S_in + B of one segment: A (see transition.py), B [B, H, K, V]."""
        chunks = _Chunks([0, k.shape[1]], k.device)
        A, B = self.state_maps(chunks.pad(k), chunks.pad(v), [chunks.pad(x) for x in gates])
        total, state = A[:, 0], B[:, 0]
        for c in range(1, B.shape[1]):
            total = self.transition.product(A[:, c], total)
            state = self.transition.apply(A[:, c], state) + B[:, c]
        return total, state

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        offsets: Sequence[int],
        entering: Late,
    ) -> Tensor:
        """o [B, T, H, V] given the state that enters each segment, asked for late."""
        chunks = _Chunks(offsets, k.device)
        A, B, Q, own = self._maps(chunks, q, k, v, gates, scale)
        states = self._scan(A, B, chunks.bounds, entering())
        return chunks.join(own + Q @ states).to(v.dtype)

    def summarize_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        do: Tensor,
    ) -> Tensor:
        """The gradient [B, H, K, V] that one segment's outputs send to the state entering it."""
        chunks = _Chunks([0, k.shape[1]], k.device)
        A, _, Q, _ = self._maps(chunks, q, k, v, gates, scale)
        pull = Q.mT @ chunks.pad(do)
        state = pull[:, -1]
        for c in reversed(range(pull.shape[1] - 1)):
            state = self.transition.apply(self.transition.adjoint(A[:, c]), state) + pull[:, c]
        return state

    def run_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        offsets: Sequence[int],
        entering: Tensor,
        do: Tensor,
        leaving: Late,
    ) -> list[Tensor]:
        """Gradients of q, k, v and each gate.

        entering [B, N, H, K, V]: the states that entered the segments; do [B, T, H, V]; leaving:
        hands over the gradients [B, N, H, K, V] of the states that left them, when needed.
        """
        chunks = _Chunks(offsets, k.device)
        inputs = [x.detach().requires_grad_() for x in (q, k, v, *gates)]
        with torch.enable_grad():
            maps = self._maps(chunks, inputs[0], inputs[1], inputs[2], inputs[3:], scale)
        A, B, Q, _ = (x.detach() for x in maps)
        do = chunks.pad(do)
        states = self._scan(A, B, chunks.bounds, entering)
        adjoints = self._scan_back(A, Q.mT @ do, chunks.bounds, leaving())
        dA = self.transition.gradient(A, adjoints, states)
        gradients = zip(maps, (dA, adjoints, do @ states.mT, do), strict=True)
        kept = [(y, dy) for y, dy in gradients if y.requires_grad]  # the identity's A does not
        return list(torch.autograd.grad([y for y, _ in kept], inputs, [dy for _, dy in kept]))

    def _maps(
        self,
        chunks: "_Chunks",
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, *gates = (chunks.pad(x) for x in (q, k, v, *gates))
        return self.maps(q * scale, k, v, gates)

    def _scan(self, A: Tensor, B: Tensor, bounds: Sequence[int], entering: Tensor) -> Tensor:
        """The state that enters each chunk, [B, n, H, K, V]."""
        states = torch.empty_like(B)
        for i, (first, stop) in enumerate(pairwise(bounds)):
            state = entering[:, i]
            for c in range(first, stop):
                states[:, c] = state
                state = self.transition.apply(A[:, c], state) + B[:, c]
        return states

    def _scan_back(self, A: Tensor, pull: Tensor, bounds: Sequence[int], leaving: Tensor) -> Tensor:
        """The gradient of the state that leaves each chunk, [B, n, H, K, V]."""
        adjoints = torch.empty_like(pull)
        transposed = self.transition.adjoint(A)
        for i, (first, stop) in enumerate(pairwise(bounds)):
            adjoint = leaving[:, i]
            for c in reversed(range(first, stop)):
                adjoints[:, c] = adjoint
                adjoint = self.transition.apply(transposed[:, c], adjoint) + pull[:, c]
        return adjoints


class _Chunks:
    """Where tokens go when each of several segments is padded to whole chunks."""

    def __init__(self, offsets: Sequence[int], device: torch.device) -> None:
        lengths = [b - a for a, b in pairwise(offsets)]
        counts = [-(-length // CHUNK) for length in lengths]
        self.bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]  # in chunks
        slots = torch.full((self.bounds[-1] * CHUNK,), offsets[-1])  # padding reads an added row
        for start, length, chunk in zip(offsets, lengths, self.bounds, strict=False):
            slots[chunk * CHUNK : chunk * CHUNK + length] = torch.arange(start, start + length)
        self._slots = slots.to(device)
        self._tokens = (slots < offsets[-1]).nonzero()[:, 0].to(device)

    def pad(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, n, H, C, D] in the dtype of states."""
        x = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
        x = x.index_select(1, self._slots).unflatten(1, (-1, CHUNK)).transpose(2, 3)
        return x if x.dtype == torch.float64 else x.float()

    def join(self, x: Tensor) -> Tensor:
        """[B, n, H, C, D] -> [B, T, H, D]; the padding is dropped."""
        return x.transpose(2, 3).flatten(1, 2).index_select(1, self._tokens)
