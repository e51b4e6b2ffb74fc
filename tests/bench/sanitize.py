"""Small runs of every GPU kernel, for NVIDIA's compute-sanitizer to watch.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.bench.sanitize
compute-sanitizer --tool racecheck python -m tests.bench.sanitize
"""

import os
from typing import Any

import torch

import seqpar
from seqpar import Layout, SequenceParallel

# tokens, heads of q and k, of v, K, V, where documents begin and end
CASES = [
    (200, 1, 2, 128, 128, None),
    (333, 2, 2, 64, 128, [0, 1, 70, 333]),
    (100, 1, 1, 48, 24, None),
]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.sanitize needs an NVIDIA GPU")
    os.environ["SEQPAR_KERNELS"] = "triton"  # all that there are
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, heads, value_heads, K, V, documents in CASES:
            sp = SequenceParallel(layout=Layout(tokens, 1, cu_seqlens=documents), segment_tokens=64)
            for width in (None, 0, K):
                q, k = (torch.randn(1, tokens, heads, K, device="cuda", dtype=dtype) for _ in "qk")
                v = torch.randn(1, tokens, value_heads, V, device="cuda", dtype=dtype)
                inputs = [q, k / K, v]
                if width is not None:
                    shape = (1, tokens, value_heads, *([width] if width else []))
                    inputs.append(-20 * torch.rand(shape, device="cuda") ** 8)
                leaves = [x.detach().requires_grad_() for x in inputs]
                beta = torch.rand(1, tokens, value_heads, device="cuda").requires_grad_()
                rule = [*leaves[:3], beta, *leaves[3:]]
                calls: list[tuple[Any, list[torch.Tensor]]]
                calls = [(seqpar.linear_attention, leaves), (seqpar.delta_attention, rule)]
                if width:
                    a = torch.nn.functional.normalize(torch.randn_like(leaves[3]), dim=-1)
                    low = [x.to(dtype).requires_grad_() for x in (-a, a / 2)]
                    calls.append((seqpar.dplr_attention, [*leaves[:3], *low, leaves[3]]))
                for function, given in calls:
                    o = function(*given, sp=sp)
                    gradients = torch.autograd.grad(o.float().square().sum(), given)
                    torch.cuda.synchronize()
                    if not all(torch.isfinite(x).all() for x in (o, *gradients)):
                        raise SystemExit(f"not finite: {dtype}, {tokens} tokens, decay {width}")
    print("all ran")


if __name__ == "__main__":
    main()
