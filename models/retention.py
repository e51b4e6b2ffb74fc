"""Retention (RetNet, arXiv 2307.08621) as a Megatron attention module."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar.attention import start_linear_attention
from seqpar.kernels.pieces import Late
from seqpar.models.groups import Heads
from seqpar.models.mixer import SequenceMixer
from seqpar.models.norm import GatedHeadNorm
from seqpar.models.sequence import SequenceParallelParams
from seqpar.models.softmax import rotate


class Retention(SequenceMixer):
    """Linear attention with a constant decay for each head, and rotary positions.

        q, k turned by their positions;  decay = 1 - 2^(-5 - h) of head h
        y = (RMSNorm(linear_attention(q, k, v, log decay)) · SiLU(r)) W_out

    Args:
        config, layer_number, pg_collection: given by Megatron's layer.
        num_heads, head_dim, value_head_dim: of the whole layer; head_dim is a key's.
        rope_base: of the rotary positions.
        layout: see SequenceMixer.

    Raises:
        ValueError: an odd head_dim.
    """

    # Megatron's are for its own layout.
    ignored_inputs = frozenset({"rotary_pos_emb"})

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *,
        num_heads: int,
        head_dim: int,
        value_head_dim: int,
        rope_base: float = 10000.0,
        layout: str | None = None,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        if head_dim % 2:
            raise ValueError(
                f"head_dim={head_dim} must be even, rotary positions turn pairs; nearest: "
                f"{head_dim - 1}, {head_dim + 1}"
            )
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
        self.widths, self.head_dim, self.rope_base = widths, head_dim, rope_base
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
        q, k, v = x.split(self.widths, -1)
        cos, sin = params.rotary(self.head_dim, self.rope_base, x.device)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        first = self.tp_group.rank() * self.heads + heads.first
        numbers = torch.arange(first, first + len(heads), dtype=torch.float64, device=x.device)
        log_decay = torch.log1p(-torch.exp2(-5 - numbers)).float()
        finish = start_linear_attention(q, k, v, log_decay, sp=params.sp)
        gate = late()
        return self.norm(finish(), gate)
