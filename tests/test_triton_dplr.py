"""DPLR's Triton kernels under the interpreter, fp32, against the token loop in fp64."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_checks import check_chain, check_functions, check_two_ranks
from harness import assert_close
from torch import Tensor

import seqpar
from seqpar.kernels import choose, reference
from seqpar.kernels.choose import choose_dplr
from seqpar.kernels.family import Family

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")

NAMES = ["dq", "dk", "dv", "da", "db", "d_log_decay"]


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")


def inputs(
    kind: str, tokens: int, heads: tuple[int, int], K: int, V: int, batch: int, nats: float
) -> list[Tensor]:
    """q, k, v, a, b, log_decay, fp64 but exact in fp32; decays from 1e-4 to `nats` a token.

    kind: "rwkv", a = -κ and b = κ η for κ of length 1, of which every third repeats the one before
    it, and η from 0 to 1 and exactly those; or "any", small random a and b.
    """
    torch.manual_seed(tokens + K)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape)

    q, k, v = randn(heads[0], K), randn(heads[0], K) * K**-0.5, randn(heads[1], V)
    a, b = (randn(heads[1], K) * (0.7 / K) ** 0.5 for _ in range(2))
    if kind == "rwkv":
        a = -torch.nn.functional.normalize(randn(heads[1], K), dim=-1)
        again = torch.arange(1, tokens, 3)
        a[:, again] = a[:, again - 1]
        b = -a * (1.4 * torch.rand(batch, tokens, heads[1], K) - 0.2).clamp(0, 1)
    span = torch.tensor(nats * 1e4).log10()
    log_decay = -(10 ** (torch.rand(batch, tokens, heads[1], K) * span - 4))
    return [x.double() for x in (q, k, v, a, b, log_decay)]


def chosen(k: Tensor, v: Tensor, gates: list[Tensor]) -> Family:
    return choose_dplr(k, v)


# kind, cuts, heads of q and v, K, V, batch, nats
CASES = [
    ("rwkv", (0, 150), (1, 1), 16, 32, 1, 0.6),
    ("any", (0, 64, 130, 131), (2, 4), 24, 40, 2, 0.1),
    ("rwkv", (0, 1, 2, 70, 199), (1, 2), 20, 24, 2, 20),
    ("any", (0, 33), (1, 1), 40, 8, 1, 20),
    ("any", (0, 60), (1, 1), 16, 48, 1, 5),
    ("rwkv", (0, 1100), (1, 1), 16, 16, 1, 1),  # more than one block of the decays' gradient
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_function_equals_the_token_loop(case: tuple) -> None:
    """Outputs, leaving state, all gradients, for pieces with states entering and leaving."""
    kind, cuts, heads, K, V, batch, nats = case
    given = inputs(kind, cuts[-1], heads, K, V, batch, nats)
    check_functions(reference.dplr_attention, chosen, "TritonDPLR", given, cuts, nats)


@pytest.mark.parametrize("kind", ["rwkv", "any"])
def test_a_sequence_cut_at_random_equals_the_uncut_one(kind: str) -> None:
    check_chain(chosen, inputs(kind, 150, (1, 1), 24, 16, 1, 3))


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_packed_documents_on_two_ranks_equal_the_token_loop(kind: str) -> None:
    given = inputs("rwkv", 192, (1, 2), 16, 16, 1, 1)
    check_two_ranks(reference.dplr_attention, seqpar.dplr_attention, given, kind)


def test_documents_of_one_token() -> None:
    """The state before each is zero: o is of its own key and value, a, b and decays do nothing."""
    leaves = [x.requires_grad_() for x in inputs("rwkv", 12, (1, 2), 16, 16, 1, 1)]
    documents = list(range(13))
    o, _ = reference.dplr_attention(*leaves, cu_seqlens=documents)
    do = torch.randn_like(o)
    expected = torch.autograd.grad((o * do).sum(), leaves)
    local = [x.detach().float().requires_grad_() for x in leaves]
    sp = seqpar.SequenceParallel(layout=seqpar.Layout(12, 1, cu_seqlens=documents))
    found = seqpar.dplr_attention(*local, sp=sp)
    assert_close("o", found, o, 1e-5)
    gradients = torch.autograd.grad(found, local, do.float())
    for name, x, right in zip(NAMES, gradients, expected, strict=True):
        if name in ("dq", "dk", "dv"):
            assert_close(name, x, right, 1e-5)
        else:  # the decays' is q dq - k dk of equals
            assert not right.any()
            assert_close(name, 1 + x, 1 + right.float(), 1e-5)


def test_slices_of_a_packed_projection_need_no_copies() -> None:
    packed = torch.randn(2, 40, 2, 6 * 16).double()
    packed = torch.nn.functional.normalize(packed, dim=-1).requires_grad_()

    def attend(x: Tensor, function: Callable[..., Any]) -> Any:
        q, k, v, a, b, g = x.split(16, -1)
        return function(q, k, v, a, b, -g.exp())

    o = attend(packed, lambda *x: reference.dplr_attention(*x)[0])
    do = torch.randn_like(o)
    (expected,) = torch.autograd.grad(o, packed, do)
    x = packed.detach().float().requires_grad_()
    found = attend(x, seqpar.dplr_attention)
    assert_close("o", found, o, 1e-5)
    (gradient,) = torch.autograd.grad(found, x, do.float())
    assert_close("gradient", gradient, expected, 1e-5)


def test_which_kernels_are_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wide, x = torch.zeros(1, 4, 1, 300), torch.zeros(1, 4, 1, 16)
    with pytest.raises(ValueError, match=r"K=300 .* at most 256"):
        seqpar.dplr_attention(wide, wide, wide, wide, wide, wide)
    with pytest.raises(ValueError, match="float64"):
        choose_dplr(x.double(), x.double())
    monkeypatch.delenv("SEQPAR_KERNELS")
    assert type(choose_dplr(x, x)).__name__ == "Chunked"
    monkeypatch.setattr(choose, "_against_triton", lambda *arguments: None)  # as on a GPU
    choose._say.cache_clear()
    with caplog.at_level(logging.INFO, "seqpar.kernels.choose"):
        assert type(choose_dplr(x, x)).__name__ == "TritonDPLR"
    assert "DPLR by Triton kernels" in caplog.text
