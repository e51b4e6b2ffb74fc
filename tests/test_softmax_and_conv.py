"""softmax_attention and causal_conv1d on shards against the dense loops: outputs, all gradients."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import assert_close, run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar.cost import choose_softmax
from seqpar.fetch import convert
from seqpar.kernels import reference
from seqpar.softmax import METHODS, _traded

TOKENS = 96
PACKED = [0, 1, 20, 48, 49, 80, 80, 96]

Case = tuple[Callable, Callable, dict[str, Tensor], dict]


def softmax_case(
    batch: int, causal: bool, method: str = "auto", kv_heads: int = 2, heads: int = 4
) -> Case:
    make = torch.Generator().manual_seed(3)
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
    inputs = {
        name: torch.randn(batch, TOKENS, heads, 8, dtype=torch.float64, generator=make)
        for name, heads in shapes.items()
    }
    options = {"causal": causal, "method": method}
    return seqpar.softmax_attention, reference.softmax_attention, inputs, options


def conv_case(batch: int, width: int) -> Case:
    make = torch.Generator().manual_seed(4)
    inputs = {
        "x": torch.randn(batch, TOKENS, 5, dtype=torch.float64, generator=make),
        "weight": torch.randn(5, width, dtype=torch.float64, generator=make),
        "bias": torch.randn(5, dtype=torch.float64, generator=make),
    }
    return seqpar.causal_conv1d, reference.causal_conv1d, inputs, {"activation": "silu"}


def check(case: Case, layout: seqpar.Layout, dtype: torch.dtype, bound: float) -> None:
    function, spec, inputs, options = case
    sharded = {name: x.dim() > 2 for name, x in inputs.items()}  # the others are parameters
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    known = {name: value for name, value in options.items() if name != "method"}
    expected_o = spec(**leaves, **known, cu_seqlens=layout.cu_seqlens)
    do = torch.randn(expected_o.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((expected_o * do).sum(), list(leaves.values()))
    expected = {"o": expected_o.detach(), **dict(zip(leaves, gradients, strict=True))}

    def work(rank: int) -> dict[str, Tensor]:
        sp = seqpar.SequenceParallel(layout=layout)
        local = {
            name: (layout.shard(x, rank) if sharded[name] else x).to(dtype).requires_grad_()
            for name, x in inputs.items()
        }
        o = function(**local, **options, sp=sp)
        loss = (o * layout.shard(do, rank).to(dtype)).sum()
        found = torch.autograd.grad(loss, list(local.values()))
        return {"o": o.detach(), **dict(zip(local, found, strict=True))}

    ranks = run_ranks(work, layout.world_size)
    for name, value in expected.items():
        if not sharded.get(name, True):
            assert_close(f"d{name}", sum(result[name] for result in ranks), value, bound)
            continue
        for rank, result in enumerate(ranks):
            wanted = layout.shard(value, rank)
            assert_close(f"{name}, rank {rank}", result[name], wanted, bound, whole=value)


def layouts(world_size: int, kind: str, packed: bool) -> seqpar.Layout:
    return seqpar.Layout(TOKENS, world_size, kind, PACKED if packed else None)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_documents_that_are_cut_zigzag_one_by_one(world_size: int) -> None:
    layout = seqpar.Layout(TOKENS, world_size, "document_zigzag", [0, 24, 24, 72, 96])
    softmax = [softmax_case(1, True, method) for method in METHODS]
    for case in (*softmax, *(conv_case(1, width) for width in (1, 4, 8))):
        check(case, layout, torch.float64, 1e-10)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_softmax_fp64_equals_the_dense_reference(
    method: str, world_size: int, kind: str, packed: bool
) -> None:
    for causal in (True, False):
        case = softmax_case(1 if packed else 2, causal, method)
        check(case, layouts(world_size, kind, packed), torch.float64, 1e-10)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("world_size", [3, 8])
def test_heads_that_ranks_do_not_divide(world_size: int, kv_heads: int) -> None:
    """Four heads over three ranks, and over eight, where half of them have none."""
    for method in METHODS:
        case = softmax_case(1, True, method, kv_heads)
        check(case, layouts(world_size, "contiguous", True), torch.float64, 1e-10)


def test_a_checkpoint_runs_again_on_ranks_without_heads_too() -> None:
    """Two heads over three ranks: what is run again exchanges again, on all of them."""
    layout = seqpar.Layout(TOKENS, 3)
    q = softmax_case(1, True, heads=2)[2]["q"]
    leaf = q.clone().requires_grad_()
    seqpar.softmax_attention(leaf, leaf, leaf).square().sum().backward()
    expected = leaf.grad
    assert expected is not None

    def work(rank: int) -> Tensor:
        sp = seqpar.SequenceParallel(layout=layout)
        attend = partial(seqpar.softmax_attention, method="ulysses", sp=sp)
        mine = layout.shard(q, rank).requires_grad_()
        o = checkpoint(lambda x: attend(x * 1.0, x * 1.0, x * 1.0), mine, use_reentrant=False)
        return torch.autograd.grad(o.square().sum(), mine)[0]

    for rank, found in enumerate(run_ranks(work, 3)):
        assert_close(f"rank {rank}", found, layout.shard(expected, rank), 1e-10, whole=expected)


@pytest.mark.parametrize("room", [1 << 30, 0])
def test_half_of_the_kv_heads_are_gathered_at_a_time_where_there_is_room(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seqpar.sources.ROOM", room)
    check(
        softmax_case(1, True, "allgather", 9, 18), layouts(2, "zigzag", True), torch.float64, 1e-10
    )
    steps = 3 if room else 9  # of four heads, the last of one
    found = softmax_traffic("allgather", 2, 18, 9)
    assert [traffic["kv"][0] for traffic in found] == [3 * steps] * 2


def test_traded_queries_make_causal_work_equal() -> None:
    for world_size in (2, 3, 4, 7):
        layout = seqpar.Layout(24 * world_size, world_size)
        work = []
        for rank in range(world_size):
            segments = [s for found in layout.cut(_traded(layout)(rank)) for s in found]
            work.append(sum(_area(s.start, s.stop) for s in segments))
        assert len(set(work)) == 1, work


def _area(start: int, stop: int) -> int:
    """Pairs of a query from start to stop and a key up to it."""
    return sum(range(start + 1, stop + 1))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_conv_fp64_equals_the_token_loop(world_size: int, kind: str, packed: bool) -> None:
    for width in (1, 4):
        case = conv_case(1 if packed else 2, width)
        check(case, layouts(world_size, kind, packed), torch.float64, 1e-10)


def test_fp32_is_within_1e_5() -> None:
    for case in (softmax_case(2, True), conv_case(2, 4)):
        check(case, layouts(2, "zigzag", False), torch.float32, 1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_uneven_shards_and_halos_over_more_than_one_rank(packed: bool) -> None:
    """A width of 8 reaches past shards of 2 and 3 tokens."""
    sizes = [40, 2, 3, TOKENS - 45]
    layout = seqpar.Layout(TOKENS, 4, cu_seqlens=PACKED if packed else None, shard_sizes=sizes)
    batch = 1 if packed else 2
    softmax = [softmax_case(batch, True, method) for method in METHODS]
    for case in (*softmax, conv_case(batch, 8)):
        check(case, layout, torch.float64, 1e-10)


def test_a_halo_moves_width_minus_one_tokens_to_the_next_rank() -> None:
    def work(rank: int) -> tuple[int, int]:
        sp = seqpar.SequenceParallel(layout=seqpar.Layout(TOKENS, 4))
        x = torch.randn(1, TOKENS // 4, 5, requires_grad=True)
        seqpar.causal_conv1d(x, torch.randn(5, 4), sp=sp).sum().backward()
        return sp.comm.traffic["halo"].calls, sp.comm.traffic["halo"].bytes_sent

    one_way = 3 * 5 * 4  # three tokens of five fp32 channels
    assert run_ranks(work, 4) == [(2, one_way), (2, 2 * one_way), (2, 2 * one_way), (2, one_way)]


def softmax_traffic(method: str, size: int, heads: int, kv_heads: int) -> list[dict]:
    def work(rank: int) -> dict:
        sp = seqpar.SequenceParallel(layout=seqpar.Layout(TOKENS, size, "zigzag"))
        q, k = (torch.randn(1, TOKENS // size, h, 8, requires_grad=True) for h in (heads, kv_heads))
        seqpar.softmax_attention(q, k, k, method=method, sp=sp).sum().backward()
        return {kind: (t.calls, t.bytes_received) for kind, t in sp.comm.traffic.items()}

    return run_ranks(work, size)


def test_softmax_moves_what_the_formulas_say() -> None:
    """docs/exchanges.md; n is one rank's tokens of one head in fp32."""
    n = TOKENS // 4 * 8 * 4
    gathered = 2 * 2 * 3 * n  # K and V of two heads from three others, once each way
    assert softmax_traffic("allgather", 4, 4, 2) == [{"kv": (6, 3 * gathered)}] * 4
    ring = 3 * 2 * 2 * n + (3 * 2 * 2 * n + 4 * 2 * 2 * n)  # forward; backward with gradients
    assert softmax_traffic("ring", 4, 4, 2) == [{"kv": (2 * (3 + 3 + 4), ring)}] * 4
    one_way = 3 * n * (1 + 1 + 1 + 1)  # q, k, v and o, one head each of three other ranks
    assert softmax_traffic("ulysses", 4, 4, 4) == [{"heads": (4, 2 * one_way)}] * 4


@pytest.mark.parametrize(
    ("ranks", "tokens", "heads", "kv_heads", "trades", "method"),
    [
        (8, 1 << 16, 32, 32, False, "ulysses"),
        (8, 1 << 16, 32, 1, True, "allgather"),
        (8, 1 << 16, 31, 31, True, "allgather"),
        (8, 1 << 23, 32, 8, True, "ring"),  # a head is 12 GiB
        (1, 1 << 23, 32, 8, True, "allgather"),
        (2, 1 << 16, 16, 4, True, "ulysses"),  # measured: 8 % faster on two H100s
        (2, 1 << 16, 16, 4, False, "allgather"),
    ],
)
def test_auto_method_is_the_one_that_waits_least(
    ranks: int, tokens: int, heads: int, kv_heads: int, trades: bool, method: str
) -> None:
    assert choose_softmax(ranks, tokens, heads, kv_heads, 128, 2, trades) == method


@pytest.mark.parametrize("kinds", [("contiguous", "zigzag"), ("zigzag", "contiguous")])
def test_conversion_between_layouts_takes_one_all_to_all_each_way(kinds: tuple[str, str]) -> None:
    held, wanted = (seqpar.Layout(TOKENS, 4, kind) for kind in kinds)
    x = torch.randn(2, TOKENS, 3)

    def work(rank: int) -> int:
        sp = seqpar.SequenceParallel(layout=held)
        mine = held.shard(x, rank).requires_grad_()
        moved = convert(mine, wanted, sp)
        assert torch.equal(moved, wanted.shard(x, rank))
        moved.backward(moved.detach())
        assert mine.grad is not None
        assert torch.equal(mine.grad, mine)
        return sp.comm.traffic["convert"].calls

    assert run_ranks(work, 4) == [2] * 4


def test_conversion_refuses_another_stream() -> None:
    sp = seqpar.SequenceParallel(layout=seqpar.Layout(8, 1))
    with pytest.raises(ValueError, match="total_tokens=16"):
        convert(torch.zeros(1, 8, 2), seqpar.Layout(16, 1), sp)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(1, 8, 2, 3)}, "v is .* must have k's shape"),
        ({"q": torch.zeros(1, 8, 3, 4)}, "2 heads.* divisor of q's 3; nearest: 1"),
        ({"q": torch.zeros(1, 7, 4, 4)}, "must have q's batch"),
        ({"method": "rings"}, "method='rings' must be one of auto, allgather, ring, ulysses"),
        ({"q": torch.zeros(1, 8, 4, 4).double()}, "must share one dtype"),
        ({"k": torch.zeros(1, 8, 2, 4, device="meta")}, "k is on meta, q on cpu"),
        ({"scale": torch.ones(())}, r"scale is a tensor.* scale=1\.0"),
        ({"sp": seqpar.SequenceParallel(layout=seqpar.Layout(16, 1))}, "q has 8 tokens"),
    ],
)
def test_softmax_refuses_what_does_not_fit(change: dict, message: str) -> None:
    arguments = {"q": torch.zeros(1, 8, 4, 4)} | {n: torch.zeros(1, 8, 2, 4) for n in "kv"} | change
    with pytest.raises(ValueError, match=message):
        seqpar.softmax_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 5)}, "x is .* must be"),
        ({"x": torch.zeros(1, 0, 5)}, "none empty"),
        ({"x": torch.zeros(1, 8, 5).long()}, "x is torch.int64, it must be a floating dtype"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "weight is on meta, x on cpu"),
        ({"weight": torch.zeros(4, 4)}, "channels=5"),
        ({"bias": torch.zeros(4)}, "bias is"),
        ({"activation": "relu"}, "activation='relu' must be None or 'silu'"),
        ({"sp": seqpar.SequenceParallel(layout=seqpar.Layout(16, 1))}, "x has 8 tokens"),
    ],
)
def test_conv_refuses_what_does_not_fit(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(1, 8, 5), "weight": torch.zeros(5, 4)} | change
    with pytest.raises(ValueError, match=message):
        seqpar.causal_conv1d(**arguments)
