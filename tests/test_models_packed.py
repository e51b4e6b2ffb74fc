"""In another project's GPTModel: packed documents, cut zigzag or not, and groups of a batch."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import assert_close, run_ranks
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron_setup import Rank, Setting, tiny
from torch import Tensor

from seqpar.models import (
    core_attention_spec,
    linear_attention_spec,
    pattern_spec,
    softmax_attention_spec,
)

SIZES: dict[str, Any] = {"num_heads": 2, "head_dim": 4, "value_head_dim": 8}
# Real documents and, behind each, padding up to a multiple of 8: of 2 * cp for up to 4 ranks.
LENGTHS = [(5, 8), (24, 24), (1, 8), (14, 16), (8, 8)]
PADDED = [0, *itertools.accumulate(padded for _, padded in LENGTHS)]
TOKENS = PADDED[-1]


@dataclass
class Way:
    """Which layers, how callers cut the sequence, and over how many ranks of how many."""

    layers: str = "GDN"
    layout: str = "zigzag"
    ranks: int = 1
    packed: bool = True
    batch: int = 1
    own_group: bool = False  # the batch brings a group of half of the context-parallel ranks


def model(state: Rank, way: Way) -> GPTModel:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    theirs = spec.submodules.self_attention
    theirs.submodules.core_attention = core_attention_spec(layout=way.layout)
    spec.submodules.self_attention = pattern_spec(
        way.layers,
        {
            "G": linear_attention_spec("gla", **SIZES, gate_rank=4, layout=way.layout),
            "D": linear_attention_spec("gated_deltanet", **SIZES, layout=way.layout),
            "N": softmax_attention_spec(layout=way.layout),
            "M": theirs,  # Megatron's own attention, with its rotary embedding
        },
    )
    torch.manual_seed(2)
    rotary = "rope" if "M" in way.layers else "none"
    network = GPTModel(
        state.config, spec, 32, 64, position_embedding_type=rotary, pg_collection=state.groups
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return network


def cut(way: Way, rank: int, ranks: int) -> Tensor:
    """The tokens of `rank`, found as Megatron and Transformer Engine find them."""
    everything = torch.arange(TOKENS)
    if way.layout == "contiguous":
        return everything.chunk(ranks)[rank]
    documents = everything.split([padded for _, padded in LENGTHS]) if way.packed else [everything]
    pieces = [document.chunk(2 * ranks) for document in documents]
    return torch.cat([torch.cat([p[rank], p[2 * ranks - 1 - rank]]) for p in pieces])


def packed_sequence(group: Any, alone: bool) -> PackedSeqParams:
    real = torch.tensor([0, *itertools.accumulate(length for length, _ in LENGTHS)]).int()
    padded = torch.tensor(PADDED).int()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=24,
        max_seqlen_kv=24,
        cp_group=group,
        local_cp_size=1 if alone else None if group is None else group.size(),
    )


def losses(rank: int, way: Way) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """This rank's tokens, their losses where they are not padding, and its share of gradients."""
    state = Rank(tiny("N" * len(way.layers), num_experts=0), Setting(context=way.ranks))
    network = model(state, way)
    group, ranks = None, way.ranks
    if way.own_group:
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group, ranks, rank = halves[rank // 2], 2, rank % 2
    own = cut(way, rank, ranks)
    make = torch.Generator().manual_seed(1)
    stream = torch.randint(0, 32, (way.batch, TOKENS + 1), generator=make)
    real = torch.cat([torch.arange(padded) < length for length, padded in LENGTHS])
    params = packed_sequence(group, alone=False) if way.packed else None
    found = network(stream[:, own], None, None, labels=stream[:, own + 1], packed_seq_params=params)
    found = found * real[own] if way.packed else found
    found.sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return own, found.detach(), gradients


def check(way: Way) -> None:
    whole = Way(way.layers, "contiguous", 1, way.packed, way.batch)
    if "M" in way.layers and way.packed:
        whole.layout = "zigzag"  # its rotary embedding counts within documents either way
    [(order, expected, wanted)] = run_ranks(losses, 1, whole)
    expected = expected[:, order.argsort()]
    results = run_ranks(losses, way.ranks, way)
    for own, found, _ in results:
        assert_close("losses", found, expected[:, own], 1e-5, whole=expected)
    copies = 2 if way.own_group else 1
    for name, gradient in wanted.items():
        total = sum(gradients[name] for _, _, gradients in results)
        assert_close(name, total, copies * gradient, 5e-5)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_packed_documents(layout: str, ranks: int) -> None:
    check(Way(layout=layout, ranks=ranks))


def test_a_batch_brings_its_own_group() -> None:
    check(Way(ranks=4, own_group=True))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_several_sequences_at_once(layout: str) -> None:
    check(Way(layout=layout, ranks=2, packed=False, batch=3))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_megatrons_own_attention_with_its_rotary_embedding(packed: bool) -> None:
    check(Way("MG", ranks=2, packed=packed, batch=1 if packed else 2))


def bounds(*documents: int) -> dict[str, Tensor]:
    names = ("cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    return {name: torch.tensor(documents) for name in names}


def refusal(rank: int, change: dict[str, Any], layout: str, ranks: int) -> str:
    way = Way("G", layout, ranks)
    state = Rank(tiny("G", num_experts=0), Setting(context=ranks))
    params = packed_sequence(None, alone=False)
    for name, value in change.items():
        setattr(params, name, value)
    tokens = torch.zeros(1, TOKENS // ranks, dtype=torch.long)
    try:
        model(state, way)(tokens, None, None, packed_seq_params=params)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        (
            {"cu_seqlens_q_padded": torch.tensor([0, 32])},
            "zigzag",
            r"cu_seqlens_kv=.* is not cu_seqlens_q=\[0, 32\]",
        ),
        (
            bounds(0, 12, 28),
            "zigzag",
            "cu_seqlens_q ends at 28, but 2 .* hold 32 tokens each.* 64, padding included",
        ),
        (
            bounds(0, 30, 64),
            "zigzag",
            r"document \[0, 30\) has 30 tokens.* multiple of 4 .* nearest: 28, 32; pad it",
        ),
        (
            bounds(0, 12, 28),
            "contiguous",
            "accepted",
        ),
        ({}, "striped", "layout='striped' must be one of contiguous, zigzag, or None"),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    change: dict[str, Any], layout: str, message: str
) -> None:
    for found in run_ranks(refusal, 2, change, layout, 2):
        with pytest.raises(ValueError, match=message):
            raise ValueError(found)
