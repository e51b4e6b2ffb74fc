"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692) as a Megatron attention module."""

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import causal_conv1d
from seqpar.attention import start_delta_attention
from seqpar.kernels.norm import unit
from seqpar.kernels.pieces import Late
from seqpar.models.decay import first_rates, first_steps, log_decay
from seqpar.models.groups import Heads
from seqpar.models.mixer import SequenceMixer, heads_of_keys
from seqpar.models.norm import GatedHeadNorm
from seqpar.models.sequence import SequenceParallelParams


class KimiDeltaAttention(SequenceMixer):
    """The delta rule with a decay for each key channel, on short convolutions of q, k and v.

        q, k, v = SiLU(conv(q, k, v));  q, k = q / |q|, k / |k|;  beta = sigmoid(b)
        log_decay = -exp(A_log) · softplus(x W_down W_decay + dt_bias)
        y = (RMSNorm(delta_attention(...)) · sigmoid(x W_down' W_gate + bias)) W_out

    Args:
        config, layer_number, pg_collection: given by Megatron's layer.
        num_heads, head_dim, value_head_dim: of the whole layer; head_dim is a key's.
        key_heads: heads of q and k, each shared by as many of v; 0: num_heads.
        gate_rank: rank of the projections that make the decay and the output's gate.
        conv_width: taps of the convolutions.
        layout: see SequenceMixer.

    Raises:
        ValueError: key_heads that do not divide num_heads.
    """

    # Rotary embedding belongs to the softmax layers of a hybrid; the decay orders tokens here.
    ignored_inputs = frozenset({"rotary_pos_emb"})

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *,
        num_heads: int,
        head_dim: int,
        value_head_dim: int,
        key_heads: int = 0,
        gate_rank: int = 128,
        conv_width: int = 4,
        layout: str | None = None,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        groups, each = heads_of_keys(num_heads, key_heads)
        widths = [head_dim, head_dim, each * value_head_dim]
        super().__init__(
            config,
            heads=groups,
            in_width=sum(widths) + each,
            out_width=each * value_head_dim,
            layout=layout,
            pg_collection=pg_collection,
        )
        self.widths, self.each, self.gate_rank = widths, each, gate_rank
        taps = torch.empty(groups, sum(widths), conv_width)
        self.conv_weight = self.head_parameter(taps.uniform_(-1, 1) / math.sqrt(conv_width))
        self.gate_down = self.whole_linear(2 * gate_rank)
        self.decay_up = self.column_linear(gate_rank, num_heads * head_dim)
        self.gate_up = self.column_linear(gate_rank, num_heads * value_head_dim, bias=True)
        self.A_log = self.head_parameter(first_rates(num_heads))
        self.dt_bias = self.head_parameter(first_steps(num_heads * head_dim))  # flat: no decay
        self.norm = GatedHeadNorm(config, value_head_dim, self.tp_group, activation="sigmoid")

    def down(self, hidden_states: Tensor) -> Tensor:
        """See SequenceMixer."""
        return self.gate_down(hidden_states)

    def mix(
        self,
        x: Tensor,
        late: Late,
        low: Tensor | None,
        heads: Heads,
        params: SequenceParallelParams,
    ) -> Tensor:
        """See SequenceMixer; nothing of x is late, the output's gate has projections of its own."""
        qkv, beta = x.split([sum(self.widths), self.each], -1)
        taps = heads.part(self.conv_weight).flatten(0, 1)
        qkv = causal_conv1d(qkv, taps, activation="silu", sp=params.sp)
        q, k, v = qkv.split(self.widths, -1)
        assert low is not None
        low_decay, low_gate = low.chunk(2, -1)
        bias = heads.part(self.dt_bias).float().unflatten(0, (len(heads) * self.each, -1))
        opposite = -bias - self._heads(self.decay_up(low_decay, heads)[0], heads)
        finish = start_delta_attention(
            unit(q),
            unit(k),
            v.unflatten(3, (self.each, -1)).flatten(2, 3),
            beta.flatten(2).float().sigmoid(),
            log_decay(opposite, heads.part(self.A_log).float().exp()[:, None]),
            sp=params.sp,
        )
        gate = self._heads(self.gate_up(low_gate, heads)[0], heads)
        o = self.norm(finish(), gate)
        return o.unflatten(2, (len(heads), -1)).flatten(3)

    def _heads(self, x: Tensor, heads: Heads) -> Tensor:
        """[s, b, heads · each · dim] -> [b, s, heads · each, dim]."""
        return heads.by_head(x).unflatten(3, (self.each, -1)).flatten(2, 3)
