"""Compiles the Hopper kernel for every kind of pass, without a GPU; run by test_triton.py.

A process of its own, for under Triton's interpreter nothing can be compiled.
"""

from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from seqpar.kernels.hopper import CHUNK
from seqpar.kernels.hopper_kernels import run_hopper_kernel

DESCRIPTORS = ("x", "y", "z", "other", "out")
POINTERS = {"out_pointer": "*bf16"} | dict.fromkeys(["steps", "counts", "table"], "*i32")
POINTERS |= dict.fromkeys(["gate", "entering", "saved", "shares", "flows", "halves"], "*fp32")


def compile_for(
    dim: int, decay: str, reverse: bool, gate: bool, strict: bool = False, split: bool = False
) -> None:
    constants: dict[str, object] = {"GATE": gate, "STRICT": strict, "SPLIT": split}
    constants["EXACT"] = strict
    constants |= {"SPAN": 512}
    constants |= {f"{x}_GROUP": 2 for x in "XYZW"}
    wide = {"out", "out_pointer"} if decay == "value" else set()  # whose output is fp32
    build(run_hopper_kernel, dim, decay, reverse, constants, wide)


def build(
    kernel: Any,
    dim: int,
    decay: str,
    reverse: bool,
    constants: dict[str, object],
    wide: set[str],
) -> None:
    constants |= {"HEADS": 4, "DY": dim, "DZ": dim, "DECAY": decay, "REVERSE": reverse}
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in DESCRIPTORS:
            tile = [CHUNK, dim]
            dtype = gl.float32 if name in wide else gl.bfloat16
            layout = gl.NVMMASharedLayout.get_default_for(tile, dtype)
            signature[name] = f"tensordesc<{dtype}{tile},{layout!r}>"
        elif name in constants:
            signature[name] = "constexpr"
        elif name in wide:
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name == "scale" else POINTERS.get(name, "i32")
    places = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, constexprs=places)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": dim // 16}
    )
    shared = compiled.metadata.shared
    print(f"{kernel.fn.__name__} {dim} {decay} {reverse=}: {shared} bytes of shared memory")
    assert shared <= 232448, "more than a Hopper program may have"


if __name__ == "__main__":
    compile_for(64, "none", False, False)
    for reverse, gate in product((False, True), repeat=2):
        compile_for(128, "scalar", reverse, gate)
        compile_for(128, "value" if gate else "key", reverse, gate)
    # passes of the delta rule
    compile_for(128, "none", False, False, strict=True)
    for dim in (64, 128):
        compile_for(dim, "scalar", False, True, split=True)
        compile_for(dim, "scalar", False, True, strict=True, split=True)
    compile_for(128, "value", False, False, strict=True, split=True)
    compile_for(128, "value", False, False, split=True)
    compile_for(128, "scalar", False, True, strict=True, split=True)
