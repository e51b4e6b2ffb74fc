"""What the public functions share: checks of their arguments, and what compilers leave alone."""

import hashlib
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless all are [batch, tokens, heads, dim] of one dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.numel():
            raise ValueError(
                f"{name} is {list(x.shape)}, it must be [batch, tokens, heads, dim], none empty"
            )
        check_beside(name, x, "q", q)
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, q {q.dtype}: they must share one dtype")


def check_beside(name: str, x: Tensor, first: str, other: Tensor) -> None:
    """Raise ValueError unless `x` is of a floating dtype, and on the device of `other`."""
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}, it must be a floating dtype such as torch.bfloat16")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {first} on {other.device}: they must share one")


def scale_of(scale: float | None, q: Tensor) -> float:
    """What q is multiplied with: `scale`, or one over the square root of its last dimension."""
    if isinstance(scale, Tensor):
        raise ValueError(
            "scale is a tensor, it must be a number, for it gets no gradient; nearest: multiply q "
            "with it and give scale=1.0"
        )
    return q.shape[-1] ** -0.5 if scale is None else scale


def digest(*parts: object) -> str:
    """The same on all ranks for parts that are written alike, and for no others."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which torch.compile leaves out of its graphs: it could not trace an exchange."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def first_order(backward: Callable[..., R]) -> Callable[..., R]:
    """The `backward` of a function whose gradient has none. PyTorch's `once_differentiable` finds
    a second one only if all of it is asked for, and else leaves it out."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> R:
        if torch.is_grad_enabled():
            raise ValueError("create_graph=True must be False: there is no gradient of a gradient")
        return backward(ctx, *gradients)

    return checked
