"""The specs outside this project's own model, and the model in bfloat16."""

import re
from typing import Any

import pytest
import torch
from harness import assert_close, run_ranks
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mamba import MambaModel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron_setup import Rank, Setting, tiny, whole_weights
from torch import Tensor

import seqpar
from seqpar.models import (
    forward_step,
    hybrid_stack_spec,
    linear_attention_spec,
    pattern_spec,
    softmax_attention_spec,
)


def foreign_loss(rank: int, ranks: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Another project's GPTModel on Megatron's own layer spec, its attention replaced."""
    state = Rank(tiny("G", num_experts=0), Setting(context=ranks))
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention = linear_attention_spec(
        "gated_deltanet", num_heads=2, head_dim=4, value_head_dim=8, layout="zigzag"
    )
    torch.manual_seed(2)
    network = GPTModel(
        state.config, spec, 32, 64, position_embedding_type="none", pg_collection=state.groups
    )
    layout = seqpar.Layout(24, ranks, "zigzag")  # as Megatron's get_batch_on_this_cp_rank cuts it
    stream = torch.randint(0, 32, (2, 25), generator=torch.Generator().manual_seed(1))
    tokens, labels = (layout.shard(x, rank) for x in (stream[:, :-1], stream[:, 1:]))
    losses = network(tokens, None, None, labels=labels)
    losses.sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return losses.detach(), gradients


def test_linear_mixer_in_a_foreign_model() -> None:
    [(whole, expected)] = run_ranks(foreign_loss, 1, 1)
    parts, shares = zip(*run_ranks(foreign_loss, 2, 2), strict=True)
    assert_close("losses", seqpar.Layout(24, 2, "zigzag").unshard(parts), whole, 1e-5)
    for name, gradient in expected.items():
        assert_close(name, shares[0][name] + shares[1][name], gradient, 5e-5)


def hybrid_loss(rank: int, ranks: int, pattern: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Megatron's own hybrid, its linear slot filled."""
    state = Rank(tiny("G" * len(pattern)), Setting(context=ranks))
    linear = linear_attention_spec(
        "gated_deltanet", num_heads=2, head_dim=4, value_head_dim=8, layout="zigzag"
    )
    torch.manual_seed(2)
    network = MambaModel(
        state.config,
        mamba_stack_spec=hybrid_stack_spec(linear, layout="zigzag"),
        vocab_size=32,
        max_sequence_length=64,
        hybrid_override_pattern=pattern,
        pg_collection=state.groups,
    )
    layout = seqpar.Layout(24, ranks, "zigzag")
    stream = torch.randint(0, 32, (2, 25), generator=torch.Generator().manual_seed(1))
    tokens, labels = (layout.shard(x, rank) for x in (stream[:, :-1], stream[:, 1:]))
    losses = network(tokens, None, None, labels=labels)
    losses.sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return losses.detach(), gradients


def test_linear_slot_of_megatrons_own_hybrid() -> None:
    pattern = "M-*EM"
    [(whole, expected)] = run_ranks(hybrid_loss, 1, 1, pattern)
    parts, shares = zip(*run_ranks(hybrid_loss, 2, 2, pattern), strict=True)
    assert_close("losses", seqpar.Layout(24, 2, "zigzag").unshard(parts), whole, 1e-5)
    assert any("mixer.in_proj" in name for name in expected)
    for name, gradient in expected.items():
        assert_close(name, shares[0][name] + shares[1][name], gradient, 5e-5)


class Blind(torch.nn.Module):
    """An attention that would see its own rank's tokens only."""

    def __init__(self, **_: Any) -> None:
        super().__init__()


def build_pattern(rank: int, ranks: int, layer: int) -> str:
    state = Rank(tiny("G", num_experts=0), Setting(context=ranks))
    spec = pattern_spec("LX", {"L": softmax_attention_spec(), "X": ModuleSpec(Blind)})
    try:
        build_module(spec, config=state.config, layer_number=layer, pg_collection=state.groups)
    except ValueError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize(
    ("ranks", "layer", "message"),
    [
        (1, 2, "built"),
        (2, 1, "built"),
        (2, 2, "layer 2 is a Blind, which has no sequence-parallel path: .* 2 context-parallel"),
        (1, 3, "layer 3 has no letter in a pattern of 2"),
    ],
)
def test_a_layer_without_a_path_refuses_to_build(ranks: int, layer: int, message: str) -> None:
    for found in run_ranks(build_pattern, ranks, ranks, layer):
        assert re.match(message, found)


def test_an_unknown_letter_is_refused() -> None:
    with pytest.raises(ValueError, match="pattern='LM' holds the letter 'M'; mixers has L"):
        pattern_spec("LM", {"L": softmax_attention_spec()})


def build_with(rank: int, override: dict[str, Any]) -> str:
    try:
        Rank(tiny("GN"), Setting(config=override))
    except ValueError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"moe_z_loss_coeff": 0.1}, "moe_z_loss_coeff=0.1 must be 0 or None"),
        (
            {"moe_router_load_balancing_type": "global_aux_loss"},
            "moe_router_load_balancing_type='global_aux_loss' must be 'aux_loss' or 'none'",
        ),
        ({"moe_router_load_balancing_type": "none"}, "built"),
    ],
)
def test_balancing_that_would_depend_on_the_cut_is_refused(
    override: dict[str, Any], message: str
) -> None:
    assert run_ranks(build_with, 1, override)[0].startswith(message)


def loss_in(rank: int, dtype: torch.dtype, weights: dict[str, Tensor]) -> float:
    setting = Setting(context=2, config={"dtype": dtype})
    state = Rank(tiny("GDN"), setting)
    state.load(weights)
    network = state.network
    output, loss_function = forward_step(state.batches(), network)
    loss, _, report = loss_function(output)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert {p.dtype for p in network.parameters()} == {dtype}
    return report["loss_sum"].item()


def test_bfloat16_is_near_fp32() -> None:
    weights = whole_weights(tiny("GDN"))
    exact, rounded = (
        sum(run_ranks(loss_in, 2, dtype, weights)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded != exact
