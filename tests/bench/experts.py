"""Time of the experts of one layer on one GPU, and of the tokens' way to them and back.

    python -m tests.bench.experts

bf16, 32K tokens of which each goes to 8 experts of 64, hidden size 1,024 and width 896 (A0.3B-2B);
the same with 8 of the 64 on this GPU, as with expert parallelism, and with experts that get
unequally many tokens. Medians over CUDA events, in which the GPU may wait for the host, and what
the host takes to launch; the products' arithmetic over the first. Beside them the same products
with one expert for all rows, the most that can be reached.

To them and back: a row for each of a token's 8 experts and the sum of these, by gathers
(seqpar/models/dispatch.py) and by Megatron's permutation. Each row is moved four times, both ways.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqpar.kernels.gate import gated_silu
from seqpar.kernels.grouped import grouped_linear

from .kernels import host_ms, median_ms

ROWS, HIDDEN, WIDTH = 8 * 32768, 1024, 896


def grouped(x: Tensor, first: Tensor, second: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
    hidden = gated_silu(grouped_linear(x, first, counts), scale)
    return grouped_linear(hidden, second, counts)


def one_by_one(x: Tensor, first: Tensor, second: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
    parts = zip(x.split(counts.tolist()), scale.split(counts.tolist()), strict=True)
    weights = zip(first.unbind(), second.unbind(), strict=True)
    found = []
    for (rows, factor), (wide, narrow) in zip(parts, weights, strict=True):
        found.append(F.linear(gated_silu(F.linear(rows, wide), factor), narrow))
    return torch.cat(found)


def one_matrix(x: Tensor, first: Tensor, second: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    return F.linear(gated_silu(F.linear(x, first[0]), scale), second[0])


WAYS: dict[str, Callable[..., Tensor]] = {
    "grouped": grouped,
    "one by one": one_by_one,
    "one matrix": one_matrix,
}


def counts_of(experts: int, uneven: bool) -> Tensor:
    shares = torch.arange(experts) * float(uneven) + 1.0
    counts = (shares / shares.sum() * ROWS).long()
    counts[-1] += ROWS - counts.sum()
    return counts.pin_memory()


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.experts needs an NVIDIA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; times in ms")
    heads = ("forward", "both", "host", "TFLOP/s")
    print(f"{'':18} {'':10}", *(f"{head:>8}" for head in heads))
    flops = 3 * 2 * ROWS * 3 * HIDDEN * WIDTH  # forward and backward
    for experts, uneven in ((64, False), (64, True), (8, False)):
        counts = counts_of(experts, uneven)
        shapes = [(ROWS, HIDDEN), (experts, 2 * WIDTH, HIDDEN), (experts, HIDDEN, WIDTH), (ROWS,)]
        given = [torch.randn(shape, device="cuda").mul_(0.05).bfloat16() for shape in shapes]
        given[-1] = given[-1].float()
        for name, way in WAYS.items():
            times = measure(way, [each.requires_grad_() for each in given], counts)
            case = f"{experts} experts{', uneven' if uneven else ''}"
            rate = flops / times[1] / 1e9
            print(f"{case:18} {name:10}", *(f"{x:8.2f}" for x in times), f"{rate:8.0f}", flush=True)
    on_the_way()


def on_the_way() -> None:
    """Tokens to experts and back: without the experts, and with no exchange between GPUs."""
    from megatron.core.transformer.moe import moe_utils

    from seqpar.models.dispatch import permute, unpermute

    tokens, top, experts = ROWS // 8, 8, 64
    probs = torch.rand(tokens, experts, device="cuda")
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.topk(top)[1], True)
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    inputs = [x.requires_grad_(), probs.requires_grad_()]
    ways = {
        "gathers": (permute, unpermute),
        "Megatron's": (moe_utils.permute, moe_utils.unpermute),
    }
    for name, (go, back) in ways.items():

        def way(x: Tensor, probs: Tensor, _: Tensor, go: Any = go, back: Any = back) -> Tensor:
            rows, share, order, *_rest = go(x, chosen, probs=probs, num_out_tokens=ROWS)
            y: Tensor = back(rows, order, restore_shape=x.shape, routing_map=chosen)
            return y + share.sum().to(y.dtype)

        times = measure(way, inputs, chosen)
        print(f"{'to them and back':18} {name:10}", *(f"{x:8.2f}" for x in times), flush=True)


def measure(
    way: Callable[..., Tensor], inputs: list[Tensor], counts: Tensor
) -> tuple[float, float, float]:
    """ms of the GPU forward, forward and backward; of the host for both."""
    dy = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            way(*inputs, counts)

    def both() -> None:
        torch.autograd.grad(way(*inputs, counts), inputs, dy, allow_unused=True)

    return median_ms(forward), median_ms(both), host_ms(both)


if __name__ == "__main__":
    main()
