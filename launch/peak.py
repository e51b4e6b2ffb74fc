"""The most memory that a rank of a run has in use at once, by part: `memory`.

Beside what is kept (count.py) that is what comes and goes in the backward pass of one layer, or of
the loss: followed tensor by tensor, as a GPU of NVIDIA's Hopper generation has them.
"""

from seqpar.kernels.tuned import BLOCK
from seqpar.launch.count import Count, layer_parameters, parameters, total
from seqpar.launch.flops import qkv_width
from seqpar.sources import ROOM

RESERVED = 1.5 * 2**30
"""Bytes of a GPU that CUDA, NCCL and the kernels themselves take."""

FRAGMENTS = 0.05
"""The part of a GPU's memory that PyTorch holds and cannot use."""


def memory(count: Count) -> dict[str, float]:
    """Bytes on the GPU by part, at their highest."""
    config, sizes = count.config, count.sizes
    own = parameters(config, sizes, count.rank)
    half = config.train.precision == "bf16"
    dense_ranks = expert_ranks = 1.0
    if config.optimizer.distributed:
        stage = sizes.data * sizes.context * sizes.tensor
        dense_ranks = sizes.data * sizes.context
        expert_ranks = stage / (sizes.expert * sizes.expert_tensor)
    held = (own.total - own.experts) / dense_ranks + own.experts / expert_ranks
    found = {
        "weights": own.total * count.element,
        "gradients": own.total * 4,
        "optimizer": held * (12 if half else 8),
    }
    kept, _ = count.kept()
    found |= {f"activations: {kind}": size * count.in_flight for kind, size in kept.items()}
    found["workspace"] = max(layers_working(count), loss_working(count))
    if sizes.tensor > 1:  # Megatron's, in which it gathers the input of a product
        found["workspace"] += count.tokens * count.hidden * sizes.tensor
    found["reserved"] = RESERVED + FRAGMENTS * sum(found.values())
    return found


def loss_working(count: Count) -> float:
    """Bytes beside what all layers keep, in the loss and its backward pass."""
    if not count.last:
        return 0.0
    m, tokens = count.model, count.tokens
    rows = m.vocab_size / count.sizes.tensor
    logits = min(count.config.memory.loss_tokens or tokens, tokens) * rows
    weight = rows * m.hidden_size
    found = (logits + weight) * (count.element + 4)
    return found + count.loss_bytes + tokens * count.hidden


def layers_working(count: Count) -> float:
    """Bytes beside what all layers keep, in the backward pass of the layer that needs most: by then
    what later ones kept is gone."""
    most = gone = 0.0
    on_the_way = count.kept()[0]["on its way to the host"]
    for run in reversed(range(len(count.runs))):
        mixers, leaves = count.runs[run]
        *first, last = mixers
        earlier = (_layer(count, mixer) for mixer in first)
        needed = max(_layer(count, last) + _restored(count, first), *earlier, 0.0)
        most = max(most, needed - gone - (on_the_way - count.on_the_way(run)))
        here, inputs = count.run_bytes(mixers)
        gone += total(here) + (0 if leaves else total(inputs))
    return most


def _restored(count: Count, mixers: list[str]) -> float:
    """What the first layers of a run make of its input, before the last one's backward pass."""
    attended = 0.0
    if not count.config.memory.keep_attention:
        attended = mixers.count("softmax") * count.attended_bytes
    return count.tokens * (len(mixers) * count.hidden + attended)


def _layer(count: Count, mixer: str) -> float:
    """The most of a layer's backward pass, beside what is kept of it and of those before it.

    Its MLP comes first. Each sum is of a moment: what heads have made between the projections, and
    hidden states: the gradient that came, the norm of the mixer's input, the MLP's input.
    """
    tokens, hidden = count.tokens, count.tokens * count.hidden
    heads = tokens * count.mixer_bytes(mixer) - 2 * hidden  # without the input and its norm
    exchanged = exchange_bytes(count) if mixer == "softmax" else 0.0
    gradients = tokens * _gradient_bytes(count, mixer)
    mlp = _mlp(count, mixer) + hidden
    if not count.again(mixer) or not count.mlp_again:
        made = heads + hidden if count.again(mixer) else 0.0
        given_up = hidden if count.mlp_again else tokens * count.mlp_bytes
        return max(mlp, hidden + made + gradients + exchanged - given_up)
    groups, keeps = count.groups(mixer), count.config.memory.keep_attention
    attended = tokens * count.attended_bytes if mixer == "softmax" else 0.0
    if keeps:
        heads -= attended
    if groups == 1:
        return heads + 2 * hidden + max(mlp, gradients + exchanged)
    # of each tensor-parallel rank all tokens' input and gradients, and sums of these in fp32
    whole, apart = hidden * count.sizes.tensor, hidden if count.sizes.tensor > 1 else 0.0
    precise = whole * 4 / count.element
    others = 0.0 if keeps else attended * (groups - 1) / groups  # attended, of other groups
    done = min(groups - 1, 2)  # after two groups the sum of their gradients is in fp32
    sums = precise if done == 2 else whole
    left = others - attended * done / groups
    one = max((heads + gradients) / groups + exchanged, heads / groups + whole)
    return max(
        others + heads / groups + apart + hidden + 2 * whole + precise,  # the output is added up
        others + heads / groups + whole + hidden + mlp,
        left + one + apart + 2 * whole + sums,
        left + apart + 4 * whole + precise,  # the second gradients are added to the first
    )


def _mlp(count: Count, mixer: str) -> float:
    """The most of the backward pass of an MLP, or experts, beside what is kept of it."""
    m, e, tp = count.model, count.element, count.sizes.tensor
    own = 3 * m.hidden_size * m.ffn_hidden_size / tp
    gradients = 2 * m.ffn_hidden_size * e / tp
    if m.num_experts:  # a token is sent, taken, given back and received
        own = layer_parameters(m, mixer, count.sizes).experts
        gradients = m.moe_top_k * max(3 * count.row, 2 * m.moe_ffn_hidden_size) * e / tp
    if not count.mlp_again:
        return count.tokens * gradients + own * e
    tiled = count.tiles > 1  # then gradients are put together, in fp32 those of the parameters
    size = count.tokens / count.tiles * (count.mlp_bytes - count.hidden + gradients)
    return size + own * (e + 4 * tiled) + count.tokens * count.hidden * tiled


def _gradient_bytes(count: Count, mixer: str) -> float:
    """Bytes a token at most, beside those kept, while what lies between the projections of a mixer
    is differentiated: gradients and what kernels leave to each other, less what is not needed then.
    """
    m, e = count.model, count.element
    heads, keys, values = m.num_heads, m.num_heads * m.head_dim, m.num_heads * m.value_head_dim
    shared = m.key_heads < heads  # heads of keys, by several of values
    decay = "diagonal" if mixer in ("gla", "kda") else "scalar"
    states = 4 * keys * m.value_head_dim / BLOCK[decay]  # for the gradient of the decays
    query, kv = heads * m.softmax_head_dim, m.kv_heads * m.softmax_head_dim
    found = {
        # of o, q, k and v; that of q once more in fp32
        "softmax": query * (2 * e + 4) + kv * 2 * e,
        # q and k without decay, their gradients in fp32
        "gla": values * e + keys * (2 * e + 8.5) + states,
        "retention": (values + 2 * keys) * e,
        # u, r and dx, T, dq, shares of the gradients of beta and the decays; not the gate's copy
        "gated_deltanet": (3 - shared) * values * e
        + (64 * heads + keys) * e
        + (values + 3 * keys) / 4
        + states,
        # q, k and k once more without decay, three gradients in fp32
        "kda": keys * (3 * e + 12.5) + states,
        # x, and twice its gradient, by the step in fp32; not what was convolved
        "mamba2": 12 * values + 2 * m.key_heads * m.head_dim * e - shared * qkv_width(m, mixer) * e,
    }[mixer]
    return found / count.sizes.tensor


def exchange_bytes(count: Count) -> float:
    """Of keys and values of other ranks, and of gradients of all, in softmax layers."""
    element, sequence = count.element, count.config.data.sequence_length
    heads = max(1, count.model.kv_heads // count.sizes.tensor) // count.groups("softmax")
    head = 2 * count.model.softmax_head_dim  # numbers of a key and its value
    if count.sizes.context == 1 or count.attention == "ulysses":
        return count.tokens * heads * head * 4
    if count.attention == "ring":  # at hand and arriving; five of gradients
        return count.tokens * heads * head * (2 * element + 20)
    # as gathered, and in order; gradients, by rank, and together to be sent
    at_once = max(1, min(heads // 2, ROOM // (sequence * head * (element + 4))))
    return sequence * at_once * head * (2 * element + 12)
