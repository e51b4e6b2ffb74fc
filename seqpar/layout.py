"""Which tokens of the global stream a rank owns, in which order, and where documents begin."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from operator import index

import torch
from torch import Tensor

from seqpar.chain import Chain
from seqpar.checks import digest
from seqpar.kernels.once import Once

KINDS = ("contiguous", "zigzag", "document_zigzag")


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of one document within one range of one rank.

    start, stop: global token indices. offset: local index of its first token. document: global
    index of its document's first token. document_stop: one past its document's last token.
    """

    start: int
    stop: int
    offset: int
    document: int
    document_stop: int

    @property
    def continues(self) -> bool:
        """Whether its document began before it: a state enters."""
        return self.start > self.document

    @property
    def continued(self) -> bool:
        """Whether its document goes on after it: its state is wanted elsewhere."""
        return self.stop < self.document_stop

    def split(self, limit: int | None) -> list["Segment"]:
        """Segments of at most `limit` tokens that make up this one.

        Cut at multiples of 64 tokens, the kernels' chunks, where the limit allows.
        """
        length = self.stop - self.start
        count = 1 if limit is None else -(-length // limit)
        step = -(-length // count)
        if limit is not None and limit >= 64:
            step = min(-(-step // 64) * 64, limit)
        cuts = [*range(0, length, step), length]
        return [
            replace(self, start=self.start + a, stop=self.start + b, offset=self.offset + a)
            for a, b in pairwise(cuts)
        ]

    @property
    def local(self) -> slice:
        """Its tokens, in the rank's own order."""
        return slice(self.offset, self.offset + self.stop - self.start)


class Layout(Once):
    """How a stream of tokens is cut over ranks.

    contiguous: rank r holds the r-th piece of the stream (equal pieces, or `shard_sizes`).
    zigzag: the stream is cut in 2W equal pieces; rank r holds pieces r and 2W-1-r, in that order.
    document_zigzag: the same with each document, one after the other (as Transformer Engine cuts
    packed sequences). Each document then crosses all ranks, its state 2W-1 times.

    Args:
        total_tokens: length of the global stream.
        world_size: number of ranks W it is cut over.
        kind: "contiguous", "zigzag" or "document_zigzag".
        cu_seqlens: document boundaries in the stream, from 0 to total_tokens, ascending (empty
            documents are allowed); None for one document. Needs batch size 1.
        shard_sizes: tokens of each rank, contiguous only; None for equal pieces.

    Raises:
        ValueError: a size, kind or boundary that is not possible, with the nearest that is.
    """

    def __init__(
        self,
        total_tokens: int,
        world_size: int,
        kind: str = "contiguous",
        cu_seqlens: Sequence[int] | Tensor | None = None,
        shard_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.total_tokens = _positive("total_tokens", total_tokens)
        self.world_size = _positive("world_size", world_size)
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
        self.kind = kind
        self.cu_seqlens = None if cu_seqlens is None else _boundaries(cu_seqlens, self.total_tokens)
        self.shard_sizes = self._shard_sizes(shard_sizes)
        self._starts = tuple(accumulate(self.shard_sizes, initial=0))  # of contiguous shards

    def __repr__(self) -> str:
        documents = len(self.documents) - 1
        return (
            f"Layout({self.total_tokens} tokens, {self.world_size} ranks, {self.kind}, "
            f"{documents} document{'s' * (documents > 1)})"
        )

    @cached_property
    def documents(self) -> tuple[int, ...]:
        """Boundaries of the documents that hold at least one token, 0 and total_tokens included."""
        return tuple(dict.fromkeys(self.cu_seqlens or (0, self.total_tokens)))

    def ranges(self, rank: int) -> list[tuple[int, int]]:
        """The global token ranges [start, stop) of `rank`, in its local order."""
        self._check_rank(rank)
        if self.kind != "contiguous":
            cut = self.documents if self.kind == "document_zigzag" else (0, self.total_tokens)
            return [
                (start + i * size, start + (i + 1) * size)
                for start, stop in pairwise(cut)
                for size in [(stop - start) // (2 * self.world_size)]
                for i in (rank, 2 * self.world_size - 1 - rank)
            ]
        return [(self._starts[rank], self._starts[rank + 1])]

    def local_tokens(self, rank: int) -> int:
        """How many tokens `rank` holds."""
        self._check_rank(rank)
        return self.shard_sizes[rank]

    @cached_property
    def digest(self) -> str:
        """The same for two layouts only if they are the same."""
        # Python's hash of whole numbers is the same in every process
        return digest(self.total_tokens, self.kind, hash(self.documents), hash(self.shard_sizes))

    @cached_property
    def chain(self) -> Chain:
        """Every range of every rank, in the order of the stream."""
        ranges = sorted(
            (start, stop, rank, slot)
            for rank in range(self.world_size)
            for slot, (start, stop) in enumerate(self.ranges(rank))
        )
        linked = [self.begin(start) < start for start, *_ in ranges]
        through = [
            enters and bisect_right(self.documents, start) == bisect_right(self.documents, stop)
            for enters, (start, stop, *_) in zip(linked, ranges, strict=True)
        ]
        places = tuple((rank, slot) for _, _, rank, slot in ranges)
        return Chain(places, tuple(linked), tuple(through))

    def begin(self, token: int) -> int:
        """The global index of the first token of a token's document."""
        return self.documents[bisect_right(self.documents, token) - 1]

    def segments(self, rank: int) -> list[list[Segment]]:
        """The segments of `rank`: a list for each of its ranges, in local order."""
        return self.once(("segments", rank), lambda: self.cut(self.ranges(rank)))

    def cut(self, ranges: Sequence[tuple[int, int]]) -> list[list[Segment]]:
        """Any global ranges, held one after the other, cut where documents begin."""
        offset, found = 0, []
        for start, stop in ranges:
            found.append(list(self._cut(start, stop, offset)) if start < stop else [])
            offset += stop - start
        return found

    def positions(self, rank: int) -> Tensor:
        """The position of each local token within its document, int64 [local_tokens]."""

        def make() -> Tensor:
            runs = [
                torch.arange(segment.start - segment.document, segment.stop - segment.document)
                for segments in self.segments(rank)
                for segment in segments
            ]
            return torch.cat(runs)

        return self.once(("positions", rank), make)

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The part of `rank` of a global tensor: tokens along `dim`, in the rank's order."""
        if x.shape[dim] != self.total_tokens:
            raise ValueError(
                f"x has {x.shape[dim]} tokens along dim={dim}, the layout has "
                f"total_tokens={self.total_tokens}"
            )
        return torch.cat([x.narrow(dim, a, b - a) for a, b in self.ranges(rank)], dim)

    def unshard(self, shards: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The global tensor from the parts of all ranks (a list by rank); undoes `shard`."""
        if len(shards) != self.world_size:
            raise ValueError(
                f"shards holds {len(shards)} tensors, the layout has world_size={self.world_size}"
            )
        for rank, x in enumerate(shards):
            if x.shape[dim] != self.local_tokens(rank):
                raise ValueError(
                    f"shards[{rank}] has {x.shape[dim]} tokens along dim={dim}, the layout gives "
                    f"rank {rank} {self.local_tokens(rank)}"
                )
        parts = [
            x.split([b - a for a, b in self.ranges(rank)], dim) for rank, x in enumerate(shards)
        ]
        return torch.cat([parts[rank][slot] for rank, slot in self.chain.places], dim)

    def _cut(self, start: int, stop: int, offset: int) -> Iterator[Segment]:
        nearby = slice(
            bisect_right(self.documents, start) - 1, bisect_left(self.documents, stop) + 1
        )
        for document, document_stop in pairwise(self.documents[nearby]):
            first, last = max(start, document), min(stop, document_stop)
            yield Segment(first, last, offset + first - start, document, document_stop)

    def _shard_sizes(self, sizes: Sequence[int] | None) -> tuple[int, ...]:
        if sizes is None:
            pieces = self.world_size * (1 if self.kind == "contiguous" else 2)
            for start, stop in pairwise(self.documents if self.kind == "document_zigzag" else ()):
                if (stop - start) % pieces:
                    below = (stop - start) // pieces * pieces
                    nearest = ", ".join(str(n) for n in (below, below + pieces) if n)
                    raise ValueError(
                        f"the document [{start}, {stop}) has {stop - start} tokens, it must have a "
                        f"multiple of {pieces} for kind={self.kind!r} over world_size="
                        f"{self.world_size}; nearest: {nearest}; pad it"
                    )
            if self.total_tokens % pieces:
                below = self.total_tokens // pieces * pieces
                nearest = ", ".join(str(n) for n in (below, below + pieces) if n)
                raise ValueError(
                    f"total_tokens={self.total_tokens} must be a multiple of {pieces} for "
                    f"kind={self.kind!r} over world_size={self.world_size}; nearest: {nearest}"
                )
            return (self.total_tokens // self.world_size,) * self.world_size
        if self.kind != "contiguous":
            raise ValueError(f"shard_sizes needs kind='contiguous', not {self.kind!r}")
        if len(sizes) != self.world_size:
            raise ValueError(
                f"shard_sizes has {len(sizes)} entries, one for each of world_size="
                f"{self.world_size} ranks is needed"
            )
        sizes = _whole("shard_sizes", sizes)
        if sum(sizes) != self.total_tokens or min(sizes) < 1:
            raise ValueError(
                f"shard_sizes={list(sizes)} must be positive and add up to "
                f"total_tokens={self.total_tokens}, not {sum(sizes)}"
            )
        return sizes

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank={rank} must be from 0 to {self.world_size - 1}")


def _positive(name: str, value: int) -> int:
    [whole] = _whole(name, [value])
    if whole < 1:
        raise ValueError(f"{name}={whole} must be a whole number from 1; nearest: 1")
    return whole


def _whole(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """The values as integers, also of other libraries; what has a fraction is not cut off."""
    found = []
    for value in values:
        try:
            found.append(index(value))
        except TypeError:
            raise ValueError(f"{name} holds {value!r}, it must be a whole number") from None
    return tuple(found)


def _boundaries(cu_seqlens: Sequence[int] | Tensor, total_tokens: int) -> tuple[int, ...]:
    given = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    values = _whole("cu_seqlens", given)
    if not values or values[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, not {list(values[:1])}")
    if values[-1] != total_tokens:
        raise ValueError(
            f"cu_seqlens must end at total_tokens={total_tokens}, not {values[-1]}: it counts "
            "tokens of the global stream, not of one rank"
        )
    for i, (a, b) in enumerate(pairwise(values)):
        if b < a:
            raise ValueError(f"cu_seqlens[{i + 1}]={b} must not be below cu_seqlens[{i}]={a}")
    return values
