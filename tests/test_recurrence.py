"""linear_attention and delta_attention on shards against the token loop: outputs, all gradients."""

import random
import time
from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from harness import assert_close, run_ranks
from torch import Tensor

import seqpar
from seqpar.attention import start_linear_attention
from seqpar.kernels import reference

TOKENS, HEADS, K, V = 192, 2, 6, 5
DOCUMENTS: dict[str, tuple[int, ...] | None] = {
    "whole": None,
    "packed": (0, 1, 40, 96, 97, 160, 160, 192),  # one token, over ranks, from a rank's edge, empty
    "random": (0, *sorted(random.Random(5).sample(range(1, TOKENS), 9)), TOKENS),
    "even": (0, 48, 48, 144, 192),  # which ranks can cut zigzag one by one
}

EXCHANGES = ("allgather", "ring", "allscan", "doubling", "twolevel")

# what a family takes besides q, k, v: [B, T, HV], [B, T, HV, int], or a "constant" [HV]
Gates = dict[str, int | str | None]
# name -> (function, reference, gates)
FAMILIES: dict[str, tuple[Callable, Callable, Gates]] = {
    "linear": (seqpar.linear_attention, reference.linear_attention, {}),
    "constant": (
        seqpar.linear_attention,
        reference.linear_attention,
        {"log_decay": "constant"},
    ),
    "scalar": (seqpar.linear_attention, reference.linear_attention, {"log_decay": None}),
    "diagonal": (seqpar.linear_attention, reference.linear_attention, {"log_decay": K}),
    "delta": (seqpar.delta_attention, reference.delta_attention, {"beta": None}),
    "delta scalar": (
        seqpar.delta_attention,
        reference.delta_attention,
        {"beta": None, "log_decay": None},
    ),
    "delta diagonal": (
        seqpar.delta_attention,
        reference.delta_attention,
        {"beta": None, "log_decay": K},
    ),
    "dplr": (
        seqpar.dplr_attention,
        reference.dplr_attention,
        {"a": K, "b": K, "log_decay": K},
    ),
}


@cache
def case(
    family: str, documents: str, tokens: int = TOKENS
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Global inputs (fp64), output gradient, and the token loop's output and input gradients."""
    _, spec, gates = FAMILIES[family]
    make = torch.Generator().manual_seed(
        len(DOCUMENTS) * list(FAMILIES).index(family) + list(DOCUMENTS).index(documents)
    )

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=make)

    batch, value_heads = (2, HEADS) if DOCUMENTS[documents] is None else (1, 2 * HEADS)
    inputs = {
        "q": randn(batch, tokens, HEADS, K),
        "k": torch.nn.functional.normalize(randn(batch, tokens, HEADS, K), dim=-1),
        "v": randn(batch, tokens, value_heads, V),
    }
    for name, width in gates.items():
        shape = [value_heads] if width == "constant" else [batch, tokens, value_heads]
        x = randn(*shape, width) if isinstance(width, int) else randn(*shape)
        if name == "log_decay":  # from exp(-1e-4) to exp(-20) a token
            x = -(10 ** (torch.rand(x.shape, dtype=torch.float64, generator=make) * 5.3 - 4))
        elif name == "beta":
            x = 2 * torch.sigmoid(x)
        else:  # a and b: a rank-one update that keeps the state bounded
            x = torch.nn.functional.normalize(x, dim=-1) * 0.7
        inputs[name] = x
    do = randn(batch, tokens, value_heads, V)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, _ = spec(**leaves, cu_seqlens=DOCUMENTS[documents])
    gradients = torch.autograd.grad((o * do).sum(), list(leaves.values()))
    return inputs, do, {"o": o.detach(), **dict(zip(leaves, gradients, strict=True))}


def compute(
    rank: int,
    layout: seqpar.Layout,
    family: str,
    documents: str,
    dtype: torch.dtype,
    exchange: str,
    segment_tokens: int | None = None,
) -> dict[str, Tensor]:
    """This rank's output and gradients."""
    inputs, do, _ = case(family, documents, layout.total_tokens)
    sp = seqpar.SequenceParallel(layout=layout, exchange=exchange, segment_tokens=segment_tokens)
    leaves = {
        name: (x if x.dim() == 1 else layout.shard(x, rank)).to(dtype).requires_grad_()
        for name, x in inputs.items()
    }
    o = FAMILIES[family][0](**leaves, sp=sp)
    local = layout.shard(do, rank).to(dtype)
    gradients = torch.autograd.grad((o * local).sum(), list(leaves.values()))
    return {"o": o.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(
    exchange: str,
    world_size: int,
    kind: str,
    documents: str,
    dtype: torch.dtype = torch.float64,
    bound: float = 1e-10,
    segment_tokens: int | None = None,
    tokens: int = TOKENS,
) -> None:
    layout = make_layout(world_size, kind, documents, tokens)
    for family in FAMILIES:  # before the fork, so that workers inherit them
        case(family, documents, tokens)

    def work(rank: int) -> dict[str, dict[str, Tensor]]:
        return {
            family: compute(rank, layout, family, documents, dtype, exchange, segment_tokens)
            for family in FAMILIES
        }

    ranks = run_ranks(work, layout.world_size)
    for family in FAMILIES:
        expected = case(family, documents, tokens)[2]
        for name, value in expected.items():
            shards = [result[family][name] for result in ranks]
            if value.dim() == 1:  # a parameter: each rank has its own tokens' share
                assert_close(f"{family} d{name}", sum(shards), value, bound)
                continue
            for rank, shard in enumerate(shards):
                wanted = layout.shard(value, rank)
                label = f"{family} {name} on rank {rank} of {layout}"
                assert_close(label, shard, wanted, bound, whole=value)


def make_layout(world_size: int, kind: str, documents: str, tokens: int = TOKENS) -> seqpar.Layout:
    cu_seqlens = DOCUMENTS[documents]
    if kind != "uneven":
        return seqpar.Layout(tokens, world_size, kind, cu_seqlens)
    sizes = [1 + 7 * rank for rank in range(world_size - 1)]
    return seqpar.Layout(
        TOKENS, world_size, cu_seqlens=cu_seqlens, shard_sizes=[*sizes, TOKENS - sum(sizes)]
    )


@pytest.mark.parametrize(
    "arguments",
    [
        *product(("allgather",), (1, 2, 3, 4), ("contiguous", "zigzag"), ("whole", "packed")),
        ("allgather", 3, "uneven", "packed"),
        *[(exchange, 3, "zigzag", "packed") for exchange in EXCHANGES[1:]],
        *[(exchange, 4, "contiguous", "whole") for exchange in EXCHANGES[1:]],
        ("auto", 4, "uneven", "random"),
        *[(exchange, 3, "document_zigzag", "even") for exchange in EXCHANGES],
    ],
    ids=lambda arguments: "-".join(map(str, arguments)),
)
def test_fp64_equals_the_token_loop(arguments: tuple[str, int, str, str]) -> None:
    check(*arguments)


@pytest.mark.complete
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "uneven"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_full_product_equals_the_token_loop(
    exchange: str, world_size: int, kind: str, documents: str
) -> None:
    check(exchange, world_size, kind, documents)


@pytest.mark.complete
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_documents_cut_zigzag_equal_the_token_loop(exchange: str, world_size: int) -> None:
    check(exchange, world_size, "document_zigzag", "even")


@pytest.mark.complete
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_thousands_of_tokens_equal_the_token_loop(exchange: str) -> None:
    check(exchange, 4, "zigzag", "whole", tokens=3000)


def test_fp32_is_within_1e_5() -> None:
    check("auto", 2, "zigzag", "whole", torch.float32, 1e-5)


@pytest.mark.parametrize("exchange", ["allgather", "doubling"])
def test_autocast_leaves_states_in_full_precision(exchange: str) -> None:
    """Forward and backward within it."""
    with torch.autocast("cpu", torch.bfloat16):
        check(exchange, 3, "contiguous", "packed", torch.float32, 1e-5)


def test_messages_of_other_layers_may_come_between_the_halves_of_a_recurrence() -> None:
    """States go round by a thread on a CPU, keys and values by the caller, between the same ranks:
    which are sent first is not the same on all of them."""
    layout, x = seqpar.Layout(48, 3), torch.randn(1, 48, 8, 4, dtype=torch.float64)
    expected = seqpar.linear_attention(x, x, x), seqpar.softmax_attention(x, x, x)

    def work(rank: int) -> list[tuple[Tensor, Tensor]]:
        sp = seqpar.SequenceParallel(layout=layout, exchange="ring")
        q, found = layout.shard(x, rank), []
        for turn in range(20):
            if rank == turn % 3:
                time.sleep(0.002)
            finish = start_linear_attention(q, q, q, sp=sp)
            between = seqpar.softmax_attention(q, q, q, method="ring", sp=sp)
            found.append((finish(), between))
        return found

    for rank, turns in enumerate(run_ranks(work, 3)):
        for results in turns:
            for result, whole in zip(results, expected, strict=True):
                assert_close(f"rank {rank}", result, layout.shard(whole, rank), 1e-10, whole=whole)


@pytest.mark.parametrize("segment_tokens", [1, 7, 64])
def test_the_numbers_do_not_depend_on_how_a_rank_cuts_its_tokens(segment_tokens: int) -> None:
    check("auto", 2, "zigzag", "packed", segment_tokens=segment_tokens)
    check("auto", 1, "contiguous", "whole", segment_tokens=segment_tokens)


def test_a_repeated_run_gives_the_same_bits() -> None:
    def work(rank: int) -> None:
        layout = make_layout(4, "contiguous", "whole")
        for exchange in EXCHANGES:
            for family in ("diagonal", "delta"):
                runs = [
                    compute(rank, layout, family, "whole", torch.float32, exchange)
                    for _ in range(2)
                ]
                for name, value in runs[0].items():
                    assert torch.equal(value, runs[1][name]), (exchange, family, name)

    for family in ("diagonal", "delta"):
        case(family, "whole")
    run_ranks(work, 4)


def test_without_sp_a_rank_holds_whole_sequences() -> None:
    for family, (function, *_) in FAMILIES.items():
        inputs, _, expected = case(family, "whole")
        assert_close(family, function(**inputs), expected["o"], 1e-10)


def test_one_collective_each_way_of_the_minimal_summary() -> None:
    """A rank receives (P-1) times K·V state elements plus A: 0, 1, K or K·K of them a head."""
    extra = {"linear": 0, "constant": 1, "scalar": 1, "diagonal": K, "delta": K * K}

    def work(rank: int) -> dict[str, tuple[int, int]]:
        moved = {}
        for family in extra:
            inputs, _, _ = case(family, "whole")
            layout = seqpar.Layout(TOKENS, 3)
            sp = seqpar.SequenceParallel(layout=layout, exchange="allgather")
            leaves = {
                n: (x if x.dim() == 1 else layout.shard(x, rank)).requires_grad_()
                for n, x in inputs.items()
            }
            FAMILIES[family][0](**leaves, sp=sp).sum().backward()
            traffic = sp.comm.traffic["state"]
            moved[family] = (traffic.calls, traffic.bytes_received)
        return moved

    for moved in run_ranks(work, 3):
        for family, elements in extra.items():
            state_bytes = 8 * 2 * HEADS * (K * V + elements)  # fp64, batch 2
            assert moved[family] == (2, 2 * (3 - 1) * state_bytes), family


def test_documents_that_end_with_the_rank_exchange_nothing() -> None:
    def work(rank: int) -> int:
        layout = seqpar.Layout(64, 2, cu_seqlens=[0, 32, 64])
        sp = seqpar.SequenceParallel(layout=layout)
        x = torch.randn(1, 32, 1, 4, requires_grad=True)
        seqpar.linear_attention(x, x, x, sp=sp).sum().backward()
        return sp.comm.total().calls

    assert run_ranks(work, 2) == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 8, 2)}, "q is .* must be"),
        ({"k": torch.zeros(1, 8, 2, 3)}, "k is .* must have q's shape"),
        ({"v": torch.zeros(1, 8, 3, 4)}, "3 heads.* nearest: 2"),
        ({"v": torch.zeros(1, 7, 2, 4)}, "batch and tokens"),
        ({"v": torch.zeros(1, 8, 2, 4).half()}, "dtype"),
        ({"log_decay": torch.zeros(1, 8)}, "log_decay is .* must be"),
        ({"log_decay": torch.zeros(1, 8, 2).long()}, "floating"),
        ({"log_decay": torch.zeros(1, 8, 2, device="meta")}, "log_decay is on meta, v on cpu"),
        ({"scale": torch.ones(())}, r"scale is a tensor.* scale=1\.0"),
        ({"sp": seqpar.SequenceParallel(layout=seqpar.Layout(16, 1))}, "q has 8 tokens"),
        (
            {"sp": seqpar.SequenceParallel(layout=seqpar.Layout(8, 1, cu_seqlens=[0, 3, 8]))},
            "batch size 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    batch = 2 if "batch size" in message else 1
    arguments = {name: torch.zeros(batch, 8, 2, 4) for name in "qkv"} | change
    with pytest.raises(ValueError, match=message):
        seqpar.linear_attention(**arguments)


def test_several_steps_a_token_are_interleaved_tokens() -> None:
    """DeltaProduct (arXiv 2502.10297): two Householder steps a token, read after both."""
    steps, tokens = 2, 48
    torch.manual_seed(0)
    q = torch.randn(1, tokens, HEADS, K).double()
    v = torch.randn(1, tokens, steps, HEADS, V).double()
    k = torch.nn.functional.normalize(torch.randn(1, tokens, steps, HEADS, K).double(), dim=-1)
    beta = 2 * torch.rand(1, tokens, steps, HEADS).double()
    decay = -torch.rand(1, tokens, HEADS).double()

    state, rows = torch.zeros(1, HEADS, K, V).double(), []
    for t in range(tokens):
        state = decay[:, t].exp()[..., None, None] * state
        for j in range(steps):
            key = k[:, t, j, :, :, None]
            change = v[:, t, j, :, None] - key.mT @ state
            state = state + beta[:, t, j, :, None, None] * key * change
        rows.append((q[:, t, :, None] @ state).squeeze(-2))
    expected = torch.stack(rows, 1) * K**-0.5

    def interleaved(x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, T * steps, ...]: x at each token's first step, zero at the others."""
        return torch.stack([x, *[torch.zeros_like(x)] * (steps - 1)], 2).flatten(1, 2)

    layout = seqpar.Layout(tokens * steps, 2)
    inputs = {
        "q": interleaved(q).roll(steps - 1, 1),  # read after the last step
        "k": k.flatten(1, 2),
        "v": v.flatten(1, 2),
        "beta": beta.flatten(1, 2),
        "log_decay": interleaved(decay),
    }

    def work(rank: int) -> Tensor:
        sp = seqpar.SequenceParallel(layout=layout)
        local = {name: layout.shard(x, rank) for name, x in inputs.items()}
        return FAMILIES["delta scalar"][0](**local, sp=sp)

    o = layout.unshard(run_ranks(work, 2))[:, steps - 1 :: steps]
    assert_close("o", o, expected, 1e-10)
