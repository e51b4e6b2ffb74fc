"""Gated linear attention (arXiv 2312.06635) as a Megatron attention module."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar.attention import start_linear_attention
from seqpar.kernels.pieces import Late
from seqpar.models.decay import log_decay
from seqpar.models.groups import Heads
from seqpar.models.mixer import SequenceMixer
from seqpar.models.norm import GatedHeadNorm
from seqpar.models.sequence import SequenceParallelParams

DECAY_TEMPERATURE = 16
"""The logarithm of the decay is divided by it, so that states are forgotten slowly at first."""


class GatedLinearAttention(SequenceMixer):
    """Linear attention with a data-dependent decay for each key channel.

        log_decay = logsigmoid(x W_down W_up + b) / 16
        y = (RMSNorm(linear_attention(q, k, v, log_decay)) · SiLU(r)) W_out

    Args:
        config, layer_number, pg_collection: given by Megatron's layer.
        num_heads, head_dim, value_head_dim: of the whole layer; head_dim is a key's.
        gate_rank: rank of the projection that makes the decay.
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
        gate_rank: int = 16,
        layout: str | None = None,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        widths = [head_dim, head_dim, value_head_dim]
        super().__init__(
            config,
            heads=num_heads,
            in_width=sum(widths) + value_head_dim,
            out_width=value_head_dim,
            late_width=value_head_dim,
            layout=layout,
            pg_collection=pg_collection,
        )
        self.widths = widths
        self.decay_down = self.whole_linear(gate_rank)
        self.decay_up = self.column_linear(gate_rank, num_heads * head_dim, bias=True)
        self.norm = GatedHeadNorm(config, value_head_dim, self.tp_group)

    def down(self, hidden_states: Tensor) -> Tensor:
        """See SequenceMixer."""
        return self.decay_down(hidden_states)

    def mix(
        self,
        x: Tensor,
        late: Late,
        low: Tensor | None,
        heads: Heads,
        params: SequenceParallelParams,
    ) -> Tensor:
        """See SequenceMixer; the output's gate is late."""
        q, k, v = x.split(self.widths, -1)
        logits = heads.by_head(self.decay_up(low, heads)[0])
        decay = log_decay(logits, logits.new_full((), 1 / DECAY_TEMPERATURE, dtype=torch.float32))
        finish = start_linear_attention(q, k, v, decay, sp=params.sp)
        gate = late()
        return self.norm(finish(), gate)
