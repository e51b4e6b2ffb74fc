"""How tensors lie in memory, as Triton kernels want to know it."""

import math

from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x [B, T, H, D] with its channels side by side, as the kernels read them.

    And with all heads of a token within 2^31 elements: where a head lies is reckoned in 32 bits.
    """
    beside = x.stride(3) == 1 or x.shape[3] == 1
    near = (x.shape[2] - 1) * x.stride(2) + x.shape[3] <= 2**31
    return x if beside and near else x.contiguous()


def named(**tensors: Tensor) -> dict[str, int]:
    """The strides of each x [B, T, H, D] but the last, as kernels name them: xb, xt, xh."""
    return {
        name + axis: stride
        for name, x in tensors.items()
        for axis, stride in zip("bth", x.stride()[:3], strict=True)
    }


def in_units(**tensors: Tensor) -> dict[str, int]:
    """The same in units of X_UNIT elements, the largest up to 8 that divides all of x's strides."""
    units = {name: math.gcd(8, *x.stride()[:3]) for name, x in tensors.items()}
    strides = named(**tensors)
    found = {name: stride // units[name[0]] for name, stride in strides.items()}
    return found | {f"{name.upper()}_UNIT": unit for name, unit in units.items()}
