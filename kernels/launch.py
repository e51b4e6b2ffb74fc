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


class Launch:
    """A kernel on a grid, for tensors of the same types and alignment at each call.

    numbers: arguments that follow the tensors. constants: constexpr arguments, and options of the
    compiler.
    """

    def __init__(self, kernel: Any, programs: int, numbers: Sequence[Any], **constants: Any):
        self._first = kernel[programs, 1, 1]
        self._numbers, self._constants = tuple(numbers), constants
        self._names = kernel.arg_names if isinstance(kernel, JITFunction) else None
        self._programs = programs
        self._again: Callable[..., None] | None = None

    def __call__(self, *tensors: Any) -> None:
        """Run it on the current stream. Tensors, or tensor descriptors, in the kernel's order."""
        if self._again is not None:
            self._again(*tensors, *self._numbers)
            return
        compiled = self._first(*tensors, *self._numbers, **self._constants)
        if self._names is not None:  # not under Triton's interpreter
            names = self._names[len(tensors) + len(self._numbers) :]
            self._numbers += tuple(self._constants[name] for name in names)
            self._again = compiled[self._programs, 1, 1]


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
