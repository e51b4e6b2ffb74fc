"""Every combination of Megatron's parallelisms trains as one process does.

A case names what each kind of parallelism is set to. `cases` picks, out of all that fit on 8 ranks
and that Megatron can do, few that hold every pair of settings that can occur together.
"""

import functools
import itertools
from typing import Any

import pytest
from harness import run_ranks
from megatron_setup import Rank, Setting, adam, tiny, train_step, whole_weights
from torch import Tensor

from seqpar.models.config import ModelConfig

STEPS, SEQUENCES = 5, 4  # sequences: of one step, over all data-parallel ranks

# Megatron's MoE needs its sequence parallelism where there is tensor parallelism.
FACTORS: dict[str, tuple[Any, ...]] = {
    "tensor": ("1", "2", "2+sp"),
    "context": ("1", "2 contiguous", "2 zigzag", "4 contiguous"),
    "experts": ("none", "1", "2 alltoall", "2 allgather", "4 alltoall"),
    "expert_tensor": (1, 2),
    "stages": ("4", "2 2", "1 3", "1 1 1 1", "1 0 2 1", "2 1 0 1 pp4"),
    "data": (1, 2),
    "distributed": (False, True),
    "overlap": (False, True),
}
Case = tuple[Any, ...]


def setting(case: Case) -> tuple[ModelConfig, Setting, int]:
    """The model of a case, how it is spread, and over how many ranks."""
    values = dict(zip(FACTORS, case, strict=True))
    context, *layout = values["context"].split()
    experts, *dispatcher = values["experts"].split()
    *stages, last = values["stages"].split()
    pipeline = 4 if last == "pp4" else min(2, len(stages) + 1)
    stages = stages if last == "pp4" else [*stages, last]
    tensor, *sequence_parallel = values["tensor"].split("+")
    config: dict[str, Any] = {"sequence_parallel": bool(sequence_parallel)}
    if dispatcher:
        config["moe_token_dispatcher_type"] = dispatcher[0]
    found = Setting(
        tensor=int(tensor),
        context=int(context),
        pipeline=pipeline,
        expert=1 if experts == "none" else int(experts),
        expert_tensor=values["expert_tensor"],
        stages=tuple(map(int, stages)) if pipeline > 1 else None,
        distributed=values["distributed"],
        overlap=values["overlap"],
        layout=layout[0] if layout else "contiguous",
        documents=None if layout == ["zigzag"] else (0, 5, 21, 22, 40, 48),
        microbatches=SEQUENCES // values["data"],
        config=config,
    )
    model = tiny("GDNG", num_experts=0 if experts == "none" else 4)
    return model, found, found.tensor * found.context * found.pipeline * values["data"]


def possible(case: Case, most: int) -> bool:
    model, found, ranks = setting(case)
    if ranks > most or found.microbatches % found.pipeline:
        return False
    if not model.num_experts:
        return found.expert_tensor == 1
    if found.tensor > 1 and not found.config["sequence_parallel"]:
        return False
    return ranks // found.pipeline % (found.expert * found.expert_tensor) == 0


def pairs(case: Case) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(zip(FACTORS, case, strict=True), 2))


def cases(most: int) -> list[Case]:
    """Of what is possible on `most` ranks, cases that hold all pairs, found greedily."""
    left = [case for case in itertools.product(*FACTORS.values()) if possible(case, most)]
    missing = set().union(*map(pairs, left))
    chosen = []
    while missing:
        best = max(left, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


# Few enough for every run of the tests; each value of each factor is there.
SAMPLE: list[Case] = [
    ("1", "2 zigzag", "2 alltoall", 1, "1 1 1 1", 1, True, True),
    ("2+sp", "2 contiguous", "1", 1, "4", 1, False, True),
    ("2", "1", "none", 1, "1 3", 1, True, False),
    ("1", "4 contiguous", "2 allgather", 2, "4", 1, False, False),
    ("1", "2 contiguous", "4 alltoall", 1, "4", 2, True, True),
]


def trajectory(
    rank: int, model: ModelConfig, spread: Setting, weights: dict[str, Tensor], lr: float
) -> list[tuple[float, int, float]]:
    """(this rank's loss sum, its tokens, gradient norm) of each step."""
    state = Rank(model, spread)
    state.load(weights)
    optimizer = adam(state, lr)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        result = train_step(state, step)
        found.append((result.loss, result.tokens, float(optimizer.step()[1])))
    return found


def course(
    model: ModelConfig, spread: Setting, ranks: int, lr: float = 0.01
) -> list[tuple[float, float]]:
    """(mean loss, gradient norm) of each step, over all ranks."""
    results = run_ranks(trajectory, ranks, model, spread, whole_weights(model), lr)
    found = []
    for step in zip(*results, strict=True):
        assert len({round(norm, 5) for _, _, norm in step}) <= 2, f"ranks differ: {step}"
        losses, tokens, norms = zip(*step, strict=True)
        found.append((sum(losses) / sum(tokens), norms[0]))
    return found


@functools.cache
def alone(experts: int, documents: bool, lr: float = 0.01) -> list[tuple[float, float]]:
    found = (0, 5, 21, 22, 40, 48) if documents else None
    spread = Setting(microbatches=SEQUENCES, documents=found)
    return course(tiny("GDNG", num_experts=experts), spread, 1, lr)


def check(case: Case) -> None:
    model, spread, ranks = setting(case)
    expected = alone(model.num_experts, spread.documents is not None)
    found = course(model, spread, ranks)
    for step, (own, wanted) in enumerate(zip(found, expected, strict=True)):
        assert wanted[1] > 0.2
        assert own == pytest.approx(wanted, rel=1e-4), f"step {step}"


def name(case: Case) -> str:
    return ", ".join(f"{k} {v}" for k, v in zip(FACTORS, case, strict=True))


@pytest.mark.parametrize("case", SAMPLE, ids=name)
def test_trains_as_one_process_does(case: Case) -> None:
    assert possible(case, 4)
    check(case)


def test_the_sample_has_every_value_that_fits_on_four_ranks() -> None:
    values = set().union(*(zip(FACTORS, case, strict=True) for case in SAMPLE))
    every = {(k, v) for k, found in FACTORS.items() for v in found}
    assert every - values == {("stages", v) for v in ("2 2", "1 0 2 1", "2 1 0 1 pp4")}


@pytest.mark.complete
@pytest.mark.parametrize("case", cases(8), ids=name)
def test_every_pair_of_settings_trains_as_one_process_does(case: Case) -> None:
    check(case)


def test_the_cases_hold_all_pairs() -> None:
    assert len(cases(8)) >= 24


def test_what_the_optimizer_does_is_seen_in_the_losses() -> None:
    moved, unmoved = alone(4, True)[-1], alone(4, True, lr=0.0)[-1]
    assert abs(moved[0] / unmoved[0] - 1) > 30 * 1e-4
