"""The Triton convolution under the interpreter, fp32, against the token loop in fp64."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_close, run_ranks
from torch import Tensor

import seqpar
import seqpar.conv
from seqpar.kernels import reference
from seqpar.kernels.conv import Convolution

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")

DOCUMENTS = [0, 1, 3, 6, 10, 15, 16, 17, 19, 40]  # of 1 to 5 tokens, and one longer


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")


def inputs(batch: int, tokens: int, channels: int, width: int) -> dict[str, Tensor]:
    """fp64, exact in fp32."""
    make = torch.Generator().manual_seed(channels * width)
    shapes = {"x": (batch, tokens, channels), "weight": (channels, width), "bias": (channels,)}
    return {name: torch.randn(shape, generator=make).double() for name, shape in shapes.items()}


def differentiate(
    function: Any, given: dict[str, Tensor], dy: Tensor, **options: Any
) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    y = function(**leaves, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def single(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in given.items()}


# batch, tokens, channels, width, bias, activation, documents
CASES: list[tuple[int, int, int, int, bool, str | None, list[int] | None]] = [
    (2, 40, 20, 1, True, "silu", None),
    (2, 37, 70, 2, False, None, None),
    (1, 1, 5, 4, True, "silu", None),
    (2, 41, 300, 4, True, "silu", None),
    (1, 40, 20, 1, True, None, DOCUMENTS),
    (1, 40, 64, 2, False, "silu", DOCUMENTS),
    (1, 40, 20, 3, True, None, DOCUMENTS),
    (1, 40, 70, 4, False, "silu", DOCUMENTS),
    (1, 40, 70, 4, True, None, DOCUMENTS),
    (1, 40, 8, 8, True, "silu", DOCUMENTS),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_and_all_gradients_equal_the_token_loop(case: tuple) -> None:
    batch, tokens, channels, width, bias, activation, documents = case
    given = inputs(batch, tokens, channels, width)
    if not bias:
        del given["bias"]
    dy = torch.randn(batch, tokens, channels).double()
    expected = differentiate(
        reference.causal_conv1d, given, dy, activation=activation, cu_seqlens=documents
    )
    layout = seqpar.Layout(tokens, 1, cu_seqlens=documents)
    found = differentiate(
        seqpar.causal_conv1d,
        single(given),
        dy.float(),
        activation=activation,
        sp=seqpar.SequenceParallel(layout=layout),
    )
    for name, value in expected.items():
        assert_close(name, found[name], value, 1e-5)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("width", [2, 4])
def test_two_ranks_equal_the_token_loop(width: int, kind: str, documents: list[int] | None) -> None:
    batch = 2 if documents is None else 1
    given, dy = inputs(batch, 40, 20, width), torch.randn(batch, 40, 20).double()
    expected = differentiate(
        reference.causal_conv1d, given, dy, activation="silu", cu_seqlens=documents
    )
    layout = seqpar.Layout(40, 2, kind, documents)

    def work(rank: int) -> dict[str, Tensor]:
        local = single(given) | {"x": layout.shard(given["x"], rank).float()}
        sp = seqpar.SequenceParallel(layout=layout)
        mine = layout.shard(dy, rank).float()
        return differentiate(seqpar.causal_conv1d, local, mine, activation="silu", sp=sp)

    ranks = run_ranks(work, 2)
    for name in ("weight", "bias"):
        assert_close(name, sum(found[name] for found in ranks), expected[name], 1e-5)
    for name in ("x", "y"):
        for rank, found in enumerate(ranks):
            wanted = layout.shard(expected[name], rank)
            label = f"{name} on rank {rank}"
            assert_close(label, found[name], wanted, 1e-5, whole=expected[name])


def test_halos_from_more_than_one_rank() -> None:
    """A width of 8 reaches past shards of 2 and 3 tokens, whose tokens are in two halos."""
    given, dy = inputs(2, 20, 6, 8), torch.randn(2, 20, 6).double()
    expected = differentiate(reference.causal_conv1d, given, dy)
    layout = seqpar.Layout(20, 4, shard_sizes=[8, 2, 3, 7])

    def work(rank: int) -> dict[str, Tensor]:
        local = single(given) | {"x": layout.shard(given["x"], rank).float()}
        sp = seqpar.SequenceParallel(layout=layout)
        return differentiate(seqpar.causal_conv1d, local, layout.shard(dy, rank).float(), sp=sp)

    ranks = run_ranks(work, 4)
    for name in ("x", "y"):
        found = layout.unshard([result[name] for result in ranks])
        assert_close(name, found, expected[name], 1e-5)


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "plain"])
def test_heads_of_a_packed_projection_are_read_where_they_lie(
    triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQPAR_KERNELS", "triton" if triton else "torch")
    torch.manual_seed(0)
    batch, tokens, heads, dim, width = 2, 21, 3, 24, 4
    packed = torch.randn(tokens, batch, heads, dim + 10).double()
    weight = torch.randn(heads * dim, width).double()
    given = {"packed": packed, "weight": weight}
    dy = torch.randn(batch, tokens, heads, dim).double()

    def loop(packed: Tensor, weight: Tensor) -> Tensor:
        x = packed.transpose(0, 1)[..., 2 : dim + 2].flatten(2)
        return reference.causal_conv1d(x, weight, activation="silu").unflatten(2, (heads, dim))

    def ours(packed: Tensor, weight: Tensor) -> Tensor:
        x = packed.transpose(0, 1)[..., 2 : dim + 2]
        return seqpar.causal_conv1d(x, weight, activation="silu")

    expected = differentiate(loop, given, dy)
    strided = torch.randn(2, *dy.shape).float()  # dy is a view as well
    strided[1] = dy
    for name, value in differentiate(ours, single(given), strided[1]).items():
        assert_close(name, value, expected[name], 1e-5)
    turned = dy.float().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for name, value in differentiate(ours, single(given), turned).items():
        assert_close(name, value, expected[name], 1e-5)


def test_what_follows_from_the_layout_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = seqpar.Layout(40, 2, "zigzag", DOCUMENTS)

    def work(rank: int) -> int:
        made = 0
        plan = seqpar.conv._plan

        def counted(*arguments: Any) -> Any:
            nonlocal made
            made += 1
            return plan(*arguments)

        monkeypatch.setattr(seqpar.conv, "_plan", counted)
        sp = seqpar.SequenceParallel(layout=layout)
        x = torch.randn(1, 20, 4, requires_grad=True)
        for _ in range(3):
            seqpar.causal_conv1d(x, torch.randn(4, 3), sp=sp).sum().backward()
        return made

    assert run_ranks(work, 2) == [1, 1]


def test_one_document_reads_no_table() -> None:
    for documents, table in ((None, False), ([0, 40], False), ([0, 1, 40], True)):
        layout = seqpar.Layout(40, 1, cu_seqlens=documents)
        plan = seqpar.conv._plan(seqpar.SequenceParallel(layout=layout), 3, torch.device("cpu"))
        assert (plan.seen is not None) == table


def test_widths_beyond_the_kernels_take_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 12, 4), torch.randn(4, 9)
    with pytest.raises(ValueError, match="width=9 must be at most 8"):
        seqpar.causal_conv1d(x, weight)
    monkeypatch.setenv("SEQPAR_KERNELS", "auto")
    expected = reference.causal_conv1d(x.double(), weight.double())
    assert_close("y", seqpar.causal_conv1d(x, weight), expected, 1e-5)


def test_a_token_of_another_document_that_is_not_finite_is_not_seen() -> None:
    x = torch.randn(1, 12, 4)
    x[0, 5] = float("nan")
    sp = seqpar.SequenceParallel(layout=seqpar.Layout(12, 1, cu_seqlens=[0, 6, 12]))
    y = seqpar.causal_conv1d(x, torch.randn(4, 4), sp=sp)
    assert torch.isfinite(y[:, :5]).all()
    assert torch.isnan(y[:, 5]).all()
    assert torch.isfinite(y[:, 6:]).all()


def test_the_kernels_are_what_runs() -> None:
    """Both forms of one convolution, side by side: they round differently."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 64, 2, 32), torch.randn(64, 4)
    ours, plain = (
        Convolution(True, 1, None, triton).forward(x, None, weight, None)
        for triton in (True, False)
    )
    assert not torch.equal(ours, plain)
    assert_close("y", ours, plain, 1e-6)


def test_the_kernels_compile_without_a_gpu() -> None:
    script = Path(__file__).with_name("elementwise_compiles.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
