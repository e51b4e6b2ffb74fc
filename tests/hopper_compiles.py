"""Compiles the Hopper kernel for every kind of pass, without a GPU; run by test_triton.py.

A process of its own, for under Triton's interpreter nothing can be compiled.
"""

from itertools import product

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
    constants: dict[str, object] = {
        "HEADS": 4,
        "DY": dim,
        "DZ": dim,
        "C": CHUNK,
        "SPAN": 512,
        "STAGES": 3,
    }
    constants |= {f"{x}_GROUP": 2 for x in "XYZW"}
    constants |= {
        "DECAY": decay,
        "REVERSE": reverse,
        "GATE": gate,
        "STRICT": strict,
        "SPLIT": split,
    }
    constants["num_warps"] = dim // 16
    wide = decay == "value" or strict  # whose output is fp32
    signature = {}
    names = run_hopper_kernel.arg_names
    for name in names:
        if name in DESCRIPTORS:
            tile = [CHUNK, dim]
            dtype = gl.float32 if wide and name == "out" else gl.bfloat16
            layout = gl.NVMMASharedLayout.get_default_for(tile, dtype)
            signature[name] = f"tensordesc<{dtype}{tile},{layout!r}>"
        else:
            kind = "fp32" if name == "scale" else POINTERS.get(name, "i32")
            kind = "*fp32" if wide and name == "out_pointer" else kind
            signature[name] = "constexpr" if name in constants else kind
    places = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(run_hopper_kernel, signature, constexprs=places)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": dim // 16}
    )
    shared = compiled.metadata.shared
    print(f"{dim} {decay} {reverse=} {gate=} {strict=} {split=}: {shared} bytes of shared memory")
    assert shared <= 232448, "more than a Hopper program may have"


if __name__ == "__main__":
    compile_for(64, "none", False, False)
    for reverse, gate in product((False, True), repeat=2):
        compile_for(128, "scalar", reverse, gate)
        compile_for(128, "value" if gate else "key", reverse, gate)
    # passes of the delta rule
    compile_for(128, "none", False, False, strict=True)
    compile_for(128, "value", False, False, strict=True, split=True)
    compile_for(128, "value", False, False, split=True)
