"""Sequence-parallel training of linear-attention, delta-rule and softmax layers.

One sequence is cut over the ranks of a process group. Linear layers exchange fixed-size memory
states, softmax layers exchange keys and values; outputs and gradients are those of one rank that
holds it all. Importing this package needs torch only.
"""

from seqpar.attention import delta_attention, dplr_attention, linear_attention
from seqpar.context import SequenceParallel
from seqpar.conv import causal_conv1d
from seqpar.layout import Layout
from seqpar.softmax import softmax_attention

__all__ = [
    "Layout",
    "SequenceParallel",
    "causal_conv1d",
    "delta_attention",
    "dplr_attention",
    "linear_attention",
    "softmax_attention",
]
