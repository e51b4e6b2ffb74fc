"""The delta rule's kernels on a GPU against fp64: `pytest -m gpu tests/test_gpu_delta.py`, one GPU.

The bound is twice the error of the token loop in plain PyTorch on the same inputs: products in
their dtype, the state in fp32.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from family_checks import handed_on
from gpu_checks import SIZES, Inputs, differentiate, draws, error, hold
from torch import Tensor

import seqpar
from seqpar.kernels import passes, reference
from seqpar.kernels.choose import choose_delta
from seqpar.kernels.delta import DELTA
from seqpar.kernels.delta_triton import TritonDelta
from seqpar.kernels.pieces import Pieces

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
WIDTHS = {"none": None, "scalar": 1, "diagonal": -1}
# the loop has no running sums of decays: fp32 rounds those of 20 nats to a few 1e-6
LEAST = {torch.float32: 5e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
# where no loop runs
USUAL = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3}


def inputs(decay: str, size: tuple[int, ...], nats: float) -> Inputs:
    """fp64, exact in bf16 and fp16, gates in fp32; every third key repeats the one before it."""
    tokens, heads, groups, K, V = size
    make = torch.Generator(DEVICE).manual_seed(tokens * 1000 + K + V)

    def randn(*shape: int) -> Tensor:
        return torch.randn(draws(tokens), tokens, *shape, device=DEVICE, generator=make).double()

    def few_bits(x: Tensor, unit: int) -> Tensor:
        return (x * unit).round().clamp(-127, 127) / unit

    k = few_bits(torch.nn.functional.normalize(randn(heads, K), dim=-1), 128)
    again = torch.arange(1, tokens, 3, device=DEVICE)
    k[:, again] = k[:, again - 1]
    values = heads * groups
    beta = torch.rand(draws(tokens), tokens, values, device=DEVICE, generator=make).double()
    found = {"q": few_bits(randn(heads, K), 16), "k": k, "v": few_bits(randn(values, V), 16)}
    found["beta"] = few_bits(beta * 1.8, 8)
    if WIDTHS[decay] is not None:
        shape = (draws(tokens), tokens, values, *([K] if decay == "diagonal" else []))
        spread = torch.rand(shape, device=DEVICE, generator=make)
        span = torch.tensor(nats * 1e4).log10().item()
        found["log_decay"] = -(10 ** (spread * span - 4)).float().double()
    return found


def plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The token loop with products in the inputs' dtype."""
    dtype, group = v.dtype, v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(group, 2) for x in (q, k))
    state = torch.zeros(*q.shape[::2], k.shape[3], v.shape[3], device=v.device)
    rows = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            state = log_decay[:, t].exp().reshape(*state.shape[:2], -1, 1) * state
        held = (k[:, t, :, None] @ state.to(dtype))[:, :, 0]
        u = beta[:, t, :, None].to(dtype) * (v[:, t] - held)
        state = state + k[:, t, :, :, None].float() * u[:, :, None].float()
        rows.append((q[:, t, :, None] @ state.to(dtype))[:, :, 0] * k.shape[3] ** -0.5)
    return torch.stack(rows, 1)


def specification(**given: Any) -> Tensor:
    """The token loop up to 300 tokens, its chunked form in fp64 (held against it) beyond."""
    if given["q"].shape[1] <= 300:
        return reference.delta_attention(**given)[0]
    return seqpar.delta_attention(**given)  # fp64 takes the chunked PyTorch form


def check(decay: str, dtype: torch.dtype, size: tuple[int, ...], nats: float) -> None:
    given = inputs(decay, size, nats)
    usual, least = USUAL[dtype], LEAST[dtype]
    hold(
        seqpar.delta_attention, plain, specification, given, dtype, usual, least=lambda name: least
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", WIDTHS)
def test_at_most_twice_the_error_of_plain_pytorch(
    decay: str, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    check(decay, dtype, size, 0.3)


@pytest.mark.parametrize("size", [(300, 2, 2, 128, 128), (300, 1, 1, 64, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
def test_decays_from_1e_4_to_20_nats_in_one_head(
    decay: str, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    check(decay, dtype, size, 20)


@pytest.mark.parametrize("decay", WIDTHS)
def test_the_general_kernels_are_right_where_hopper_has_its_own(
    decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "is_hopper", lambda device: False)
    check(decay, torch.bfloat16, (300, 2, 2, 128, 128), 0.3)


@pytest.mark.parametrize("decay", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_chain_of_pieces_equals_the_uncut_run(decay: str, dtype: torch.dtype) -> None:
    """Through (A, B) of twelve pieces, forwards and backwards, with states at both ends."""
    given = inputs(decay, (700, 1, 2, 128, 128), 0.3)
    q, k, v, beta, *rest = given.values()
    do = (torch.randn_like(v) * 4).round() / 4
    ends = [torch.randn(len(v), 2, 128, 128, device=DEVICE) for _ in range(2)]

    def run(cuts: list[int], dtype: torch.dtype) -> list[Tensor]:
        gates = [x if x.dim() == 4 else x[..., None] for x in (beta, *rest)]
        gates = [x.to(torch.promote_types(dtype, torch.float32)) for x in gates]
        count = len(cuts) - 1
        pieces = Pieces(list(pairwise(cuts)), [True] * count, [True] * count, [(0, count)])
        family = choose_delta(k.to(dtype), v, gates)
        prepared = family.prepare(q.to(dtype), k.to(dtype), v.to(dtype), gates, 0.1, pieces)
        start, end = (x.to(torch.promote_types(dtype, torch.float32)) for x in ends)
        states, adjoints = (x[:, None].repeat(1, count, 1, 1, 1) for x in (start, end))
        A, B = prepared.summarize()
        maps = (A, B), (family.transition.adjoint(A), prepared.summarize_backward(do.to(dtype)))
        family.scan(*maps[0], pieces, start[None], states, backwards=False)
        family.scan(*maps[1], pieces, end[None], adjoints, backwards=True)
        S = handed_on(family, *maps[0], pieces, start, backwards=False)
        dS = handed_on(family, *maps[1], pieces, end, backwards=True)
        o = prepared.run(lambda: states)
        gradients = prepared.run_backward(
            states, do.to(dtype), lambda: adjoints, [True] * len(gates)
        )
        return [x.double() for x in (S, dS, o, *gradients) if x is not None]

    right = run([0, 700], torch.float64)
    whole = run([0, 700], dtype)
    parts = run([0, 1, 64, 130, 200, 263, 264, 300, 420, 500, 550, 640, 700], dtype)
    for i, (x, y, z) in enumerate(zip(parts, whole, right, strict=True)):
        cut, uncut = error(x, z), error(y, z)
        assert cut <= 1.5 * uncut + LEAST[dtype], f"{i}: {cut:.1e}, uncut {uncut:.1e}"


@pytest.mark.parametrize("decay", WIDTHS)
def test_packed_documents_are_apart(decay: str) -> None:
    given = inputs(decay, (700, 16, 2, 128, 128), 0.3)  # many heads, for one token is a document
    given = {name: x[:1] for name, x in given.items()}
    do = torch.randn_like(given["v"]).round()
    cuts = [0, 1, 64, 200, 263, 700]
    layout = seqpar.Layout(700, 1, cu_seqlens=cuts)
    sp = seqpar.SequenceParallel(layout=layout, segment_tokens=128)
    found = differentiate(lambda **x: seqpar.delta_attention(**x, sp=sp), given, torch.bfloat16, do)
    for start, stop in pairwise(cuts):
        here = {name: x[:, start:stop] for name, x in given.items()}
        right = differentiate(seqpar.delta_attention, here, torch.float64, do[:, start:stop])
        for name, x in found.items():
            if stop - start > 1 or name != "log_decay":
                assert error(x[:, start:stop], right[name]) < 1.2e-2, name


@pytest.mark.parametrize("decay", WIDTHS)
def test_64k_tokens_equal_the_chunked_form_in_fp64(decay: str) -> None:
    check(decay, torch.bfloat16, (65536, 1, 1, 128, 128), 0.01)


def test_which_kernels_run() -> None:
    x = torch.zeros(1, 4, 1, 16, device=DEVICE, dtype=torch.bfloat16)
    assert isinstance(choose_delta(x, x, [x]), TritonDelta)
    assert choose_delta(x.double(), x.double(), [x]) is DELTA
