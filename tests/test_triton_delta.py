"""The delta rule's Triton kernels under the interpreter, fp32, against the token loop in fp64."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import check_chain, check_functions, check_two_ranks
from harness import assert_close
from torch import Tensor

import seqpar
from seqpar.kernels import delta_triton, reference, walks
from seqpar.kernels.choose import choose_delta
from seqpar.kernels.pieces import Pieces
from seqpar.kernels.tuned import Config, run_config

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
    ("scalar", (0, 550), (1, 1), 16, 16, 1, 1),  # more than one block of the gate's gradient
    ("diagonal", (0, 550), (1, 1), 16, 16, 1, 1),
]


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
) -> None:
    given = inputs(decay, cuts[-1], heads, K, V, batch, nats)
    check_functions(reference.delta_attention, choose_delta, "TritonDelta", given, cuts, nats)


@pytest.mark.parametrize("case", [CASES[5], CASES[8]], ids=str)
def test_frames_of_two_steps_as_on_hopper(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    def longer(*arguments: Any) -> Config:
        return replace(run_config(*arguments), chunk=64)

    monkeypatch.setattr(delta_triton, "run_config", longer)
    check(*case)


@pytest.mark.parametrize("decay", WIDTHS)
def test_a_sequence_cut_at_random_equals_the_uncut_one(decay: str) -> None:
    check_chain(choose_delta, inputs(decay, 150, (1, 1), 24, 16, 1, 3))


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("decay", WIDTHS)
def test_packed_documents_on_two_ranks_equal_the_token_loop(decay: str, kind: str) -> None:
    given = inputs(decay, 192, (1, 2), 16, 16, 1, 1)
    check_two_ranks(reference.delta_attention, seqpar.delta_attention, given, kind)


def test_slices_of_a_packed_projection_need_no_copies() -> None:
    packed = torch.randn(2, 40, 2, 3 * 16 + 2).double()
    packed = torch.nn.functional.normalize(packed, dim=-1).requires_grad_()

    def attend(x: Tensor, function: Callable[..., Any]) -> Any:
        q, k, v, beta, g = x.split([16, 16, 16, 1, 1], -1)
        return function(q, k, v, beta.sigmoid()[..., 0], -g.exp()[..., 0])

    o = attend(packed, lambda *x: reference.delta_attention(*x)[0])
    do = torch.randn_like(o)
    expected = torch.autograd.grad(o, packed, do)
    x = packed.detach().float().requires_grad_()
    found = attend(x, seqpar.delta_attention)
    assert_close("o", found, o, 1e-5)
    (gradient,) = torch.autograd.grad(found, x, do.float())
    assert_close("gradient", gradient, expected[0], 1e-5)


def test_on_hopper_a_rank_that_hands_nothing_on_takes_what_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(walks, "is_hopper", lambda device: True)
    none, arriving = torch.zeros(1, 0, 2, 64, 64), torch.randn(1, 1, 2, 64, 64)
    states, pieces = torch.zeros_like(arriving), Pieces([(0, 5)], [True], [False], [(0, 1)])
    family = delta_triton.TritonDelta(False)
    family.scan(none, none, pieces, arriving, states, backwards=False)
    assert torch.equal(states, arriving)
    _, leaving = family.leave(none, none, pieces, backwards=False)
    assert not leaving.any()


def test_what_triton_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.zeros(1, 4, 1, 300)
    with pytest.raises(ValueError, match=r"K=300 .* at most 256"):
        seqpar.delta_attention(wide, wide, wide, wide[..., 0])
    monkeypatch.delenv("SEQPAR_KERNELS")
    assert type(choose_delta(wide, wide, [])).__name__ == "Chunked"


@pytest.mark.parametrize("name", ["delta_compiles.py", "hopper_delta_compiles.py"])
def test_the_kernels_compile_without_a_gpu(name: str) -> None:
    script = Path(__file__).with_name(name)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
