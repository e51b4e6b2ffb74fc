"""Gated DeltaNet (arXiv 2412.06464) as a Megatron attention module."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import causal_conv1d
from seqpar.attention import start_delta_attention
from seqpar.kernels.norm import unit
from seqpar.kernels.pieces import Late
from seqpar.models.mixer import SequenceMixer
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
        conv_width: taps of the convolutions.
        layout: see SequenceMixer.
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
        conv_width: int = 4,
        layout: str | None = None,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        qkv_widths = [head_dim, head_dim, value_head_dim]
        widths = [sum(qkv_widths), 1, 1]
        super().__init__(
            config,
            heads=num_heads,
            in_width=sum(widths) + value_head_dim,
            out_width=value_head_dim,
            late_width=value_head_dim,
            layout=layout,
            pg_collection=pg_collection,
        )
        self.widths, self.qkv_widths = widths, qkv_widths
        taps = torch.empty(num_heads, sum(qkv_widths), conv_width)
        self.conv_weight = self.head_parameter(taps.uniform_(-1, 1) / math.sqrt(conv_width))
        # As Mamba-2 draws them: decay rates in [1, 16), steps log-uniform in [0.001, 0.1].
        self.A_log = self.head_parameter(torch.empty(num_heads).uniform_(1, 16).log())
        step = torch.empty(num_heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = self.head_parameter(step + (-(-step).expm1()).log())  # softplus gives step
        self.norm = GatedHeadNorm(config, value_head_dim, self.tp_group)

    def mix(
        self, x: Tensor, late: Late, hidden_states: Tensor, params: SequenceParallelParams
    ) -> Tensor:
        """See SequenceMixer; the output's gate is late."""
        qkv, beta, a = x.split(self.widths, -1)
        taps = self.conv_weight.flatten(0, 1)
        qkv = causal_conv1d(qkv, taps, activation="silu", sp=params.sp)
        q, k, v = qkv.split(self.qkv_widths, -1)
        step = F.softplus(a.squeeze(-1).float() + self.dt_bias.float())
        finish = start_delta_attention(
            unit(q),
            unit(k),
            v,
            beta.squeeze(-1).float().sigmoid(),
            -self.A_log.float().exp() * step,
            sp=params.sp,
        )
        gate = late()
        return self.norm(finish(), gate)
