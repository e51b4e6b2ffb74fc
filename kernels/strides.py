"""How tensors lie in memory, as Triton kernels want to know it."""

import math

from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x with its channels side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def in_units(x: Tensor) -> tuple[list[int], int]:
    """The strides of x but the last, in the largest units up to 8 elements that divide them all."""
    strides = x.stride()[:-1]
    unit = math.gcd(8, *strides)
    return [stride // unit for stride in strides], unit
