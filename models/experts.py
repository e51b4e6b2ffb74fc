"""The experts of Megatron's MoE layer as grouped products, see seqpar/kernels/grouped.py."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar.kernels.gate import gated_silu
from seqpar.kernels.grouped import grouped_linear

# what is built in, by the field of TransformerConfig that would ask for something else
_BUILT_IN: dict[str, Any] = {
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "moe_apply_probs_on_input": False,
    "fp8": None,
    "fp4": None,
}


class Experts(MegatronModule):
    """This rank's experts, MLPs with a gated SiLU and no biases, all of them at once.

    Weights are drawn, and written to checkpoints, as those of Megatron's SequentialMLP. Tokens come
    and go by Megatron's dispatcher, over the ranks that share matrices of experts too.

    Gradients of experts go over the experts' own groups. Megatron marks them so only with expert
    parallelism; without it, but with tensor parallelism that does not cut experts, they would not
    be summed over the tensor-parallel ranks.

    Raises:
        ValueError: a configuration of other experts.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        for field, built_in in _BUILT_IN.items():
            if (asked := getattr(config, field, built_in)) != built_in:
                names = [getattr(each, "__name__", each) for each in (asked, built_in)]
                raise ValueError(f"{field}={names[0]} must be {names[1]} with num_moe_experts")
        super().__init__(config)
        self.ep, self.tp, self.dp = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        drawn = SequentialMLP(num_local_experts, config, linears, pg_collection).local_experts
        # [experts, 2 ffn, h] and [experts, h, ffn]; gates and values are cut over ranks each
        self.weight1 = _stacked([expert.linear_fc1.weight for expert in drawn], cut=0, matrices=2)
        self.weight2 = _stacked([expert.linear_fc2.weight for expert in drawn], cut=1, matrices=1)

    def forward(self, x: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Megatron's call: x [rows, h] by expert, counts [experts], probs [rows] -> [rows, h]."""
        hidden = gated_silu(grouped_linear(x, self.weight1, counts), probs)
        return grouped_linear(hidden, self.weight2, counts), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[tuple[int, int, int]] = (),
        metadata: dict | None = None,
    ) -> dict[str, ShardedTensorFactory]:
        """For a distributed checkpoint: keys and shapes of Megatron's SequentialMLP."""
        apart = (metadata or {}).get("singleton_local_shards", False)
        layers = {"weight1": "linear_fc1", "weight2": "linear_fc2"}
        return {
            prefix + name: self._shards(name, layer, prefix, tuple(sharded_offsets), apart)
            for name, layer in layers.items()
        }

    def _shards(
        self, name: str, layer: str, prefix: str, offsets: tuple, apart: bool
    ) -> ShardedTensorFactory:
        """A weight as tensors of a checkpoint, one for each of the matrices cut over ranks.

        apart: also one for each expert, under keys of their own.
        """
        parameter: Any = getattr(self, name)
        cut, matrices = parameter.partition_dim, parameter.partition_stride
        own, axes = len(parameter), len(offsets)

        def build(key: str, weight: Tensor, replica_id: Any, *_: Any) -> list[ShardedTensor]:
            found = []
            for index, part in enumerate(weight.detach().chunk(matrices, cut)):
                place, places = self.tp.rank(), self.tp.size()
                if apart:
                    suffix = ("_w", "_v")[index] if matrices > 1 else ""
                    place = (axes + cut - 1, place, places)
                    for expert, matrix in enumerate(part, self.ep.rank() * own):
                        named = key.replace(f"{prefix}experts.", f"{prefix}experts.{expert}.")
                        found.append((named + suffix, matrix, [place]))
                    continue
                place = (axes + cut, index * places + place, matrices * places)
                found.append((key, part, [(axes, self.ep.rank(), self.ep.size()), place]))
            return [
                ShardedTensor.from_rank_offsets(
                    named, part, *offsets, *places, replica_id=replica_id, prepend_axis_num=axes
                )
                for named, part, places in found
            ]

        def merge(parts: list[Tensor]) -> Tensor:
            if apart:
                parts = list(torch.stack(parts).unflatten(0, (matrices, own)))
            return torch.cat(parts, cut)

        key, replica = f"{prefix}experts.{layer}.weight", (0, 0, self.dp.rank())
        return ShardedTensorFactory(key, parameter, build, merge, replica)


def _stacked(weights: list[Tensor], cut: int, matrices: int) -> torch.nn.Parameter:
    """One parameter of matrices of equal shape, with their marks for Megatron.

    cut: the dimension of each that ranks share; matrices: that lie along it, one after the other.
    """
    found = torch.nn.Parameter(torch.stack([weight.detach() for weight in weights]))
    marks = {"allreduce": False, "tensor_model_parallel": True}
    vars(found).update(marks, partition_dim=cut + 1, partition_stride=matrices)
    return found
