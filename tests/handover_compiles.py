"""Compiles the kernels that hand states on, without a GPU; run by test_handover.py.

A process of its own, for under Triton's interpreter nothing can be compiled.
"""

from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqpar.kernels.handover_kernels import greet_kernel, handover_kernel, pace_kernel

COUNTERS = ("written", "received", "read_there", "written_there", "sent", "read", "late")
POINTERS = dict.fromkeys((*COUNTERS, "counters", "there", "here"), "*i32")
POINTERS |= dict.fromkeys(("A", "B", "entering", "inbox", "outbox"), "*fp32")


def build(kernel: Any, **constants: object) -> str:
    """The kernel's PTX for Hopper, all pointers aligned."""
    names = kernel.arg_names
    signature = {name: POINTERS.get(name, "i32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]] for name in names if name in POINTERS
    }
    source = ASTSource(kernel, signature, constexprs=places, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    print(kernel.fn.__name__, constants, compiled.metadata.shared, "bytes of shared memory")
    ptx: str = compiled.asm["ptx"]
    return ptx


if __name__ == "__main__":
    for kernel in (pace_kernel, greet_kernel):
        assert "ld.global.sys.acquire" in build(kernel)
    ends = ((True, True), (True, False), (False, True))
    for kind, (receives, sends) in product(("none", "scalar", "diagonal", "dense"), ends):
        size = {"K": 128, "V": 128, "BK": 128, "BV": 64}
        flags = {"RECEIVES": receives, "SENDS": sends, "THROUGH": receives}
        ptx = build(handover_kernel, KIND=kind, **size, **flags)
        assert "ld.global.sys.acquire" in ptx
        assert "atom.global.sys.release.exch" in ptx
        assert "st.global.v4" in ptx, "a tile is written in words"
        assert not receives or "ld.global.cg" in ptx
