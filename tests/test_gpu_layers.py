"""Layers cut over GPUs: `pytest -m gpu tests/test_gpu_layers.py`, on two GPUs of one machine.

The blocks of softmax attention by both operators against fp64; then functions and mixers over two
GPUs: each output and gradient, on each rank, against fp64 and against what one GPU makes of it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_checks import error
from gpu_ranks import run_on_gpus
from torch import Tensor

import seqpar
from seqpar import Layout, SequenceParallel
from seqpar.kernels import reference
from seqpar.kernels.softmax import block_backward, block_forward, merge, uses_cudnn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")

HERE = "test_gpu_layers"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = 2048 if torch.cuda.is_available() else 128
HEADS, K = 4, 128
LEAST = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # errors that are never too large
METHODS = ("allgather", "ring", "ulysses")
DRAWS = 6  # of mixers: errors of gradients of few numbers are a matter of chance
Found = dict[str, Tensor]


def rand(*shape: int) -> Tensor:
    """Exact in bf16."""
    return torch.randn(*shape).bfloat16().double()


# One block: queries, keys, heads, kv heads, dim, causal.
BLOCKS = [
    (256, 256, 4, 4, 128, True),
    (256, 640, 4, 1, 128, False),
    (1000, 200, 4, 2, 64, False),
    (129, 129, 2, 2, 64, True),
    (3, 1, 2, 1, 64, False),
]


@pytest.mark.parametrize("cudnn", [False, True], ids=["flash", "cudnn"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_and_their_merging_equal_fp64(
    block: tuple[int, int, int, int, int, bool], cudnn: bool
) -> None:
    """Two blocks of keys merged, and the gradients of both from the merged rows.

    q, k and v are slices of tensors [B, T, H, D] as `attend` takes them; the gradient of o comes
    once as o lies and once otherwise, which must be no matter.
    """
    torch.manual_seed(0)
    queries, keys, heads, kv_heads, dim, causal = block
    if cudnn and not uses_cudnn(torch.empty(1, dim, device=DEVICE), True):
        pytest.skip("cuDNN is not taken on this GPU")
    scale, batch = dim**-0.5, 2
    q = rand(batch, queries + 8, heads + 1, dim).transpose(1, 2)
    kv = rand(2, batch, 300 + keys, kv_heads, dim).transpose(2, 3)
    do = rand(batch, queries, heads, dim).transpose(1, 2)
    exact = [x.requires_grad_() for x in (q[:, 1:, 8:].detach(), *kv.detach())]
    given = [x.to(DEVICE, torch.bfloat16) for x in (q, kv)]
    own, (k, v) = given[0][:, 1:, 8:], given[1]
    parts = [(slice(300, 300 + keys), causal), (slice(0, 300), False)]
    outs = [block_forward(own, k[:, :, at], v[:, :, at], c, scale, cudnn) for at, c in parts]
    (o, lse), (other, other_lse) = ((o.float(), lse.float()) for o, lse in outs)
    o, lse = merge(o, lse, other, other_lse)
    o = o.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)

    mask = torch.zeros(queries, 300 + keys, dtype=torch.bool)
    mask[:, 300:] = torch.ones(queries, keys).triu(1).bool() if causal else mask[:, 300:]
    k_all, v_all = (x.repeat_interleave(heads // kv_heads, 1) for x in exact[1:])
    scores = (exact[0] @ k_all.mT * scale).masked_fill(mask, -torch.inf)
    right = scores.softmax(-1) @ v_all
    wanted = torch.autograd.grad(right, exact, do)
    assert error(lse.double().cpu(), scores.logsumexp(-1).detach()) < 1e-5
    assert error(o.double().cpu(), right.detach()) < 5e-3

    lying = do.to(DEVICE, torch.bfloat16)
    for gradient in (lying, lying.contiguous()):
        dq, dkv = torch.zeros(own.shape, device=DEVICE), torch.zeros(given[1].shape, device=DEVICE)
        for at, c in parts:
            rest = o, lse, c, scale, cudnn
            block_dq, dk, dv = block_backward(gradient, own, k[:, :, at], v[:, :, at], *rest)
            dq += block_dq
            dkv[0, :, :, at] += dk
            dkv[1, :, :, at] += dv
        for name, x, y in zip("qkv", (dq, *dkv), wanted, strict=True):
            assert error(x.double().cpu(), y) < 1e-2, f"d{name}"


def test_whole_sequences_go_to_cudnn_on_hopper_and_documents_to_flash() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    q = torch.empty(1, 128, dtype=torch.bfloat16, device=DEVICE)
    assert uses_cudnn(q, True)
    assert not uses_cudnn(q, False)
    assert not uses_cudnn(torch.empty(1, 256, device=DEVICE), True)


def cases() -> dict[str, tuple[Callable[..., Tensor], Found, list[dict[str, Any]]]]:
    """Name -> function, inputs [1, T, ...], options to try."""
    torch.manual_seed(1)
    shape = 1, TOKENS, HEADS
    q, k, v = (rand(*shape, K) for _ in range(3))
    unit = torch.nn.functional.normalize(k, dim=-1).bfloat16().double()
    scalar = -torch.rand(shape).double() * 0.1
    diagonal = -(torch.rand(*shape, K).double() ** 3) * 0.3
    beta = torch.rand(shape).double()
    qkv = {"q": q, "k": unit, "v": v}
    grouped = {"q": rand(1, TOKENS, 8, K), "k": k[:, :, :2], "v": v[:, :, :2]}
    linear, delta = seqpar.linear_attention, seqpar.delta_attention
    a_b = {"a": -unit / 2, "b": unit.flip(1)}
    return {
        "linear": (linear, qkv, [{}]),
        "scalar": (linear, qkv | {"log_decay": scalar}, [{}]),
        "diagonal": (linear, qkv | {"log_decay": diagonal}, [{}]),
        "delta": (delta, qkv | {"beta": beta}, [{}]),
        "gated delta": (delta, qkv | {"beta": beta, "log_decay": scalar}, [{}]),
        "kda": (delta, qkv | {"beta": beta, "log_decay": diagonal}, [{}]),
        "dplr": (seqpar.dplr_attention, qkv | a_b | {"log_decay": diagonal}, [{}]),
        "softmax": (seqpar.softmax_attention, grouped, [{"method": m} for m in METHODS]),
        "softmax of 8 kv heads": (
            seqpar.softmax_attention,
            {name: rand(1, TOKENS, 8, K) for name in "qkv"},
            [{"method": "allgather"}],
        ),
    }


@contextmanager
def plain_kernels() -> Iterator[None]:
    before = os.environ.get("SEQPAR_KERNELS")
    os.environ["SEQPAR_KERNELS"] = "torch"
    try:
        yield
    finally:
        del os.environ["SEQPAR_KERNELS"]
        if before is not None:
            os.environ["SEQPAR_KERNELS"] = before


def differentiate(function: Callable[..., Tensor], given: Found, do: Tensor, **rest: Any) -> Found:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    o = function(**leaves, **rest)
    gradients = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
    return {"o": o.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact(function: Callable[..., Tensor], given: Found, do: Tensor) -> Found:
    """In fp64: softmax on the host, the recurrences by plain PyTorch."""
    if function is seqpar.softmax_attention:
        return differentiate(reference.softmax_attention, given, do)
    with plain_kernels():
        found = differentiate(function, {n: x.to(DEVICE) for n, x in given.items()}, do.to(DEVICE))
    return {name: x.cpu() for name, x in found.items()}


def held(label: str, found: Found, one: Found, right: Found, layout: Layout, rank: int) -> None:
    """This rank's shard of each tensor is at most twice as far off as one GPU's."""
    dtype = found["o"].dtype
    for name, x in found.items():
        wanted = layout.shard(right[name], rank)
        alone = error(layout.shard(one[name].double().cpu(), rank), wanted)
        off = error(x.double().cpu(), wanted)
        print(f"{label} {name}, rank {rank}: {off:.1e}, one GPU {alone:.1e}")
        assert off <= max(2 * alone, LEAST[dtype]), f"{label} {name}, rank {rank}: {off:.2e}"


def functions(rank: int, size: int, name: str) -> None:
    function, given, ways = cases()[name]
    softmax = function is seqpar.softmax_attention
    do = rand(*(given["q"] if softmax else given["v"]).shape)
    right = exact(function, given, do)
    for dtype in (torch.bfloat16,) if softmax else (torch.float32, torch.bfloat16):
        inputs = {
            n: x.to(DEVICE, torch.float32 if n in ("log_decay", "beta") else dtype)
            for n, x in given.items()
        }
        one = differentiate(function, inputs, do.to(DEVICE))
        for kind in ("contiguous", "zigzag"):
            layout = Layout(TOKENS, size, kind)
            own = {n: layout.shard(x, rank) for n, x in inputs.items()}
            own_do = layout.shard(do.to(DEVICE), rank)
            for options in ways:
                sp = SequenceParallel(layout=layout)
                found = differentiate(function, own, own_do, **options, sp=sp)
                held(f"{name} {dtype} {kind} {options}", found, one, right, layout, rank)


def mixers(rank: int, size: int, kinds: str) -> None:
    """Modules of Megatron layers: outputs, and gradients of input and parameters."""
    from megatron_setup import Rank, Setting, tiny

    from seqpar.models.sequence import SequenceParallelParams

    wide = {"hidden_size": 256, "num_heads": 4, "head_dim": 64, "kv_heads": 2, "num_experts": 0}
    state = Rank(tiny(kinds, **wide), Setting(context=size))
    layout = Layout(TOKENS, size)
    torch.manual_seed(3)
    given = [(rand(TOKENS, 1, 256), rand(TOKENS, 1, 256)) for _ in range(DRAWS)]

    def run(module: Any, sp: SequenceParallel, x: Tensor, dy: Tensor) -> tuple[Found, Found]:
        leaf = x.detach().clone().requires_grad_()
        out, _ = module(leaf, packed_seq_params=SequenceParallelParams(sp))
        named = dict(module.named_parameters())
        dx, *rest = torch.autograd.grad(out, [leaf, *named.values()], dy.to(out.dtype))
        # tokens second, as in functions
        found = {"o": out.detach().transpose(0, 1), "x": dx.transpose(0, 1)}
        return found, dict(zip(named, rest, strict=True))

    for layer in state.network.decoder.layers:
        module = layer.self_attention.cpu().double()
        kept = {name: y.clone() for name, y in module.state_dict().items() if y is not None}
        whole, name = SequenceParallel(layout=Layout(TOKENS, 1)), type(module).__name__
        with plain_kernels():
            right = [run(module, whole, *each) for each in given]
        for dtype in (torch.bfloat16,) if name == "SoftmaxAttention" else LEAST:
            module.to(DEVICE, dtype).load_state_dict(kept)
            sp = SequenceParallel(state.groups.cp, layout)
            gradients: dict[str, list[list[Tensor]]] = {}  # by parameter, of each draw
            for (x, dy), (wanted, weights) in zip(given, right, strict=True):
                on_gpu = x.to(DEVICE, dtype), dy.to(DEVICE)
                one, one_weights = run(module, whole, *on_gpu)
                found, own = run(module, sp, *(layout.shard(y, rank, dim=0) for y in on_gpu))
                held(f"{name} {dtype}", found, one, wanted, layout, rank)
                for key, gradient in own.items():
                    total = sp.comm.all_reduce(gradient.float())
                    three = total, one_weights[key], weights[key]
                    gradients.setdefault(key, []).append([y.double().cpu() for y in three])
            for key, draws in gradients.items():
                total, alone, exact = map(torch.stack, zip(*draws, strict=True))
                off, usual = error(total, exact), error(alone, exact)
                print(f"{name} {dtype} {key}: {off:.1e}, one GPU {usual:.1e}")
                assert off <= max(2 * usual, LEAST[dtype]), f"{name} {dtype} {key}: {off:.2e}"


@two_gpus
@pytest.mark.parametrize("name", cases())
def test_functions_on_two_gpus_are_as_exact_as_on_one(name: str) -> None:
    compare("functions", name)


@two_gpus
@pytest.mark.parametrize("kind", "GDKMRN")
def test_mixers_on_two_gpus_are_as_exact_as_on_one(kind: str) -> None:
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    compare("mixers", kind)


def compare(what: str, name: str) -> None:
    for ended in run_on_gpus(HERE, what, name, size=2, timeout=250):  # most of it compiles kernels
        print(ended.output)
        assert ended.code == 0, ended.output[-3000:]
