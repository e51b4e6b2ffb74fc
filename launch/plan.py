"""Whether a run fits and how long it takes: `seqpar plan CONFIG [section.key=value ...]`.

Needs no GPU. What is counted is in count.py, what it takes in duration.py. `--search` tries ways to
spread the model over the GPUs and to save memory, and prints the fastest that fit.
"""

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from seqpar.launch.checks import Sizes, check
from seqpar.launch.cluster import CLUSTERS, Cluster, load_cluster
from seqpar.launch.config import Config, load_config
from seqpar.launch.count import Count, parameters
from seqpar.launch.duration import softmax_exchange, state_exchange, step_seconds
from seqpar.launch.flops import peak_flops, step_flops
from seqpar.launch.peak import memory
from seqpar.launch.terminal import command_parser
from seqpar.models.config import RECOMPUTED, key_heads, layer_mixers, resolved

GIB = 2**30

Change = dict[str, Any]
"""New values of settings, by "section.key"."""

DISTRIBUTED: Change = {"optimizer.distributed": True}


def savers(config: Config) -> list[Change]:
    """What saves memory, the cheapest first."""
    mixers, tensor = layer_mixers(config.model), config.parallel.tensor
    heads = max(key_heads(config.model, mixer, tensor) for mixer in mixers)
    few = min(n for n in _divisors(heads) if n >= min(4, heads))
    nothing: Change = {}
    slow: Change = {"memory.keep_attention": False}
    groups: list[Change] = [{"memory.head_groups": n} for n in sorted({few, heads} - {1})]
    away: list[Change] = [
        {"memory.offload_layers": n} for n in sorted({-(-len(mixers) * 3 // 4), len(mixers)})
    ]
    everything: Change = {"memory.recompute": list(RECOMPUTED)}
    ways = [
        everything | own | group | kept | every
        for every in (nothing, {"memory.keep_every": 2})
        for kept in (nothing, slow)
        for group in (nothing, *groups)
        for own in (nothing, *away)
    ]
    first: list[Change] = [
        {"memory.recompute": names} for names in ([], ["mlp"], ["mlp", "softmax"])
    ]
    return [*first, *ways, ways[-1] | {"memory.mlp_tokens": 16384}]


def changed(config: Config, change: Change) -> Config:
    """`config` with other settings."""
    found = copy.deepcopy(config)
    for key, value in change.items():
        section, name = key.split(".")
        setattr(getattr(found, section), name, value)
    return found


def words(change: Change) -> str:
    """A change as it is written on the command line."""
    texts = {
        key: f"[{','.join(value)}]" if isinstance(value, list) else json.dumps(value)
        for key, value in change.items()
    }
    return " ".join(f"{key}={text}" for key, text in texts.items())


@dataclass(frozen=True)
class Plan:
    """A run on a cluster.

    Attributes: memory (bytes) of the fullest pipeline rank and seconds of a step, each by part;
    host, bytes of the host's memory for each GPU.
    """

    config: Config
    sizes: Sizes
    cluster: Cluster
    gpus: int

    @cached_property
    def fullest(self) -> Count:
        counts = [Count(self.config, self.sizes, rank) for rank in range(self.sizes.pipeline)]
        return max(counts, key=lambda count: sum(memory(count).values()))

    @cached_property
    def memory(self) -> dict[str, float]:
        return memory(self.fullest)

    @cached_property
    def seconds(self) -> dict[str, float]:
        return step_seconds(self.config, self.sizes, self.cluster)

    @property
    def host(self) -> float:
        return self.fullest.host_bytes()

    @property
    def fits(self) -> bool:
        room = sum(self.memory.values()) <= self.cluster.memory * GIB
        return room and self.host <= self.cluster.host_memory * GIB

    @property
    def tokens_per_second(self) -> float:
        tokens = self.config.train.global_batch * self.config.data.sequence_length
        return tokens / sum(self.seconds.values())

    @property
    def utilisation(self) -> float | None:
        """Of the GPUs' peak, by what the model asks for (MFU); None: the peak is not known."""
        peak = peak_flops(self.cluster.gpu)
        return None if peak is None else self.flops / sum(self.seconds.values()) / peak / self.gpus

    @property
    def flops(self) -> float:
        length, batch = self.config.data.sequence_length, self.config.train.global_batch
        return step_flops(self.config.model, [[0, length]] * batch)


def make_plan(config: Config, gpus: int, cluster: Cluster) -> Plan:
    """The plan of `config` on that many GPUs.

    Raises:
        ValueError: settings that do not fit each other or the number of GPUs.
    """
    return Plan(config, check(config, gpus), cluster, gpus)


def nearest(config: Config, gpus: int, cluster: Cluster) -> tuple[Plan, str] | None:
    """The plan nearest to that of `config` that fits, and what it changes."""
    for change, count in _remedies(config, gpus):
        try:
            plan = make_plan(changed(config, change), count, cluster)
        except ValueError:
            continue
        if plan.fits:
            return plan, " ".join([words(change), *([f"--gpus {count}"] if count != gpus else [])])
    return None


def _remedies(config: Config, gpus: int) -> Iterator[tuple[Change, int]]:
    """Changes that make a run smaller and the number of GPUs, in order of what they cost."""
    ways = savers(config)[1:]
    spread = DISTRIBUTED if gpus > 1 else {}
    yield spread, gpus
    yield from ((way, gpus) for way in ways)
    yield from ((spread | way, gpus) for way in ways)
    for times in (2, 4, 8, 16, 32, 64):
        more = {"parallel.context": None, **DISTRIBUTED}
        yield from ((more | way, gpus * times) for way in ways)
    for times in (2, 4, 8, 16, 32, 64):
        shorter = {"data.sequence_length": config.data.sequence_length // times}
        yield spread | ways[-1] | shorter, gpus


def search(config: Config, gpus: int, cluster: Cluster) -> list[tuple[Plan, str]]:
    """Plans that fit, the fastest first, each with the words that make it."""
    m, layers = resolved(config.model), len(layer_mixers(config.model))
    found = []
    for tensor, pipeline in itertools.product(
        _divisors(min(cluster.gpus_per_node, m.num_heads)), _divisors(layers)
    ):
        left = gpus // (tensor * pipeline) if gpus % (tensor * pipeline) == 0 else 0
        experts = _divisors(m.num_experts) if m.num_experts else [1]
        for context, expert in itertools.product(_divisors(left), experts):
            spread: Change = {
                "parallel.tensor": tensor,
                "parallel.pipeline": pipeline,
                "parallel.context": context,
                "parallel.expert": expert,
                "optimizer.distributed": left > 1,
            }
            if best := _best(config, spread, gpus, cluster):
                found.append(best)
    return sorted(found, key=lambda each: -each[0].tokens_per_second)


def _best(config: Config, spread: Change, gpus: int, cluster: Cluster) -> tuple[Plan, str] | None:
    """The fastest that fits of the ways to save memory."""
    fitting: list[tuple[Plan, Change]] = []
    for way in savers(changed(config, spread)):
        if any(known.items() <= way.items() for _, known in fitting):
            continue  # which saves more, and is slower
        try:
            plan = make_plan(changed(config, spread | way), gpus, cluster)
        except ValueError:
            continue
        if plan.fits:
            fitting.append((plan, way))
    if not fitting:
        return None
    plan, way = max(fitting, key=lambda each: each[0].tokens_per_second)
    return plan, words(spread | way)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def describe(plan: Plan) -> str:
    """The plan in words and figures."""
    config, sizes, cluster = plan.config, plan.sizes, plan.cluster
    batch, length = config.train.global_batch, config.data.sequence_length
    whole = parameters(config)
    m = resolved(config.model)
    idle = whole.experts * (1 - m.moe_top_k / max(1, m.num_experts))
    active = whole.total - idle
    ways = ("context", "tensor", "pipeline", "expert", "data")
    spread = ", ".join(f"{way} {getattr(sizes, way)}" for way in ways)
    layers = [name for name in sorted(set(layer_mixers(m))) if name != "softmax"]
    lines = [
        f"{plan.gpus} x {cluster.gpu}: {batch} x {length:,} tokens a step; {spread}",
        f"{whole.total:,.0f} parameters, {active:,.0f} active; {plan.flops:.3g} FLOPs a step",
        "",
        f"GiB of the fullest rank (of {cluster.memory:g})",
        *_rows({part: size / GIB for part, size in plan.memory.items()}, ".2f"),
    ]
    if plan.host:
        lines.append(
            f"  {plan.host / GIB:.2f} more of the host's memory (of {cluster.host_memory:g})"
        )
    if sizes.context > 1:
        lines += ["", "bytes that a rank sends, and microseconds, for one layer and direction"]
        for mixer in layers:
            choice, sent = state_exchange(config, sizes, cluster, mixer)
            micros = 1e6 * choice.seconds[choice.name] * plan.fullest.groups(mixer)
            lines.append(f"  states of {mixer:<20} {sent:14,.0f}  {micros:10.1f}  by {choice.name}")
        if "softmax" in layer_mixers(m):
            sent = round(sum(softmax_exchange(plan.fullest)))
            lines.append(f"  softmax {sent:37,}              by {plan.fullest.attention}")
    lines += ["", "seconds a step", *_rows(plan.seconds, ".3f")]
    mfu = "n/a" if plan.utilisation is None else f"{100 * plan.utilisation:.1f} %"
    lines += [
        "",
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / plan.gpus:,.0f} a GPU; "
        f"model FLOPs utilisation {mfu}; {config.train.steps} steps take "
        f"{sum(plan.seconds.values()) * config.train.steps / 3600:,.1f} hours",
        "it fits" if plan.fits else "IT DOES NOT FIT",
    ]
    return "\n".join(lines)


def _rows(parts: dict[str, float], form: str) -> list[str]:
    rows = {**{part: x for part, x in parts.items() if x}, "total": sum(parts.values())}
    return [f"  {part:<38} {x:10,{form}}" for part, x in rows.items()]


def _figures(plan: Plan) -> str:
    total = sum(plan.memory.values()) / GIB
    host = f" + {plan.host / GIB:.0f} host" if plan.host else ""
    return f"{plan.tokens_per_second:10,.0f} tokens/s {total:7.1f} GiB{host}"


EXAMPLES = """examples:
  seqpar plan launch/configs/hybrid-1.3b.yaml data.sequence_length=1M --cluster h200 --gpus 8
  seqpar plan launch/configs/a1b-7b.yaml data.sequence_length=4M --gpus 64 --search
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. The exit code is 1 where the run does not fit."""
    parser = command_parser(
        "seqpar plan", "Say whether a run fits and how long it takes, without a GPU.", EXAMPLES
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, see launch/configs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--cluster", default="h200", help=f"{', '.join(CLUSTERS)}, or a YAML file; default h200"
    )
    parser.add_argument("--gpus", type=int, help="default: what `parallel` needs, at least a node")
    parser.add_argument("--search", action="store_true", help="the fastest ways that fit")
    parser.add_argument("--top", type=int, default=5, help="how many of them; default 5")
    args = parser.parse_intermixed_args(argv)
    try:
        sys.exit(_run(args))
    except ValueError as error:
        sys.exit(f"error: {error}")


def _run(args: argparse.Namespace) -> int:
    cluster = load_cluster(args.cluster)
    config = load_config(args.config, args.overrides)
    parallel = config.parallel
    needed = parallel.tensor * parallel.pipeline * (parallel.context or 1)
    gpus = args.gpus or -(-cluster.gpus_per_node // needed) * needed
    if args.search:
        plans = search(config, gpus, cluster)
        for plan, how in plans[: args.top]:
            print(f"{_figures(plan)}  {how}")
        if plans:
            return 0
        print(f"nothing fits on {gpus} x {cluster.gpu}")
    else:
        plan = make_plan(config, gpus, cluster)
        print(describe(plan))
        if plan.fits:
            return 0
    if remedy := nearest(config, gpus, cluster):
        print(f"nearest that fits ({_figures(remedy[0]).strip()}): {remedy[1]}")
    else:
        print("no change of memory, optimizer, context ranks or length alone makes it fit")
    return 1


if __name__ == "__main__":
    main()
