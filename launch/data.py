"""A prepared corpus as an endless stream of packed sequences, read by the ranges a rank owns.

Documents come in a seeded order, new in every epoch, laid end to end; the stream is cut in
sequences of equal length. Which documents a sequence holds is known from the index alone, so a rank
reads only its own tokens. The state of the stream is one number: the index of the next sequence.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqpar import Layout
from seqpar.launch.config import Config
from seqpar.launch.prepare import Metadata


@dataclass(frozen=True)
class Shard:
    """One rank's part of a packed sequence, tokens in the order of its layout.

    tokens, labels: int64 [1, T]; loss_mask: float32 [1, T], 0 where a token has no next one in its
    document (its label is 0 then). layout: of the whole sequence, with its documents.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    layout: Layout


class Corpus:
    """The documents of `prefix`.bin and `prefix`.idx (Megatron's indexed format).

    Attributes: name, for messages; lengths, int64 [documents]; tokens, their sum; metadata, from
    `prefix`.json, None where there is none.

    Raises:
        ValueError: files that are missing, unreadable, damaged or empty. `field` is the name of the
            setting that the message blames.
    """

    def __init__(self, prefix: str, vocab_size: int, field: str = "data.path") -> None:
        self.name, self._vocab_size = f"{field}={prefix}", vocab_size
        self._data = Path(f"{prefix}.bin")
        self._dataset = self._open(prefix)
        self._size = self._data.stat().st_size
        # a document may be several sequences of the format; they lie one after the other in .bin
        self._first = np.asarray(self._dataset.document_indices[:-1])
        ends = np.concatenate(([0], np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)))
        self.lengths = np.diff(ends[self._dataset.document_indices])
        self.tokens = int(ends[-1])
        self.metadata = self._read_metadata(Path(f"{prefix}.json"))

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """`length` token ids of `document`, from its token `offset` on.

        Raises:
            ValueError: ids beyond the vocabulary, or a file that has changed since it was opened.
            OSError: a file that is gone.
        """
        size = self._data.stat().st_size  # the file is mapped: reading past its end would kill
        if size != self._size:
            raise ValueError(
                f"{self.name}: {self._data} has {size} bytes now, {self._size} when training "
                "began; bring it back, then go on with checkpoint.resume=latest"
            )
        tokens = self._dataset.get(self._first[document], offset, length).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= self._vocab_size)][0]
            raise ValueError(
                f"{self.name}: document {document} has token id {wrong}, ids must be below "
                f"model.vocab_size={self._vocab_size}; set model.vocab_size to at least {wrong + 1}"
                " or prepare the corpus with the model's tokenizer"
            )
        return tokens

    def _open(self, prefix: str) -> Any:
        """Megatron's reader of the files; it would read past the end of those that are cut."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexReader

        again = "it is damaged or half-written: prepare it again"
        try:
            for path in (Path(f"{prefix}.idx"), self._data):
                path.open("rb").close()
            index = _IndexReader(f"{prefix}.idx", multimodal=False)
        except OSError as error:
            raise ValueError(
                f"{self.name}: cannot read {error.filename} ({error.strerror}); prepare it with "
                f"seqpar prepare INPUT... --output {prefix}"
            ) from None
        except Exception:  # assertions, and whatever its arithmetic on a wrong file meets
            raise ValueError(
                f"{self.name}: {prefix}.idx is not an index of Megatron's format; {again}"
            ) from None
        tokens = int(index.sequence_lengths.sum(dtype=np.int64))
        if not tokens:
            raise ValueError(f"{self.name}: the corpus is empty; prepare one with more text")
        size, expected = self._data.stat().st_size, tokens * index.dtype_size
        if size != expected:
            raise ValueError(f"{self.name}: {self._data} has {size} bytes, not {expected}; {again}")
        return IndexedDataset(prefix)

    def _read_metadata(self, path: Path) -> Metadata | None:
        if not path.exists():
            return None  # made by another tool: checked token by token
        try:
            metadata = Metadata(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.name}: {path} is not readable ({error}); remove it or prepare again"
            ) from None
        if metadata.vocab_size > self._vocab_size:
            raise ValueError(
                f"model.vocab_size={self._vocab_size} must be at least {metadata.vocab_size}, the "
                f"vocabulary of {self.name} (tokenizer {metadata.tokenizer})"
            )
        return metadata


class PackedStream:
    """Packed sequences of `sequence_length` tokens of `corpus`, numbered from 0 without end.

    Raises:
        ValueError: the corpus is shorter than one sequence.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int) -> None:
        if corpus.tokens < sequence_length:
            raise ValueError(
                f"data.sequence_length={sequence_length} is more than all {corpus.tokens} tokens "
                f"of {corpus.name}; lower it to {corpus.tokens} or less, or prepare more text"
            )
        self.corpus, self._length, self._seed = corpus, sequence_length, seed
        self._epoch = lru_cache(maxsize=2)(self._shuffle)  # a sequence may span two epochs

    @property
    def sequences(self) -> int:
        """How many whole sequences one epoch has."""
        return self.corpus.tokens // self._length

    @property
    def unigram_entropy(self) -> float | None:
        """Of the corpus, in nats a token, where its metadata tells."""
        return self.corpus.metadata.unigram_entropy if self.corpus.metadata else None

    def cu_seqlens(self, index: int) -> list[int]:
        """Where documents begin in sequence `index`, from 0, and its length."""
        begin = index * self._length
        lengths = [piece[2] for piece in self._pieces(begin, begin + self._length)]
        return [0, *np.cumsum(lengths).tolist()]

    def read(self, index: int, layout: Layout, rank: int) -> Shard:
        """The part of sequence `index` that `layout` gives to `rank`."""
        begin = index * self._length
        tokens, labels, mask = [], [], []
        for start, stop in layout.ranges(rank):
            for document, offset, length, ends in self._pieces(begin + start, begin + stop):
                # one token more where the document goes on: the label of the last one
                read = self.corpus.read(document, offset, length + (not ends))
                tokens.append(read[:length])
                labels.append(np.append(read[1:], [0] * ends))
                mask.append(np.ones(length, dtype=np.float32))
                mask[-1][-1] = not ends
        return Shard(
            torch.from_numpy(np.concatenate(tokens))[None],
            torch.from_numpy(np.concatenate(labels).astype(np.int64))[None],
            torch.from_numpy(np.concatenate(mask))[None],
            layout,
        )

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, bool]]:
        """Runs of one document in tokens [start, stop) of the endless stream.

        Yields (document, offset in it, length, whether the run reaches the document's end).
        """
        while start < stop:
            epoch, place = divmod(start, self.corpus.tokens)
            order, ends = self._epoch(epoch)
            i = int(np.searchsorted(ends, place, side="right"))
            document, end = int(order[i]), int(ends[i])
            length = min(stop - start, end - place)
            offset = int(self.corpus.lengths[document]) - (end - place)
            yield document, offset, length, length == end - place
            start += length

    def _shuffle(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of documents in `epoch`, and where each one ends in the epoch's stream."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self.corpus.lengths))
        return order, np.cumsum(self.corpus.lengths[order])


def open_stream(config: Config, field: str) -> PackedStream:
    """The stream of the corpus that `config.data` names in `field`, "path" or "held_out"."""
    corpus = open_corpus(config, field)
    return PackedStream(corpus, config.data.sequence_length, config.train.seed)


def open_corpus(config: Config, field: str) -> Corpus:
    """The corpus that `config.data` names in `field`, "path" or "held_out"."""
    return Corpus(getattr(config.data, field), config.model.vocab_size, f"data.{field}")
