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
    hidden, heads, key, value = m.hidden_size, m.num_heads, m.head_dim, m.value_head_dim
    query_heads = heads * m.softmax_head_dim
    weights = {
        "gla": hidden * heads * (2 * key + 3 * value) + m.gate_rank * (hidden + heads * key),
        "gated_deltanet": hidden * heads * (2 * key + 3 * value + 2),
        "softmax": 2 * hidden * (query_heads + m.kv_heads * m.softmax_head_dim),
    }
    # a state is read and written: 4 K V; the delta rule reads it once more
    states = {"gla": 4 * heads * key * value, "gated_deltanet": 6 * heads * key * value}
    mlp = 3 * hidden * m.ffn_hidden_size
    if m.num_experts:
        mlp = m.moe_top_k * 3 * hidden * m.moe_ffn_hidden_size + hidden * m.num_experts
    mixers = layer_mixers(m)
    token = sum(2 * (weights[name] + mlp) + states.get(name, 0) for name in mixers)
    return token + 2 * hidden * m.vocab_size, 4 * query_heads * mixers.count("softmax")
