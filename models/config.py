"""The model's shape in plain types, and its checks. Imports neither torch nor Megatron."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

MIXERS = {
    "G": "gla",
    "D": "gated_deltanet",
    "K": "kda",
    "M": "mamba2",
    "R": "retention",
    "N": "softmax",
}
"""What a pattern letter stands for; besides these, L is `linear_mixer`."""


@dataclass
class ModelConfig:
    """A decoder-only language model: in each layer a mixer (by the pattern) and an MLP or MoE.

    Attributes:
        pattern: one letter a layer, spaces allowed ("LLLN LLLN"): L the `linear_mixer`, N softmax
            attention, G gated linear attention, D Gated DeltaNet, K Kimi Delta Attention,
            M Mamba-2, R retention.
        linear_mixer: what L means: "gla", "gated_deltanet", "kda", "mamba2" or "retention".
        hidden_size, vocab_size: width of the hidden states, number of tokens.
        num_heads: heads of every mixer.
        key_heads: heads of queries and keys in Gated DeltaNet, KDA and Mamba-2, each shared by
            several of values; 0: num_heads.
        head_dim: query and key dimension of a linear head; 0: half of value_head_dim.
        value_head_dim: value dimension of a linear head; 0: hidden_size / num_heads.
        kv_heads: key and value heads of a softmax layer; 0: num_heads.
        softmax_head_dim: dimension of a softmax head; 0: hidden_size / num_heads.
        rope_base, rope_fraction: rotary embedding in softmax layers, over that part of each head;
            retention turns all of it.
        gate_rank: rank of the decay's projection in gated linear attention, and in KDA of the
            output gate's as well.
        conv_width: taps of the short convolutions of Gated DeltaNet, KDA and Mamba-2.
        ffn_hidden_size: width of the SwiGLU MLP; 0: 8/3 hidden_size, rounded up to 64s.
        num_experts: experts of the mixture that is the MLP of every layer; 0: one dense MLP.
        moe_top_k: experts each token goes to.
        moe_ffn_hidden_size: width of one expert; 0: ffn_hidden_size / moe_top_k, rounded up.
        moe_aux_loss: weight of the load balancing loss.
        tie_embeddings: whether the output layer shares the embedding's weight.
        norm_epsilon, init_std: of the RMS norms; of the normal initialisation.
    """

    pattern: str = "LLLN"
    linear_mixer: str = "gla"
    hidden_size: int = 256
    vocab_size: int = 256
    num_heads: int = 4
    key_heads: int = 0
    head_dim: int = 0
    value_head_dim: int = 0
    kv_heads: int = 0
    softmax_head_dim: int = 0
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    gate_rank: int = 16
    conv_width: int = 4
    ffn_hidden_size: int = 0
    num_experts: int = 0
    moe_top_k: int = 2
    moe_ffn_hidden_size: int = 0
    moe_aux_loss: float = 0.01
    tie_embeddings: bool = False
    norm_epsilon: float = 1e-5
    init_std: float = 0.02


@dataclass
class MemoryConfig:
    """What is kept of a forward pass, and what is made again in the backward pass.

    Each layer has a mixer and an MLP, or a mixture of experts. Of those that are made again only
    the input is kept, a single one of a layer where both are.

    Attributes:
        loss_tokens: tokens of a sequence whose logits exist at a time; 0: all.
        recompute: which of RECOMPUTED are made again.
        mlp_tokens: tokens of a rank that an MLP, or its experts, that is made again works on at a
            time; 0: all.
        head_groups: groups of heads that a mixer that is made again works on one after the other,
            at most one for each head of keys that a tensor-parallel rank has. With several, all but
            one are run a third time.
        keep_attention: whether the output of softmax attention is kept where the rest of its mixer
            is made again; attention takes longer than all else in long sequences.
        offload_layers: how many layers, the first of each pipeline stage, keep what is made again
            from in the host's memory.
        keep_every: of so many layers in a row, made again whole, the input of the first alone is
            kept, and all but the last are run a third time.
    """

    loss_tokens: int = 2048
    recompute: list[str] = dataclasses.field(default_factory=list)
    mlp_tokens: int = 65536
    head_groups: int = 1
    keep_attention: bool = True
    offload_layers: int = 0
    keep_every: int = 1


RECOMPUTED = ("linear", "softmax", "mlp")
"""Mixers of linear layers, mixers of softmax layers, and the MLPs or experts of all."""


def check_memory(memory: MemoryConfig, model: ModelConfig, tensor_parallel: int = 1) -> None:
    """Raise ValueError for settings that cannot be, of a model that `check_sizes` lets pass."""
    for name in ("head_groups", "keep_every"):
        check_at_least(f"memory.{name}", getattr(memory, name), 1)
    for name in ("loss_tokens", "mlp_tokens", "offload_layers"):
        check_at_least(f"memory.{name}", getattr(memory, name), 0)
    for name in memory.recompute:
        if name not in RECOMPUTED:
            raise ValueError(
                f"memory.recompute={list(memory.recompute)} may hold {', '.join(RECOMPUTED)}, not "
                f"{name!r}"
            )
    if memory.offload_layers and not memory.recompute:
        raise ValueError(
            f"memory.offload_layers={memory.offload_layers} moves what layers are made again from, "
            f"and memory.recompute is empty; set it to [{', '.join(RECOMPUTED)}]"
        )
    if memory.keep_every > 1 and set(memory.recompute) != set(RECOMPUTED):
        raise ValueError(
            f"memory.keep_every={memory.keep_every} is of layers that are made again whole; set "
            f"memory.recompute to [{', '.join(RECOMPUTED)}], or memory.keep_every to 1"
        )
    mixers = [mixer for mixer in dict.fromkeys(layer_mixers(model)) if made_again(memory, mixer)]
    if memory.head_groups > 1 and not mixers:
        raise ValueError(
            f"memory.head_groups={memory.head_groups} is of mixers that are made again, and "
            f"memory.recompute={list(memory.recompute)} names none; nearest: 1"
        )
    for mixer in mixers:
        heads = key_heads(model, mixer, tensor_parallel)
        groups = min(memory.head_groups, heads)
        check_divides("memory.head_groups", groups, f"the heads of {mixer} on a rank", heads)


def made_again(memory: MemoryConfig, mixer: str) -> bool:
    """Whether a mixer is made again in the backward pass."""
    return ("softmax" if mixer == "softmax" else "linear") in memory.recompute


def key_heads(model: ModelConfig, mixer: str, tensor_parallel: int = 1) -> int:
    """Heads of keys that a rank has of a mixer, each with its queries and values."""
    model = resolved(model)
    heads = {"softmax": model.kv_heads, "gla": model.num_heads, "retention": model.num_heads}
    return max(1, heads.get(mixer, model.key_heads) // tensor_parallel)


def layer_mixers(model: ModelConfig) -> list[str]:
    """The mixer of each layer, in order, by the names of MIXERS.

    Raises:
        ValueError: an unknown letter or linear mixer, or no letter at all.
    """
    linear = [name for name in MIXERS.values() if name != "softmax"]
    if model.linear_mixer not in linear:
        raise ValueError(
            f"model.linear_mixer={model.linear_mixer!r} must be one of {', '.join(linear)}"
        )
    letters = {"L": model.linear_mixer, **MIXERS}
    legal = ", ".join(f"{letter} ({name})" for letter, name in letters.items())
    pattern = "".join(model.pattern.split())
    if not pattern:
        raise ValueError(f"model.pattern={model.pattern!r} must hold one letter a layer: {legal}")
    for letter in pattern:
        if letter not in letters:
            raise ValueError(
                f"model.pattern={model.pattern!r} holds the unknown letter {letter!r}; "
                f"legal letters: {legal}"
            )
    return [letters[letter] for letter in pattern]


def resolved(model: ModelConfig) -> ModelConfig:
    """A checked copy of `model` in which every 0 is the number it stands for.

    Raises:
        ValueError: a field that cannot be, its rule and the nearest legal value.
    """
    layer_mixers(model)
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if isinstance(value, int) and not isinstance(value, bool):
            check_at_least(f"model.{field.name}", value, 0 if field.default == 0 else 1)
    if not model.value_head_dim or not model.softmax_head_dim:
        check_divides("model.num_heads", model.num_heads, "model.hidden_size", model.hidden_size)
    value_dim = model.value_head_dim or model.hidden_size // model.num_heads
    ffn = model.ffn_hidden_size or _round_up(model.hidden_size * 8 // 3, 64)
    found = dataclasses.replace(
        model,
        key_heads=model.key_heads or model.num_heads,
        head_dim=model.head_dim or max(1, value_dim // 2),
        value_head_dim=value_dim,
        kv_heads=model.kv_heads or model.num_heads,
        softmax_head_dim=model.softmax_head_dim or model.hidden_size // model.num_heads,
        ffn_hidden_size=ffn,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size or _round_up(ffn // model.moe_top_k, 8),
    )
    _check(found)
    return found


def _check(model: ModelConfig) -> None:
    for name in ("kv_heads", "key_heads"):
        check_divides(f"model.{name}", getattr(model, name), "model.num_heads", model.num_heads)
    if "retention" in layer_mixers(model) and model.head_dim % 2:
        raise ValueError(
            f"model.head_dim={model.head_dim} must be even, rotary positions of retention turn "
            f"pairs; nearest: {model.head_dim - 1}, {model.head_dim + 1}"
        )
    if not 0 <= model.rope_fraction <= 1:
        nearest = min(max(model.rope_fraction, 0), 1)
        raise ValueError(
            f"model.rope_fraction={model.rope_fraction} must be from 0 to 1; nearest: {nearest}"
        )
    if model.softmax_head_dim % 2:
        raise ValueError(
            f"model.softmax_head_dim={model.softmax_head_dim} must be even, rotary embedding turns "
            f"pairs; nearest: {model.softmax_head_dim - 1}, {model.softmax_head_dim + 1}"
        )
    for name in ("rope_base", "norm_epsilon", "init_std"):
        if getattr(model, name) <= 0:
            raise ValueError(f"model.{name}={getattr(model, name)} must be above 0")
    if model.moe_aux_loss < 0:
        raise ValueError(
            f"model.moe_aux_loss={model.moe_aux_loss} must not be negative; nearest: 0"
        )
    if 0 < model.num_experts < model.moe_top_k:
        raise ValueError(
            f"model.moe_top_k={model.moe_top_k} must not be above "
            f"model.num_experts={model.num_experts}; nearest: {model.num_experts}"
        )


def check_sizes(
    model: ModelConfig,
    *,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int = 1,
    stages: Sequence[int] | None = None,
) -> None:
    """Raise ValueError, with the nearest that do, for parallel sizes that do not divide `model`.

    Args: see seqpar.models.transformer.transformer_config.
    """
    model = resolved(model)
    layers = len(layer_mixers(model))
    for name, size in (
        ("tensor_parallel", tensor_parallel),
        ("context_parallel", context_parallel),
        ("pipeline_parallel", pipeline_parallel),
        ("expert_parallel", expert_parallel),
        ("expert_tensor_parallel", expert_tensor_parallel),
    ):
        check_at_least(name, size, 1)
    check_divides("tensor_parallel", tensor_parallel, "model.num_heads", model.num_heads)
    check_divides("tensor_parallel", tensor_parallel, "model.key_heads", model.key_heads)
    if tensor_parallel % model.kv_heads:  # otherwise several ranks share one
        check_divides("tensor_parallel", tensor_parallel, "model.kv_heads", model.kv_heads)
    check_divides("tensor_parallel", tensor_parallel, "model.vocab_size", model.vocab_size)
    check_divides(
        "tensor_parallel", tensor_parallel, "model.ffn_hidden_size", model.ffn_hidden_size
    )
    if stages is None:
        check_divides("pipeline_parallel", pipeline_parallel, "the layers of model.pattern", layers)
    else:
        _check_stages(stages, pipeline_parallel, layers)
    check_divides("expert_parallel", expert_parallel, "model.num_experts", model.num_experts or 1)
    check_divides(
        "expert_tensor_parallel",
        expert_tensor_parallel,
        "model.moe_ffn_hidden_size",
        model.moe_ffn_hidden_size if model.num_experts else 1,
    )


def _check_stages(stages: Sequence[int], pipeline_parallel: int, layers: int) -> None:
    if not stages or len(stages) % pipeline_parallel:
        raise ValueError(
            f"stages={list(stages)} has {len(stages)} entries, their number must be a multiple of "
            f"pipeline_parallel={pipeline_parallel}"
        )
    if min(stages) < 0 or sum(stages) != layers:
        raise ValueError(
            f"stages={list(stages)} must be layers of each stage and add up to the {layers} of "
            f"model.pattern, not {sum(stages)}"
        )


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError, with the nearest legal value, unless value >= least."""
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}; nearest: {least}")


def check_divides(name: str, value: int, of_name: str, of: int) -> None:
    """Raise ValueError, with the nearest divisors, unless value divides `of`."""
    if of % value:
        divisors = [d for d in range(1, of + 1) if of % d == 0]
        nearest = [d for d in divisors if d < value][-1:] + [d for d in divisors if d > value][:1]
        raise ValueError(
            f"{name}={value} must divide {of_name}={of}; nearest: {', '.join(map(str, nearest))}"
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
