"""The delta rule's Triton kernels under the interpreter, fp32, against the token loop in fp64."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from harness import assert_close, run_ranks
from torch import Tensor

import seqpar
from seqpar.kernels import reference
from seqpar.kernels.choose import choose_delta
from seqpar.kernels.pieces import Pieces

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")

WIDTHS = {"none": None, "scalar": 1, "diagonal": -1}


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")


def inputs(
    decay: str, tokens: int, heads: tuple[int, int], K: int, V: int, batch: int, nats: float
) -> list[Tensor]:
    """q, k, v and gates, fp64 but exact in fp32; decays from 1e-4 to `nats` a token.

    Every third key repeats the one before it, more than beta's 0, 1 and 2 among others.
    """
    torch.manual_seed(tokens + K)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape).double()

    q, v = randn(heads[0], K), randn(heads[1], V)
    k = torch.nn.functional.normalize(randn(heads[0], K), dim=-1).float().double()
    again = torch.arange(tokens) % 3 == 1
    k[:, again] = k[:, (again.nonzero()[:, 0] - 1)]
    beta = 2 * torch.rand(batch, tokens, heads[1])
    fixed = torch.randint(0, 6, beta.shape)
    for i, value in enumerate((0.0, 1.0, 2.0)):
        beta[fixed == i] = value
    found = [q, k, v, beta.double()]
    width = WIDTHS[decay]
    if width is not None:
        shape = (batch, tokens, heads[1], *([] if width == 1 else [K]))
        span = torch.tensor(nats * 1e4).log10()
        found.append(-(10 ** (torch.rand(shape) * span - 4)).float().double())
    return found


# decay, cuts, heads of q and v, K, V, batch, nats
CASES = [
    ("none", (0, 150), (1, 1), 16, 32, 1, 0.1),
    ("none", (0, 64, 130, 131), (2, 4), 24, 40, 2, 0.1),
    ("scalar", (0, 64, 128, 150), (2, 2), 16, 16, 1, 0.1),
    ("scalar", (0, 1, 70, 199), (1, 2), 20, 24, 2, 20),
    ("diagonal", (0, 64, 150), (1, 1), 16, 32, 1, 0.1),
    ("diagonal", (0, 1, 70, 130), (1, 2), 20, 24, 2, 20),
    ("diagonal", (0, 33), (1, 1), 40, 8, 1, 20),
    ("scalar", (0, 1100), (1, 1), 16, 16, 1, 1),  # more than one block of the gate's gradient
    ("diagonal", (0, 1100), (1, 1), 16, 16, 1, 1),
]


def as_gates(given: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and the gates of a family, in fp32."""
    q, k, v, *gates = (x.detach().float() for x in given)
    return [q, k, v], [x if x.dim() == 4 else x[..., None] for x in gates]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_function_equals_the_token_loop(case: tuple) -> None:
    """Outputs, leaving state, all gradients, for pieces with states entering and leaving."""
    check(*case)


def check(
    decay: str,
    cuts: tuple[int, ...],
    heads: tuple[int, int],
    K: int,
    V: int,
    batch: int,
    nats: float,
    chunk: int = 32,
) -> None:
    given = inputs(decay, cuts[-1], heads, K, V, batch, nats)
    entering = torch.randn(batch, heads[1], K, V).double()
    leaves = [x.requires_grad_() for x in (*given, entering)]
    o, leaving = reference.delta_attention(*given, scale=0.3, initial_state=entering)
    do, d_leaving = torch.randn_like(o).float(), torch.randn_like(leaving).float()
    expected = torch.autograd.grad((o * do).sum() + (leaving * d_leaving).sum(), leaves)

    count = len(cuts) - 1
    pieces = Pieces(list(pairwise(cuts)), [True] * count, [True] * count, [(0, count)])
    (q, k, v), gates = as_gates(given)
    family = choose_delta(k, v, gates)
    assert type(family).__name__ == "TritonDelta"
    # fp32 running sums of strong decays are rounded at 1e3 nats: 6e-5
    bound = 5e-5 if nats > 1 else 1e-5
    states, adjoints = (torch.empty(batch, count, heads[1], K, V) for _ in range(2))
    prepared = family.prepare(q, k, v, gates, 0.3, pieces)
    A, B = prepared.summarize()
    arriving = entering.detach().float()[:, None]
    found = family.scan(A, B, pieces, arriving, states, backwards=False)
    assert_close("S", found[:, 0], leaving, bound)
    assert_close("o", prepared.run(lambda: states), o, bound)
    prepared = family.prepare(q, k, v, gates, 0.3, pieces)
    A, B = prepared.summarize_backward(do)
    found = family.scan(A, B, pieces, d_leaving[:, None], adjoints, backwards=True)
    assert_close("dS", found[:, 0], expected[-1], bound)
    gradients = prepared.run_backward(states, do, lambda: adjoints, [True] * len(gates))
    names = ["dq", "dk", "dv", "d_beta", "d_log_decay"]
    for name, x, right in zip(names, gradients, expected, strict=False):
        assert x is not None
        assert_close(name, x.reshape(right.shape), right, bound)
