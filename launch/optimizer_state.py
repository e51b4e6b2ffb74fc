"""The optimizer's state in a checkpoint: by the names of the model's parameters, whoever holds it.

Megatron's plain optimizer holds the moments of whole parameters, its distributed optimizer parts of
flattened ones, by data-parallel rank; what Megatron writes of the latter cannot be read back
without Transformer Engine or apex (all parameters come back sharing one count of steps). Here both
are written alike, each tensor described as its parameter is: so a run may be resumed with either of
them, on other numbers of ranks of every kind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from torch import Tensor

from seqpar.comm import Communicator

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"


@dataclass
class _Held:
    """What this rank's optimizer holds of one of the model's parameters.

    main: what the optimizer steps, elements [start, stop) of the flattened parameter, fp32; None
    where it holds none of it. sharers: who hold the rest.
    """

    parameter: Tensor
    main: Tensor | None
    start: int
    stop: int
    optimizer: MegatronOptimizer
    sharers: Communicator

    def whole(self, part: Tensor | None) -> Tensor:
        """A tensor of the parameter's shape, fp32, on the host, from the parts of all sharers."""
        if part is not None and part.shape == self.parameter.shape and self.sharers.size == 1:
            return part.float().cpu()
        found = torch.zeros_like(self.parameter, dtype=torch.float32).flatten()
        if part is not None:
            found[self.start : self.stop] = part.flatten()
        return self.sharers.all_reduce(found).view(self.parameter.shape).cpu()

    def part(self, whole: Tensor) -> Tensor:
        """Of a tensor of the parameter's shape what this rank holds, where and as it holds it."""
        assert self.main is not None
        flat = whole.flatten()[self.start : self.stop]
        return flat.to(self.main.device).view(self.main.shape)

    @property
    def separate(self) -> bool:
        """Whether the optimizer steps a copy in fp32 and not the model's parameter."""
        return self.parameter.dtype != torch.float32


def sharded_state(
    optimizer: MegatronOptimizer, model: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """What a distributed checkpoint holds of the optimizer. All ranks call it.

    Args:
        optimizer: Megatron's.
        model: its model's sharded state, which says how each parameter is cut.
        is_loading: only the shapes matter then.
    """
    helds = list(_helds(optimizer))
    described = get_param_id_to_sharded_param_map(model, (held.parameter for held in helds))
    state: dict[str, Any] = {}
    for index, held in enumerate(helds):
        moments = {} if held.main is None else held.optimizer.optimizer.state[held.main]
        parts = {key: moments.get(key) for key in MOMENTS}
        if held.separate:
            parts[MAIN] = held.main
        for key, part in parts.items():
            whole = torch.zeros(held.parameter.shape) if is_loading else held.whole(part)
            state[f"{index}.{key}"] = make_sharded_optimizer_tensor(
                described[index], whole, f"optimizer.state.{key}"
            )
    return state


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any], steps: int) -> None:
    """Continue from what a checkpoint held after that many steps.

    The hyperparameters of the parameter groups stay.
    """
    for index, held in enumerate(_helds(optimizer)):
        if held.main is None:
            continue
        inner = held.optimizer.optimizer
        own = inner.state[held.main]
        for key in MOMENTS:
            own[key] = held.part(state[f"{index}.{key}"]).clone()
        if held.separate:
            held.main.data.copy_(held.part(state[f"{index}.{MAIN}"]))
        if isinstance(inner, torch.optim.Adam):  # AdamW is one, too
            own["step"] = torch.tensor(float(steps), device=held.main.device)
    for each in _parts(optimizer):
        if not isinstance(each.optimizer, torch.optim.Adam):  # fused ones count by group
            for group in each.optimizer.param_groups:
                group["step"] = steps


def fuse(optimizer: MegatronOptimizer) -> None:
    """One kernel for what AdamW does to a parameter, where Megatron took PyTorch's. Before a step.

    PyTorch would take several, and write down a number for each parameter between them.
    """
    for each in _parts(optimizer):
        if isinstance(each.optimizer, torch.optim.Adam):
            for group in each.optimizer.param_groups:
                group["fused"] = True


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers that a chained one consists of; those without parameters are left out."""
    chained = isinstance(optimizer, ChainedOptimizer)
    for each in optimizer.chained_optimizers if chained else [optimizer]:
        if not getattr(each, "is_stub_optimizer", False):
            yield each


def _helds(optimizer: MegatronOptimizer) -> Iterator[_Held]:
    """In an order that is the same on all ranks that share parameters."""
    for each in _parts(optimizer):
        if isinstance(each, DistributedOptimizer):
            sharers = Communicator(each.data_parallel_group)
            groups, places = each.optimizer.param_groups, each.model_param_group_index_map
            for parameter in (p for buffer in each.buffers for p in buffer.param_index_map):
                if parameter not in places:
                    yield _Held(parameter, None, 0, 0, each, sharers)
                    continue
                group, order = places[parameter]
                own = each._get_model_param_range_map(parameter)["param"]
                main = groups[group]["params"][order]
                yield _Held(parameter, main, own.start, own.end, each, sharers)
            continue
        pairs = [(p, p) for group in each.optimizer.param_groups for p in group["params"]]
        if isinstance(each, Float16OptimizerWithFloat16Params):
            halves = (zip(*groups, strict=True) for groups in _copies(each))
            pairs = [pair for group in halves for pair in group]
            pairs += [(p, p) for group in each.fp32_from_fp32_groups for p in group]
        for parameter, main in pairs:
            yield _Held(parameter, main, 0, parameter.numel(), each, Communicator())


def _copies(each: Float16OptimizerWithFloat16Params) -> Iterator[tuple[list, list]]:
    return zip(each.float16_groups, each.fp32_from_float16_groups, strict=True)
