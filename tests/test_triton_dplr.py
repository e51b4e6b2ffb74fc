"""DPLR's Triton kernels under the interpreter, fp32, against the token loop in fp64."""

from itertools import pairwise

import pytest
import torch
from harness import assert_close
from torch import Tensor

from seqpar.kernels import reference
from seqpar.kernels.choose import choose_dplr
from seqpar.kernels.pieces import Pieces

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
    entering = torch.randn(batch, heads[1], K, V).double()
    leaves = [x.requires_grad_() for x in (*given, entering)]
    o, leaving = reference.dplr_attention(*given, scale=0.3, initial_state=entering)
    do, d_leaving = torch.randn_like(o).float(), torch.randn_like(leaving).float()
    expected = torch.autograd.grad((o * do).sum() + (leaving * d_leaving).sum(), leaves)

    count = len(cuts) - 1
    pieces = Pieces(list(pairwise(cuts)), [True] * count, [True] * count, [(0, count)])
    q, k, v, *gates = (x.detach().float() for x in given)
    family = choose_dplr(k, v)
    assert type(family).__name__ == "TritonDPLR"
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
    gradients = prepared.run_backward(states, do, lambda: adjoints, [True] * 3)
    for name, x, right in zip(NAMES, gradients, expected, strict=False):
        assert x is not None
        assert_close(name, x, right, bound)
