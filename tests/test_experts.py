"""Experts as grouped products, against a loop over experts in fp64, and Megatron's own."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, run_ranks
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron_setup import Rank, Setting, tiny
from torch import Tensor

from seqpar.kernels.gate import gated_silu
from seqpar.kernels.grouped import _Grouped, grouped_linear
from seqpar.models.experts import Experts

COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]]


def by_one(x: Tensor, first: Tensor, second: Tensor, scale: Tensor, counts: list[int]) -> Tensor:
    """Row after row."""
    group = [index for index, count in enumerate(counts) for _ in range(count)]
    rows = []
    for row, factor, index in zip(x, scale, group, strict=True):
        gate, value = (first[index] @ row).chunk(2)
        rows.append(second[index] @ (gate * gate.sigmoid() * value * factor))
    return torch.stack(rows) if rows else x[:, :0] @ x.new_zeros(0, second.shape[1])


def grouped(x: Tensor, first: Tensor, second: Tensor, scale: Tensor, counts: list[int]) -> Tensor:
    numbers = torch.tensor(counts)
    return grouped_linear(gated_silu(grouped_linear(x, first, numbers), scale), second, numbers)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_output_and_all_gradients_equal_a_loop(counts: list[int]) -> None:
    torch.manual_seed(0)
    rows = sum(counts)
    shapes = {"x": (rows, 6), "first": (4, 10, 6), "second": (4, 6, 5), "scale": (rows,)}
    given = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    dy = torch.randn(rows, 6).double()
    results = []
    for function in (by_one, grouped):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        y = function(**leaves, counts=counts)
        gradients = torch.autograd.grad(
            y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True
        )
        results.append({"y": y.detach(), **dict(zip(leaves, gradients, strict=True))})
    for name, expected in results[0].items():
        found = results[1][name]
        if rows:
            assert_close(name, found, expected, 1e-12)
        else:
            assert found.shape == expected.shape
            assert not found.any()


def test_the_product_of_all_groups_and_its_gradients_equal_one_product_each() -> None:
    """PyTorch's grouped product, which a CPU has too, in fp32; dy lies as a sum's gradient does."""
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 5, 1])
    given = torch.randn(9, 8), torch.randn(4, 16, 8)
    results = []
    for at_once in (False, True):
        x, weight = (each.clone().requires_grad_() for each in given)
        if at_once:
            y = _Grouped.apply(x, weight, counts.cumsum(0, dtype=torch.int32))
        else:
            y = grouped_linear(x, weight, counts)
        results.append([y, *torch.autograd.grad(y.sum(0)[3], [x, weight])])
    for name, expected, found in zip(("y", "dx", "dw"), *results, strict=True):
        assert_close(name, found, expected, 1e-6)


def beside_megatrons(rank: int, spread: dict[str, Any], metadata: dict) -> None:
    """Weights, their marks and what goes to a checkpoint are those of Megatron's experts."""
    state = Rank(tiny("GN"), Setting(**spread))
    config, groups = state.config, state.groups
    count = config.num_moe_experts // groups.ep.size()
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    theirs = SequentialMLP(count, config, linears, groups)
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    ours = Experts(count, config, groups)
    for name, layer in (("weight1", "linear_fc1"), ("weight2", "linear_fc2")):
        weight: Any = getattr(ours, name)
        assert weight.allreduce is False
        for own, expert in zip(weight, theirs.local_experts, strict=True):
            other: Any = getattr(expert, layer).weight
            assert torch.equal(own, other)
            assert weight.tensor_model_parallel
            assert weight.partition_dim == other.partition_dim + 1
            assert weight.partition_stride == other.partition_stride
    offsets = ((0, 1, 2),)  # the second of two layers that a stack writes as one
    theirs_kept = theirs.sharded_state_dict("a.", offsets, metadata)
    factories = ours.sharded_state_dict("a.", offsets, metadata)
    expected, found = written(theirs_kept), written(factories)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].isnan(), tensor.isnan())
        assert torch.equal(found[key].nan_to_num(), tensor.nan_to_num())
    for name, factory in factories.items():
        read = factory.merge_fn([shard.data for shard in factory.build()])
        assert torch.equal(read, getattr(ours, name.removeprefix("a.")))


def written(state: dict[str, Any]) -> dict[tuple[str, Any], Tensor]:
    """By key and replica, the whole tensors; NaN where other ranks' parts lie."""
    state = dict(state)
    apply_factories(state)
    found: dict[tuple[str, Any], Tensor] = {}
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor):
            key = shard.key, shard.replica_id
            whole = found.setdefault(key, torch.full(shard.global_shape, torch.nan))
            whole[shard.global_slice()] = shard.data
    return found


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize(
    "spread",
    [{"context": 2}, {"expert": 2}, {"expert": 2, "expert_tensor": 2}, {"expert_tensor": 2}],
    ids=str,
)
def test_weights_and_checkpoints_are_megatrons(spread: dict[str, Any], apart: bool) -> None:
    metadata = {"singleton_local_shards": apart}
    run_ranks(beside_megatrons, math.prod(spread.values()), spread, metadata)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"add_bias_linear": True}, "add_bias_linear=True must be False"),
        ({"activation_func": F.gelu}, "activation_func=gelu must be silu"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset=1.0 must be 0.0"),
    ],
)
def test_other_experts_are_refused(field: dict[str, Any], message: str) -> None:
    assert re.match(message, run_ranks(refusal, 1, field)[0])


def refusal(rank: int, field: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="with num_moe_experts") as error:
        Rank(tiny("G"), Setting(config=field))
    return str(error.value)
