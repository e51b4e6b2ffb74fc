"""Every exchange against a plain fold of the chain; what each one sends."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import assert_close, run_ranks
from torch import Tensor

from seqpar import Layout, SequenceParallel
from seqpar.chain import Chain
from seqpar.comm import Communicator, Traffic
from seqpar.cost import Links, choose, measure
from seqpar.exchange import States, allgather, allscan, doubling, ring, twolevel
from seqpar.kernels.transition import Decay, Dense, Identity, Transition

K, V = 4, 6
TRANSITIONS: dict[str, tuple[Transition, tuple[int, int]]] = {
    "identity": (Identity(), (0, 0)),
    "scalar": (Decay(), (1, 1)),
    "diagonal": (Decay(), (K, 1)),
    "dense": (Dense(), (K, K)),
}
EXCHANGES: dict[str, Callable[[int], Callable[..., States]]] = {
    "allgather": lambda size: allgather,
    "ring": lambda size: ring,
    "allscan in 3 blocks": lambda size: partial(allscan, blocks=3),
    "allscan in 6 blocks": lambda size: partial(allscan, blocks=V),
    "doubling": lambda size: doubling,
    "twolevel, one node": lambda size: partial(twolevel, nodes=[0] * size),
    "twolevel, nodes of 2": lambda size: partial(twolevel, nodes=[r // 2 for r in range(size)]),
    "twolevel, nodes of 1": lambda size: partial(twolevel, nodes=range(size)),
}


def layouts(size: int) -> list[Layout]:
    tokens = 12 * size
    one_each = [0, *(12 * r + 5 for r in range(size)), tokens]  # a document starts on every rank
    few = [0, 1, tokens // 2, tokens - 1, tokens]
    at_cuts = [0, *(12 * r for r in range(1, size)), tokens]
    made = [
        Layout(tokens, size, kind, cu_seqlens)
        for kind in ("contiguous", "zigzag")
        for cu_seqlens in (None, one_each, few, at_cuts)
    ]
    uneven = [1 + r % 3 for r in range(size - 1)]
    made.append(Layout(tokens, size, shard_sizes=[*uneven, tokens - sum(uneven)]))
    return made


def summaries(chain: Chain, shape: tuple[int, int]) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    make = torch.Generator().manual_seed(len(chain))
    return {
        place: (
            torch.randn(2, *shape, generator=make).double(),
            torch.randn(2, K, V, generator=make).double(),
        )
        for place in sorted(chain.places)
    }


def fold(chain: Chain, transition: Transition, given: dict) -> dict[tuple[int, int], Tensor]:
    """The state entering each range that one enters: the definition."""
    entering: dict[tuple[int, int], Tensor] = {}
    state: Tensor | None = None
    for i, place in enumerate(chain.places):
        if chain.linked[i]:
            assert state is not None
            entering[place] = state
        A, B = given[place]
        state = transition.apply(A, entering[place]) + B if chain.through[i] else B
    return entering


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", EXCHANGES)
def test_states_equal_the_fold(name: str, size: int) -> None:
    def work(rank: int) -> None:
        comm = Communicator(torch.distributed.group.WORLD)
        exchange = EXCHANGES[name](size)
        for layout in layouts(size):
            for chain in (layout.chain, layout.chain.backwards):
                for label, (transition, shape) in TRANSITIONS.items():
                    given = summaries(chain, shape)
                    expected = fold(chain, transition, given)
                    mine = [given[rank, slot] for slot in range(len(layout.ranges(rank)))]
                    A, B = (torch.stack(parts) for parts in zip(*mine, strict=True))
                    for slot, state in enumerate(exchange(transition, A, B, chain, comm)()):
                        wanted = expected.get((rank, slot))
                        assert (state is None) == (wanted is None), (layout, label, rank, slot)
                        if state is not None and wanted is not None:
                            assert_close(f"{label} {layout} {rank}", state, wanted, 1e-10)

    run_ranks(work, size)


def traffic(
    exchange: Callable[..., States],
    size: int,
    shape: tuple[int, int],
    cu_seqlens: list[int] | None = None,
) -> list[Traffic]:
    """What each rank moves for one token a rank over `size` contiguous ranks."""
    transition = Dense() if shape == (K, K) else Decay() if shape[0] else Identity()
    chain = Layout(size, size, cu_seqlens=cu_seqlens).chain

    def work(rank: int) -> Traffic:
        comm = Communicator(torch.distributed.group.WORLD)
        A, B = summaries(chain, shape)[rank, 0]
        exchange(transition, A[None], B[None], chain, comm)()
        return comm.total()

    return run_ranks(work, size)


@pytest.mark.parametrize("shape", [shape for _, shape in TRANSITIONS.values()], ids=TRANSITIONS)
def test_bytes_and_calls_are_those_of_the_formulas(shape: tuple[int, int]) -> None:
    """docs/exchanges.md: per rank, for states of K·V and transitions of a elements."""
    size, heads = 8, 2
    state, packed = 8 * heads * K * V, 8 * heads * (K * V + shape[0] * shape[1])

    def sent(exchange: Callable[..., States]) -> list[tuple[int, int]]:
        return [(t.calls, t.bytes_sent) for t in traffic(exchange, size, shape)]

    assert sent(allgather) == [(1, 7 * packed)] * size
    ends = (1, state), *[(2, state)] * (size - 2), (1, 0)  # the last one only receives
    assert sent(allscan) == list(ends)
    in_blocks = (3, state), *[(6, state)] * (size - 2), (3, 0)
    assert sent(partial(allscan, blocks=3)) == list(in_blocks)
    rounds = [sum(rank + d < size for d in (1, 2, 4)) for rank in range(size)]
    received = [sum(rank - d >= 0 for d in (1, 2, 4)) for rank in range(size)]
    assert sent(doubling) == [(s + r, s * packed) for s, r in zip(rounds, received, strict=True)]
    by_node = partial(twolevel, nodes=[0, 0, 0, 0, 1, 1, 1, 1])
    inside = [3 * packed, 2 * packed, packed]  # to those after them on the node
    crossing, handing_round = state, 3 * state
    assert [t.bytes_sent for t in traffic(by_node, size, shape)] == [
        *inside,
        crossing,
        *inside,
        handing_round,
    ]


def test_no_message_crosses_where_no_document_does() -> None:
    """Two documents of two ranks each: one state moves within each, whatever the exchange."""
    shape, state = (K, 1), 8 * 2 * K * V
    for exchange in (allscan, partial(twolevel, nodes=[0, 1, 2, 3])):
        moved = traffic(exchange, 4, shape, [0, 2, 4])
        assert [t.bytes_sent for t in moved] == [state, 0, state, 0]
    moved = traffic(doubling, 4, shape, [0, 2, 4])
    packed = state + 8 * 2 * K
    assert [(t.calls, t.bytes_sent) for t in moved] == [(1, packed), (1, 0), (1, packed), (1, 0)]


def test_auto_takes_what_keeps_a_rank_waiting_least() -> None:
    near = Links(nodes=(0,) * 64)
    long_chain, short_chain = Layout(64, 64).chain, Layout(2, 2).chain
    state, dense = 1 << 21, 1 << 21
    many = choose("auto", long_chain, near, dense, state)
    assert many.seconds["allscan"] < many.seconds["ring"] < many.seconds["allgather"]
    assert many.seconds["doubling"] < many.seconds["allgather"]
    assert many.seconds[many.name] <= 1.25 * min(many.seconds.values())
    two = choose("auto", short_chain, Links((0, 0)), 0, state)
    assert two.seconds["allgather"] == two.seconds["ring"]
    hidden = choose("auto", long_chain, near, dense, state, hidden=1.0)
    assert hidden.name == "allgather"  # everything hides behind a second of work
    comm = Communicator()
    comm.size = 64  # to reckon, not to run
    for work_rate, name in ((1e-3, "allgather"), (1e30, many.name)):
        links = Links((0,) * 64, work_rate=work_rate)
        sp = SequenceParallel(layout=Layout(64, 64), links=links, comm=comm)
        assert sp.choice(dense, state, work=1.0).name == name
    assert many.name != "allgather"
    nodes = Links(tuple(rank // 8 for rank in range(64)), across_latency=1e-3)
    assert choose("auto", long_chain, nodes, dense, state).name in ("twolevel", "doubling")
    assert "->" in str(many)
    assert many.name in str(many)


def test_sums_over_ranks_are_contiguous() -> None:
    """NCCL takes nothing else, gloo does: gradients of weights may lie otherwise."""
    x = torch.arange(6.0).view(2, 3).t()

    def work(rank: int) -> tuple[bool, bool]:
        found = Communicator(torch.distributed.group.WORLD).all_reduce(x)
        return found.is_contiguous(), torch.equal(found, 2 * x)

    assert run_ranks(work, 2) == [(True, True)] * 2


def test_measured_figures_replace_what_latencies_suggest() -> None:
    chain, state = Layout(8, 8).chain, 1 << 20
    usual = choose("auto", chain, Links((0,) * 8), 0, state)
    gathering = choose("auto", chain, Links((0,) * 8, gathering=3e-5), 0, state)
    assert usual.seconds["allgather"] - gathering.seconds["allgather"] == pytest.approx(
        7 * 2e-5 - 3e-5
    )
    direct = choose("auto", chain, Links((0,) * 8, direct=3e-6), 0, state)
    assert direct.seconds["allscan"] == pytest.approx(7 * 3e-6 + state / 3e11)
    assert direct.name == "allscan"
    assert usual.name != "allscan"
    # as measured on two H100s, where the all-gather took twice as long as All-Scan in the end
    two = Links((0, 0), 9e-6, 2.5e11, gathering=1.13e-5, direct=8.3e-6)
    assert choose("auto", Layout(2, 2).chain, two, 1 << 13, state).name == "allscan"
    alike = ("ring", "doubling", "twolevel")
    assert all(direct.seconds[name] == usual.seconds[name] for name in alike)


def test_a_named_exchange_gets_its_options() -> None:
    chain = Layout(8, 8).chain
    links = Links(nodes=(0, 0, 0, 0, 1, 1, 1, 1))
    assert choose("twolevel", chain, links, 0, 64).options == {"nodes": links.nodes}
    assert choose("allscan", chain, links, 0, 64).options == {"blocks": 1}  # latency decides
    assert choose("allscan", chain, links, 0, 1 << 24).options["blocks"] > 1


def test_measured_links_are_the_same_on_all_ranks() -> None:
    def work(rank: int) -> Links:
        return measure(Communicator(torch.distributed.group.WORLD), torch.device("cpu"), 2)

    found = run_ranks(work, 4)
    assert all(links == found[0] for links in found)
    assert found[0].nodes == (0, 0, 1, 1)
    assert 0 < found[0].latency < 0.1
    assert found[0].bandwidth > 1e6
    assert 0 < found[0].gathering < 0.1
    assert found[0].direct == 0.0  # a CPU's ranks hand states on by messages


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("exchange", ["auto", "allscan"])
def test_warming_up_uses_every_link_of_the_exchange(exchange: str, kind: str) -> None:
    """Also those that no document of the layout itself needs."""

    def work(rank: int) -> tuple[int, bool]:
        sp = SequenceParallel(
            layout=Layout(12, 3, kind, cu_seqlens=[0, 4, 8, 12]), exchange=exchange
        )
        sp.warm_up(torch.device("cpu"))
        traffic = sp.comm.traffic
        return traffic["state"].bytes_sent + traffic["state"].bytes_received, "warm-up" in traffic

    moved = run_ranks(work, 3)
    assert all(count >= 2 * 4 * 16 * 16 and rest for count, rest in moved)
