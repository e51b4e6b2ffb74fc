"""Plain-PyTorch recurrences by chunks: one scan for every family.

Within a chunk of C tokens every linear recurrence is affine in the state S that enters it:

    S' = A S + B        o = Q S + O        A: transition, B [K, V], Q [C, K], O [C, V]

A family gives these four maps, for all chunks at once; everything else is here: running
the state through the chunks, and the gradients, which are the same scan backwards with A
transposed (λ is the gradient of the state that leaves a chunk):

    dS = Aᵀ λ + Qᵀ do      dA = λ Sᵀ      dB = λ      dQ = do Sᵀ      dO = do

Chunks are padded with tokens that change nothing (k = v = beta = log_decay = 0), so segments of any
length need no masks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.transition import Transition

CHUNK = 64

# tensors are [B, n, H, C, D]; k, v, gates -> A, B
StateMaps = Callable[[Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]
# q, k, v, gates -> A, B, Q, O
Maps = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor, Tensor, Tensor]]
Spans = Sequence[tuple[int, int]]
Steps = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Chunked:
    """A family in plain PyTorch, for any device and dtype (implements `family.Family`)."""

    transition: Transition
    state_maps: StateMaps
    maps: Maps

    def piece_tokens(self, k: Tensor, v: Tensor) -> int | None:
        return None

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
    ) -> "_Prepared":
        return _Prepared(self, q, k, v, gates, scale, pieces)

    def leave(
        self, A: Tensor, B: Tensor, pieces: Pieces, *, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        return leave(self.transition, A, B, pieces, backwards=backwards)

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
        scan(self.transition, A, B, pieces, arriving, states, backwards=backwards)


def leave(
    transition: Transition, A: Tensor, B: Tensor, pieces: Pieces, *, backwards: bool
) -> tuple[Tensor, Tensor]:
    """`family.Family.leave`, one piece after the other."""
    ranges = len(pieces.ranges)
    whole_A, whole_B = (x.new_zeros(ranges, x.shape[0], *x.shape[2:]) for x in (A, B))
    for run in pieces.runs(backwards):
        if run.target is None:
            continue
        first, *rest = run.summaries
        total, state = A[:, first], B[:, first]
        for i in rest:
            state = transition.apply(A[:, i], state) + B[:, i]
            if run.source is not None:
                total = transition.product(A[:, i], total)
        whole_A[run.target], whole_B[run.target] = total, state
    return whole_A, whole_B


def scan(
    transition: Transition,
    A: Tensor,
    B: Tensor,
    pieces: Pieces,
    arriving: Tensor | None,
    states: Tensor,
    *,
    backwards: bool,
) -> None:
    """`family.Family.scan`, one piece after the other."""
    for run in pieces.runs(backwards):
        slots = iter(run.slots)
        state = B.new_zeros(B.shape[0], *B.shape[2:])
        if run.source is not None:
            assert arriving is not None
            states[:, next(slots)] = state = arriving[run.source]
        for i, slot in zip(run.summaries, slots, strict=False):  # none for what leaves
            states[:, slot] = state = transition.apply(A[:, i], state) + B[:, i]


@dataclass(frozen=True)
class _Prepared:
    """Implements `family.Prepared`."""

    family: Chunked
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Sequence[Tensor]
    scale: float
    pieces: Pieces

    def summarize(self) -> tuple[Tensor, Tensor]:
        chunks = self._chunks(self.pieces.left)
        k, v, *gates = (chunks.pad(x) for x in (spread(self.k, self.v), self.v, *self.gates))
        A, B = self.family.state_maps(k, v, gates)
        steps = chunks.steps()
        total = A[:, steps[0][1]]
        for segments, step in steps[1:]:
            total[:, segments] = self.family.transition.product(A[:, step], total[:, segments])
        return total, self._fold(A, B, steps)

    def run(self, entering: Late) -> Tensor:
        chunks = self._chunks(range(len(self.pieces.spans)))
        A, B, Q, own = self._maps(chunks)
        start = _to_all(entering(), self.pieces.entered, self.pieces)
        states = self._scan(A, B, start, chunks.steps())
        return chunks.join(own + Q @ states).to(self.v.dtype)

    def summarize_backward(self, do: Tensor) -> Tensor:
        chunks = self._chunks(self.pieces.entered)
        A, _, Q, _ = self._maps(chunks)
        adjoint = self.family.transition.adjoint(A)
        return self._fold(adjoint, Q.mT @ chunks.pad(do), chunks.steps_back())

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        chunks = self._chunks(range(len(self.pieces.spans)))
        inputs = [x.detach().requires_grad_() for x in (self.q, self.k, self.v, *self.gates)]
        q, k, v, *gates = inputs
        with torch.enable_grad():
            maps = replace(self, q=q, k=k, v=v, gates=gates)._maps(chunks)
        A, B, Q, _ = (x.detach() for x in maps)
        do = chunks.pad(do)
        states = self._scan(
            A, B, _to_all(entering, self.pieces.entered, self.pieces), chunks.steps()
        )
        back = self.family.transition.adjoint(A)
        ends = _to_all(leaving(), self.pieces.left, self.pieces)
        adjoints = self._scan(back, Q.mT @ do, ends, chunks.steps_back())
        dA = self.family.transition.gradient(A, adjoints, states)
        gradients = zip(maps, (dA, adjoints, do @ states.mT, do), strict=True)
        kept = [(y, dy) for y, dy in gradients if y.requires_grad]  # the identity's A does not
        return list(torch.autograd.grad([y for y, _ in kept], inputs, [dy for _, dy in kept]))

    def _chunks(self, which: Iterable[int]) -> "_Chunks":
        return _Chunks([self.pieces.spans[i] for i in which], self.k)

    def _maps(self, chunks: "_Chunks") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = spread(self.q, self.v), spread(self.k, self.v), self.v, *self.gates
        q, k, v, *gates = (chunks.pad(x) for x in inputs)
        return self.family.maps(q * self.scale, k, v, gates)

    def _fold(self, A: Tensor, B: Tensor, steps: Steps) -> Tensor:
        """B [B, N, H, K, V] of each segment from the maps of its chunks."""
        state = B[:, steps[0][1]]
        for segments, step in steps[1:]:
            state[:, segments] = (
                self.family.transition.apply(A[:, step], state[:, segments]) + B[:, step]
            )
        return state

    def _scan(self, A: Tensor, B: Tensor, entering: Tensor, steps: Steps) -> Tensor:
        """The state [B, n, H, K, V] that enters each chunk, in the direction of `steps`."""
        states = torch.empty_like(B)
        state = entering.clone()
        for segments, step in steps:
            states[:, step] = state[:, segments]
            state[:, segments] = (
                self.family.transition.apply(A[:, step], state[:, segments]) + B[:, step]
            )
        return states


class _Chunks:
    """Where tokens go when each of several segments is padded to whole chunks."""

    def __init__(self, spans: Spans, like: Tensor) -> None:
        self._counts = [-(-(stop - start) // CHUNK) for start, stop in spans]
        self._firsts = [sum(self._counts[:i]) for i in range(len(spans))]
        padding = like.shape[1]  # reads an added row of zeros
        slots = torch.full((sum(self._counts) * CHUNK,), padding)
        for (start, stop), chunk in zip(spans, self._firsts, strict=True):
            slots[chunk * CHUNK : chunk * CHUNK + stop - start] = torch.arange(start, stop)
        self._slots = slots.to(like.device)
        self._tokens = (slots < padding).nonzero()[:, 0].to(like.device)

    def steps(self) -> Steps:
        """(segments, their next chunk) for each step along all segments at once."""
        return [
            _pairs((i, first + step) for i, first, count in self._each() if step < count)
            for step in range(max(self._counts, default=1))
        ]

    def steps_back(self) -> Steps:
        """The same from each segment's last chunk to its first."""
        return [
            _pairs(
                (i, first + count - 1 - step) for i, first, count in self._each() if step < count
            )
            for step in range(max(self._counts, default=1))
        ]

    def pad(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, n, H, C, D] in the dtype of states."""
        x = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
        x = x.index_select(1, self._slots).unflatten(1, (-1, CHUNK)).transpose(2, 3)
        return x if x.dtype == torch.float64 else x.float()

    def join(self, x: Tensor) -> Tensor:
        """[B, n, H, C, D] -> [B, T, H, D]; the padding is dropped."""
        return x.transpose(2, 3).flatten(1, 2).index_select(1, self._tokens)

    def _each(self) -> Iterable[tuple[int, int, int]]:
        return zip(range(len(self._counts)), self._firsts, self._counts, strict=True)


def spread(x: Tensor, v: Tensor) -> Tensor:
    """x [B, T, H, K] with each head repeated for its group of v's heads."""
    group = v.shape[2] // x.shape[2]
    return x if group == 1 else torch.repeat_interleave(x, group, 2)


def _to_all(states: Tensor, which: Sequence[int], pieces: Pieces) -> Tensor:
    """States of some pieces as [B, N, H, K, V] over all, zero for the others."""
    out = states.new_zeros(states.shape[0], len(pieces.spans), *states.shape[2:])
    out[:, which] = states
    return out


def _pairs(pairs: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    left, right = [], []
    for a, b in pairs:
        left.append(a)
        right.append(b)
    return left, right
