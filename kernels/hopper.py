"""The run kernel for Hopper: which calls it takes, and its launch with tensor descriptors."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seqpar.kernels.hopper_kernels import run_hopper_kernel
from seqpar.kernels.hopper_parts import C
from seqpar.kernels.launch import Launch
from seqpar.kernels.passes import Pass
from seqpar.kernels.tuned import HOPPER_WIDTHS

CHUNK: int = C.value
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


def fits(*operands: Tensor) -> bool:
    """Whether the kernel takes these: bf16, heads of 64 or 128 channels."""
    return operands[0].dtype == torch.bfloat16 and all(
        x.shape[-1] in HOPPER_WIDTHS and _is_matrix(x) for x in operands
    )


def hopper_launch(p: Pass) -> Callable[..., None]:
    """The launch of one pass; takes x, y, z, other, out and the kernel's further tensors."""
    batch, _, heads, DZ = p.out.shape
    programs = heads * batch * len(p.table)
    launch = Launch(run_hopper_kernel, programs, **p.values, num_warps=DZ // 16)
    tiled = tiles(p.x, p.y, p.z, p.other, p.out)

    def run(x: Tensor, y: Tensor, z: Tensor, other: Tensor, out: Tensor, *rest: Tensor) -> None:
        launch(*tiled(x, y, z, other, out), out, *rest)

    return run


def _is_matrix(x: Tensor) -> bool:
    """Whether x [B, T, H, D] is a matrix of B*T rows with D channels of each head side by side."""
    batch, tokens = x.shape[:2]
    rows = batch == 1 or x.stride(0) == tokens * x.stride(1)
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) % 8 == 0 and x.stride(2) % 8 == 0
    return x.stride(3) == 1 and rows and aligned and x.stride(1) > 0 and x.stride(2) > 0


def tiles(
    *tensors: Tensor, width: int = 128, rows: int = CHUNK
) -> Callable[..., Iterable[TensorDescriptor]]:
    """Makes the descriptors of tensors like these, in tiles of at most `width` channels."""
    forms = [_form(x, rows, min(width, x.shape[3])) for x in tensors]
    return lambda *tensors: map(_descriptor, forms, tensors)


def _form(x: Tensor, rows: int, width: int) -> dict[str, Any]:
    """All of a tensor's descriptor but the tensor."""
    batch, tokens, heads, dim = x.shape
    columns = (heads - 1) * x.stride(2) + dim
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], DTYPES[x.dtype])
    shape, strides = [batch * tokens, columns], [x.stride(1), 1]
    return vars(TensorDescriptor(x, shape, strides, [rows, width], layout)) | {"base": None}


def _descriptor(form: dict[str, Any], x: Tensor) -> TensorDescriptor:
    """A descriptor that need not be checked again."""
    made = object.__new__(TensorDescriptor)
    vars(made).update(form, base=x)
    return made
