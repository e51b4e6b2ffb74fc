"""The stream of packed sequences: nothing lost, nothing twice, the same after resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch_setup import write_documents

from seqpar import Layout
from seqpar.launch.data import Corpus, PackedStream, Shard
from seqpar.launch.prepare import prepare

END = 256
LENGTH = 48


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder / "in")
    prepare([folder / "in"], f"{folder}/words")
    return f"{folder}/words"


@pytest.fixture
def corpus(prefix: str) -> Corpus:
    return Corpus(prefix, 257)


def whole(stream: PackedStream, index: int) -> Shard:
    return stream.read(index, Layout(LENGTH, 1, cu_seqlens=stream.cu_seqlens(index)), 0)


def texts(corpus: Corpus) -> list[list[int]]:
    return [corpus.read(i, 0, int(n)).tolist() for i, n in enumerate(corpus.lengths)]


def test_an_epoch_holds_every_document_once(corpus: Corpus) -> None:
    stream = PackedStream(corpus, LENGTH, seed=1)
    tokens: list[int] = []
    for index in range(2 * stream.sequences + 3):
        tokens += whole(stream, index).tokens[0].tolist()
    orders = []
    for epoch in range(2):
        part = tokens[epoch * corpus.tokens : (epoch + 1) * corpus.tokens]
        ends = [i + 1 for i, token in enumerate(part) if token == END]
        assert ends[-1] == len(part)
        orders.append([part[a:b] for a, b in zip([0, *ends], ends, strict=False)])
        assert sorted(orders[-1]) == sorted(texts(corpus))
    assert orders[0] != orders[1] != texts(corpus)  # shuffled, and anew


def test_the_order_depends_on_the_seed_alone(prefix: str, corpus: Corpus) -> None:
    def tokens(seed: int) -> torch.Tensor:
        stream = PackedStream(Corpus(prefix, 257), LENGTH, seed)
        return torch.cat([whole(stream, index).tokens for index in range(9)])

    assert torch.equal(tokens(1), tokens(1))
    assert not torch.equal(tokens(1), tokens(2))


def test_a_stream_begun_anywhere_is_the_same(prefix: str, corpus: Corpus) -> None:
    """The index of the next sequence is all the state there is."""
    stream = PackedStream(corpus, LENGTH, seed=1)
    expected = [whole(stream, index) for index in range(4 * stream.sequences)]
    for index in (3 * stream.sequences, 5, 2 * stream.sequences - 1, 0):
        found = whole(PackedStream(Corpus(prefix, 257), LENGTH, seed=1), index)
        assert torch.equal(found.tokens, expected[index].tokens)
        assert torch.equal(found.labels, expected[index].labels)


def test_labels_are_the_next_tokens_of_the_document(corpus: Corpus) -> None:
    stream = PackedStream(corpus, LENGTH, seed=1)
    count = stream.sequences + 2  # into the second epoch
    shards = [whole(stream, index) for index in range(count)]
    tokens = torch.cat([shard.tokens for shard in shards], 1)[0]
    labels = torch.cat([shard.labels for shard in shards], 1)[0]
    mask = torch.cat([shard.loss_mask for shard in shards], 1)[0]
    assert mask.tolist() == (tokens != END).float().tolist()
    # shifted before the cut: also at the ends of sequences
    valid = mask[:-1].bool()
    assert torch.equal(labels[:-1][valid], tokens[1:][valid])
    cut = mask[LENGTH - 1 :: LENGTH]
    assert 0 < cut.sum() < len(cut) + 1  # documents do go on across sequences here
    assert (labels[mask == 0] == 0).all()
    assert labels.max() == END  # the end of a document is learned


def test_documents_of_a_sequence(corpus: Corpus) -> None:
    stream = PackedStream(corpus, LENGTH, seed=1)
    for index in range(stream.sequences + 2):
        tokens = whole(stream, index).tokens[0].tolist()
        starts = [i + 1 for i, token in enumerate(tokens) if token == END and i + 1 < LENGTH]
        assert stream.cu_seqlens(index) == [0, *starts, LENGTH]


def test_documents_are_known_without_reading(corpus: Corpus) -> None:
    stream = PackedStream(corpus, LENGTH, seed=1)
    expected = stream.cu_seqlens(3)
    corpus.read = None  # type: ignore[assignment, method-assign]
    assert stream.cu_seqlens(3) == expected


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shards_of_all_ranks_are_the_sequence(corpus: Corpus, kind: str, ranks: int) -> None:
    stream = PackedStream(corpus, LENGTH, seed=1)
    for index in range(0, stream.sequences + 2, 7):
        layout = Layout(LENGTH, ranks, kind, stream.cu_seqlens(index))
        shards = [stream.read(index, layout, rank) for rank in range(ranks)]
        expected = whole(stream, index)
        for name in ("tokens", "labels", "loss_mask"):
            parts = [getattr(shard, name) for shard in shards]
            assert torch.equal(layout.unshard(parts), getattr(expected, name)), name
        assert expected.tokens.dtype == expected.labels.dtype == torch.int64
        assert expected.loss_mask.dtype == torch.float32
        assert expected.tokens.shape == (1, LENGTH)


def test_a_rank_reads_its_own_tokens_only(corpus: Corpus) -> None:
    """Beside its tokens it reads one more where a document goes on: the last label of a range."""
    stream = PackedStream(corpus, LENGTH, seed=1)
    reads: list[tuple[int, int]] = []
    get = corpus._dataset.get

    def counted(document: int, offset: int, length: int) -> Any:
        reads.append((int(document), length))
        return get(document, offset, length)

    corpus._dataset.get = counted
    for kind, ranges in (("contiguous", 1), ("zigzag", 2)):
        for index in range(5):
            layout = Layout(LENGTH, 2, kind, stream.cu_seqlens(index))
            for rank in range(2):
                reads.clear()
                stream.read(index, layout, rank)
                own = layout.local_tokens(rank)
                assert own <= sum(length for _, length in reads) <= own + ranges
                segments = sum(len(part) for part in layout.segments(rank))
                assert len(reads) == segments  # one read for each run of a document


def test_documents_of_several_sequences_of_the_format(tmp_path: Path) -> None:
    """Megatron's own tools may store a document in parts; empty ones do no harm."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/x.bin", dtype=np.int32)
    builder.add_document(np.arange(10), [4, 6])
    builder.add_document(np.array([], dtype=np.int32), [0])
    builder.add_document(np.arange(10, 15), [5])
    builder.finalize(f"{tmp_path}/x.idx")
    corpus = Corpus(f"{tmp_path}/x", 257)
    assert corpus.lengths.tolist() == [10, 0, 5]
    assert corpus.metadata is None
    stream = PackedStream(corpus, 15, seed=0)
    assert stream.unigram_entropy is None
    boundaries = {tuple(stream.cu_seqlens(i)) for i in range(20)}
    assert boundaries == {(0, 10, 15), (0, 5, 15)}
    shard = stream.read(0, Layout(15, 1, cu_seqlens=stream.cu_seqlens(0)), 0)
    assert sorted(shard.tokens[0].tolist()) == list(range(15))
    assert shard.loss_mask.sum() == 13


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _replace(path: Path) -> None:
    path.write_bytes(b"something else" * 10)


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    (".idx", Path.unlink, r"cannot read .*x\.idx \(No such file.*; prepare it with seqpar prepare"),
    (".bin", Path.unlink, r"cannot read .*x\.bin \(No such file"),
    (".bin", _cut, r"x\.bin has \d+ bytes, not \d+; it is damaged or half-written"),
    (".idx", _cut, r"x\.idx is not an index .*; it is damaged or half-written"),
    (".idx", lambda path: path.write_bytes(b""), r"x\.idx is not an index of Megatron's format"),
    (".idx", _replace, r"x\.idx is not an index of Megatron's format"),
    (".json", _cut, r"x\.json is not readable"),
    (".json", _replace, r"x\.json is not readable"),
]


@pytest.mark.parametrize(("suffix", "damage", "message"), DAMAGE)
def test_damaged_files(
    suffix: str, damage: Callable[[Path], Any], message: str, prefix: str, tmp_path: Path
) -> None:
    for name in (".bin", ".idx", ".json"):
        (tmp_path / f"x{name}").write_bytes(Path(prefix + name).read_bytes())
    if suffix == ".json" and damage is _cut:
        (tmp_path / "x.json").write_text("{")
    else:
        damage(tmp_path / f"x{suffix}")
    with pytest.raises(ValueError, match=message) as error:
        Corpus(f"{tmp_path}/x", 257, "data.held_out")
    assert str(error.value).startswith(f"data.held_out={tmp_path}/x: ")


def test_an_empty_corpus(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    IndexedDatasetBuilder(f"{tmp_path}/x.bin").finalize(f"{tmp_path}/x.idx")
    with pytest.raises(ValueError, match=r"data\.path=.*: the corpus is empty"):
        Corpus(f"{tmp_path}/x", 257)


def test_a_corpus_shorter_than_a_sequence(corpus: Corpus) -> None:
    PackedStream(corpus, corpus.tokens, seed=0)
    with pytest.raises(ValueError, match=rf"sequence_length={corpus.tokens + 1} is more than all"):
        PackedStream(corpus, corpus.tokens + 1, seed=0)


def test_tokens_beyond_the_vocabulary(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size=256 must be at least 257"):
        Corpus(prefix, 256)
    for name in (".bin", ".idx"):  # without metadata the tokens themselves tell
        (tmp_path / f"x{name}").write_bytes(Path(prefix + name).read_bytes())
    stream = PackedStream(Corpus(f"{tmp_path}/x", 256), LENGTH, seed=0)
    message = r"document \d+ has token id 256.*set model\.vocab_size to at least 257"
    with pytest.raises(ValueError, match=message):
        [whole(stream, index) for index in range(stream.sequences)]
