"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692) as a Megatron attention module."""

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


class KimiDeltaAttention(ConvolvedMixer):
    """The delta rule with a decay for each key channel, on short convolutions of q, k and v.

        q, k, v = SiLU(conv(q, k, v));  q, k = q / |q|, k / |k|;  beta = sigmoid(b)
        log_decay = -exp(A_log) · softplus(x W_down W_decay + dt_bias)
        y = (RMSNorm(delta_attention(...)) · sigmoid(x W_down' W_gate + bias)) W_out

    Args: see ConvolvedMixer, and
        gate_rank: rank of the projections that make the decay and the output's gate.
    """

    gates = 1  # b
    gate_is_late = False  # it has projections of its own

    def __init__(self, *given: Any, gate_rank: int = 128, **options: Any) -> None:
        super().__init__(*given, **options)
        keys, values = (self.num_heads * dim for dim in (self.widths[1], self.value_head_dim))
        self.gate_down = self.whole_linear(2 * gate_rank)
        self.decay_up = self.column_linear(gate_rank, keys)
        self.gate_up = self.column_linear(gate_rank, values, bias=True)
        self.A_log = self.head_parameter(first_rates(self.num_heads))
        self.dt_bias = self.head_parameter(first_steps(keys))  # flat: no decay
        norm = GatedHeadNorm(self.config, self.value_head_dim, self.tp_group, activation="sigmoid")
        self.norm = norm

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
        """See SequenceMixer; nothing of x is late."""
        assert low is not None
        q, k, v, [b] = self.convolved(x, heads, params)
        low_decay, low_gate = low.chunk(2, -1)
        bias = heads.part(self.dt_bias).float().unflatten(0, (len(heads) * self.each, -1))
        step = self.by_value_head(heads.by_head(self.decay_up(low_decay, heads)[0]))
        finish = start_delta_attention(
            unit(q),
            unit(k),
            v,
            b.float().sigmoid(),
            log_decay(-bias - step, heads.part(self.A_log).float().exp()[:, None]),
            sp=params.sp,
        )
        gate = self.by_value_head(heads.by_head(self.gate_up(low_gate, heads)[0]))
        return self.by_key_head(self.norm(finish(), gate))
