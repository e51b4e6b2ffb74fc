"""Megatron's MoE layer with a router whose balancing loss does not depend on how tokens are cut."""

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# Megatron-Core 0.16 reads this name in its router also where Transformer Engine did not define it.
vars(moe_utils).setdefault("te_general_gemm", None)


class Router(TopKRouter):
    """Megatron's top-k router, its auxiliary loss weighted by the tokens of the whole sequence.

    Gradients are divided by the global token count in the end, so the auxiliary loss, a mean, is
    multiplied by tokens first. Its parts on the ranks of one sequence add up to the mean, so that
    must be the sequence's tokens. Megatron-Core 0.16 takes a rank's own, which weakens the loss by
    the number of ranks; later versions agree with this one.

    Raises:
        ValueError: another balancing loss, or a z-loss, for which this does not hold.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        kind = config.moe_router_load_balancing_type
        if kind not in ("aux_loss", "none"):
            raise ValueError(
                f"moe_router_load_balancing_type={kind!r} must be 'aux_loss' or 'none'"
            )
        if config.moe_z_loss_coeff:
            raise ValueError(f"moe_z_loss_coeff={config.moe_z_loss_coeff} must be 0 or None")
        super().__init__(config, *args, **kwargs)
        self.calculate_per_token_loss = False  # weighted below instead

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        *args: Any,
        valid_token_count: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As TopKRouter's; the coefficient is scaled along, so that the logged mean stays."""
        tokens = activation.shape[0] if valid_token_count is None else valid_token_count
        weight = tokens * self.tp_cp_group.size() if self.config.calculate_per_token_loss else 1
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff * weight,
            aux_loss * weight,
            *args,
            valid_token_count=valid_token_count,
            **kwargs,
        )


class Experts(SequentialMLP):
    """Megatron's experts, one after the other; their gradients go over the experts' own groups.

    Megatron marks them so only with expert parallelism. Without it, but with tensor parallelism
    that does not cut experts, their gradients would not be summed over the tensor-parallel ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.parameters():
            parameter.allreduce = False


def moe_spec() -> ModuleSpec:
    """Megatron's MoE layer on its own parallel linear layers."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=Experts, submodules=linears)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=Router))
