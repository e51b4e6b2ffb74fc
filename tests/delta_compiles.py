"""Compiles the kernels of the delta rule and DPLR, every kind of each, without a GPU.

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

from seqpar.kernels import delta_back_kernels, delta_kernels, frame_kernels
from seqpar.kernels.tuned import frame_warps, walk_config

Trial = tuple[str, Any, int, dict[str, object]]  # name, kernel, warps, constants

COUNTS = {"batches", "tokens", "pieces", "chunks", "slots", "saves", "blocks"}
FP32 = {"entering", "leaving", "A", "B", "halves", "shares", "saved", "flows", "gate"}
FP32 |= {"dq", "dk", "d_gate"}
INT32 = {"levels", "steps", "counts", "table"}


def compile_for(kernel: Any, dtype: str, warps: int, **given: Any) -> Any:
    """For Hopper, as the launches of walks.py and frames.py would."""
    names = kernel.arg_names
    constants = {name: value for name, value in given.items() if name in names}
    wide = kernel is delta_back_kernels.keys_kernel and given["DECAY"] == "frames"
    wide |= kernel is frame_kernels.leave_kernel
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
            kind = "fp32" if wide and name in ("d_plus", "out") else kind
            signature[name] = f"*{kind}"
            divisible[(i,)] = [["tt.divisibility", 16]]
    places = {(names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps, "num_stages": given.get("num_stages", 3)}
    source = ASTSource(kernel, signature, places, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def frame_trials(K: int, split: bool) -> list[Trial]:
    """Into the frames of DPLR and out of them again."""
    frame: dict[str, object] = {"DIM": K, "C": 32, "PAIRS": True, "SPLIT": split}
    more = frame | {"GROUP": 1, "D": K, "HALVINGS": 2, "PLUS": False, "BEFORE": True}
    enter: Trial = ("enter", frame_kernels.enter_kernel, 2 * frame_warps(K, 32), more)
    more = frame | {"D": 32, "PLUS": True, "num_stages": 1}
    return [enter, ("leave", frame_kernels.leave_kernel, frame_warps(32, 32), more)]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    kinds: dict[str, tuple[torch.dtype, tl.dtype, str]] = {
        "bf16": (torch.bfloat16, tl.bfloat16, "ieee"),
        "fp32": (torch.float32, tl.float32, "bf16x6"),
    }
    every = list(product(kinds, (64, 128, 256), ("none", "scalar", "frames")))
    few = [("bf16", 128, "scalar"), ("bf16", 128, "frames"), ("fp32", 64, "none")]
    for kind, K, decay in every if folder else few:
        dtype, operand, precision = kinds[kind]
        config = walk_config(K, K, dtype, decay == "frames", 1000, torch.device("cpu"))
        common: dict[str, object] = {
            "HEADS": 4,
            "GROUP": 2,
            "DK": K,
            "DV": K,
            "C": 64 if kind == "bf16" else 32,
        }
        common |= {
            "DECAY": decay,
            "OPERAND": operand,
            "PRECISION": precision,
            "SPAN": 512,
        }
        common |= {"STAGES": config.stages}
        walk: dict[str, object] = {"BK": config.rows, "BV": config.columns}
        keys: dict[str, object] = {"BK": config.columns, "BV": config.rows}
        trials: list[Trial] = [("solve", delta_kernels.solve_kernel, 1, walk)]
        trials += [("keys", delta_back_kernels.keys_kernel, config.warps, keys)]
        back = delta_back_kernels.walk_back_kernel
        for summary in (False, True):
            more = walk | {"SUMMARY": summary}
            trials += [("walk_backB" if summary else "walk_back", back, config.warps, more)]
            name, more = "walkAB" if summary else "walk", more | {"RESIDUAL": not summary}
            trials += [(name, delta_kernels.walk_kernel, config.warps, more)]
        if decay == "frames":
            trials += frame_trials(K, kind == "bf16")
        for name, kernel, warps, more in trials:
            compiled = compile_for(kernel, kind, warps, **(common | more))
            shared = compiled.metadata.shared
            label = f"{name}_{kind}_{K}_{decay}"
            print(f"{label}: {shared} bytes of shared memory", flush=True)
            assert shared <= 232448, "more than a Hopper program may have"
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{label}.cubin").write_bytes(compiled.asm["cubin"])
                (folder / f"{label}.ttgir").write_text(compiled.asm["ttgir"])


if __name__ == "__main__":
    main()
