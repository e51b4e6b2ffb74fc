"""Gated linear attention (arXiv 2312.06635) as a Megatron attention module."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.attention import start_linear_attention
from seqpar.kernels.pieces import Late
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
        # Too narrow to cut: whole on each tensor-parallel rank.
        self.decay_down = torch.nn.Linear(
            config.hidden_size, gate_rank, bias=False, dtype=config.params_dtype
        )
        config.init_method(self.decay_down.weight)
        weight: Any = self.decay_down.weight
        weight.sequence_parallel = config.sequence_parallel
        self.decay_up = self.column_linear(gate_rank, num_heads * head_dim, bias=True)
        self.norm = GatedHeadNorm(config, value_head_dim, self.tp_group)

    def mix(
        self, x: Tensor, late: Late, hidden_states: Tensor, params: SequenceParallelParams
    ) -> Tensor:
        """See SequenceMixer; the output's gate is late."""
        q, k, v = x.split(self.widths, -1)
        logits, _ = self.decay_up(self.decay_down(hidden_states))
        logits = logits.transpose(0, 1).unflatten(-1, (self.heads, -1))
        log_decay = _LogDecay.apply(logits)
        finish = start_linear_attention(q, k, v, log_decay, sp=params.sp)
        gate = late()
        return self.norm(finish(), gate)


class _LogDecay(torch.autograd.Function):
    """The logarithm of a channel's decay, in fp32, of which only the result is kept, which the
    recurrence keeps in any case: the derivative of y = logsigmoid(x) is 1 - exp(y)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        log_decay = F.logsigmoid(logits.float()) / DECAY_TEMPERATURE
        ctx.save_for_backward(log_decay)
        ctx.dtype = logits.dtype
        return log_decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_decay: Tensor) -> Tensor:
        [log_decay] = ctx.saved_tensors
        decayed = (log_decay * DECAY_TEMPERATURE).expm1_()
        return decayed.mul_(d_log_decay).div_(-DECAY_TEMPERATURE).to(ctx.dtype)
