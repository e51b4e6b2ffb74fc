"""How long a step takes on a cluster, by part, from what was measured of each part alone."""

from collections import defaultdict
from functools import lru_cache

from seqpar.cost import Choice, Links, choose, softmax_bytes
from seqpar.launch.checks import Sizes
from seqpar.launch.cluster import Cluster
from seqpar.launch.config import Config
from seqpar.launch.count import Count, Parts, parameters
from seqpar.launch.flops import CONVOLVED, qkv_width
from seqpar.layout import Layout

# Seconds on an H200, (forward, both ways), of 64K tokens and 16 heads of 128 (docs/performance.md):
# the recurrence; the short convolution of 6,144 channels; the norm of heads; unit length of keys.
_MEASURED = {
    "gla": (0.932e-3, 4.07e-3),
    "gated_deltanet": (1.60e-3, 5.53e-3),
    "kda": (2.02e-3, 7.32e-3),
    "mamba2": (0.439e-3, 1.75e-3),
    "retention": (0.412e-3, 1.37e-3),
    "convolution": (0.465e-3, 1.27e-3),
    "norm": (0.192e-3, 0.550e-3),
    "unit": (0.13e-3, 0.316e-3),
}
_MEASURED_BANDWIDTH = 4.27e12
_GROUPED = 0.92  # of the rate of large products, what grouped ones of experts reach
_MOVED = (1.5, 4.0)  # how often norms, gates and activations move what a layer keeps: forward, both
_OPTIMIZER = 40  # bytes that AdamW moves a parameter


def step_seconds(config: Config, sizes: Sizes, cluster: Cluster) -> dict[str, float]:
    """Seconds of a step by part; they add up to the whole."""
    ranks = range(sizes.pipeline)
    counts = [Count(config, sizes, rank) for rank in ranks]
    micro = max((_microbatch(count, cluster) for count in counts), key=_total)
    turns = max(1, len(config.parallel.stages or ()) // sizes.pipeline)
    found = {part: seconds * counts[0].microbatches for part, seconds in micro.items()}
    if sizes.pipeline > 1:
        found["pipeline filling and emptying"] = _total(micro) * (sizes.pipeline - 1) / turns
    ends = [_end(count, cluster) for count in counts]
    if config.optimizer.overlap:
        for end in ends:
            backward = _total(micro) / 2  # of the last micro-batch, at least
            end["gradients across ranks"] = max(0.0, end["gradients across ranks"] - backward)
    return found | max(ends, key=_total)


def state_exchange(
    config: Config, sizes: Sizes, cluster: Cluster, mixer: str
) -> tuple[Choice, int]:
    """How the states of a linear layer, or of one of its groups of heads, cross ranks; and the
    bytes of the layer that a rank sends at most."""
    count = Count(config, sizes)
    m, groups = count.model, count.groups(mixer)
    heads = m.num_heads // sizes.tensor // groups
    a = {"gla": m.head_dim, "mamba2": 1, "retention": 1}.get(mixer, m.head_dim**2)
    b = m.head_dim * m.value_head_dim
    wanted, layout = config.parallel.exchange, config.parallel.layout
    a_bytes, b_bytes = 4 * heads * a, 4 * heads * b
    choice = _choice(wanted, layout, sizes, cluster, a_bytes, b_bytes)
    ranges = 2 if layout == "zigzag" else 1
    inside = min(sizes.context, max(1, cluster.gpus_per_node // sizes.tensor))
    packed = ranges * (a_bytes + b_bytes)
    across = inside * b_bytes if sizes.context > inside else 0
    sent = {
        "allgather": (sizes.context - 1) * packed,
        "doubling": (ranges * sizes.context - 1).bit_length() * packed,
        "twolevel": (inside - 1) * packed + across,
    }
    return choice, groups * sent.get(choice.name, ranges * b_bytes)


def softmax_exchange(count: Count) -> tuple[float, float]:
    """`cost.softmax_bytes` of a softmax layer, all its groups of heads."""
    beside, waited = softmax_bytes(count.attention, *count.attending)
    groups = count.groups("softmax")
    return groups * beside, groups * waited


@lru_cache(maxsize=4096)
def _choice(
    wanted: str, layout: str, sizes: Sizes, cluster: Cluster, a_bytes: int, b_bytes: int
) -> Choice:
    links = Links(
        tuple(rank * sizes.tensor // cluster.gpus_per_node for rank in range(sizes.context)),
        cluster.latency,
        cluster.bandwidth,
        cluster.across_latency,
        cluster.across_bandwidth,
    )
    chain = Layout(2 * sizes.context, sizes.context, layout).chain
    return choose(wanted, chain, links, a_bytes, b_bytes)


def _microbatch(count: Count, cluster: Cluster) -> Parts:
    """Of one micro-batch on one pipeline rank."""
    sizes, m, config = count.sizes, count.model, count.config
    found: Parts = defaultdict(float)
    moved = flops = attention = 0.0
    halves_again = layers_again = 0
    places = (
        (mixer, mixers[at + 1 :]) for mixers, _ in count.runs for at, mixer in enumerate(mixers)
    )
    for mixer, following in places:
        groups, more = count.groups(mixer), bool(following)  # more: for the input of the next layer
        again = count.again(mixer) * (more + 2 - 1 / groups)  # all but one group once more
        mlp_again = count.mlp_again + more
        halves_again += count.again(mixer) * (1 + more) + mlp_again
        layers_again += mlp_again
        flops += count.mixer_flops(mixer) * (3 + again) + count.mlp_flops * (3 + mlp_again)
        moved += count.mixer_bytes(mixer) * (_MOVED[1] + _MOVED[0] * again)
        moved += count.mlp_bytes * (_MOVED[1] + _MOVED[0] * mlp_again)
        if mixer == "softmax":
            runs = 3.5 + (again > 0 and not config.memory.keep_attention)
            attention += count.attention_flops * runs / cluster.attention
            continue
        found["recurrences"] += _recurrence(count, cluster, mixer, again)
        if sizes.context > 1:
            choice, _ = state_exchange(config, sizes, cluster, mixer)
            found["states across ranks"] += 2 * groups * choice.seconds[choice.name]
    if count.last:
        flops += 4 * count.loss_flops
    experts = count.mlp_flops * (3 * len(count.mixers) + layers_again) if m.num_experts else 0.0
    found["matrix products"] = (flops - experts + experts / _GROUPED) / cluster.matmul
    found["softmax attention"] = attention
    found["norms, gates, activations"] = moved * count.tokens / cluster.memory_bandwidth
    compute = _total(found)
    softmax = count.mixers.count("softmax")
    if sizes.context > 1 and softmax:
        rate = _rate(cluster, sizes.context, sizes.tensor)
        beside, waited = softmax_exchange(count)
        # backwards keys and values come again, and their gradients in fp32
        seconds = softmax * beside * (2 + 4 / count.element) / rate
        found["softmax across ranks"] = max(seconds - attention, 0.0)
        found["softmax across ranks"] += softmax * 2 * waited / rate
    if sizes.tensor > 1:
        hidden = count.tokens * m.hidden_size * count.element * (sizes.tensor - 1) / sizes.tensor
        times = 10 * len(count.mixers) + 2 * halves_again + 3 * count.last
        found["tensor parallelism"] = times * hidden / _rate(cluster, sizes.tensor, 1)
    if m.num_experts and sizes.expert > 1:
        tokens = count.tokens / sizes.tensor * m.moe_top_k * (sizes.expert - 1) / sizes.expert
        times = 4 * len(count.mixers) + 2 * layers_again
        rate = _rate(cluster, sizes.expert, sizes.expert_tensor)
        found["tokens to experts"] = times * tokens * m.hidden_size * count.element / rate
    if away := count.kept()[1]:
        found["offloading"] = max(0.0, 2 * away / cluster.host_bandwidth - 0.9 * compute)
    return found


def _end(count: Count, cluster: Cluster) -> Parts:
    """What follows the last micro-batch: gradients are summed, the optimizer steps."""
    sizes, found = count.sizes, Parts(float)
    own = parameters(count.config, sizes, count.rank)
    experts_over = sizes.data * sizes.context * sizes.tensor
    experts_over //= sizes.expert * sizes.expert_tensor
    held = 0.0
    for size, ranks, step in (
        (own.total - own.experts, sizes.data * sizes.context, sizes.tensor),
        (own.experts, max(1, experts_over), sizes.expert * sizes.expert_tensor),
    ):
        distributed = count.config.optimizer.distributed
        moved = size * (4 + count.element if distributed else 8) * (ranks - 1) / ranks
        if moved:
            found["gradients across ranks"] += moved / _rate(cluster, ranks, step)
        held += size / ranks if distributed else size
    found["optimizer"] = _OPTIMIZER * held / cluster.memory_bandwidth
    return found


def _total(parts: Parts) -> float:
    return sum(parts.values())


def _recurrence(count: Count, cluster: Cluster, mixer: str, again: float) -> float:
    m = count.model
    key, value = m.head_dim, m.value_head_dim
    widths = {mixer: (key + value) / 256, "norm": value / 128}
    if mixer in CONVOLVED:
        widths["convolution"] = qkv_width(m, mixer) / m.num_heads / 384
    if mixer in ("gated_deltanet", "kda"):
        widths["unit"] = 2 * key * m.key_heads / m.num_heads / 128
    size = count.tokens / 65536 * m.num_heads / count.sizes.tensor / 16
    size *= _MEASURED_BANDWIDTH / cluster.memory_bandwidth
    times = ((_MEASURED[name], width) for name, width in widths.items())
    return size * sum(width * (both + again * forward) for (forward, both), width in times)


def _rate(cluster: Cluster, ranks: int, step: int) -> float:
    """Bytes a second that each of `ranks`, every `step`-th GPU, receives in a collective.

    Between nodes all ports of a node work for what its GPUs then hand to each other.
    """
    members = max(1, cluster.gpus_per_node // step)
    if ranks <= members:
        return cluster.bandwidth
    return min(cluster.bandwidth, cluster.across_bandwidth * members)
