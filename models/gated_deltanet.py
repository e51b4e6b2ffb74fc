"""Gated DeltaNet (arXiv 2412.06464) as a Megatron attention module."""

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


class GatedDeltaNet(SequenceMixer):
    """The delta rule with a decay for each head, on short convolutions of q, k and v.

        q, k, v = SiLU(conv(q, k, v));  q, k = q / |q|, k / |k|
        beta = sigmoid(b);  log_decay = -exp(A_log) · softplus(a + dt_bias)
        y = (RMSNorm(delta_attention(q, k, v, beta, log_decay)) · SiLU(z)) W_out

    Args:
        config, layer_number, pg_collection: given by Megatron's layer.
        num_heads, head_dim, value_head_dim: of the whole layer; head_dim is a key's.
        key_heads: heads of q and k, each shared by as many of v; 0: num_heads.
        conv_width: taps of the convolutions.
        layout: see SequenceMixer.

    Raises:
        ValueError: key_heads that do not divide num_heads.
    """

    # Rotary embedding belongs to the softmax layers of a hybrid; the decay orders tokens here.
    ignored_inputs = frozenset({"rotary_pos_emb"})
    columns = 2  # the output's gate once stood before beta

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
        groups, each = heads_of_keys(num_heads, key_heads)
        value = each * value_head_dim
        widths = [head_dim, head_dim, value]
        super().__init__(
            config,
            heads=groups,
            in_width=sum(widths) + 2 * each + value,
            out_width=value,
            late_width=value,
            layout=layout,
            pg_collection=pg_collection,
        )
        self.widths, self.each = widths, each
        taps = torch.empty(groups, sum(widths), conv_width)
        self.conv_weight = self.head_parameter(taps.uniform_(-1, 1) / math.sqrt(conv_width))
        self.A_log = self.head_parameter(first_rates(num_heads))
        self.dt_bias = self.head_parameter(first_steps(num_heads))
        self.norm = GatedHeadNorm(config, value_head_dim, self.tp_group)

    def mix(
        self,
        x: Tensor,
        late: Late,
        low: Tensor | None,
        heads: Heads,
        params: SequenceParallelParams,
    ) -> Tensor:
        """See SequenceMixer; the output's gate is late."""
        qkv, beta, a = x.split([sum(self.widths), self.each, self.each], -1)
        taps = heads.part(self.conv_weight).flatten(0, 1)
        qkv = causal_conv1d(qkv, taps, activation="silu", sp=params.sp)
        q, k, v = qkv.split(self.widths, -1)
        # softplus(y) = -logsigmoid(-y)
        opposite = -heads.part(self.dt_bias).float() - a.flatten(2)
        finish = start_delta_attention(
            unit(q),
            unit(k),
            v.unflatten(3, (self.each, -1)).flatten(2, 3),
            beta.flatten(2).float().sigmoid(),
            log_decay(opposite, heads.part(self.A_log).float().exp()),
            sp=params.sp,
        )
        gate = late()
        o = self.norm(finish(), gate.unflatten(3, (self.each, -1)).flatten(2, 3))
        return o.unflatten(2, (len(heads), -1)).flatten(3)
