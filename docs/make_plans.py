"""Writes the plans beside launch/configs/*.yaml: `python docs/make_plans.py`. A test compares them.

A recipe is a configuration, a length, a number of GPUs, and what else is changed for these.
"""

from seqpar.launch.cluster import CLUSTERS
from seqpar.launch.config import CONFIGS, load_config
from seqpar.launch.plan import GIB, Plan, describe, make_plan

CLUSTER = "h200"
LESS = "memory.recompute=[linear,softmax,mlp]"
ONE = f"{LESS} parallel.context=1 optimizer.distributed=false"
SPREAD = "parallel.context=null optimizer.distributed=true"
HEADS, AGAIN = "memory.head_groups=4", "memory.keep_attention=false"
OTHER = "memory.keep_every=2"
RECIPES = {
    "hybrid-1.3b": [
        ("128K", 8, f"train.global_batch=8 parallel.context=1 {LESS}"),
        ("1M", 1, f"{ONE} memory.offload_layers=24 {HEADS}"),
        ("2M", 1, f"{ONE} memory.offload_layers=24 {HEADS} {AGAIN} {OTHER}"),
        ("2M", 1, f"model.pattern={24 * 'L'} {ONE} memory.offload_layers=24 {HEADS} {OTHER}"),
        ("4M", 2, f"{SPREAD} {LESS} memory.offload_layers=24 {HEADS} {AGAIN} {OTHER}"),
        ("1M", 8, f"{SPREAD} {LESS}"),
        ("2M", 16, f"{SPREAD} {LESS}"),
        ("4M", 32, f"{SPREAD} {LESS}"),
        ("8M", 64, f"{SPREAD} {LESS}"),
    ],
    "a0.3b-2b": [
        ("128K", 8, f"{SPREAD} train.global_batch=1"),
        ("1M", 1, f"{ONE} train.global_batch=1 memory.offload_layers=12"),
        ("2M", 1, f"{ONE} train.global_batch=1 memory.offload_layers=12 {HEADS}"),
        ("1M", 8, f"{SPREAD} train.global_batch=1 {LESS} parallel.expert=8"),
        ("2M", 16, f"{SPREAD} train.global_batch=1 {LESS} parallel.expert=8"),
        ("4M", 32, f"{SPREAD} train.global_batch=1 {LESS} parallel.expert=8"),
        ("8M", 64, f"{SPREAD} train.global_batch=1 {LESS} parallel.expert=8"),
    ],
    "a1b-7b": [
        ("128K", 8, "memory.recompute=[mlp]"),
        ("1M", 8, f"{SPREAD} train.global_batch=1 {LESS}"),
        ("2M", 16, f"{SPREAD} train.global_batch=1 {LESS}"),
        ("4M", 32, f"{SPREAD} train.global_batch=1 {LESS}"),
        ("8M", 64, f"{SPREAD} train.global_batch=1 {LESS}"),
    ],
}
INTRODUCTION = """Plans of {name}.yaml, written by docs/make_plans.py; a test compares them.
The same words after `torchrun ... -m seqpar.launch.train launch/configs/{name}.yaml` train so.

{summary}
"""


def plans(name: str) -> list[tuple[str, Plan]]:
    """The recipes of one configuration, each with the command that plans it."""
    path, found = CONFIGS / f"{name}.yaml", []
    for length, gpus, words in RECIPES[name]:
        changes = [f"data.sequence_length={length}", *words.split()]
        plan = make_plan(load_config(str(path), changes), gpus, CLUSTERS[CLUSTER])
        file = f"launch/configs/{name}.yaml"
        found.append((f"seqpar plan {file} {' '.join(changes)} --gpus {gpus}", plan))
    return found


def page(name: str) -> str:
    """The text beside one configuration."""
    found = plans(name)
    rows = [
        f"{plan.config.data.sequence_length:10,} tokens on {plan.gpus:3} GPUs: "
        f"{sum(plan.memory.values()) / GIB:6.1f} GiB, {plan.tokens_per_second:8,.0f} tokens/s"
        for _, plan in found
    ]
    parts = [INTRODUCTION.format(name=name, summary="\n".join(rows))]
    parts += [f"$ {command}\n\n{describe(plan)}\n" for command, plan in found]
    return "\n\n".join(parts)


if __name__ == "__main__":
    for name in RECIPES:
        (CONFIGS / f"{name}.plans.txt").write_text(page(name))
