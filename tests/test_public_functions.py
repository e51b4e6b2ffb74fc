"""Of every public function: none ignores `sp`, swallows NaN, or answers what it cannot."""

import inspect
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from harness import assert_close, run_ranks
from torch import Tensor
from torch._dynamo.utils import counters

import seqpar

TOKENS, HEADS, K = 32, 2, 4
GLOBAL = {"weight", "bias", "constant"}  # what is not cut: parameters


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def options() -> dict[Callable[..., Tensor], dict[str, list[Any]]]:
    """Every argument of every public function that takes `sp`, with every form it may have."""
    torch.manual_seed(0)
    heads = [rand(1, TOKENS, HEADS, K) for _ in range(5)]
    q, k, v, a, b = (x / x.norm(dim=-1, keepdim=True) for x in heads)
    beta = rand(1, TOKENS, HEADS)
    constant, scalar, diagonal = -rand(HEADS), -rand(1, TOKENS, HEADS), -rand(1, TOKENS, HEADS, K)
    scales = [None, 0.3]
    common = {"q": [q], "k": [k], "v": [v], "scale": scales}
    return {
        seqpar.linear_attention: common | {"log_decay": [None, constant, scalar, diagonal]},
        seqpar.delta_attention: common | {"beta": [beta], "log_decay": [None, scalar, diagonal]},
        seqpar.dplr_attention: common | {"a": [-a], "b": [b], "log_decay": [diagonal]},
        seqpar.softmax_attention: common
        | {"causal": [True, False], "method": ["auto", "allgather", "ring", "ulysses"]},
        seqpar.causal_conv1d: {
            "x": [rand(1, TOKENS, 3)],
            "weight": [rand(3, 4)],
            "bias": [None, rand(3)],
            "activation": [None, "silu"],
        },
    }


FUNCTIONS = {function.__name__: function for function in options()}


def combinations(name: str) -> list[dict[str, Any]]:
    choices = options()[FUNCTIONS[name]]
    return [dict(zip(choices, found, strict=True)) for found in product(*choices.values())]


def sharded(arguments: dict[str, Any], layout: seqpar.Layout, rank: int) -> dict[str, Any]:
    return {
        name: layout.shard(x, rank)
        if isinstance(x, Tensor) and name not in GLOBAL and x.dim() > 1
        else x
        for name, x in arguments.items()
    }


def test_the_list_of_functions_and_arguments_is_complete() -> None:
    public = {name: getattr(seqpar, name) for name in seqpar.__all__}
    taking = {name for name, x in public.items() if "sp" in inspect.signature(x).parameters}
    assert taking == set(FUNCTIONS)
    for function, choices in options().items():
        parameters = inspect.signature(function).parameters
        assert set(parameters) == {*choices, "sp"}, function.__name__
        kinds = {p.kind for p in parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_combination_of_arguments_ignores_sp(name: str) -> None:
    """The second rank's result is that of the whole sequence, and not that of its tokens alone."""
    function, layout = FUNCTIONS[name], seqpar.Layout(TOKENS, 2)

    def work(rank: int) -> list[Tensor]:
        sp = seqpar.SequenceParallel(layout=layout)
        return [function(**sharded(found, layout, rank), sp=sp) for found in combinations(name)]

    second = run_ranks(work, 2)[1]
    for arguments, result in zip(combinations(name), second, strict=True):
        assert_close(name, result, layout.shard(function(**arguments), 1), 1e-10)
        alone = function(**sharded(arguments, layout, 1))
        assert (alone - result).abs().max() > 1e-3, arguments


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_finite_reaches_later_ranks_of_its_document_only(name: str, bad: float) -> None:
    """A bad value on the first of three ranks; a second document begins on the last one."""
    tokens, document = 36, 30
    arguments = combinations(name)[0]
    torch.manual_seed(1)
    arguments = {
        key: rand(1, tokens, *x.shape[2:]) / 4 if isinstance(x, Tensor) and key not in GLOBAL else x
        for key, x in arguments.items()
    }
    if "log_decay" in arguments and arguments["log_decay"] is not None:
        arguments["log_decay"] = -arguments["log_decay"]
    place = 11 if name == "causal_conv1d" else 5  # a convolution forgets after three tokens
    arguments["x" if name == "causal_conv1d" else "v"][0, place] = bad
    layout = seqpar.Layout(tokens, 3, cu_seqlens=[0, document, tokens])

    def work(rank: int) -> Tensor:
        sp = seqpar.SequenceParallel(layout=layout)
        return FUNCTIONS[name](**sharded(arguments, layout, rank), sp=sp)

    whole = layout.unshard(run_ranks(work, 3))
    assert not torch.isfinite(whole[:, place]).any()
    if name == "softmax_attention":
        assert not torch.isfinite(whole[:, document - 1]).any()
    elif name != "causal_conv1d":
        assert not torch.isfinite(whole[:, document - 1]).all()
    else:
        assert not torch.isfinite(whole[:, place + 1]).any()  # on the next rank
    assert torch.isfinite(whole[:, document:]).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_of_a_gradient_is_refused(name: str) -> None:
    """Also where the input is used elsewhere, which alone has one."""
    arguments = combinations(name)[0]
    x = arguments["x" if name == "causal_conv1d" else "v"].requires_grad_()
    loss = FUNCTIONS[name](**arguments).square().sum() + x.pow(3).sum()
    with pytest.raises(ValueError, match="create_graph=True must be False"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_code_calls_it_as_it_is(name: str) -> None:
    arguments = combinations(name)[0]
    tensors = {key: x.requires_grad_() for key, x in arguments.items() if isinstance(x, Tensor)}

    def loss(given: dict[str, Tensor]) -> Tensor:
        doubled = {key: 2 * x for key, x in given.items()}
        return FUNCTIONS[name](**arguments | doubled).sin().sum()

    def gradients(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(tensors), list(tensors.values()))

    torch._dynamo.reset()
    counters.clear()
    found = gradients(torch.compile(loss, backend="eager"))
    assert counters["stats"]["unique_graphs"] == 2, "one before it and one after"
    for result, wanted in zip(found, gradients(loss), strict=True):
        assert_close(name, result, wanted, 1e-10)
