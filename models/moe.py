"""Megatron's MoE layer with a router whose balancing loss does not depend on how tokens are cut."""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar.comm import Communicator
from seqpar.kept import kept
from seqpar.models import compat
from seqpar.models.dispatch import permute, unpermute
from seqpar.models.experts import Experts

compat.define_missing_names()


class Router(TopKRouter):
    """Megatron's top-k router, its auxiliary loss that of the whole sequence however it is cut.

    Ranks may hold different numbers of tokens: they are counted, Megatron takes them to be equal.
    Gradients are divided by the global token count in the end, so the auxiliary loss, a mean, is
    multiplied by tokens first. Its parts on the ranks of one sequence add up to the mean, so that
    must be the sequence's tokens. Megatron-Core 0.16 takes a rank's own, which weakens the loss by
    the number of ranks; later versions agree with this one. Where a layer is run again in parts
    (`models/recompute.py`), counts are those of the first run, of all parts.

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

    def _apply_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """As TopKRouter's; the coefficient is scaled along, so that the logged mean stays."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        counts, tokens = self._counted(routing_map)
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=counts,
            total_num_tokens=tokens,
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coefficient,
        )
        weight = tokens if self.config.calculate_per_token_loss else 1
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient * weight, loss * weight, "load_balancing_loss", self.tp_cp_group
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As TopKRouter's."""
        probs, routing_map = super().forward(*args, **kwargs)
        now = kept()
        if now is not None and not now.again:
            now.sums[self] = now.sums.get(self, 0) + routing_map.sum(0)
        return probs, routing_map

    def _counted(self, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens of each expert, tokens) of the whole sequence."""
        now = kept()
        if now is not None and self in now.sums:
            counts = Communicator(self.tp_cp_group).all_reduce(now.sums.pop(self), kind="experts")
            now.sums["whole"] = counts
        if now is not None:
            return now.sums["whole"], now.sums["whole"].sum() // self.topk
        counts, _, tokens = get_tokens_per_expert_and_token_count(
            routing_map=routing_map,
            reduce_group=self.tp_cp_group,
            topk=self.topk,
            with_padding_mask=True,
        )
        return counts, tokens


class MoE(MoELayer):
    """Megatron's MoE layer; its tokens go to experts and come back by gathers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dispatcher: Any = self.token_dispatcher
        by_gathers = compat.calling(type(dispatcher), permute=permute, unpermute=unpermute)
        dispatcher.__class__ = by_gathers


def moe_spec() -> ModuleSpec:
    """The MoE layer with this router, and its experts as grouped products."""
    experts = ModuleSpec(module=Experts)
    return ModuleSpec(module=MoE, submodules=MoESubmodules(experts=experts, router=Router))
