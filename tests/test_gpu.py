"""The same functions on GPUs: `pytest -m gpu` on a machine with one NVIDIA GPU or more.

One GPU against the fp64 references; all GPUs of the machine, over NCCL, against the same.
"""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import assert_close
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import seqpar
from seqpar.kernels import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOKENS, HEADS, K = 384, 4, 64
DOCUMENTS = [0, 100, 101, 300, TOKENS]
EXCHANGES = ("allgather", "ring", "allscan", "doubling", "twolevel")
METHODS = ("allgather", "ring", "ulysses")

Case = tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Tensor]]


def cases() -> dict[str, Case]:
    """Name -> (function, fp64 reference, inputs exact in bf16)."""
    torch.manual_seed(0)

    def rand(*width: int) -> Tensor:
        return torch.randn(1, TOKENS, HEADS, *width).bfloat16().double()

    q, v = rand(K), rand(K)
    k, a, b = (torch.nn.functional.normalize(rand(K), dim=-1).bfloat16().double() for _ in range(3))
    beta = rand().sigmoid().bfloat16().double()
    scalar, diagonal = (-(rand(*width).abs() ** 3).bfloat16().double() for width in ((), (K,)))

    def last_state_dropped(spec: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda **inputs: spec(**inputs)[0]

    linear, delta, dplr = (
        last_state_dropped(spec)
        for spec in (
            reference.linear_attention,
            reference.delta_attention,
            reference.dplr_attention,
        )
    )
    qkv = {"q": q, "k": k, "v": v}
    return {
        "linear": (seqpar.linear_attention, linear, qkv),
        "scalar": (seqpar.linear_attention, linear, qkv | {"log_decay": scalar}),
        "diagonal": (seqpar.linear_attention, linear, qkv | {"log_decay": diagonal}),
        "delta": (seqpar.delta_attention, delta, qkv | {"beta": beta}),
        "gated delta": (
            seqpar.delta_attention,
            delta,
            qkv | {"beta": beta, "log_decay": diagonal},
        ),
        "dplr": (
            seqpar.dplr_attention,
            dplr,
            qkv | {"a": -a / 2, "b": b, "log_decay": diagonal},
        ),
        "conv": (
            seqpar.causal_conv1d,
            reference.causal_conv1d,
            {"x": q.flatten(2), "weight": torch.randn(HEADS * K, 4).bfloat16().double()},
        ),
        "softmax": (
            seqpar.softmax_attention,
            reference.softmax_attention,
            {"q": q, "k": k[:, :, :2] * 3, "v": v[:, :, :2]},
        ),
    }


def expected(case: Case, do: Tensor) -> dict[str, Tensor]:
    _, spec, inputs = case
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o = spec(**leaves, cu_seqlens=DOCUMENTS)
    gradients = torch.autograd.grad((o * do).sum(), list(leaves.values()))
    return {"o": o.detach(), **dict(zip(leaves, gradients, strict=True))}


def run(
    case: Case,
    do: Tensor,
    sp: seqpar.SequenceParallel,
    dtype: torch.dtype,
    device: torch.device,
    **options: object,
) -> dict[str, Tensor]:
    function, _, inputs = case

    def mine(x: Tensor) -> Tensor:
        return (x if x.dim() == 2 else sp.layout.shard(x, sp.rank)).to(device, dtype)

    leaves = {name: mine(x).requires_grad_() for name, x in inputs.items()}
    o = function(**leaves, **options, sp=sp)
    gradients = torch.autograd.grad((o * mine(do)).sum(), list(leaves.values()))
    found = {"o": o.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: x.cpu() for name, x in found.items()}


def check_all(sp_of: Callable[[str], seqpar.SequenceParallel], device: torch.device) -> None:
    for name, case in cases().items():
        _, spec, inputs = case
        o = spec(**inputs, cu_seqlens=DOCUMENTS)
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).bfloat16().double()
        wanted = expected(case, do)
        world = sp_of("allgather").layout.world_size
        # PyTorch's flash operator takes 16-bit inputs only
        dtypes = [torch.bfloat16] if name == "softmax" else [torch.float32, torch.bfloat16]
        for dtype in dtypes:
            bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
            ways: list[tuple[str, dict[str, object]]] = [("allgather", {})]
            if world > 1 and name == "softmax":
                ways = [("allgather", {"method": method}) for method in METHODS]
            elif world > 1:
                ways = [(exchange, {}) for exchange in EXCHANGES]
            for exchange, options in ways:
                sp = sp_of(exchange)
                for key, value in run(case, do, sp, dtype, device, **options).items():
                    label = f"{name} {key} {dtype} {exchange} {options} rank {sp.rank}"
                    if value.dim() == 2:  # a parameter: the sum of all ranks' shares
                        value = sp.comm.all_reduce(value.to(device)).cpu()
                        assert_close(label, value, wanted[key], bound)
                        continue
                    shard = sp.layout.shard(wanted[key], sp.rank)
                    assert_close(label, value, shard, bound, whole=wanted[key])


def test_one_gpu_equals_the_references() -> None:
    layout = seqpar.Layout(TOKENS, 1, cu_seqlens=DOCUMENTS)
    check_all(lambda exchange: seqpar.SequenceParallel(layout=layout), torch.device("cuda"))


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)  # the references are many small operations
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    for kind in ("contiguous", "zigzag"):
        layout = seqpar.Layout(TOKENS, size, kind, DOCUMENTS)

        def sp_of(exchange: str, layout: seqpar.Layout = layout) -> seqpar.SequenceParallel:
            return seqpar.SequenceParallel(layout=layout, exchange=exchange)

        check_all(sp_of, device)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_all_gpus_over_nccl_equal_the_references() -> None:
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    size = min(torch.cuda.device_count(), 4)
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, (size, folder), size)
