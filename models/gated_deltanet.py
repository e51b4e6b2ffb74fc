"""Gated DeltaNet (arXiv 2412.06464) as a Megatron attention module."""

from typing import Any

from torch import Tensor

from seqpar.attention import start_delta_attention
from seqpar.kernels.norm import unit
from seqpar.kernels.pieces import Late
from seqpar.models.convolved import ConvolvedMixer
from seqpar.models.decay import first_rates, first_steps, log_decay
from seqpar.models.groups import Heads
from seqpar.models.norm import GatedHeadNorm
from seqpar.models.sequence import SequenceParallelParams


class GatedDeltaNet(ConvolvedMixer):
    """The delta rule with a decay for each head, on short convolutions of q, k and v.

        q, k, v = SiLU(conv(q, k, v));  q, k = q / |q|, k / |k|
        beta = sigmoid(b);  log_decay = -exp(A_log) · softplus(a + dt_bias)
        y = (RMSNorm(delta_attention(q, k, v, beta, log_decay)) · SiLU(z)) W_out

    Args: see ConvolvedMixer.
    """

    columns = 2  # the output's gate once stood before beta
    gates = 2  # b, a

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.A_log = self.head_parameter(first_rates(self.num_heads))
        self.dt_bias = self.head_parameter(first_steps(self.num_heads))
        self.norm = GatedHeadNorm(self.config, self.value_head_dim, self.tp_group)

    def mix(
        self,
        x: Tensor,
        late: Late,
        low: Tensor | None,
        heads: Heads,
        params: SequenceParallelParams,
    ) -> Tensor:
        """See SequenceMixer; the output's gate is late."""
        q, k, v, (b, a) = self.convolved(x, heads, params)
        opposite = -heads.part(self.dt_bias).float() - a  # softplus(y) = -logsigmoid(-y)
        finish = start_delta_attention(
            unit(q),
            unit(k),
            v,
            b.float().sigmoid(),
            log_decay(opposite, heads.part(self.A_log).float().exp()),
            sp=params.sp,
        )
        gate = late()
        return self.by_key_head(self.norm(finish(), self.by_value_head(gate)))
