"""Compiles the kernels of convolution, norms and gate, without a GPU; run by test_triton_conv.py.

A process of its own, for under Triton's interpreter nothing can be compiled. Only here does CI see
what the interpreter cannot run: bf16 and the instructions behind FAST.
"""

from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqpar.kernels import conv_kernels, gate_kernels, norm_kernels

INTEGERS = {"batches", "length", "tokens", "tiles", "rows"}
UNITS = {"X_UNIT": 8, "Y_UNIT": 8, "G_UNIT": 2}
NORM = UNITS | {"HEADS": 16, "DIM": 128, "FAST": True, "ROWS": 16, "COLS": 128}
GATE = {"DIM": 896, "FAST": True, "ROWS": 4, "COLS": 1024}
CONV = UNITS | {"CHANNELS": 768, "DIM": 384, "SILU": True, "FAST": True, "UNROLL": 4}


def compile_for(kernel: Any, capability: int, given: dict[str, Any], warps: int) -> str:
    """Its PTX."""
    names = kernel.arg_names
    constants = {name: value for name, value in given.items() if name in names}
    signature = {}
    for name in names:
        strides = len(name) == 2 and name[1] in "bth" and name != "dx"
        kind = {
            "seen": "*i32",
            "sums": "*fp32",
            "scale": "*fp32",
            "d_scale": "*fp32",
            "eps": "fp32",
        }.get(name, "*bf16")
        kind = "i32" if name in INTEGERS or strides else kind
        signature[name] = "constexpr" if name in constants else kind
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    target = GPUTarget("cuda", capability, 32)
    ptx: str = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
    return ptx


if __name__ == "__main__":
    for (capability, width), cut in product(((80, 4), (90, 4), (90, 8)), (True, False)):
        flags = dict.fromkeys(("HALO", "PACKED", "BIAS"), cut)
        size = {"WIDTH": width, "RANGES": 2 if cut else 1, "BLOCK": 128, "ROWS": 64}
        options = CONV | flags | size
        for kernel in (conv_kernels.conv_kernel, conv_kernels.conv_backward_kernel):
            ptx = compile_for(kernel, capability, options, 1)
            assert "ex2.approx.ftz" in ptx
            assert "ld.global.v2.b32" in ptx, "loads are not as wide as a thread's channels"
    for silu, first in product((True, False), repeat=2):
        options = NORM | {"SILU": silu, "GATE_FIRST": first}
        for kernel in (norm_kernels.gated_norm_kernel, norm_kernels.gated_norm_backward_kernel):
            assert "ex2.approx.ftz" in compile_for(kernel, 90, options, 4)
    for kernel in (norm_kernels.unit_kernel, norm_kernels.unit_backward_kernel):
        assert "ld.global.v4.b32" in compile_for(kernel, 90, NORM, 4)
    for kernel in (gate_kernels.gated_silu_kernel, gate_kernels.gated_silu_backward_kernel):
        ptx = compile_for(kernel, 90, GATE, 4)
        assert "ex2.approx.ftz" in ptx
        assert "ld.global.v4.b32" in ptx
    print("compiled")
