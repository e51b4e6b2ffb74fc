"""The Triton kernels on a GPU against fp64: `pytest -m gpu tests/test_gpu_kernels.py`, one GPU.

The bound is twice the error of the same formula in plain PyTorch on the same inputs and dtype.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from gpu_checks import SIZES, Inputs, differentiate, draws, error, hold
from torch import Tensor

import seqpar
from seqpar.kernels import passes, reference
from seqpar.kernels.choose import choose_linear
from seqpar.kernels.decay import TritonLinear
from seqpar.kernels.linear import DECAYED_LINEAR, LINEAR

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
WIDTHS = {"none": None, "scalar": 1, "diagonal": -1}


def inputs(decay: str, size: tuple[int, ...], nats: float) -> Inputs:
    """fp64 on the GPU, exact in bf16 and fp16; gates exact in fp32."""
    tokens, heads, groups, K, V = size
    make = torch.Generator(DEVICE).manual_seed(tokens * 1000 + K + V)

    def randn(*shape: int) -> Tensor:
        x = torch.randn(draws(tokens), tokens, *shape, device=DEVICE, generator=make)
        return (x * 8).round().clamp(-31, 31).double() / 8  # few bits: exact in every dtype

    found = {"q": randn(heads, K), "k": randn(heads, K) / 16, "v": randn(heads * groups, V)}
    if WIDTHS[decay] is not None:
        shape = (draws(tokens), tokens, heads * groups, *([K] if decay == "diagonal" else []))
        spread = torch.rand(shape, device=DEVICE, generator=make)
        span = torch.tensor(nats * 1e4).log10().item()
        found["log_decay"] = -(10 ** (spread * span - 4)).float().double()
    return found


def plain(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The quadratic form in plain PyTorch: products and scores in the inputs' dtype."""
    group = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (q, k))
    v = v.transpose(1, 2)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(q.shape[0], q.shape[2], -1)
    if log_decay is None:
        scores = (q @ k.mT).tril()
    elif log_decay.dim() == 3:
        total = log_decay.transpose(1, 2).cumsum(-1)
        differences = total[..., :, None] - total[..., None, :]
        future = torch.ones_like(differences, dtype=torch.bool).triu(1)
        scores = (q @ k.mT) * differences.masked_fill(future, -torch.inf).exp().to(q.dtype)
    else:
        total = log_decay.transpose(1, 2).cumsum(-2)
        factor = (total[..., :, None, :] - total[..., None, :, :]).clamp(max=0).exp().to(q.dtype)
        scores = (q[..., :, None, :] * factor * k[..., None, :, :]).sum(-1).tril()
    return ((scores * k.shape[-1] ** -0.5) @ v).transpose(1, 2)


def specification(**given: Any) -> Tensor:
    """The token loop up to 300 tokens, its chunked form in fp64 (held against it) beyond."""
    if given["q"].shape[1] <= 300:
        return reference.linear_attention(**given)[0]
    return seqpar.linear_attention(**given)  # fp64 takes the chunked PyTorch form


def check(decay: str, dtype: torch.dtype, size: tuple[int, ...], nats: float) -> None:
    usual = {torch.float32: 3e-6, torch.float16: 5e-4}.get(dtype, 3e-3)
    # few tokens' sums can be exact by chance in fp32: allow what four of its roundings make
    least = 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.0
    given = inputs(decay, size, nats)
    hold(
        seqpar.linear_attention, plain, specification, given, dtype, usual, least=lambda name: least
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


@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_the_general_kernels_are_right_where_hopper_has_its_own(
    decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated backward products in Triton: 3.4 to 3.7.0 are known to miscompile some on Hopper."""
    monkeypatch.setattr(passes, "is_hopper", lambda device: False)
    for size in SIZES[:8]:
        check(decay, torch.bfloat16, size, 0.3)


@pytest.mark.parametrize("decay", WIDTHS)
def test_documents_and_zigzag_ranges_of_one_rank(decay: str) -> None:
    given = inputs(decay, (1000, 16, 1, 128, 128), 0.3)
    given = {name: x[:1] for name, x in given.items()}
    do = torch.randn_like(given["v"])
    documents = [0, 1, 70, 500, 564, 1000]

    def one_by_one(**leaves: Any) -> Tensor:
        parts = [{name: x[:, a:b] for name, x in leaves.items()} for a, b in pairwise(documents)]
        return torch.cat([seqpar.linear_attention(**part) for part in parts], 1)

    right = differentiate(one_by_one, given, torch.float64, do)
    for kind in ("contiguous", "zigzag"):
        sp = seqpar.SequenceParallel(layout=seqpar.Layout(1000, 1, kind, documents))
        found = differentiate(
            lambda sp=sp, **leaves: seqpar.linear_attention(**leaves, sp=sp),
            given,
            torch.bfloat16,
            do,
        )
        for name, x in found.items():
            assert error(x, right[name]) < 8e-3, name


@pytest.mark.parametrize("decay", WIDTHS)
def test_64k_tokens_equal_the_chunked_form_in_fp64(decay: str) -> None:
    check(decay, torch.bfloat16, (65536, 1, 1, 128, 128), 0.01)


def test_a_constant_decay_gets_its_gradient() -> None:
    given = inputs("none", (300, 16, 1, 128, 128), 0)
    given["log_decay"] = -torch.logspace(-3, 0, 16, device=DEVICE).float().double()
    do = torch.randn_like(given["v"])
    right = differentiate(specification, given, torch.float64, do)
    usual = differentiate(plain, given, torch.bfloat16, do)
    for name, x in differentiate(seqpar.linear_attention, given, torch.bfloat16, do).items():
        assert error(x, right[name]) <= 2 * error(usual[name], right[name]), name


def test_which_kernels_run() -> None:
    x = torch.zeros(1, 4, 1, 16, device=DEVICE, dtype=torch.bfloat16)
    assert isinstance(choose_linear(x, x, []), TritonLinear)
    assert choose_linear(x.double(), x.double(), []) is LINEAR
    wide = torch.zeros(1, 4, 1, 300, device=DEVICE)
    assert choose_linear(wide, wide, [wide]) is DECAYED_LINEAR
