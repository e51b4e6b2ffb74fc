"""RMS norms that work with Megatron's sequence parallelism, which its own local norms refuse."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar.kernels.norm import gated_rms_norm


class RMSNorm(torch.nn.Module):
    """RMS norm over the last dimension, for every norm slot of a Megatron layer spec.

    Args:
        config: gives the parameter dtype, and whether ranks of the tensor-parallel group see
            different tokens (then Megatron sums the weight's gradient over them).
        hidden_size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size], normalised, in x's dtype."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class GatedHeadNorm(RMSNorm):
    """RMS norm of each head's output, with a gate: see `gated_rms_norm`; one weight for all heads.

    A tensor-parallel rank holds some of the heads, so its gradient of the weight is a part of the
    sum. Megatron adds the parts up with sequence parallelism on; otherwise it is done here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        head_dim: int,
        tp_group: Any,
        *,
        activation: str = "silu",
        gate_first: bool = False,
    ) -> None:
        super().__init__(config, head_dim, config.layernorm_epsilon)
        self.kind: dict[str, Any] = {"activation": activation, "gate_first": gate_first}
        self.tp_group = None if config.sequence_parallel else tp_group

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """x and gate [..., heads, head_dim]."""
        weight = self.weight
        if self.tp_group is not None:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return gated_rms_norm(x, gate, weight, self.eps, **self.kind)
