"""Mamba-2 (arXiv 2405.21060) as a Megatron attention module."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqpar.attention import start_linear_attention
from seqpar.kernels.pieces import Late
from seqpar.models.convolved import ConvolvedMixer
from seqpar.models.decay import first_rates, first_steps, log_decay
from seqpar.models.groups import Heads
from seqpar.models.norm import GatedHeadNorm
from seqpar.models.sequence import SequenceParallelParams


class Mamba2(ConvolvedMixer):
    """A selective state-space model: linear attention with a decay for each head and token.

        C, B, x = SiLU(conv(C, B, x) + b);  step = softplus(dt + dt_bias)
        o = linear_attention(C, B, step · x, -exp(A_log) · step, scale=1) + D · x
        y = RMSNorm(o · SiLU(z)) W_out

    C, B and x are query, key and value; the heads of a group share C, B, and the norm. The norm's
    weight is one for all groups: W_out can tell them apart.

    Args: see ConvolvedMixer. head_dim is the size of the state (d_state), value_head_dim that of a
        head of x, key_heads the groups of heads that share B and C.
    """

    gates = 1  # dt

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        groups, channels, _ = self.conv_weight.shape
        bias = torch.zeros(groups * self.tp_group.size() * channels)
        self.conv_bias = self.head_parameter(bias)  # flat: no decay
        self.A_log = self.head_parameter(first_rates(self.num_heads))
        self.dt_bias = self.head_parameter(first_steps(self.num_heads))
        self.D = self.head_parameter(torch.ones(self.num_heads))
        width = self.each * self.value_head_dim
        self.norm = GatedHeadNorm(self.config, width, self.tp_group, gate_first=True)

    def mix(
        self,
        x: Tensor,
        late: Late,
        low: Tensor | None,
        heads: Heads,
        params: SequenceParallelParams,
    ) -> Tensor:
        """See SequenceMixer; z is late."""
        c, b, x, [dt] = self.convolved(x, heads, params, heads.part(self.conv_bias))
        opposite = -heads.part(self.dt_bias).float() - dt  # softplus(y) = -logsigmoid(-y)
        decay = log_decay(opposite, heads.part(self.A_log).float().exp())
        step = -F.logsigmoid(opposite)
        v = (x * step[..., None]).to(x.dtype)
        finish = start_linear_attention(c, b, v, decay, scale=1.0, sp=params.sp)
        gate = late()
        o = torch.addcmul(finish(), x, heads.part(self.D)[:, None].to(x.dtype))
        return self.norm(self.by_key_head(o), gate)
