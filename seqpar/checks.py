"""Checks of tensors that the public functions share."""

from torch import Tensor


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless all are [batch, tokens, heads, dim] of one dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or min(x.shape) < 1:
            raise ValueError(
                f"{name} is {list(x.shape)}, it must be [batch, tokens, heads, dim], none empty"
            )
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}: q, k and v must share one floating dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: they must share a device")
