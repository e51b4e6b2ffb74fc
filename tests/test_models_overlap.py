"""Mixers project the output's gate while states travel; what they compute stays the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_close, run_ranks
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron_setup import Rank, Setting, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqpar
from seqpar.exchange import EXCHANGES
from seqpar.models.sequence import SequenceParallelParams
from seqpar.models.specs import LINEAR_MIXERS, linear_attention_spec

HIDDEN, HEADS, KEY, VALUE, TOKENS, BATCH = 24, 4, 4, 8, 20, 2
SPECS = {
    name: linear_attention_spec(name, num_heads=HEADS, head_dim=KEY, value_head_dim=VALUE)
    for name in LINEAR_MIXERS
    if name != "kda"  # its gate has projections of its own
}


class Products(TorchDispatchMode):
    """Notes products of matrices, by the shape of the result."""

    def __init__(self, notes: list[str], names: dict[tuple[int, ...], str]) -> None:
        super().__init__()
        self.notes, self.names = notes, names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and tuple(out.shape) in self.names:
            self.notes.append(self.names[tuple(out.shape)])
        return out


def noted(notes: list[str], start: Callable[..., Any]) -> Callable[..., Any]:
    """An exchange that notes when it is started and when it is waited for."""

    def started(*args: Any, **options: Any) -> Callable[[], Any]:
        notes.append("start")
        arriving = start(*args, **options)

        def wait() -> Any:
            notes.append("wait")
            return arriving()

        return wait

    return started


def made(spec: ModuleSpec, context: int) -> tuple[Any, Rank]:
    state = Rank(tiny("G", hidden_size=HIDDEN), Setting(context=context))
    torch.manual_seed(5)
    module = build_module(
        spec, config=state.config, layer_number=1, pg_collection=state.groups
    ).double()
    return module, state


def inputs() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(6)
    shape = TOKENS, BATCH, HIDDEN
    x, dy = (torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(2))
    return x, dy


def order(rank: int, spec: ModuleSpec) -> tuple[list[str], list[str]]:
    """What was noted forwards and backwards."""
    module, state = made(spec, 2)
    sp = seqpar.SequenceParallel(state.groups.cp, seqpar.Layout(TOKENS, 2), "allgather")
    x = sp.layout.shard(inputs()[0], rank, dim=0).clone().requires_grad_()
    rest = module.in_proj.weight.shape[0] - HEADS * VALUE
    names: dict[tuple[int, ...], str] = {
        (TOKENS // 2 * BATCH, HEADS * VALUE): "gate",
        (HEADS * VALUE, HIDDEN): "gate's weight",
        (rest, HIDDEN): "other weights",
        (HIDDEN, rest): "other weights",
    }
    notes: list[str] = []
    EXCHANGES.update({name: noted(notes, start) for name, start in EXCHANGES.items()})
    module.in_proj.register_forward_pre_hook(lambda *_: notes.append("hook"))
    with Products(notes, names):
        out, _ = module(x, packed_seq_params=SequenceParallelParams(sp))
        forward = list(notes)
        notes.clear()
        out.square().sum().backward()
    return forward, [note for note in notes if note != "gate"]  # of the output's gradient as well


@pytest.mark.parametrize("name", SPECS)
def test_gate_is_projected_while_states_travel_and_its_gradient_while_theirs_do(name: str) -> None:
    for forward, backward in run_ranks(order, 2, SPECS[name]):
        assert forward == ["hook", "start", "gate", "wait"]
        assert backward == ["start", "gate's weight", "wait", "other weights"]


def gradients(rank: int, spec: ModuleSpec, size: int, apart: bool) -> dict[str, Tensor]:
    """Output, and gradients of the input and all parameters, of a sequence over `size` ranks."""
    module, state = made(spec, size)
    if not apart:
        module.head_widths = [sum(module.head_widths), 0]
        mix, late = module.mix, HEADS * VALUE // module.heads
        module.mix = lambda x, _, *rest: mix(x[..., :-late], lambda: x[..., -late:], *rest)
    layout = seqpar.Layout(TOKENS, size)
    x, dy = (layout.shard(y, rank, dim=0).clone() for y in inputs())
    params = SequenceParallelParams(seqpar.SequenceParallel(state.groups.cp, layout, "allgather"))
    out, _ = module(x.requires_grad_(), packed_seq_params=params)
    leaves = {"x": x, **dict(module.named_parameters())}
    found = torch.autograd.grad(out, list(leaves.values()), dy)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


@pytest.mark.parametrize("name", SPECS)
def test_projecting_apart_changes_nothing(name: str) -> None:
    """Against one product for all, and against one rank; gates are reckoned in fp32."""
    whole = run_ranks(gradients, 1, SPECS[name], 1, True)[0]
    apart = run_ranks(gradients, 2, SPECS[name], 2, True)
    together = run_ranks(gradients, 2, SPECS[name], 2, False)
    for key, wanted in whole.items():
        if key in ("out", "x"):
            for rank, (one, other) in enumerate(zip(apart, together, strict=True)):
                shard = seqpar.Layout(TOKENS, 2).shard(wanted, rank, dim=0)
                assert_close(f"{key} of rank {rank}", one[key], shard, 1e-5)
                assert_close(f"{key} of rank {rank}", one[key], other[key], 1e-6)
            continue
        assert_close(key, apart[0][key] + apart[1][key], wanted, 1e-5)
        for one, other in zip(apart, together, strict=True):
            assert_close(key, one[key], other[key], 1e-6)
