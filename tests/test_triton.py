"""The Triton kernels under the interpreter, fp32, against the token loop in fp64."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family_checks import check_functions, check_two_ranks
from harness import assert_close
from torch import Tensor

import seqpar
from seqpar.kernels import frames, reference
from seqpar.kernels.choose import choose_linear
from seqpar.kernels.once import Once
from seqpar.kernels.pieces import Pieces

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    # scores of later tokens may overflow in a frame; they are masked
    pytest.mark.filterwarnings("ignore:.* encountered in matmul:RuntimeWarning"),
]

WIDTHS = {"none": None, "scalar": 1, "diagonal": -1}


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")


def inputs(
    decay: str, tokens: int, heads: int, value_heads: int, K: int, V: int, batch: int, nats: float
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """q, k, v and gates, fp64 but exact in fp32; decays from 1e-4 to `nats` a token."""
    torch.manual_seed(tokens + K)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape).double()

    q, v = randn(heads, K), randn(value_heads, V)
    k = torch.nn.functional.normalize(randn(heads, K), dim=-1).float().double()
    width = WIDTHS[decay]
    if width is None:
        return q, k, v, []
    shape = (batch, tokens, value_heads, 1 if width == 1 else K)
    span = torch.tensor(nats * 1e4).log10()
    return q, k, v, [-(10 ** (torch.rand(shape) * span - 4)).double()]


def as_decays(decay: str, gates: list[Tensor]) -> list[Tensor]:
    """The gates as public functions take them."""
    return [gate.squeeze(-1) if decay == "scalar" else gate for gate in gates]


# decay, cuts, heads of q and v, K, V, batch, nats
CASES = [
    ("none", (0, 150), (1, 1), 16, 32, 1, 0.1),
    ("none", (0, 64, 130, 131), (2, 4), 24, 80, 2, 0.1),
    ("scalar", (0, 64, 128, 150), (2, 2), 16, 16, 1, 0.1),
    ("scalar", (0, 1, 70, 199), (1, 2), 20, 24, 2, 20),
    ("diagonal", (0, 64, 150), (1, 1), 16, 32, 1, 0.1),
    ("diagonal", (0, 1, 70, 130), (1, 2), 20, 24, 2, 20),
    ("diagonal", (0, 33), (1, 1), 40, 8, 1, 20),
    ("scalar", (0, 1100), (1, 1), 16, 16, 1, 1),  # more than one block of the gate's gradient
    ("diagonal", (0, 1100), (1, 1), 16, 16, 1, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_function_equals_the_token_loop(case: tuple) -> None:
    """Outputs, leaving state, all gradients, for pieces with states entering and leaving."""
    decay, cuts, (heads, value_heads), K, V, batch, nats = case
    q, k, v, gates = inputs(decay, cuts[-1], heads, value_heads, K, V, batch, nats)
    given = q, k, v, *as_decays(decay, gates)
    check_functions(reference.linear_attention, choose_linear, "TritonLinear", given, cuts, nats)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("decay", WIDTHS)
def test_packed_documents_on_two_ranks_equal_the_token_loop(decay: str, kind: str) -> None:
    q, k, v, gates = inputs(decay, 192, 1, 2, 16, 16, 1, 1)
    given = q, k, v, *as_decays(decay, gates)
    check_two_ranks(reference.linear_attention, seqpar.linear_attention, given, kind)


def test_slices_of_a_packed_projection_and_a_constant_decay_need_no_copies() -> None:
    packed = torch.randn(2, 70, 2, 3 * 16).double().requires_grad_()
    decay = torch.tensor([-0.1, -1.0]).double().requires_grad_()
    q, k, v = packed.split(16, -1)
    o, _ = reference.linear_attention(q, k, v, decay)
    do = torch.randn_like(o)
    expected = torch.autograd.grad((o * do).sum(), (packed, decay))
    x, g = (t.detach().float().requires_grad_() for t in (packed, decay))
    q, k, v = x.split(16, -1)
    found = seqpar.linear_attention(q, k, v, g)
    assert_close("o", found, o, 1e-5)
    gradients = torch.autograd.grad((found * do.float()).sum(), (x, g))
    for name, gradient, right in zip(("packed", "decay"), gradients, expected, strict=True):
        assert_close(name, gradient, right, 1e-5)


def test_frames_are_halved_where_a_channel_decays_too_far() -> None:
    """q' · k' is the decayed score within each frame, and all frames of a piece are listed."""
    q, k, _, _ = inputs("none", 100, 1, 1, 16, 16, 1, 0.1)
    gate = torch.full((1, 100, 1, 16), -0.1)
    gate[:, 32:64, :, 3] = -6.0  # 192 nats in 32 tokens
    gate[:, 96:, :, 0] = -25.0  # more than a frame of 8 holds
    pieces = Pieces([(0, 100)], [False], [False], [(0, 1)])
    found = frames.enter(q.float(), k.float(), gate, pieces, 512, 32, torch.float32, Once())
    assert found.levels.flatten().tolist() == [0, 1, 0, 0]
    steps = found.steps[0, 0, : found.counts.item()].tolist()
    assert [(step // 4 * 8, 32 >> step % 4) for step in steps] == [
        (0, 32),
        (32, 16),
        (48, 16),
        (64, 32),
        (96, 32),
    ]
    total = gate.double()[0, :, 0].cumsum(0)
    for first, size in ((0, 32), (32, 16), (48, 16), (64, 32), (96, 4)):
        rows = slice(first, first + size)
        scores = found.q[0, rows, 0].double() @ found.k[0, rows, 0].double().T
        factor = (total[rows, None] - total[None, rows]).clamp(max=0).exp()
        right = (q[0, rows, 0, None] * factor * k[0, None, rows, 0]).sum(-1)
        assert_close(f"from {first}", scores.tril(), right.tril(), 1e-5)
        half = found.halves[0, first // 8, 0].double()
        ends = total[min(first + size, 100) - 1] - (total[first - 1] if first else 0)
        if first < 96:  # where nothing counts as less than it is
            assert_close("half", half, ends / 2 / math.log(2), 1e-5)


def test_short_documents_keep_no_states() -> None:
    layout = seqpar.Layout(20_000, 1, cu_seqlens=range(0, 20_001, 2))
    pieces = seqpar.SequenceParallel(layout=layout).pieces(1024)
    assert len(pieces.spans) == 10_000
    assert not pieces.entered
    assert not pieces.left


@pytest.mark.parametrize(
    ("k", "variable", "message"),
    [
        (torch.zeros(1, 4, 1, 16), "fast", "must be one of auto, triton, torch"),
        (torch.zeros(1, 4, 1, 16).double(), "triton", "float64 must be"),
        (torch.zeros(1, 4, 1, 16).bfloat16(), "triton", "only float32"),
        (torch.zeros(1, 4, 1, 300), "triton", "K=300 .* at most 256"),
    ],
)
def test_what_triton_cannot_do_is_refused(
    k: Tensor, variable: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQPAR_KERNELS", variable)
    with pytest.raises(ValueError, match=message):
        seqpar.linear_attention(k, k, k)


def test_without_a_gpu_pytorch_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEQPAR_KERNELS")
    x = torch.zeros(1, 4, 1, 16)
    assert type(choose_linear(x, x, [])).__name__ == "Chunked"


def test_the_hopper_kernel_compiles_without_a_gpu() -> None:
    script = Path(__file__).with_name("hopper_compiles.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
