"""The run kernel for Hopper, launched: which calls it takes, and its tensor descriptors."""

from functools import cache
from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seqpar.kernels.hopper_kernels import run_hopper_kernel
from seqpar.kernels.passes import Pass
from seqpar.kernels.tuned import BLOCK

CHUNK = 64
DTYPES = {torch.bfloat16: gl.bfloat16}


def fits(decay: str, *operands: Tensor) -> bool:
    """Whether the kernel takes these: no or scalar decay, bf16, heads of 64 or 128 channels."""
    return (
        decay != "diagonal"
        and operands[0].dtype in DTYPES
        and all(x.shape[-1] in (64, 128) and _is_matrix(x) for x in operands)
    )


def run_hopper(p: Pass) -> None:
    """Launch one pass.

    Triton finds the compiled kernel by the types and values of all arguments, for tensor
    descriptors by name, in longer than the kernel runs on short inputs. Here the constants decide.
    """
    batch, _, heads, DZ = p.out.shape
    arguments = (
        *(_matrix(x) for x in (p.x, p.y, p.z, p.other if p.gated else p.z, p.out)),
        p.gate,
        p.entering,
        p.saved,
        p.out,
        p.shares,
        p.flows,
        p.table,
        p.scale,
        *p.sizes,
        *(x.stride(2) for x in (p.x, p.y, p.z, p.other)),
        *p.gate.stride()[:3],
        *p.state_strides,
    )
    constants = {
        "HEADS": heads,
        **p.groups,
        "DY": p.y.shape[-1],
        "DZ": DZ,
        "C": CHUNK,
        "DECAY": p.decay,
        "REVERSE": p.reverse,
        "GATE": p.gated,
        "EVERY": BLOCK // CHUNK,
        "STAGES": 3,
        "num_warps": DZ // 16,
    }
    grid = heads * batch * len(p.table), 1, 1
    types = p.x.dtype, p.gate.dtype, max(p.gate.stride()) < 2**31
    key = torch.cuda.current_device(), *types, *constants.values()
    if key in _compiled:
        _compiled[key][grid](*arguments, *constants.values())
    else:
        _compiled[key] = run_hopper_kernel[grid](*arguments, **constants)


_compiled: dict[tuple[object, ...], Any] = {}


def _is_matrix(x: Tensor) -> bool:
    """Whether x [B, T, H, D] is a matrix of B*T rows with D channels of each head side by side."""
    batch, tokens = x.shape[:2]
    rows = batch == 1 or x.stride(0) == tokens * x.stride(1)
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) % 8 == 0 and x.stride(2) % 8 == 0
    return x.stride(3) == 1 and rows and aligned and x.stride(1) > 0 and x.stride(2) > 0


def _matrix(x: Tensor) -> TensorDescriptor:
    batch, tokens, heads, dim = x.shape
    columns = (heads - 1) * x.stride(2) + dim
    layout = _layout(x.dtype, dim)
    return TensorDescriptor(x, [batch * tokens, columns], [x.stride(1), 1], [CHUNK, dim], layout)


@cache
def _layout(dtype: torch.dtype, dim: int) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([CHUNK, dim], DTYPES[dtype])
