"""What the mixers with short convolutions of queries, keys and values share."""

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import causal_conv1d
from seqpar.models.config import check_divides
from seqpar.models.groups import Heads
from seqpar.models.mixer import SequenceMixer
from seqpar.models.sequence import SequenceParallelParams


class ConvolvedMixer(SequenceMixer):
    """A head of queries and keys with the heads of values that share it is one of SequenceMixer's.

    Args:
        config, layer_number, pg_collection: given by Megatron's layer.
        num_heads, head_dim, value_head_dim: of the whole layer; head_dim is a key's.
        key_heads: heads of queries and keys, each shared by as many of values; 0: num_heads.
        conv_width: taps of the convolutions.
        layout: see SequenceMixer.

    Attributes: num_heads, value_head_dim, as given; each, the heads of values that share one of
        keys; widths, the numbers of such a head that are its query, its key and its values.

    Raises:
        ValueError: key_heads that do not divide num_heads.
    """

    # Rotary embedding belongs to the softmax layers of a hybrid; the decay orders tokens here.
    ignored_inputs = frozenset({"rotary_pos_emb"})

    gates: int
    """Numbers that a head of values takes from `in_proj` beside its values."""

    gate_is_late = True
    """Whether `in_proj` gives what gates the output, too."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *,
        num_heads: int,
        head_dim: int,
        value_head_dim: int,
        key_heads: int = 0,
        conv_width: int = 4,
        layout: str | None = None,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        key_heads = key_heads or num_heads
        check_divides("key_heads", key_heads, "num_heads", num_heads)
        each = num_heads // key_heads
        value = each * value_head_dim
        widths, late = [head_dim, head_dim, value], value if self.gate_is_late else 0
        super().__init__(
            config,
            heads=key_heads,
            in_width=sum(widths) + self.gates * each + late,
            out_width=value,
            late_width=late,
            layout=layout,
            pg_collection=pg_collection,
        )
        self.num_heads, self.value_head_dim = num_heads, value_head_dim
        self.widths, self.each = widths, each
        taps = torch.empty(key_heads, sum(widths), conv_width)
        self.conv_weight = self.head_parameter(taps.uniform_(-1, 1) / math.sqrt(conv_width))

    def convolved(
        self, x: Tensor, heads: Heads, params: SequenceParallelParams, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """What `mix` is given, convolved and through SiLU, but for the gates.

        Returns:
            query and key [b, s, heads, head_dim], value [b, s, heads · each, value_head_dim], and
            `gates` times [b, s, heads · each].
        """
        qkv, *gates = x.split([sum(self.widths), *[self.each] * self.gates], -1)
        taps = heads.part(self.conv_weight).flatten(0, 1)
        qkv = causal_conv1d(qkv, taps, bias, activation="silu", sp=params.sp)
        q, k, v = qkv.split(self.widths, -1)
        return q, k, self.by_value_head(v), [gate.flatten(2) for gate in gates]

    def by_value_head(self, x: Tensor) -> Tensor:
        """[b, s, heads, each · dim] -> [b, s, heads · each, dim]."""
        return x.unflatten(3, (self.each, -1)).flatten(2, 3)

    def by_key_head(self, x: Tensor) -> Tensor:
        """[b, s, heads · each, dim] -> [b, s, heads, each · dim]."""
        return x.unflatten(2, (-1, self.each)).flatten(3)
