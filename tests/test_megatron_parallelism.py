"""Sequence parallelism beside Megatron's tensor, expert and pipeline parallelism.

Each rank's reduced gradients are its part of what one process finds by autograd alone.
"""

from typing import Any

import pytest
from harness import run_ranks
from megatron_setup import (
    Rank,
    Setting,
    Step,
    assert_same_gradients,
    tiny,
    train_step,
    whole_step,
    whole_weights,
)
from torch import Tensor

from seqpar.models.config import ModelConfig
from seqpar.models.sequence import SequenceParallelParams

MEGATRON_SEQUENCE_PARALLEL = {"sequence_parallel": True}


def step_and_expectation(
    rank: int, model: ModelConfig, setting: Setting, weights: dict[str, Tensor], whole: Step
) -> tuple[Step, dict[str, Tensor]]:
    state = Rank(model, setting)
    state.load(weights)
    step = train_step(state)
    mean = {
        name: state.part(whole.gradients[name], parameter) / whole.tokens
        for name, parameter in state.parameters()
    }
    return step, mean


def check(model: ModelConfig, setting: Setting, ranks: int, data: int = 1) -> None:
    whole = whole_step(model, setting.documents, data * setting.microbatches)
    results = run_ranks(step_and_expectation, ranks, model, setting, whole_weights(model), whole)
    # Tensor-parallel ranks all see the loss, only the last pipeline stage does.
    seen = sum(step.loss for step, _ in results) / setting.tensor
    assert seen == pytest.approx(whole.loss, rel=1e-5)
    names = set()
    for step, expected in results:
        assert_same_gradients(step.gradients, expected, 5e-5)
        names |= expected.keys()
    assert names == whole.gradients.keys()


def test_tensor_parallel() -> None:
    check(tiny("GDN", num_experts=0), Setting(tensor=2), ranks=2)


def test_tensor_parallel_with_megatrons_sequence_parallelism() -> None:
    setting = Setting(tensor=2, expert=2, config=MEGATRON_SEQUENCE_PARALLEL)
    check(tiny("GDN"), setting, ranks=2)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_expert_parallel_over_the_ranks_of_a_sequence(dispatcher: str) -> None:
    setting = Setting(context=2, expert=2, config={"moe_token_dispatcher_type": dispatcher})
    check(tiny("GN"), setting, ranks=2)


def test_expert_parallel_over_data_parallel_ranks() -> None:
    check(tiny("GN"), Setting(expert=2), ranks=2, data=2)


@pytest.mark.parametrize("pattern", ["GDN", "KMR"])
def test_tensor_context_and_expert_parallel_together(pattern: str) -> None:
    setting = Setting(
        tensor=2, context=2, expert=2, layout="zigzag", config=MEGATRON_SEQUENCE_PARALLEL
    )
    check(tiny(pattern), setting, ranks=4)


@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_stages_pick_their_mixers_by_global_layer(tied: bool) -> None:
    setting = Setting(pipeline=2, context=2, microbatches=2)
    check(tiny("GDDN", tie_embeddings=tied), setting, ranks=4)


@pytest.mark.parametrize("method", ["allgather", "ring", "ulysses"])
@pytest.mark.parametrize(("tensor", "context", "kv_heads"), [(2, 4, 2), (4, 2, 2), (4, 1, 1)])
def test_fewer_kv_heads_than_tensor_and_context_ranks(
    method: str, tensor: int, context: int, kv_heads: int
) -> None:
    """Also than tensor-parallel ranks, which then share them."""
    setting = Setting(tensor=tensor, context=context, layout="zigzag", softmax=method)
    model = tiny("NG", num_experts=0, kv_heads=kv_heads, head_dim=4)
    check(model, setting, ranks=tensor * context)


RECOMPUTED: dict[str, dict[str, Any]] = {
    "full, uniform": {"granularity": "full", "method": "uniform", "num_layers": 2},
    "full, block": {"granularity": "full", "method": "block", "num_layers": 2},
    "attention": {"granularity": "selective", "modules": ["core_attn"]},
    "norms": {"granularity": "selective", "modules": ["layernorm"]},
    "norms, attention and experts": {
        "granularity": "selective",
        "modules": ["layernorm", "core_attn", "moe"],
    },
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation_with_accumulated_gradients(name: str) -> None:
    config = {f"recompute_{key}": value for key, value in RECOMPUTED[name].items()}
    setting = Setting(context=2, layout="zigzag", microbatches=3, config=config)
    check(tiny("GDNG"), setting, ranks=2)


def calls_of_mix(rank: int, config: dict[str, Any]) -> int:
    """How often the attention of one layer is computed in one step."""
    state, calls = Rank(tiny("N"), Setting(context=2, config=config)), [0]
    mixer = state.network.decoder.layers[0].self_attention
    mix = mixer.mix

    def counted(*args: Any) -> Tensor:
        calls[0] += 1
        return mix(*args)

    mixer.mix = counted
    train_step(state)
    return calls[0]


@pytest.mark.parametrize(
    ("name", "expected"), [("full, uniform", 2), ("attention", 2), ("norms", 1)]
)
def test_what_is_recomputed_is_what_was_asked_for(name: str, expected: int) -> None:
    config = {f"recompute_{key}": value for key, value in RECOMPUTED[name].items()}
    config |= {"recompute_num_layers": 1} if "full" in name else {}
    assert run_ranks(calls_of_mix, 2, config) == [expected] * 2


UNEVEN = {"variable_seq_lengths": True, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("setting", "ranks"),
    [
        (Setting(context=3, expert=2, shards=(30, 4, 14)), 6),
        (Setting(tensor=2, context=2, pipeline=2, microbatches=2, shards=(14, 34)), 8),
    ],
    ids=["experts", "tensor and pipeline"],
)
def test_ranks_with_different_numbers_of_tokens(setting: Setting, ranks: int) -> None:
    setting.config = UNEVEN if setting.tensor > 1 else {}
    data = ranks // (setting.tensor * setting.context * setting.pipeline)
    check(tiny("GN"), setting, ranks, data)


def uneven(rank: int, setting: Setting) -> str:
    state = Rank(tiny("GN"), setting)
    try:
        SequenceParallelParams(next(state.batches()).sp).check(state.config)
    except ValueError as error:
        return str(error)
    return "possible"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting(context=2, pipeline=2, shards=(8, 40)), "ranks [8, 40] tokens: pipeline stages"),
        (
            Setting(context=2, shards=(8, 40), config={"moe_token_dispatcher_type": "allgather"}),
            "set it to 'alltoall'",
        ),
        (
            Setting(tensor=2, context=2, shards=(9, 39), config=MEGATRON_SEQUENCE_PARALLEL),
            "each must be a multiple of tensor_model_parallel_size=2",
        ),
        (Setting(context=2, pipeline=2, shards=(24, 24)), "possible"),
    ],
)
def test_where_different_numbers_are_not_possible(setting: Setting, message: str) -> None:
    ranks = setting.tensor * setting.context * setting.pipeline
    assert all(message in found for found in run_ranks(uneven, ranks, setting))
