"""Whatever is not kept of a forward pass, the loss and all gradients are the same."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from harness import assert_close, run_ranks
from megatron_setup import (
    Rank,
    Setting,
    Step,
    assert_same_gradients,
    tiny,
    train_step,
    whole_weights,
)
from torch import Tensor

from seqpar import blocks
from seqpar.comm import Communicator
from seqpar.models.config import MemoryConfig, ModelConfig
from seqpar.models.language_model import forward_step

KEPT = MemoryConfig(loss_tokens=0)
ALL = ["linear", "softmax", "mlp"]
SAVERS = {
    "loss": MemoryConfig(loss_tokens=5),
    "linear": MemoryConfig(recompute=["linear"]),
    "softmax": MemoryConfig(recompute=["softmax"], keep_attention=False),
    "mlp": MemoryConfig(recompute=["mlp"], mlp_tokens=0),
    "tiles": MemoryConfig(recompute=["mlp"], mlp_tokens=5),
    "layers": MemoryConfig(recompute=ALL, mlp_tokens=5),
    "offload": MemoryConfig(loss_tokens=5, recompute=ALL, mlp_tokens=7, offload_layers=2),
    "heads": MemoryConfig(recompute=ALL, mlp_tokens=5, head_groups=4, offload_layers=2),
    "pairs": MemoryConfig(recompute=ALL, head_groups=2, keep_attention=False),
    "every other": MemoryConfig(recompute=ALL, mlp_tokens=7, keep_every=2, offload_layers=3),
    "every third": MemoryConfig(
        recompute=ALL, mlp_tokens=7, keep_every=3, head_groups=2, keep_attention=False
    ),
    "mixers": MemoryConfig(recompute=["linear", "softmax"], head_groups=2),
}


def step(
    rank: int, model: ModelConfig, setting: Setting, weights: dict[str, Tensor]
) -> tuple[Step, dict[str, int]]:
    """One step, and how many exchanges of each kind there were."""
    state = Rank(model, setting)
    state.load(weights)
    calls: Counter[str] = Counter()
    count = Communicator.count

    def counted(self: Communicator, kind: str, sent: int, received: int) -> None:
        calls[kind] += 1
        count(self, kind, sent, received)

    Communicator.count = counted  # type: ignore[method-assign]
    return train_step(state), dict(calls)


def compare(
    model: ModelConfig, memory: MemoryConfig, ranks: int, **spread: Any
) -> tuple[dict[str, int], dict[str, int]]:
    """The exchanges of rank 0 with `memory`, and with everything kept."""
    weights = whole_weights(model)
    wanted = run_ranks(step, ranks, model, Setting(memory=KEPT, **spread), weights)
    found = run_ranks(step, ranks, model, Setting(memory=memory, **spread), weights)
    for (own, _), (expected, _) in zip(found, wanted, strict=True):
        assert own.tokens == expected.tokens
        assert own.loss == pytest.approx(expected.loss, rel=1e-5)
        assert_same_gradients(own.gradients, expected.gradients, 1e-5)
    return found[0][1], wanted[0][1]


@pytest.mark.parametrize("saver", SAVERS)
def test_on_one_rank(saver: str) -> None:
    compare(tiny("GDN", tie_embeddings=True), SAVERS[saver], 1)


SPREAD: dict[str, dict[str, Any]] = {
    "context": {"context": 2},
    "uneven": {"context": 2, "shards": (19, 29), "expert": 2},
    "tensor": {"tensor": 2, "config": {"sequence_parallel": True}, "expert": 2},
    "expert tensor": {"context": 2, "expert_tensor": 2},
    "pipeline": {"pipeline": 2, "stages": (1, 2), "microbatches": 3},
    "turns": {"pipeline": 2, "stages": (1, 1, 1, 0), "microbatches": 2, "context": 1},
    "data": {"expert": 2, "distributed": True, "overlap": True, "microbatches": 2},
}


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("saver", ["layers", "offload", "heads", "every other", "every third"])
def test_on_two_ranks(saver: str, spread: str) -> None:
    compare(tiny("GDN"), SAVERS[saver], 2, **SPREAD[spread])


def test_on_four_ranks_with_tensor_context_and_expert_parallelism() -> None:
    spread = {"tensor": 2, "context": 2, "expert": 4, "config": {"sequence_parallel": True}}
    compare(tiny("GDN"), SAVERS["offload"], 4, **spread)


def test_a_rank_with_few_tokens_has_as_many_tiles_as_the_others() -> None:
    memory = MemoryConfig(recompute=ALL, mlp_tokens=2)
    compare(tiny("GN"), memory, 2, context=2, expert=2, shards=(4, 44))


@pytest.mark.parametrize("pattern", ["G", "D", "K", "M", "R"])
@pytest.mark.parametrize(("groups", "every"), [(1, 1), (4, 1), (2, 2)])
def test_states_and_halos_are_not_exchanged_again(pattern: str, groups: int, every: int) -> None:
    memory = dataclasses.replace(SAVERS["layers"], head_groups=groups, keep_every=every)
    found, kept = compare(tiny(2 * pattern, num_experts=0), memory, 2, context=2)
    wanted = {kind: calls * groups for kind, calls in kept.items()}  # each group its own
    assert found == {**wanted, "loss": found["loss"]}
    assert kept["state"] > 0


@pytest.mark.parametrize("spread", ["alone", "context", "tensor", "tensor, tokens cut"])
@pytest.mark.parametrize("pattern", ["G", "D", "K", "M", "R", "N"])
def test_heads_in_groups(pattern: str, spread: str) -> None:
    """Fewer heads of keys than of values; two heads a rank at least."""
    model = tiny(pattern, num_experts=0, num_heads=8, key_heads=4, kv_heads=4)
    words: dict[str, dict[str, Any]] = {
        "alone": {},
        "context": {"context": 2},
        "tensor": {"tensor": 2},
        "tensor, tokens cut": {"tensor": 2, "config": {"sequence_parallel": True}},
    }
    ranks = 1 if spread == "alone" else 2
    memory = MemoryConfig(recompute=ALL, head_groups=2, keep_attention=False)
    compare(model, memory, ranks, **words[spread])


def test_heads_in_groups_on_four_ranks_round_a_ring() -> None:
    spread = {"tensor": 2, "context": 2, "softmax": "ring", "layout": "zigzag"}
    compare(tiny("GN", num_experts=0, kv_heads=4), SAVERS["pairs"], 4, **spread)


def attended(rank: int, model: ModelConfig, setting: Setting) -> tuple[int, int]:
    """How often a head attended forwards and backwards in one step."""
    calls: Counter[str] = Counter()
    module: Any = blocks
    forward, backward = module.block_forward, module.block_backward

    def forwards(q: Tensor, *others: Any) -> Any:
        calls["forward"] += q.shape[1]
        return forward(q, *others)

    def backwards(do: Tensor, *others: Any) -> Any:
        calls["backward"] += do.shape[1]
        return backward(do, *others)

    module.block_forward, module.block_backward = forwards, backwards
    train_step(Rank(model, setting))
    return calls["forward"], calls["backward"]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("kept", "runs"), [(True, 1), (False, 2)])
def test_what_is_run_a_third_time_does_not_attend(kept: bool, runs: int, every: int) -> None:
    memory = MemoryConfig(recompute=ALL, head_groups=2, keep_attention=kept, keep_every=every)
    setting = Setting(memory=memory, documents=None)
    model = tiny("NN", num_experts=0)
    assert run_ranks(attended, 1, model, setting) == [(runs * 8, 8)]


def evaluated(rank: int, model: ModelConfig, memory: MemoryConfig) -> Tensor:
    state = Rank(model, Setting(memory=memory))
    with torch.no_grad():
        return forward_step(state.batches(), state.network.eval())[0]


def test_without_gradients() -> None:
    model = tiny("GN")
    found, wanted = (run_ranks(evaluated, 1, model, m)[0] for m in (SAVERS["offload"], KEPT))
    assert_close("losses", found, wanted, 1e-5)


def build(rank: int, model: ModelConfig, setting: Setting) -> None:
    Rank(model, setting)


@pytest.mark.parametrize(
    ("memory", "config", "message"),
    [
        ({"mlp_tokens": -1}, {}, "memory.mlp_tokens=-1 must be at least 0; nearest: 0"),
        ({"recompute": ["moe"]}, {}, r"memory.recompute=\['moe'\] may hold linear, softmax, mlp"),
        ({"offload_layers": 2}, {}, r"memory.offload_layers=2 .* set it to \[linear, softmax, mlp"),
        (
            {"head_groups": 2},
            {},
            r"memory.head_groups=2 .* memory.recompute=\[\] names none; nearest: 1",
        ),
        (
            {"recompute": ["linear"], "head_groups": 3},
            {},
            "memory.head_groups=3 must divide the heads of gla on a rank=4; nearest: 2, 4",
        ),
        ({"recompute": ["linear", "mlp"], "keep_every": 2}, {}, "memory.keep_every=2 is of layers"),
        ({"recompute": ["mlp"]}, {"hidden_dropout": 0.1}, "not possible with hidden_dropout=0.1"),
        (
            {"recompute": ["mlp"]},
            {"recompute_granularity": "selective"},
            "recompute_granularity='selective' both make layers again",
        ),
    ],
)
def test_what_cannot_be(memory: dict[str, Any], config: dict[str, Any], message: str) -> None:
    setting = Setting(memory=MemoryConfig(**memory), config=config)
    with pytest.raises(AssertionError, match=message):
        run_ranks(build, 1, tiny("GN"), setting)
