"""Mamba-2 (arXiv 2405.21060) as a Megatron attention module."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import causal_conv1d
from seqpar.attention import start_linear_attention
from seqpar.kernels.pieces import Late
from seqpar.models.decay import first_rates, first_steps, log_decay
from seqpar.models.groups import Heads
from seqpar.models.mixer import SequenceMixer, heads_of_keys
from seqpar.models.norm import GatedHeadNorm
from seqpar.models.sequence import SequenceParallelParams


class Mamba2(SequenceMixer):
    """A selective state-space model: linear attention with a decay for each head and token.

        C, B, x = SiLU(conv(C, B, x) + b);  step = softplus(dt + dt_bias)
        o = linear_attention(C, B, step · x, -exp(A_log) · step, scale=1) + D · x
        y = RMSNorm(o · SiLU(z)) W_out

    C, B and x are query, key and value; the heads of a group share C, B, and the norm. The norm's
    weight is one for all groups: W_out can tell them apart.

    Args:
        config, layer_number, pg_collection: given by Megatron's layer.
        num_heads, head_dim, value_head_dim: of the whole layer; head_dim is the size of the state
            (d_state), value_head_dim that of a head of x.
        key_heads: groups of heads that share B and C; 0: num_heads.
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
            in_width=sum(widths) + each + value,
            out_width=value,
            late_width=value,
            layout=layout,
            pg_collection=pg_collection,
        )
        self.widths, self.each = widths, each
        taps = torch.empty(groups, sum(widths), conv_width)
        self.conv_weight = self.head_parameter(taps.uniform_(-1, 1) / math.sqrt(conv_width))
        self.conv_bias = self.head_parameter(torch.zeros(groups * sum(widths)))  # flat: no decay
        self.A_log = self.head_parameter(first_rates(num_heads))
        self.dt_bias = self.head_parameter(first_steps(num_heads))
        self.D = self.head_parameter(torch.ones(num_heads))
        self.norm = GatedHeadNorm(config, value, self.tp_group, gate_first=True)

    def mix(
        self,
        x: Tensor,
        late: Late,
        low: Tensor | None,
        heads: Heads,
        params: SequenceParallelParams,
    ) -> Tensor:
        """See SequenceMixer; z is late."""
        cbx, dt = x.split([sum(self.widths), self.each], -1)
        taps = heads.part(self.conv_weight).flatten(0, 1)
        bias = heads.part(self.conv_bias)
        cbx = causal_conv1d(cbx, taps, bias, activation="silu", sp=params.sp)
        c, b, x = cbx.split(self.widths, -1)
        x = x.unflatten(3, (self.each, -1)).flatten(2, 3)  # [b, s, heads, value_head_dim]
        # softplus(y) = -logsigmoid(-y)
        opposite = -heads.part(self.dt_bias).float() - dt.flatten(2)
        decay = log_decay(opposite, heads.part(self.A_log).float().exp())
        step = -F.logsigmoid(opposite)
        v = (x * step[..., None]).to(x.dtype)
        finish = start_linear_attention(c, b, v, decay, scale=1.0, sp=params.sp)
        gate = late()
        o = torch.addcmul(finish(), x, heads.part(self.D)[:, None].to(x.dtype))
        return self.norm(o.unflatten(2, (len(heads), -1)).flatten(3), gate)
