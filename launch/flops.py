"""How much arithmetic a step is, and how much the GPU could do: model FLOPs utilisation (MFU).

Only what the model asks for is counted: no recomputation, no padding, and of softmax attention the
causal half of each document.
"""

import re
from collections.abc import Iterable
from itertools import pairwise

import torch

from seqpar.models.config import ModelConfig, layer_mixers, resolved

# Dense bf16 operations a second, in 1e12, by what the GPU's name holds; the first match counts.
_PEAKS = {
    r"H100 PCIe": 756,
    r"H100|H200|H800|GH200": 989,
    r"H20\b": 148,
    r"GB200|GB300": 2500,
    r"B200|B300": 2250,
    r"A100|A800": 312,
    r"L40S": 362,
    r"L40": 181,
    r"A10\b": 125,
    r"L4\b": 121,
}


def peak_flops(gpu: str) -> float | None:
    """Dense bf16 operations a second of the GPU of this name; None: not known here."""
    found = (peak * 1e12 for pattern, peak in _PEAKS.items() if re.search(pattern, gpu))
    return next(found, None)


def peak_of_this_gpu() -> float | None:
    """Likewise of this rank's; None where there is none."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def step_flops(model: ModelConfig, documents: Iterable[list[int]]) -> float:
    """Operations of a forward and backward pass.

    Args:
        documents: of each sequence where its documents begin, and its length (cu_seqlens).
    """
    lengths = [stop - start for bounds in documents for start, stop in pairwise(bounds)]
    tokens, pairs = sum(lengths), sum(n * (n + 1) / 2 for n in lengths)
    linear, softmax = _forward(resolved(model))
    return 3 * (linear * tokens + softmax * pairs)  # the backward pass is two more


def _forward(m: ModelConfig) -> tuple[float, float]:
    """(operations a token, operations a pair of query and key) of all layers, forward."""
    mixers = layer_mixers(m)
    token = sum(2 * (mixer_weights(m, x) + mlp_weights(m)) + state_flops(m, x) for x in mixers)
    query_width = m.num_heads * m.softmax_head_dim
    return token + 2 * m.hidden_size * m.vocab_size, 4 * query_width * mixers.count("softmax")


# Numbers a head that a mixer's first projection gives beside queries, keys, values and the gate.
_GATES = {"gated_deltanet": 2, "kda": 1, "mamba2": 1}
CONVOLVED = ("gated_deltanet", "kda", "mamba2")
"""Mixers with short convolutions of queries, keys and values, and perhaps fewer heads of keys."""


def qkv_width(m: ModelConfig, mixer: str) -> int:
    """Numbers of a token's queries, keys and values in a linear mixer."""
    keys = m.key_heads if mixer in CONVOLVED else m.num_heads
    return 2 * keys * m.head_dim + m.num_heads * m.value_head_dim


def in_width(m: ModelConfig, mixer: str) -> int:
    """Numbers that a mixer's first projection gives a token."""
    if mixer == "softmax":
        return (m.num_heads + 2 * m.kv_heads) * m.softmax_head_dim
    gate = 0 if mixer == "kda" else m.value_head_dim
    return qkv_width(m, mixer) + m.num_heads * (gate + _GATES.get(mixer, 0))


def low_rank(m: ModelConfig, mixer: str) -> tuple[int, int]:
    """Numbers that a mixer's gates are projected to first, and from there."""
    if mixer == "gla":
        return m.gate_rank, m.num_heads * m.head_dim
    if mixer == "kda":  # of the decay and of the output's gate
        return 2 * m.gate_rank, m.num_heads * (m.head_dim + m.value_head_dim)
    return 0, 0


def mixer_weights(m: ModelConfig, mixer: str) -> int:
    """Of a mixer's projections, each of which takes two operations a token."""
    out = m.softmax_head_dim if mixer == "softmax" else m.value_head_dim
    low, up = low_rank(m, mixer)
    weights = m.hidden_size * (in_width(m, mixer) + m.num_heads * out + low)
    return weights + m.gate_rank * up


def mlp_weights(m: ModelConfig) -> int:
    """Of an MLP, or of the router and the experts that a token goes to."""
    if not m.num_experts:
        return 3 * m.hidden_size * m.ffn_hidden_size
    return m.hidden_size * (m.moe_top_k * 3 * m.moe_ffn_hidden_size + m.num_experts)


def state_flops(m: ModelConfig, mixer: str) -> int:
    """Of a linear recurrence, a token: its state is read (by the delta rule twice) and written."""
    passes = {"softmax": 0, "gated_deltanet": 6, "kda": 6}.get(mixer, 4)
    return passes * m.num_heads * m.head_dim * m.value_head_dim
