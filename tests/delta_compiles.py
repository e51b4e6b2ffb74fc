"""Compiles the delta rule's kernels for every kind of walk, without a GPU.

Run by test_triton_delta.py as a process of its own: under the interpreter nothing can be compiled.

    python tests/delta_compiles.py FOLDER    more sizes; writes the machine code, for cuobjdump
"""

import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqpar.kernels import delta_back_kernels, delta_kernels
from seqpar.kernels.tuned import walk_config

COUNTS = {"batches", "tokens", "pieces", "chunks", "slots", "saves", "blocks"}
FP32 = {"entering", "leaving", "A", "B", "halves", "shares", "saved", "flows", "d_plus"}
INT32 = {"levels", "steps", "counts", "table"}


def compile_for(kernel: Any, dtype: str, warps: int, **given: Any) -> Any:
    """For Hopper, as the launches of delta_triton.py would."""
    names = kernel.arg_names
    constants = {name: value for name, value in given.items() if name in names}
    wide = kernel is delta_back_kernels.keys_kernel and given["FRAMED"]
    signature, divisible = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in COUNTS or (len(name) == 2 and name[1] in "bth" and name not in ("dx", "do")):
            signature[name] = "i32"
            if name not in COUNTS and name[0] != "b":
                divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            kind = "i32" if name in INT32 else "fp32" if name in FP32 else dtype
            kind = "fp32" if wide and name == "out" else kind
            signature[name] = f"*{kind}"
            divisible[(i,)] = [["tt.divisibility", 16]]
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    kinds: dict[str, tuple[torch.dtype, tl.dtype, str]] = {
        "bf16": (torch.bfloat16, tl.bfloat16, "ieee"),
        "fp32": (torch.float32, tl.float32, "bf16x6"),
    }
    every = list(product(kinds, (64, 128, 256), (False, True)))
    for kind, K, framed in every if folder else [("bf16", 128, True), ("fp32", 64, False)]:
        dtype, operand, precision = kinds[kind]
        config = walk_config(K, K, dtype, framed, 1000, torch.device("cpu"))
        common: dict[str, object] = {
            "HEADS": 4,
            "GROUP": 2,
            "DK": K,
            "DV": K,
            "C": 64 if kind == "bf16" else 32,
        }
        common |= {"FRAMED": framed, "OPERAND": operand, "PRECISION": precision, "SPAN": 512}
        common |= {"STAGES": config.stages}
        walk: dict[str, object] = {"BK": config.rows, "BV": config.columns}
        keys: dict[str, object] = {"BK": config.columns, "BV": config.rows}
        trials: list[tuple[str, Any, int, dict[str, object]]] = [
            ("solve", delta_kernels.solve_kernel, 1, walk)
        ]
        trials += [("keys", delta_back_kernels.keys_kernel, config.warps, keys)]
        for summary in ("", "A", "AB"):
            more = walk | {"SUMMARY": summary, "RESIDUAL": not summary}
            trials += [(f"walk{summary}", delta_kernels.walk_kernel, config.warps, more)]
        for summary in ("", "B"):
            more = walk | {"SUMMARY": bool(summary)}
            back = delta_back_kernels.walk_back_kernel
            trials += [(f"walk_back{summary}", back, config.warps, more)]
        for name, kernel, warps, more in trials:
            compiled = compile_for(kernel, kind, warps, **(common | more))
            shared = compiled.metadata.shared
            label = f"{name}_{kind}_{K}_{'framed' if framed else 'plain'}"
            print(f"{label}: {shared} bytes of shared memory", flush=True)
            assert shared <= 232448, "more than a Hopper program may have"
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{label}.cubin").write_bytes(compiled.asm["cubin"])
                (folder / f"{label}.ttgir").write_text(compiled.asm["ttgir"])


if __name__ == "__main__":
    main()
