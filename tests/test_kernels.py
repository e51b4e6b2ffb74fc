"""The chunked PyTorch kernels and the state algebra, on one rank."""

from itertools import accumulate, pairwise

import pytest
import torch
from harness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import reference
from seqpar.kernels.chunked import Chunked
from seqpar.kernels.delta import DELTA
from seqpar.kernels.linear import DECAYED_LINEAR, LINEAR
from seqpar.kernels.pieces import Pieces
from seqpar.kernels.scores import decayed_scores
from seqpar.kernels.strides import dense
from seqpar.kernels.transition import Decay, Dense, Identity, Transition

BATCH, HEADS, K, V = 2, 2, 6, 5
CASES = {
    "linear": (LINEAR, None),
    "scalar": (DECAYED_LINEAR, 1),
    "diagonal": (DECAYED_LINEAR, K),
    "delta": (DELTA, None),
    "delta scalar": (DELTA, 1),
    "delta diagonal": (DELTA, K),
}


def inputs(name: str, tokens: int) -> tuple[Chunked, Tensor, Tensor, Tensor, list[Tensor]]:
    family, width = CASES[name]
    torch.manual_seed(list(CASES).index(name))

    def randn(*shape: int) -> Tensor:
        return torch.randn(BATCH, tokens, HEADS, *shape, dtype=torch.float64)

    q, k, v = randn(K), torch.nn.functional.normalize(randn(K), dim=-1), randn(V)
    gates = [2 * torch.sigmoid(randn(1))] if family is DELTA else []
    if width:
        gates.append(-(10 ** (torch.rand(BATCH, tokens, HEADS, width).double() * 5.3 - 4)))
    return family, q, k, v, gates


def token_loop(
    q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], family: Chunked, state: Tensor
) -> tuple[Tensor, Tensor]:
    rest = [gate.squeeze(-1) for gate in gates]
    loop = reference.delta_attention if family is DELTA else reference.linear_attention
    return loop(q, k, v, *rest, scale=0.5, initial_state=state)


@pytest.mark.parametrize("tokens", [1, 64, 150])
@pytest.mark.parametrize("name", CASES)
def test_the_four_functions_equal_the_token_loop(name: str, tokens: int) -> None:
    """Outputs, the leaving state, every gradient, for a state that enters and one that leaves."""
    family, q, k, v, gates = inputs(name, tokens)
    entering = torch.randn(BATCH, 1, HEADS, K, V, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, *gates, entering)]
    o, leaving = token_loop(q, k, v, gates, family, entering[:, 0])
    do, d_leaving = torch.randn_like(o), torch.randn_like(leaving)
    expected = torch.autograd.grad((o * do).sum() + (leaving * d_leaving).sum(), leaves)
    pieces = Pieces([(0, tokens)], [True], [True], [(0, 1)])
    wanted = [True] * len(gates)

    with torch.no_grad():
        prepared = family.prepare(q, k, v, gates, 0.5, pieces)
        assert_close("o", prepared.run(lambda: entering), o, 1e-10)
        A, B = prepared.summarize()
        assert_close("state", family.transition.apply(A, entering) + B, leaving[:, None], 1e-10)
        back, pulled = family.transition.adjoint(A), prepared.summarize_backward(do)
        dS = family.transition.apply(back, d_leaving[:, None]) + pulled
        assert_close("dS", dS, expected[-1], 1e-10)
        gradients = prepared.run_backward(entering, do, lambda: d_leaving[:, None], wanted)
    for i, (gradient, right) in enumerate(zip(gradients, expected[:-1], strict=True)):
        assert gradient is not None
        assert_close(f"gradient {i}", gradient, right, 1e-10)


@settings(max_examples=25)
@given(st.sampled_from(list(CASES)), st.lists(st.integers(1, 90), min_size=2, max_size=5))
def test_a_sequence_cut_anywhere_and_chained_equals_the_uncut_one(
    name: str, lengths: list[int]
) -> None:
    offsets = [0, *accumulate(lengths)]
    family, q, k, v, gates = inputs(name, offsets[-1])
    one = Pieces([(0, offsets[-1])], [False], [False], [(0, 1)])
    none = torch.zeros(BATCH, 0, HEADS, K, V, dtype=torch.float64)
    whole = family.prepare(q, k, v, gates, 0.5, one).run(lambda: none)
    spans, last = list(pairwise(offsets)), len(lengths) - 1
    handed = [i < last for i in range(last + 1)]
    pieces = Pieces(spans, [False, *handed[:-1]], handed, [(0, last + 1)])
    prepared = family.prepare(q, k, v, gates, 0.5, pieces)
    A, B = prepared.summarize()
    states = torch.zeros(BATCH, last, HEADS, K, V, dtype=torch.float64)
    family.scan(A, B, pieces, None, states, backwards=False)
    cut = prepared.run(lambda: states)
    assert_close(name, cut, whole, 1e-10)


@pytest.mark.parametrize("width", [1, 8])
def test_scores_stay_finite_for_any_decay(width: int) -> None:
    """A chunk that decays by 20 nats a token: no factor above one is ever formed."""
    x, y = torch.randn(2, 3, 64, 8, requires_grad=True), torch.randn(2, 3, 64, 8)
    total = torch.full((2, 3, 64, width), -20.0).cumsum(-2).requires_grad_()
    scores = decayed_scores(x, y, total)
    gradients = torch.autograd.grad(scores.sum(), (x, total))
    assert all(torch.isfinite(value).all() for value in (scores, *gradients))
    diagonal = (x * y).sum(-1)
    assert_close("diagonal", scores.diagonal(dim1=-2, dim2=-1), diagonal, 1e-5)


def test_reference_dplr_contains_the_delta_rule() -> None:
    """a = -beta k e^g, b = k, with beta on the values, is the gated delta rule."""
    _, q, k, v, (beta, log_decay) = inputs("delta diagonal", 20)
    delta, _ = reference.delta_attention(q, k, v, beta[..., 0], log_decay)
    a = -beta * k * log_decay.exp()
    dplr, _ = reference.dplr_attention(q, k, beta * v, a, k, log_decay)
    assert_close("o", dplr, delta, 1e-10)


def transition_maps(transition: Transition, count: int) -> list[tuple[Tensor, Tensor]]:
    shape = {Identity: (0, 0), Decay: (K, 1), Dense: (K, K)}[type(transition)]
    return [(torch.randn(2, *shape).double(), torch.randn(2, K, V).double()) for _ in range(count)]


@pytest.mark.parametrize(
    "transition", [Identity(), Decay(), Dense()], ids=lambda t: type(t).__name__
)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_the_algebra_is_associative_and_has_the_adjoint(transition: Transition, seed: int) -> None:
    def compose(later: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor]) -> tuple:
        (A2, B2), (A1, B1) = later, first
        return transition.product(A2, A1), transition.apply(A2, B1) + B2

    torch.manual_seed(seed)
    a, b, c = transition_maps(transition, 3)
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    assert_close("B", left[1], right[1], 1e-12)
    if left[0].numel():
        assert_close("A", left[0], right[0], 1e-12)

    (A, x), (_, y) = transition_maps(transition, 2)
    forward = x * transition.apply(A, y)
    backward = transition.apply(transition.adjoint(A), x) * y
    terms = forward.abs().sum()  # a sum may nearly cancel, its error does not
    assert_close("adjoint", forward.sum(), backward.sum(), 1e-12, terms)
    leaf = A.clone().requires_grad_()
    if leaf.numel():
        (expected,) = torch.autograd.grad((transition.apply(leaf, y) * x).sum(), leaf)
        assert_close("dA", transition.gradient(A, x, y), expected, 1e-12)


@pytest.mark.parametrize("heads", [16, 17])
def test_heads_that_32_bits_cannot_tell_apart_are_copied(heads: int) -> None:
    tokens, dim = 2**20, 128
    strides = (heads * tokens * dim, dim, tokens * dim, 1)
    x = torch.empty_strided((1, tokens, heads, dim), strides, device="meta")
    copied = dense(x) is not x
    assert copied == (heads == 17)
    assert not copied or dense(x).is_contiguous()
