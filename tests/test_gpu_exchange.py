"""Exchanges between GPUs: `pytest -m gpu tests/test_gpu_exchange.py` on two GPUs of one machine.

Every exchange against the fold of all summaries, 200 times with the same bits while ranks are late
at random; CUDA graphs against eager calls; nothing that waits on the host; and what becomes of the
others when a rank fails.
"""

import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from gpu_ranks import Ended, run_on_gpus
from harness import assert_close
from test_exchange import fold
from torch import Tensor

import seqpar
from seqpar import Layout, SequenceParallel
from seqpar.chain import Chain
from seqpar.comm import Communicator
from seqpar.exchange import (
    EXCHANGES,
    States,
    allgather,
    allscan,
    doubling,
    handover,
    ring,
    twolevel,
)
from seqpar.kernels.transition import Decay, Dense, Identity, Transition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

HERE = "test_gpu_exchange"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPEATS = 200
TIMEOUT = 10.0
TRANSITIONS: dict[str, tuple[Transition, Callable[[int], tuple[int, int]]]] = {
    "none": (Identity(), lambda K: (0, 0)),
    "scalar": (Decay(), lambda K: (1, 1)),
    "diagonal": (Decay(), lambda K: (K, 1)),
    "dense": (Dense(), lambda K: (K, K)),
}
Given = dict[tuple[int, int], tuple[Tensor, Tensor]]


def ways(size: int) -> dict[str, Callable[..., States]]:
    return {
        "allgather": allgather,
        "ring": ring,
        "allscan": allscan,
        "allscan by messages": partial(ring, blocks=4),
        "doubling": doubling,
        "twolevel": partial(twolevel, nodes=[0] * size),
        "twolevel, a rank each": partial(twolevel, nodes=range(size)),
    }


def layouts(size: int) -> Iterator[Layout]:
    tokens = 24 * size
    for kind in ("contiguous", "zigzag"):
        for documents in (None, [0, 5, 6, 24, tokens - 7, tokens]):
            yield Layout(tokens, size, kind, documents)


def summaries(chain: Chain, name: str, shape: tuple[int, ...], seed: int) -> Given:
    """Of every range of every rank, fp32 on this rank's GPU."""
    *heads, K, _ = shape
    rows, columns = TRANSITIONS[name][1](K)
    make = torch.Generator(DEVICE).manual_seed(seed)
    randn = partial(torch.randn, generator=make, device=DEVICE)
    return {
        place: (randn(*heads, rows, columns) / max(K, 1) ** 0.5, randn(*shape))
        for place in sorted(chain.places)
    }


def stacked(given: Given, rank: int, ranges: int) -> tuple[Tensor, Tensor]:
    A, B = zip(*(given[rank, slot] for slot in range(ranges)), strict=True)
    return torch.stack(A), torch.stack(B)


def check_fold(
    label: str,
    start: Callable[..., States],
    layout: Layout,
    name: str,
    comm: Communicator,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    bound: float = 1e-5,
) -> None:
    transition = TRANSITIONS[name][0]
    for chain in (layout.chain, layout.chain.backwards):
        given = summaries(chain, name, shape, len(chain))
        wide = {place: (A.double(), B.double()) for place, (A, B) in given.items()}
        expected = fold(chain, transition, wide)
        A, B = stacked(given, comm.rank, len(layout.ranges(comm.rank)))
        states = start(transition, A.to(dtype), B.to(dtype), chain, comm)()
        for slot, state in enumerate(states):
            wanted = expected.get((comm.rank, slot))
            assert (state is None) == (wanted is None), (label, name, layout, slot)
            if state is not None and wanted is not None:
                assert_close(f"{label} {name} {layout}", state.cpu(), wanted.cpu(), bound)


def folds(rank: int, size: int) -> None:
    comm = Communicator(dist.group.WORLD)
    for layout in layouts(size):
        for label, start in ways(size).items():
            for name in TRANSITIONS:
                check_fold(label, start, layout, name, comm, (2, 3, 64, 48))
    for name in TRANSITIONS:
        check_fold("tiles", allscan, Layout(2, size), name, comm, (1, 40, 128, 128))
        check_fold("padded", allscan, Layout(2 * size, size, "zigzag"), name, comm, (1, 3, 200, 70))
    state = torch.zeros(1, 2, 3, 64, 48, device=DEVICE)
    reach = torch.cuda.can_device_access_peer(0, 1)
    print("through peers' memory:", handover(comm, state) is not None)
    assert (handover(comm, state) is not None) or not reach
    assert handover(comm, state.double()) is None
    double = partial(check_fold, dtype=torch.float64, bound=1e-10)
    double("fp64 goes by messages", allscan, Layout(2, size), "dense", comm, (2, 3, 64, 48))


def falls_back(rank: int, size: int) -> None:
    """Without symmetric memory All-Scan goes by messages, and says so once."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("seqpar.comm").addHandler(handler)
    logging.getLogger("seqpar.comm").setLevel(logging.INFO)
    comm = Communicator(dist.new_group(list(range(size))))
    comm.shared.once("against symmetric", lambda: "a test has taken it away")
    for K in (16, 32, 64):
        check_fold("messages", allscan, Layout(2 * size, size), "diagonal", comm, (1, 2, K, K))
        assert handover(comm, torch.zeros(1, 1, 2, K, K, device=DEVICE)) is None
    assert said == ["no symmetric memory: a test has taken it away"]


def repeats(rank: int, size: int) -> None:
    """Three sets of summaries in turn, none waited for on the host, ranks late at random."""
    draw = random.Random(rank)
    for kind in ("contiguous", "zigzag"):
        layout = Layout(24 * size, size, kind)
        for name, label in (("diagonal", "allscan"), ("dense", "allscan"), ("diagonal", "ring")):
            comm = Communicator(dist.group.WORLD)
            start, transition = ways(size)[label], TRANSITIONS[name][0]
            shape = (1, 16, 128, 128)
            both = (layout.chain, layout.chain.backwards)
            ranges = len(layout.ranges(rank))
            sets = [stacked(summaries(both[0], name, shape, i), rank, ranges) for i in range(3)]
            first: dict[tuple[int, bool], list[Tensor | None]] = {}
            differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
            for turn in range(REPEATS):
                if draw.random() < 0.3:
                    torch.cuda._sleep(draw.randrange(1_000_000))  # up to half a millisecond
                for chain in both:
                    states = start(transition, *sets[turn % 3], chain, comm)()
                    key = turn % 3, chain is both[0]
                    for state, same in zip(states, first.setdefault(key, states), strict=True):
                        if state is not None and same is not None:
                            differ += (state != same).sum()
            assert differ.item() == 0, (kind, name, label)
    print(f"{REPEATS} runs gave the same bits")


Step = Callable[[], list[Tensor]]


def layer(sp: SequenceParallel | None, tokens: int, decay: str) -> tuple[list[Tensor], Step]:
    """Inputs of this rank, and a forward and backward of linear_attention over them."""

    def randn(*width: int) -> Tensor:
        return torch.randn(1, tokens, 4, *width, device=DEVICE).bfloat16()

    inputs = [randn(64), randn(64), randn(64)]
    if decay != "none":
        width = (64,) if decay == "diagonal" else ()
        inputs.append(-torch.rand(1, tokens, 4, *width, device=DEVICE) / 10)
    leaves = [x.requires_grad_() for x in inputs]
    do = randn(64)

    def step() -> list[Tensor]:
        o = seqpar.linear_attention(*leaves, sp=sp)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    return [*inputs, do], step


def layer_cases(size: int) -> Iterator[tuple[str, SequenceParallel | None, str]]:
    tokens = 2048
    for decay in ("none", "scalar", "diagonal"):
        yield "alone", None, decay
        for kind, documents in (("contiguous", None), ("zigzag", [0, 100, 1500, 1501, tokens])):
            layout = Layout(tokens, size, kind, documents)
            for exchange in ("allscan", "allgather", "ring", "doubling", "twolevel"):
                yield (
                    f"{exchange} {kind}",
                    SequenceParallel(layout=layout, exchange=exchange),
                    decay,
                )


def graphs(rank: int, size: int) -> None:
    """A captured forward and backward gives the bits of eager calls, whatever the inputs are."""
    dist.barrier()
    for label, sp, decay in layer_cases(size):
        inputs, step = layer(sp, 2048 if sp is None else 2048 // size, decay)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for turn in range(3):
            torch.manual_seed(100 * turn + rank)
            with torch.no_grad():
                for x in inputs[:3] + inputs[-1:]:
                    x.copy_(torch.randn_like(x))
            eager = [x.clone() for x in step()] if turn != 1 else None
            graph.replay()
            found = [x.clone() for x in captured]
            graph.replay()  # once more at its heels
            if eager is None:
                eager = step()
            for x, y, again in zip(eager, found, captured, strict=True):
                assert torch.isfinite(x).all(), (label, decay)
                assert x.any(), (label, decay)
                assert torch.equal(x, y), f"{label} {decay}: a replay differs"
                assert torch.equal(x, again), f"{label} {decay}: a second replay differs"
        torch.cuda.synchronize()
        del graph, captured
    print("graphs give the bits of eager calls")


def waits_nowhere(rank: int, size: int) -> None:
    """Once everything has been made, a layer's forward and backward never wait on the host."""
    dist.barrier()
    for label, sp, decay in layer_cases(size):
        _, step = layer(sp, 2048 if sp is None else 2048 // size, decay)
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            raise AssertionError(f"{label} {decay} waits on the host") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")


def refuses_room_in_a_graph(rank: int, size: int) -> None:
    """States of a shape that has not been met need memory, which a graph cannot make."""
    comm = Communicator(dist.group.WORLD)
    comm.barrier()
    state = torch.zeros(1, 1, 1, 16, 48, device=DEVICE)
    with (
        pytest.raises(RuntimeError, match="run the call once before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        allscan(Identity(), state[..., :0, :0], state, Layout(size, size).chain, comm)
    torch.cuda.synchronize()


def warms_up(rank: int, size: int) -> None:
    for exchange in ("auto", *EXCHANGES):
        SequenceParallel(layout=Layout(4 * size, size, "zigzag"), exchange=exchange).warm_up(
            torch.device(DEVICE)
        )


WORKS = (folds, warms_up, falls_back, repeats, waits_nowhere, graphs, refuses_room_in_a_graph)


def everything(rank: int, size: int) -> None:
    """All of the above in one process a rank: to start one takes longer than most of it."""
    for work in WORKS:
        begin = time.monotonic()
        work(rank, size)
        torch.cuda.synchronize()
        dist.barrier()
        print(f"passed {work.__name__} in {time.monotonic() - begin:.1f} s", flush=True)


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return run_on_gpus(HERE, "everything", size=torch.cuda.device_count())


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_all_gpus(work: Callable[[int, int], None], ended: list[Ended]) -> None:
    for rank, found in enumerate(ended):
        print(f"rank {rank}, exit code {found.code}:\n{found.output[-4000:]}")
    for found in ended:
        assert f"passed {work.__name__} in" in found.output


def _until_it_fails(rank: int, size: int, exchange: str, end: Callable[[], object]) -> None:
    """Some steps, then rank 1 comes to its `end` while a step of its own is under way."""
    logging.basicConfig()
    sp = SequenceParallel(layout=Layout(256, size), exchange=exchange)
    _, step = layer(sp, 256 // size, "scalar")
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        step()  # waits on the GPU for rank 0
        end()
    time.sleep(1)
    print(f"failing from {time.time()}", flush=True)
    for _ in range(20):
        step()
        torch.cuda.synchronize()
    raise AssertionError("nothing was noticed")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_allscan(rank: int, size: int) -> None:
    _until_it_fails(rank, size, "allscan", _die)


def killed_ring(rank: int, size: int) -> None:
    _until_it_fails(rank, size, "ring", _die)


def stalled_allscan(rank: int, size: int) -> None:
    _until_it_fails(rank, size, "allscan", partial(time.sleep, 1000))


def stalled_allgather(rank: int, size: int) -> None:
    _until_it_fails(rank, size, "allgather", partial(time.sleep, 1000))


def never_comes(rank: int, size: int) -> None:
    logging.basicConfig()
    dist.barrier()
    if rank == 1:
        time.sleep(1000)
    sp = SequenceParallel(layout=Layout(256, size), exchange="allscan")
    layer(sp, 256 // size, "scalar")[1]()


@pytest.mark.parametrize(
    "work",
    [
        killed_allscan,
        killed_ring,
        stalled_allscan,
        stalled_allgather,
        never_comes,
    ],
    ids=lambda work: work.__name__,
)
def test_a_rank_that_fails_ends_the_others_with_a_message(
    work: Callable[[int, int], None],
) -> None:
    """NCCL's own watch needs up to half a minute more than the timeout to write what it knows."""
    name = work.__name__
    ended = run_on_gpus(HERE, name, timeout=150, group_timeout=TIMEOUT, survivors=[0])[0]
    print(f"{name}: {ended.code} after {ended.seconds:.0f} s\n{ended.output[-1500:]}")
    assert ended.code is not None, f"it hangs:\n{ended.output[-4000:]}"
    assert ended.code != 0
    assert "nothing was noticed" not in ended.output
    if name == "never_comes":
        assert "ExchangeError" in ended.output
        assert "rank 1 gave no answer" in ended.output
    elif name.endswith("allscan"):
        assert "s for rank 1 in vain" in ended.output, ended.output[-4000:]
        assert "rank 1 gave no answer" in ended.output
        assert "linear_attention(q [1, T, 4, 64]" in ended.output
    else:
        assert "timeout" in ended.output.lower()
