"""Time of convolution, norms of heads and gate of experts on one GPU, beside the memory's floor.

    python -m tests.bench.elementwise

bf16, 65,536 tokens; medians over CUDA events. The floor moves each tensor once, at the rate of a
large copy: forward inputs and output, backward inputs, dy and the gradients. Plain PyTorch is the
same function with SEQPAR_KERNELS=torch, whose convolution goes forwards once more in its backward
pass; flash-linear-attention is timed where it is installed.
"""

import argparse
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import seqpar
from seqpar.kernels.gate import gated_silu
from seqpar.kernels.norm import gated_rms_norm, unit

from .kernels import copy_bandwidth, median_ms

TOKENS = 65536
# name -> shapes of the large inputs, of the parameters
CASES: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "conv": ([(1, TOKENS, 6144)], [(6144, 4)]),
    "gated norm": ([(1, TOKENS, 16, 128)] * 2, [(128,)]),
    "unit": ([(1, TOKENS, 16, 128)], []),
    "gate": ([(4 * TOKENS, 2 * 896)], [(4 * TOKENS,)]),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.elementwise needs an NVIDIA GPU")
    rate = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copies move {rate / 1e12:.2f} TB/s; times in ms")
    print(f"{'':10} {'':8} {'forward':>8} {'floor':>8} {'both':>8} {'floor':>8} {'of floor':>8}")
    for case, (large, small) in CASES.items():
        inputs = [
            torch.randn(shape, device="cuda").bfloat16().requires_grad_()
            for shape in (*large, *small)
        ]
        tensor = inputs[0].numel() * inputs[0].element_size()
        ways = functions(case)
        with torch.no_grad():
            dy = torch.randn_like(ways["seqpar"](*inputs))
        moved = len(large) + dy.numel() / inputs[0].numel()  # x, gate, y
        forward_floor = moved * tensor / rate * 1e3
        both_floor = (2 * moved + len(large)) * tensor / rate * 1e3
        for who, function in ways.items():
            forward, both = measure(function, inputs, dy)
            print(
                f"{case:10} {who:8} {forward:8.3f} {forward_floor:8.3f} {both:8.3f} "
                f"{both_floor:8.3f} {both / both_floor:8.2f}",
                flush=True,
            )


def functions(case: str) -> dict[str, Callable[..., Tensor]]:
    """Who -> the function."""

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return seqpar.causal_conv1d(x, weight, activation="silu")

    known: dict[str, Callable[..., Tensor]]
    known = {"conv": conv, "gated norm": gated_rms_norm, "unit": unit, "gate": gated_silu}
    ours = known[case]

    def plain(*inputs: Tensor) -> Tensor:
        os.environ["SEQPAR_KERNELS"] = "torch"
        try:
            return ours(*inputs)
        finally:
            del os.environ["SEQPAR_KERNELS"]

    found = {"seqpar": ours, "PyTorch": plain}
    theirs = fla(case)
    return found | ({"fla": theirs} if theirs is not None else {})


def fla(case: str) -> Callable[..., Tensor] | None:
    """flash-linear-attention's function, whose modules have moved from version to version."""
    places = {
        "conv": ("causal_conv1d", ("fla.modules.conv", "fla.modules.convolution")),
        "gated norm": ("rms_norm_gated", ("fla.modules.fused_norm_gate",)),
        "unit": ("l2norm", ("fla.modules.l2norm",)),
    }
    name, modules = places.get(case, ("", ()))
    function: Any = None
    for module in modules:
        try:
            function = function or getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    if function is None:
        return None
    calls: dict[str, Callable[..., Tensor]] = {
        "conv": lambda x, weight: function(x, weight, activation="silu")[0],
        "gated norm": lambda x, gate, weight: function(x, gate, weight, None, eps=1e-5),
        "unit": lambda x: function(x),
    }
    return calls[case]


def measure(
    function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor
) -> tuple[float, float]:
    """ms forward, and forward and backward; NaN where memory or the function fails."""

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, dy)

    times = []
    for run in (forward, both):
        try:
            times.append(median_ms(run))
        except (RuntimeError, TypeError) as problem:
            print(f"    {str(problem).splitlines()[0][:90]}")
            times.append(float("nan"))
        torch.cuda.empty_cache()
    return times[0], times[1]


if __name__ == "__main__":
    main()
