"""Where pieces, blocks and chunks lie: the rows that tell the Triton kernels which tokens to take.

A block is what lies between two states that the gradient of the decays needs (decay_kernels.py); a
chunk is what is worked on at once. Both are counted from the beginning of their piece.
"""

from collections.abc import Iterator

from torch import Tensor

from seqpar.kernels.pieces import Pieces
from seqpar.kernels.tuned import ceil_div


def piece_rows(pieces: Pieces, block: int, chunk: int, like: Tensor) -> Tensor:
    """For each piece: [first token, tokens, slot of the state that enters, of the one that leaves
    (-1: none), blocks before it, saved states before it, and after it, chunks before it]."""

    def rows() -> Iterator[tuple[int, ...]]:
        entered = {piece: slot for slot, piece in enumerate(pieces.entered)}
        left = {piece: slot for slot, piece in enumerate(pieces.left)}
        blocks = saved = chunks = 0
        for i, (start, stop) in enumerate(pieces.spans):
            here = ceil_div(stop - start, block)
            keeps = here if i in left else here - 1  # λ is zero at an end that no state leaves
            slots = entered.get(i, -1), left.get(i, -1)
            yield start, stop - start, *slots, blocks, saved, saved + keeps, chunks
            blocks, saved = blocks + here, saved + keeps
            chunks += ceil_div(stop - start, chunk)

    return pieces.table(("pieces", block, chunk), rows, like.device)


def summary_rows(pieces: Pieces, backwards: bool, chunk: int, like: Tensor) -> Tensor:
    """For each piece that a state leaves, or backwards enters: [first token, tokens, chunks before
    it, which piece it is]."""

    def rows() -> Iterator[tuple[int, ...]]:
        wanted, chunks = set(pieces.entered if backwards else pieces.left), 0
        for i, (start, stop) in enumerate(pieces.spans):
            if i in wanted:
                yield start, stop - start, chunks, i
            chunks += ceil_div(stop - start, chunk)

    return pieces.table(("summaries", backwards, chunk), rows, like.device)


def cut_rows(pieces: Pieces, size: int, chunk: int, like: Tensor) -> Tensor:
    """For each part of `size` tokens of a piece: [first token, tokens, chunks before it]."""

    def rows() -> Iterator[tuple[int, ...]]:
        chunks = 0
        for start, stop in pieces.spans:
            for first in range(start, stop, size):
                last = min(first + size, stop)
                yield first, last - first, chunks
                chunks += ceil_div(last - first, chunk)

    return pieces.table(("parts", size, chunk), rows, like.device)


def run_rows(pieces: Pieces, backwards: bool, like: Tensor, *, leave: bool = False) -> Tensor:
    """The runs of pieces that hand states on (`pieces.Run.row`); or those that leave a range."""

    def rows() -> Iterator[tuple[int, ...]]:
        for run in pieces.runs(backwards):
            if not leave or run.target is not None:
                yield run.row

    return pieces.table(("runs", backwards, leave), rows, like.device)


def saves(pieces: Pieces, block: int) -> int:
    """How many states are saved: one at each end of a block that λ reaches."""

    def count() -> int:
        blocks = sum(ceil_div(stop - start, block) for start, stop in pieces.spans)
        return blocks - len(pieces.spans) + len(pieces.left)

    return pieces.once(("saves", block), count)
