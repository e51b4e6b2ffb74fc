"""Compiles the delta rule's kernels for Hopper without a GPU; run by test_triton_delta.py.

A process of its own, for under Triton's interpreter nothing can be compiled.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from seqpar.kernels.hopper import CHUNK
from seqpar.kernels.hopper_keys_kernels import keys_hopper_kernel
from seqpar.kernels.hopper_scan_kernels import scan_hopper_kernel
from seqpar.kernels.hopper_solve_kernels import solve_hopper_kernel
from seqpar.kernels.hopper_walk_back_kernels import walk_back_hopper_kernel
from seqpar.kernels.hopper_walk_kernels import walk_hopper_kernel

INT32 = {"steps", "counts", "table", "levels"}
FP32 = {"beta", "gate", "entering", "leaving", "A", "B", "halves", "shares", "saved", "flows"}
BF16 = {"u_pointer", "r_pointer", "dx_pointer", "out_pointer", "solved", "w"}


def compile_for(
    kernel: Any,
    tiles: dict[str, int],
    warps: int,
    fp32: set[str],
    rows: int = CHUNK,
    **constants: object,
) -> None:
    """tiles: the widths of the tensors that come by descriptor, in `rows`. fp32: what else is."""
    constants |= {"HEADS": 4}
    if "GROUP" in kernel.arg_names:
        constants["GROUP"] = 2
    options = {name: constants.pop(name) for name in ("maxnreg",) if name in constants}
    signature = {}
    for name in kernel.arg_names:
        if name in tiles:
            dtype = gl.float32 if name in fp32 else gl.bfloat16
            layout = gl.NVMMASharedLayout.get_default_for([rows, tiles[name]], dtype)
            signature[name] = f"tensordesc<{dtype}{[rows, tiles[name]]},{layout!r}>"
        elif name in constants:
            signature[name] = "constexpr"
        elif name in FP32 | fp32:
            signature[name] = "*fp32"
        elif name in INT32 | BF16:
            signature[name] = "*i32" if name in INT32 else "*bf16"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        GluonASTSource(kernel, signature, constexprs=places),
        target=GPUTarget("cuda", 90, 32),
        options=options | {"num_warps": warps},
    )
    label = f"{kernel.fn.__name__} {constants}"
    print(f"{label}: {compiled.metadata.shared} bytes of shared memory", flush=True)
    assert compiled.metadata.shared <= 232448, "more than a Hopper program may have"


def main() -> None:
    whole = {"DK": 128, "DV": 128}
    k, v = dict.fromkeys(("w", "minus", "plus", "q"), 128), dict.fromkeys(("v", "u", "r"), 64)
    walk = {"PARTS": 2, "maxnreg": 168}
    back = dict.fromkeys(("q", "plus", "minus", "do", "r", "dx"), 128) | {"solved": 64}
    keys = dict.fromkeys(("u", "do", "dx", "q", "plus", "d_plus", "out"), 128)
    for decay in ("none", "scalar", "frames"):
        solve = {name: k[name] for name in ("plus", "minus")}
        compile_for(solve_hopper_kernel, solve, 4, set(), DK=128, DECAY=decay)
        for summary in (False, True):
            more: dict[str, Any] = whole | walk | {"DECAY": decay, "SUMMARY": summary}
            more |= {"RESIDUAL": not summary}
            tiles = {name: k[name] for name in ("w", "minus")} | v | {"solved": 64}
            compile_for(walk_hopper_kernel, tiles, 4, set(), **more)
        more = whole | {"DECAY": decay}
        compile_for(walk_back_hopper_kernel, back, 8, set(), SUMMARY=False, **more)
        wide = {"out", "out_pointer", "d_plus"} if decay == "frames" else set()
        compile_for(keys_hopper_kernel, keys, 8, wide, SPAN=512, **more)
    ends = {"A", "arriving", "states", "whole_A", "whole_B"}
    for store, through in ((True, False), (False, False), (False, True)):
        scan: dict[str, Any] = {"DK": 128, "DV": 128, "STEP": 1, "TRANSPOSED": through}
        scan |= {"STORE": store, "THROUGH": through}
        compile_for(scan_hopper_kernel, {"A": 128}, 8, ends, rows=128, **scan)


if __name__ == "__main__":
    main()
