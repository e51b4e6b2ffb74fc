"""Triton kernels launched again and again with nothing changed but their tensors.

Triton finds the compiled kernel by the types and values of all arguments, which takes the host
longer than many of these kernels run. A `Launch` is made once for all else than the tensors, and
remembers which compiled kernel it is. `plan` keeps them with the pieces, for one call's shapes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction

from seqpar.kernels.once import Once
from seqpar.kernels.pieces import Pieces

OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of the compiler


class Launch:
    """A kernel on a grid, for tensors of the same types and alignment at each call.

    values: what follows the tensors, numbers and constants, and options of the compiler, by name;
    there may be some that this kernel has not.
    """

    def __init__(self, kernel: Any, programs: int, **values: Any):
        self._kernel, self._programs = kernel, programs
        self._values = [values[name] for name in kernel.arg_names if name in values]
        self._options = {name: values[name] for name in OPTIONS if name in values}
        self._again: Callable[..., None] | None = None

    def __call__(self, *tensors: Any) -> None:
        """Run it on the current stream. Tensors, or tensor descriptors, in the kernel's order."""
        if self._again is not None:
            self._again(*tensors, *self._values)
            return
        kernel, grid = self._kernel, (self._programs, 1, 1)
        compiled = kernel[grid](*tensors, *self._values, **self._options)
        if isinstance(kernel, JITFunction):  # not under Triton's interpreter
            self._again = compiled[grid]


def plan(pieces: Pieces, *kind: object) -> Once:
    """What calls of one kind over these pieces share; tensors among `kind` stand for their form.

    A form is the type, shape, strides and alignment.
    """
    return pieces.once(_key(kind), Once)


def alike(*kind: object) -> Once:
    """The same for calls that have no pieces; of the kinds that were met last."""
    return _kept(_key(kind))


@lru_cache(256)
def _kept(key: tuple[object, ...]) -> Once:
    return Once()


def _key(kind: Sequence[object]) -> tuple[object, ...]:
    return tuple(_form(x) if isinstance(x, Tensor) else x for x in kind)


def _form(x: Tensor) -> tuple[object, ...]:
    return x.dtype, x.device, x.shape, x.stride(), x.data_ptr() % 16 == 0
