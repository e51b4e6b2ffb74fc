"""Small runs of every GPU kernel, for NVIDIA's compute-sanitizer to watch.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.bench.sanitize
compute-sanitizer --tool racecheck python -m tests.bench.sanitize

Most of the time goes into compiling: --share 0/6 to 5/6 cut the runs over processes side by side.
--control runs the kernel of sanitize_kernels.py instead: what racecheck says of it, it says of
handovers by mbarriers that are right.
"""

import argparse
import os
from itertools import product
from typing import Any

import torch

import seqpar
from seqpar import Layout, SequenceParallel
from seqpar.kernels.hopper import tiles

from .sanitize_kernels import handover_kernel

# tokens, heads of q and k, of v, K, V, where documents begin and end
Case = tuple[int, int, int, int, int, list[int] | None]
CASES: list[Case] = [
    (200, 1, 2, 128, 128, None),
    (333, 2, 2, 64, 128, [0, 1, 70, 333]),
    (100, 1, 1, 48, 24, None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", default="0/1", help="every Nth run from the Ith on: I/N")
    parser.add_argument("--control", action="store_true", help="a handover that is right")
    args = parser.parse_args()
    first, every = map(int, args.share.split("/"))
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.sanitize needs an NVIDIA GPU")
    if args.control:
        hand_over()
        return
    os.environ["SEQPAR_KERNELS"] = "triton"  # all that there are
    runs = product((torch.bfloat16, torch.float32), CASES, ("none", "scalar", "diagonal"))
    for dtype, case, decay in list(runs)[first::every]:
        run(dtype, case, decay)
    print("all ran")


def run(dtype: torch.dtype, case: Case, decay: str) -> None:
    """All functions that have such decays, forward and backward."""
    tokens, heads, value_heads, K, V, documents = case
    sp = SequenceParallel(layout=Layout(tokens, 1, cu_seqlens=documents), segment_tokens=64)
    q, k = (torch.randn(1, tokens, heads, K, device="cuda", dtype=dtype) for _ in "qk")
    v = torch.randn(1, tokens, value_heads, V, device="cuda", dtype=dtype)
    inputs = [q, k / K, v]
    if decay != "none":
        shape = (1, tokens, value_heads, *([K] if decay == "diagonal" else []))
        inputs.append(-20 * torch.rand(shape, device="cuda") ** 8)
    leaves = [x.detach().requires_grad_() for x in inputs]
    beta = torch.rand(1, tokens, value_heads, device="cuda").requires_grad_()
    rule = [*leaves[:3], beta, *leaves[3:]]
    calls: list[tuple[Any, list[torch.Tensor]]]
    calls = [(seqpar.linear_attention, leaves), (seqpar.delta_attention, rule)]
    if decay == "diagonal":
        a = torch.nn.functional.normalize(torch.randn_like(leaves[3]), dim=-1)
        low = [x.to(dtype).requires_grad_() for x in (-a, a / 2)]
        calls.append((seqpar.dplr_attention, [*leaves[:3], *low, leaves[3]]))
    for function, given in calls:
        o = function(*given, sp=sp)
        gradients = torch.autograd.grad(o.float().square().sum(), given)
        torch.cuda.synchronize()
        if not all(torch.isfinite(x).all() for x in (o, *gradients)):
            raise SystemExit(f"not finite: {dtype}, {tokens} tokens, {decay} decay")


def hand_over(size: int = 256, count: int = 20) -> None:
    right = torch.arange(size) * count + count * (count - 1) // 2
    numbers = torch.zeros(1, 64, 1, 64, dtype=torch.bfloat16, device="cuda")
    for way in ("arrives", "expects nothing", "expects a tile"):
        print(f"the warpgroup that gives {way}", flush=True)
        out = torch.empty(size, dtype=torch.int32, device="cuda")
        handover_kernel[(4,)](*tiles(numbers)(numbers), out, count, size, way, num_warps=4)
        if not torch.equal(out.cpu().long(), right):
            raise SystemExit("the handover is wrong")
    print("the handovers are right")


if __name__ == "__main__":
    main()
