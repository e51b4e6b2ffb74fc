"""Experts as grouped products, against a loop over experts in fp64, and Megatron's own."""

import math
import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, run_ranks
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron_setup import Rank, Setting, tiny
from torch import Tensor

from seqpar.kernels.gate import gated_silu
from seqpar.kernels.grouped import _Grouped, grouped_linear
from seqpar.models.dispatch import permute, unpermute
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


def routed(tokens: int, experts: int, most: int) -> Tensor:
    """Each token to 0 to `most` experts; the last expert to none."""
    draw = torch.rand(tokens, experts)
    draw[:, -1] = 2
    ranks = draw.argsort(1).argsort(1)
    return ranks < torch.randint(0, most + 1, (tokens, 1))


@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_tokens_go_and_come_back_as_by_megatron(tokens: int) -> None:
    """Rows and their probabilities, in order, the sums of rows, and the gradients of all."""
    torch.manual_seed(2)
    chosen = routed(tokens, 6, 3)
    rows = int(chosen.sum())
    given = [torch.randn(tokens, 4).double(), torch.rand(tokens, 6).double()]
    weight, d_probs, dy = torch.randn(rows, 4), torch.randn(rows), torch.randn(tokens, 4)
    found = []
    for go, back in ((moe_utils.permute, moe_utils.unpermute), (permute, unpermute)):
        x, probs = (leaf.clone().requires_grad_() for leaf in given)
        there, share, order, *_ = go(x, chosen, probs=probs, num_out_tokens=rows)
        y = back(there * weight, order, restore_shape=x.shape, routing_map=chosen)
        gradients = torch.autograd.grad([y, share], [x, probs], [dy.double(), d_probs.double()])
        found.append([there.detach(), share.detach(), y.detach(), *gradients])
    for name, one, other in zip(("rows", "probs", "y", "dx", "d_probs"), *found, strict=True):
        assert one.shape == other.shape
        if tokens == 50:
            assert_close(name, other, one, 1e-12)


def test_sums_of_rows_are_rounded_once() -> None:
    """In bf16 Megatron adds 1 to 256 in vain, as often as there are experts."""
    chosen = torch.ones(1, 5, dtype=torch.bool)
    there, _, order, *_ = permute(torch.ones(1, 3).bfloat16(), chosen, num_out_tokens=5)
    there = there * torch.tensor([[256.0], [1], [1], [1], [1]]).bfloat16()
    y = unpermute(there, order, restore_shape=torch.Size([1, 3]))
    assert y.dtype == torch.bfloat16
    assert (y == 260).all()


@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
def test_layers_send_tokens_by_gathers(kind: str) -> None:
    def work(rank: int) -> list[str]:
        config = {"moe_token_dispatcher_type": kind}
        state = Rank(tiny("G"), Setting(config=config))
        layer = state.network.decoder.layers[0].mlp
        ours = mock.patch("seqpar.models.dispatch._Spread.apply", side_effect=KeyError("spread"))
        with ours, pytest.raises(KeyError, match="spread"):
            layer(torch.randn(5, 1, 16))
        return [base.__name__ for base in type(layer.token_dispatcher).__mro__[:2]]

    [[own, parent]] = run_ranks(work, 1)
    assert own == parent
