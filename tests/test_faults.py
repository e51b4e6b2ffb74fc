"""A rank that dies, stalls or does something else ends the call on all ranks, and says why."""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

import seqpar
from seqpar.agreement import ExchangeError, agreement_of
from seqpar.cost import Links

TOKENS, TIMEOUT = 48, 4.0


def call(rank: int, size: int, **changes: object) -> None:
    """One forward and backward; `changes` is what this rank does differently."""
    layout = changes.pop("layout", None) or seqpar.Layout(TOKENS, size)
    assert isinstance(layout, seqpar.Layout)
    dtype = changes.pop("dtype", torch.float32)
    width = changes.pop("width", 4)
    exchange, decay = changes.pop("exchange", "allgather"), changes.pop("decay", "scalar")
    links = Links((0,) * size, latency=float(str(changes.pop("latency", 1e-5))))
    sp = seqpar.SequenceParallel(_group(size), layout, str(exchange), links=links)
    q = torch.randn(1, layout.local_tokens(rank), 2, 4, dtype=dtype, requires_grad=True)  # type: ignore[call-overload]
    v = torch.randn(1, layout.local_tokens(rank), 2, width, dtype=dtype)  # type: ignore[call-overload]
    log_decay = -torch.rand(q.shape if decay == "diagonal" else q.shape[:3])
    seqpar.linear_attention(q, q, v, log_decay, sp=sp).sum().backward()


def _group(size: int) -> dist.ProcessGroup:
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=TIMEOUT))
    assert group is not None
    return group


def message(work: Callable[[], object]) -> tuple[str, float]:
    """What `work` raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        work()
    except (ValueError, ExchangeError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"width": 6}, "v [1, T, 2, 6]"),
        ({"dtype": torch.float64}, "torch.float64"),
        ({"layout": seqpar.Layout(TOKENS, 3, "zigzag")}, "zigzag"),
        ({"layout": seqpar.Layout(TOKENS, 3, cu_seqlens=[0, 20, TOKENS])}, "2 documents"),
        ({"exchange": "doubling"}, "exchange=doubling"),
        ({"decay": "diagonal"}, "log_decay [1, T, 2, 4]"),
        ({"latency": 1.0}, "links "),
    ],
    ids=["shape", "dtype", "layout", "documents", "exchange", "gate", "links"],
)
def test_a_rank_that_differs_is_named_on_every_rank(change: dict, difference: str) -> None:
    def work(rank: int) -> tuple[str, float]:
        return message(lambda: call(rank, 3, **(change if rank == 1 else {})))

    for rank, (text, seconds) in enumerate(run_ranks(work, 3)):
        assert difference in text, (rank, text)
        assert "rank 1" in text, (rank, text)
        assert seconds < TIMEOUT + 5


def test_a_rank_outside_of_the_group_is_told_so() -> None:
    def work(rank: int) -> str:
        group = dist.new_group([0, 1])
        if rank < 2:
            return ""
        return message(lambda: seqpar.SequenceParallel(group, seqpar.Layout(TOKENS, 2)))[0]

    assert "group does not hold this rank" in run_ranks(work, 3)[2]


def test_a_difference_in_a_later_step_is_found_too() -> None:
    def work(rank: int) -> tuple[str, float]:
        for _ in range(2):
            call(rank, 2)
        return message(lambda: call(rank, 2, **({"width": 6} if rank == 1 else {})))

    for text, _ in run_ranks(work, 2):
        assert "v [1, T, 2, 6]" in text


@pytest.mark.parametrize("exchange", ["allgather", "ring", "allscan", "doubling", "twolevel"])
def test_a_rank_that_dies_in_the_exchange_ends_the_others(exchange: str) -> None:
    """Killed in the second step, when all has been agreed on."""

    def work(rank: int) -> tuple[str, float]:
        group = _group(3)
        layout = seqpar.Layout(TOKENS, 3)
        sp = seqpar.SequenceParallel(group, layout, exchange)
        q = torch.randn(1, TOKENS // 3, 2, 4)
        seqpar.linear_attention(q, q, q, sp=sp)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return message(lambda: [seqpar.linear_attention(q, q, q, sp=sp) for _ in range(99)])

    answers = run_ranks(work, 3, survivors=[0, 2])
    for text, seconds in answers:
        assert "ExchangeError" in text
        assert "rank 1 gave no answer" in text
        assert "linear_attention(q [1, T, 2, 4]" in text
        assert seconds < TIMEOUT + 5


@pytest.mark.parametrize("known", [True, False], ids=["a known call", "a new call"])
def test_a_store_that_died_with_its_rank_hides_nothing(known: bool) -> None:
    """Without torchrun the first rank keeps it, and every question to it fails."""

    def lost(*_: object) -> None:
        raise dist.DistNetworkError("Broken pipe")

    def work(rank: int) -> str:
        sp = seqpar.SequenceParallel(_group(2), seqpar.Layout(TOKENS, 2), "allgather")
        q = torch.randn(1, TOKENS // 2, 2, 4)
        seqpar.linear_attention(q, q, q, sp=sp)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        assert sp.comm.group is not None
        methods = dict.fromkeys(("set", "get", "check", "compare_set"), lost)
        agreement_of(sp.comm.group)._store = SimpleNamespace(**methods)  # type: ignore[assignment]
        v = q if known else q[..., :3]
        return message(lambda: [seqpar.linear_attention(q, q, v, sp=sp) for _ in range(99)])[0]

    [text] = run_ranks(work, 2, survivors=[1])
    assert "ExchangeError: the exchange of rank 1" in text
    assert "linear_attention(q [1, T, 2, 4]" in text
    assert "keeps the process group's store has died" in text


def test_a_rank_that_stalls_ends_the_others_within_the_timeout() -> None:
    def work(rank: int) -> tuple[str, float]:
        group = _group(3)
        sp = seqpar.SequenceParallel(group, seqpar.Layout(TOKENS, 3), "allscan")
        q = torch.randn(1, TOKENS // 3, 2, 4)
        seqpar.linear_attention(q, q, q, sp=sp)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return message(lambda: [seqpar.linear_attention(q, q, q, sp=sp) for _ in range(99)])

    for text, seconds in run_ranks(work, 3, survivors=[2]):
        assert "rank 1 gave no answer" in text
        assert TIMEOUT - 1 < seconds < TIMEOUT + 5


def test_a_rank_that_never_comes_ends_the_others_within_the_timeout() -> None:
    def work(rank: int) -> str:
        if rank == 1:
            _group(2)
            time.sleep(TIMEOUT + 4)
            return ""
        return message(lambda: call(rank, 2))[0]

    assert "rank 1 gave no answer" in run_ranks(work, 2)[0]
