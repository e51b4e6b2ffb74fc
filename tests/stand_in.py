"""A package of any module and class that is asked for, which do nothing; see its `REAL`.

Copied to `transformer_engine/__init__.py` it is Transformer Engine as far as Megatron-Core can see
without using it: Megatron defines dozens of layers from its classes where it is installed.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

__version__ = "9.8"
REAL = (".optimizers", ".general_gemm")  # one is a file of its own, the other is not there
# what is called whether or not its work is wanted
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "get_cpu_offload_context": lambda *_, **__: (contextlib.nullcontext(), lambda x: x),
}


def _made_up(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    if name[0].islower():
        return importlib.import_module(f"{module}.{name}")
    return type(name, (torch.nn.Module,), {"__module__": module})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}.") or name.endswith(REAL):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        vars(module)["__getattr__"] = lambda name: _made_up(spec.name, name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        folder = module.__name__.partition(".")[2].replace(".", "/")
        module.__path__ = [f"{path}/{folder}" for path in globals().get("__path__", ())]


def __getattr__(name: str) -> Any:
    return _made_up(__name__, name)


sys.meta_path.insert(0, _Finder())
