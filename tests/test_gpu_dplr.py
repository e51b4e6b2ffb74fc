"""DPLR's kernels on a GPU against fp64: `pytest -m gpu tests/test_gpu_dplr.py`, one GPU.

The bound is twice the error of the token loop in plain PyTorch on the same inputs: products in
their dtype, the state in fp32. Until they have passed, these kernels run only where asked for.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from family_checks import handed_on
from gpu_checks import Inputs, differentiate, draws, error, hold
from torch import Tensor

import seqpar
from seqpar.kernels import reference
from seqpar.kernels.dplr import DPLR
from seqpar.kernels.dplr_triton import TritonDPLR
from seqpar.kernels.pieces import Pieces
from seqpar.recurrence import recurrence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GATES = ("a", "b", "log_decay")
# the loop has no running sums of decays: fp32 rounds those of 20 nats to a few 1e-6
LEAST = {torch.float32: 5e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
# nor does it round keys relative to a frame, to which the gradient of a decay is in proportion; its
# own errors there are averaged over V
LEAST_OF_DECAYS = {**LEAST, torch.bfloat16: 2**-8}
# where no loop runs
USUAL = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3}


def inputs(size: tuple[int, ...], nats: float) -> Inputs:
    """As RWKV-7 has them, in fp64, exact in bf16 and fp16, decays in fp32.

    a = -κ and b = κ η, with κ of length 1 and η from 0 to 1; every third κ repeats the one before.
    """
    tokens, heads, groups, K, V = size
    make = torch.Generator(DEVICE).manual_seed(tokens * 1000 + K + V)
    values = heads * groups

    def randn(*shape: int) -> Tensor:
        return torch.randn(draws(tokens), tokens, *shape, device=DEVICE, generator=make).double()

    def few_bits(x: Tensor, unit: int) -> Tensor:
        return (x * unit).round().clamp(-127, 127) / unit

    kappa = torch.nn.functional.normalize(randn(values, K), dim=-1)
    again = torch.arange(1, tokens, 3, device=DEVICE)
    kappa[:, again] = kappa[:, again - 1]
    eta, spread = (
        torch.rand(draws(tokens), tokens, values, K, device=DEVICE, generator=make).double()
        for _ in "ab"
    )
    span = torch.tensor(nats * 1e4).log10().item()
    return {
        "q": few_bits(randn(heads, K), 16),
        "k": few_bits(randn(heads, K) * K**-0.5, 128),
        "v": few_bits(randn(values, V), 16),
        "a": -few_bits(kappa, 128),
        "b": few_bits(kappa * eta, 256),
        "log_decay": -(10 ** (spread * span - 4)).float().double(),
    }


def plain(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor) -> Tensor:
    """The token loop with products in the inputs' dtype."""
    dtype, group = v.dtype, v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(group, 2) for x in (q, k))
    state = torch.zeros(*q.shape[::2], k.shape[3], v.shape[3], device=v.device)
    rows = []
    for t in range(q.shape[1]):
        u = (a[:, t, :, None] @ state.to(dtype))[:, :, 0]
        state = log_decay[:, t, :, :, None].exp() * state
        for x, y in ((b, u), (k, v[:, t])):
            state = state + x[:, t, :, :, None].float() * y[:, :, None].float()
        rows.append((q[:, t, :, None] @ state.to(dtype))[:, :, 0] * k.shape[3] ** -0.5)
    return torch.stack(rows, 1)


def specification(**given: Any) -> Tensor:
    """The token loop up to 300 tokens, its chunked form in fp64 (held against it) beyond."""
    if given["q"].shape[1] <= 300:
        return reference.dplr_attention(**given)[0]
    return attend(DPLR, **given)


def attend(family: Any, sp: Any = None, **given: Tensor) -> Tensor:
    """`seqpar.dplr_attention` by this family, whatever would be chosen."""
    q, k, v = (given.pop(name) for name in "qkv")
    scale = q.shape[3] ** -0.5
    return recurrence("dplr_attention", family, q, k, v, given, scale, sp, beside=False)()


def by_triton(**given: Tensor) -> Tensor:
    return attend(TritonDPLR(), **given)


def check(dtype: torch.dtype, size: tuple[int, ...], nats: float) -> None:
    def least(name: str) -> float:
        return (LEAST_OF_DECAYS if name == "log_decay" else LEAST)[dtype]

    hold(
        by_triton, plain, specification, inputs(size, nats), dtype, USUAL[dtype], least, idle=GATES
    )


# tokens, heads, values' heads a head, K, V
SIZES = [
    (1, 2, 1, 64, 64),
    (63, 2, 1, 64, 64),
    (300, 2, 2, 64, 64),
    (300, 2, 1, 128, 128),
    (300, 2, 1, 64, 128),
    (257, 1, 2, 128, 64),
    (200, 1, 1, 16, 16),
    (200, 1, 2, 32, 32),
    (150, 1, 1, 96, 40),
    (150, 1, 1, 256, 256),
    (5000, 2, 1, 64, 64),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_most_twice_the_error_of_plain_pytorch(
    dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    check(dtype, size, 0.6)


@pytest.mark.parametrize("size", [(300, 2, 2, 128, 128), (300, 1, 1, 64, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decays_from_1e_4_to_20_nats_in_one_head(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    check(dtype, size, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_chain_of_pieces_equals_the_uncut_run(dtype: torch.dtype) -> None:
    """Through (A, B) of twelve pieces, forwards and backwards, with states at both ends."""
    given = inputs((700, 1, 2, 64, 64), 0.6)
    do = (torch.randn_like(given["v"]) * 4).round() / 4
    ends = [torch.randn(len(do), 2, 64, 64, device=DEVICE) for _ in range(2)]

    def run(cuts: list[int], dtype: torch.dtype) -> list[Tensor]:
        precise = torch.promote_types(dtype, torch.float32)
        q, k, v, a, b = (given[name].to(dtype) for name in ("q", "k", "v", "a", "b"))
        gates = [a, b, given["log_decay"].to(precise)]
        count = len(cuts) - 1
        pieces = Pieces(list(pairwise(cuts)), [True] * count, [True] * count, [(0, count)])
        family: Any = DPLR if dtype == torch.float64 else TritonDPLR()
        prepared = family.prepare(q, k, v, gates, 0.1, pieces)
        start, end = (x.to(precise) for x in ends)
        states, adjoints = (x[:, None].repeat(1, count, 1, 1, 1) for x in (start, end))
        A, B = prepared.summarize()
        maps = (A, B), (family.transition.adjoint(A), prepared.summarize_backward(do.to(dtype)))
        family.scan(*maps[0], pieces, start[None], states, backwards=False)
        family.scan(*maps[1], pieces, end[None], adjoints, backwards=True)
        S = handed_on(family, *maps[0], pieces, start, backwards=False)
        dS = handed_on(family, *maps[1], pieces, end, backwards=True)
        o = prepared.run(lambda: states)
        gradients = prepared.run_backward(states, do.to(dtype), lambda: adjoints, [True] * 3)
        return [x.double() for x in (S, dS, o, *gradients) if x is not None]

    right = run([0, 700], torch.float64)
    whole = run([0, 700], dtype)
    parts = run([0, 1, 64, 130, 200, 263, 264, 300, 420, 500, 550, 640, 700], dtype)
    for i, (x, y, z) in enumerate(zip(parts, whole, right, strict=True)):
        cut, uncut = error(x, z), error(y, z)
        assert cut <= 1.5 * uncut + LEAST[dtype], f"{i}: {cut:.1e}, uncut {uncut:.1e}"


def test_packed_documents_are_apart() -> None:
    given = inputs((700, 2, 2, 64, 64), 0.6)
    do = torch.randn_like(given["v"]).round()
    cuts = [0, 1, 64, 200, 263, 700]
    layout = seqpar.Layout(700, 1, cu_seqlens=cuts)
    sp = seqpar.SequenceParallel(layout=layout, segment_tokens=128)
    found = differentiate(lambda **x: attend(TritonDPLR(), sp, **x), given, torch.bfloat16, do)
    for start, stop in pairwise(cuts):
        here = {name: x[:, start:stop] for name, x in given.items()}
        right = differentiate(lambda **x: attend(DPLR, **x), here, torch.float64, do[:, start:stop])
        for name, x in found.items():
            if stop - start > 1 or name not in GATES:
                assert error(x[:, start:stop], right[name]) < 1.2e-2, name


def test_64k_tokens_equal_the_chunked_form_in_fp64() -> None:
    check(torch.bfloat16, (65536, 1, 1, 64, 64), 0.6)
