"""The run kernel for Hopper, launched: which calls it takes, and its tensor descriptors."""

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
    """Launch one pass."""
    batch, _, heads, DZ = p.out.shape
    run_hopper_kernel[(heads * batch * len(p.table),)](
        _matrix(p.x),
        _matrix(p.y),
        _matrix(p.z),
        _matrix(p.other if p.gated else p.z),
        _matrix(p.out),
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
        HEADS=heads,
        DY=p.y.shape[-1],
        DZ=DZ,
        C=CHUNK,
        DECAY=p.decay,
        REVERSE=p.reverse,
        GATE=p.gated,
        EVERY=BLOCK // CHUNK,
        STAGES=3,
        num_warps=DZ // 16,
        **p.groups,
    )


def _is_matrix(x: Tensor) -> bool:
    """Whether x [B, T, H, D] is a matrix of B*T rows with D channels of each head side by side."""
    batch, tokens = x.shape[:2]
    rows = batch == 1 or x.stride(0) == tokens * x.stride(1)
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) % 8 == 0 and x.stride(2) % 8 == 0
    return x.stride(3) == 1 and rows and aligned and x.stride(1) > 0 and x.stride(2) > 0


def _matrix(x: Tensor) -> TensorDescriptor:
    batch, tokens, heads, dim = x.shape
    columns = (heads - 1) * x.stride(2) + dim
    tile = [CHUNK, dim]
    layout = gl.NVMMASharedLayout.get_default_for(tile, DTYPES[x.dtype])
    return TensorDescriptor(x, [batch * tokens, columns], [x.stride(1), 1], tile, layout)
