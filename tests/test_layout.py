"""Layout: who owns which tokens, in any cut, with any documents."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import Layout


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    world_size = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["contiguous", "zigzag", "document_zigzag", "uneven"]))
    sizes = None
    if kind == "document_zigzag":
        lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any))
        bounds = [0, *itertools.accumulate(2 * world_size * n for n in lengths)]
        return Layout(bounds[-1], world_size, kind, bounds)
    if kind == "uneven":
        sizes = draw(st.lists(st.integers(1, 9), min_size=world_size, max_size=world_size))
        total = sum(sizes)
    else:
        total = draw(st.integers(1, 6)) * world_size * 2
    cuts = draw(st.none() | st.lists(st.integers(0, total), max_size=8))
    cu_seqlens = None if cuts is None else [0, *sorted(cuts), total]
    return Layout(total, world_size, "contiguous" if sizes else kind, cu_seqlens, shard_sizes=sizes)


@given(layouts())
def test_shard_and_unshard_undo_each_other(layout: Layout) -> None:
    x = torch.arange(2 * layout.total_tokens * 3).view(2, layout.total_tokens, 3)
    shards = [layout.shard(x, rank) for rank in range(layout.world_size)]
    assert [s.shape[1] for s in shards] == [layout.local_tokens(r) for r in range(len(shards))]
    assert torch.equal(layout.unshard(shards), x)


@given(layouts())
def test_positions_count_from_each_document_start(layout: Layout) -> None:
    bounds = layout.cu_seqlens or (0, layout.total_tokens)
    expected = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])
    for rank in range(layout.world_size):
        assert torch.equal(layout.positions(rank), layout.shard(expected, rank, dim=0))


@given(layouts())
def test_segments_cover_the_ranges_without_crossing_documents(layout: Layout) -> None:
    for rank in range(layout.world_size):
        offset = 0
        for (start, stop), segments in zip(layout.ranges(rank), layout.segments(rank), strict=True):
            assert [s.start for s in segments] == [start, *(s.stop for s in segments[:-1])]
            assert segments[-1].stop == stop
            for s in segments:
                assert s.document <= s.start < s.stop <= s.document_stop
                assert s.offset == offset
                offset += s.stop - s.start


@given(layouts())
def test_the_chain_links_ranges_that_share_a_document(layout: Layout) -> None:
    """By definition, token by token: a state crosses where two neighbours are of one document."""
    bounds = layout.cu_seqlens or (0, layout.total_tokens)
    document = torch.bucketize(torch.arange(layout.total_tokens), torch.tensor(bounds), right=True)
    chain = layout.chain
    ranges = [layout.ranges(rank)[slot] for rank, slot in chain.places]
    assert ranges == sorted(ranges)
    for i, (start, stop) in enumerate(ranges):
        enters = start > 0 and document[start - 1] == document[start]
        leaves = stop < layout.total_tokens and document[stop - 1] == document[stop]
        whole = document[start] == document[stop - 1]
        assert chain.linked[i] == enters
        assert chain.sends(i) == leaves
        assert chain.through[i] == bool(enters and leaves and whole)
        first = next((j for j in range(i) if document[ranges[j][1] - 1] == document[start]), i)
        assert chain.begin(i) == first
        assert chain.backwards.linked[len(chain) - 1 - i] == leaves
    assert chain.backwards.backwards == chain


def test_document_zigzag_gives_each_rank_two_pieces_of_each_document() -> None:
    layout = Layout(24, 2, "document_zigzag", [0, 8, 8, 24])
    assert layout.ranges(0) == [(0, 2), (6, 8), (8, 12), (20, 24)]
    assert layout.ranges(1) == [(2, 4), (4, 6), (12, 16), (16, 20)]


def test_zigzag_gives_each_rank_an_early_and_a_late_piece() -> None:
    layout = Layout(16, 2, "zigzag")
    assert [layout.ranges(rank) for rank in range(2)] == [[(0, 4), (12, 16)], [(4, 8), (8, 12)]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_tokens": 1001, "world_size": 4}, "multiple of 4 .* nearest: 1000, 1004"),
        ({"total_tokens": 12, "world_size": 4, "kind": "zigzag"}, "multiple of 8.*: 8, 16"),
        (
            {
                "total_tokens": 16,
                "world_size": 2,
                "kind": "document_zigzag",
                "cu_seqlens": [0, 10, 16],
            },
            r"document \[0, 10\) has 10 tokens, .* multiple of 4 .* nearest: 8, 12; pad it",
        ),
        ({"total_tokens": 3, "world_size": 4}, "nearest: 4"),
        ({"total_tokens": 0, "world_size": 1}, "total_tokens=0 must be a whole number from 1"),
        ({"total_tokens": 8.5, "world_size": 1}, r"total_tokens holds 8\.5.* whole number"),
        ({"total_tokens": 8, "world_size": 2, "cu_seqlens": [0, 3.5, 8]}, r"cu_seqlens holds 3\.5"),
        ({"total_tokens": 8, "world_size": 2, "shard_sizes": [2.5, 5.5]}, r"sizes holds 2\.5"),
        ({"total_tokens": 8, "world_size": 2, "kind": "striped"}, "kind='striped' must be one of"),
        ({"total_tokens": 8, "world_size": 2, "cu_seqlens": [1, 8]}, "start at 0"),
        ({"total_tokens": 8, "world_size": 2, "cu_seqlens": [0, 4]}, "end at total_tokens=8"),
        ({"total_tokens": 8, "world_size": 2, "cu_seqlens": [0, 5, 4, 8]}, r"cu_seqlens\[2\]=4"),
        ({"total_tokens": 8, "world_size": 2, "shard_sizes": [3, 4]}, "add up to total_tokens=8"),
        ({"total_tokens": 8, "world_size": 2, "shard_sizes": [8, 0]}, "must be positive"),
        ({"total_tokens": 8, "world_size": 2, "shard_sizes": [8]}, "has 1 entries"),
        (
            {"total_tokens": 8, "world_size": 2, "kind": "zigzag", "shard_sizes": [4, 4]},
            "kind='contiguous'",
        ),
    ],
)
def test_impossible_layouts_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**arguments)


def test_integers_of_other_libraries_are_taken() -> None:
    numbers = torch.tensor([0, 3, 8]).numpy()
    sizes = torch.tensor([5, 3])
    layout = Layout(numbers[2], torch.tensor(2), cu_seqlens=numbers, shard_sizes=sizes)  # type: ignore[arg-type]
    assert layout.digest == Layout(8, 2, cu_seqlens=[0, 3, 8], shard_sizes=[5, 3]).digest


def test_tensors_of_another_length_are_refused() -> None:
    layout = Layout(8, 2)
    with pytest.raises(ValueError, match="x has 6 tokens along dim=1"):
        layout.shard(torch.zeros(1, 6), 0)
    with pytest.raises(ValueError, match=r"shards\[1\] has 3 tokens"):
        layout.unshard([torch.zeros(1, 4), torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="holds 1 tensors"):
        layout.unshard([torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="rank=2 must be from 0 to 1"):
        layout.ranges(2)
