"""Megatron's parallelisms on GPUs: `pytest -m gpu tests/test_gpu_megatron.py` on two of them.

A hybrid with a mixture of experts, gated linear attention, Gated DeltaNet and softmax attention,
trains in bf16 over two GPUs as on one. The matrix of all combinations is in test_megatron_matrix.
"""

import json
from typing import Any

import pytest
import torch
from gpu_ranks import run_on_gpus
from megatron.core import parallel_state
from megatron_setup import Setting, draw_weights, tiny
from test_megatron_matrix import SEQUENCES, trajectory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

MODEL = tiny(
    "GDNG",
    hidden_size=256,
    num_heads=4,
    head_dim=64,
    value_head_dim=64,
    softmax_head_dim=64,
    ffn_hidden_size=256,
    gate_rank=16,
)
LR = 3e-3  # in five steps it moves the loss by 1.2e-2 of itself
# In another order bf16 sums come out up to 2^-9 apart, which sends tokens whose experts nearly tie
# to others. The loss, a mean over thousands of tokens, is 2e-4 apart in the worst step on a CPU.
BOUND = 1e-3
# Of the first gradient, for later ones follow the tokens that went elsewhere: 4e-3 apart on a CPU,
# and 7e-2 where no state crosses ranks.
NORM_BOUND = 2e-2


def cut(microbatches: int = SEQUENCES, **fields: Any) -> Setting:
    tokens = 1024
    documents = (0, 100, 101, 700, tokens)
    config = {"dtype": torch.bfloat16, **fields.pop("config", {})}
    return Setting(
        tokens=tokens, documents=documents, microbatches=microbatches, config=config, **fields
    )


SEQUENCE_PARALLEL = {"sequence_parallel": True}
WAYS = {
    1: {"one": cut(), "one, learning nothing": cut()},
    2: {
        "tensor": cut(tensor=2, config=SEQUENCE_PARALLEL),
        "tensor, experts": cut(tensor=2, expert=2, config=SEQUENCE_PARALLEL),
        "context": cut(context=2),
        "context, experts, distributed": cut(context=2, expert=2, distributed=True),
        "data, experts": cut(SEQUENCES // 2, expert=2),
    },
}


def train_all(rank: int, size: int) -> None:
    """Train in every way for `size` ranks; print a line of results of this rank for each."""
    weights = draw_weights(rank, MODEL)
    weights = {name: weight / 4 for name, weight in weights.items()}  # a gentle landscape
    for way, spread in WAYS[size].items():
        parallel_state.destroy_model_parallel()
        lr = 0.0 if "nothing" in way else LR
        print("found", json.dumps([way, trajectory(rank, MODEL, spread, weights, lr)]))


def courses(size: int) -> dict[str, list[tuple[float, float]]]:
    """(mean loss, gradient norm) of each step, by way."""
    ended = run_on_gpus("test_gpu_megatron", "train_all", size=size)
    assert all(rank.code == 0 for rank in ended), "\n".join(rank.output for rank in ended)
    found: dict[str, list[Any]] = {}
    for rank in ended:
        for line in rank.output.splitlines():
            if line.startswith("found "):
                way, steps = json.loads(line.removeprefix("found "))
                found.setdefault(way, []).append(steps)
    return {
        way: [
            (sum(loss for loss, _, _ in step) / sum(n for _, n, _ in step), step[0][2])
            for step in zip(*ranks, strict=True)
        ]
        for way, ranks in found.items()
    }


@pytest.fixture(scope="module")
def found() -> dict[str, list[tuple[float, float]]]:
    return courses(1) | courses(2)


@pytest.mark.parametrize("way", WAYS[2])
def test_two_gpus_train_as_one(way: str, found: dict[str, list[tuple[float, float]]]) -> None:
    expected = found["one"]
    losses, norms = zip(*found[way], strict=True)
    print(way, *(f"{loss / one - 1:+.1e}" for loss, (one, _) in zip(losses, expected, strict=True)))
    assert losses == pytest.approx([loss for loss, _ in expected], rel=BOUND)
    assert norms[0] == pytest.approx(expected[0][1], rel=NORM_BOUND)


def test_what_was_learned_is_seen_in_the_losses(
    found: dict[str, list[tuple[float, float]]],
) -> None:
    learned, unlearned = found["one"][-1][0], found["one, learning nothing"][-1][0]
    assert abs(learned / unlearned - 1) > 5 * BOUND
