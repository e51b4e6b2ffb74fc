"""Makes Megatron-Core run on a machine without a GPU. Call `install()` before building anything.

Megatron names "the GPU of this process" in five ways, each answered once here:
- `torch.cuda.current_device()` used as a device: the answer is the CPU;
- string literals ("cuda" as a device, "torch.cuda.FloatTensor" as a type name): rewritten in the
  functions of a few named modules, so that nothing has to be intercepted at run time;
- the CUDA random state: is the CPU's;
- synchronisation: there is nothing to wait for;
- copies to the host on a side stream (the token dispatcher): only the type of the splits changes.

And gloo gathers and scatters only equal parts, where Megatron has unequal ones.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import logging
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seqpar.comm import Communicator

# The modules whose functions hold device literals on the paths this project uses.
_MODULES_WITH_LITERALS = (
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)

_installed = False


def install() -> None:
    """Make Megatron-Core usable without a GPU; does nothing where there is one, or when repeated.

    For the whole process it changes `Tensor.cuda` and, in `torch.cuda`, `current_device`,
    `current_stream`, `synchronize`, `empty_cache` and the random state: these only raise otherwise.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _answer_for_torch_cuda()
    _rewrite_literals()
    _share_the_random_state()
    _keep_splits_on_the_host()
    _gather_unequal_parts()
    _pin_no_memory()


def define_missing_names() -> None:
    """What Megatron-Core reads also where Transformer Engine did not define it, on any machine."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    vars(moe_utils).setdefault("te_general_gemm", None)  # its router, in 0.16
    # recomputation of norms
    no_fp8 = types.SimpleNamespace(is_fp8_enabled=lambda: False)
    vars(random).setdefault("FP8GlobalStateManager", no_fp8)
    for name in ("activation_recompute_forward", "fp8_autocast"):
        vars(random).setdefault(name, lambda **_: contextlib.nullcontext())


def hybrid_stack(layers: dict[str, Any], norm: type) -> Any:
    """The spec of Megatron's own stack of different layers; 0.16 calls it after Mamba.

    Args:
        layers: the layer specs by slot; those it does not have are left out.
        norm: the norm at its end where there is no Transformer Engine, whose norm it takes.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    try:
        from megatron.core.models.hybrid import hybrid_block as block

        stack, submodules = block.HybridStack, block.HybridStackSubmodules
    except ImportError:
        from megatron.core.ssm import mamba_block as block

        stack, submodules = block.MambaStack, block.MambaStackSubmodules
    if importlib.util.find_spec("transformer_engine") is None:
        block.TENorm = norm
    known = {field.name for field in dataclasses.fields(submodules)}
    taken = {name: spec for name, spec in layers.items() if name in known}
    return ModuleSpec(stack, submodules=submodules(**taken))


def calling(parent: type, **functions: Any) -> type:
    """A subclass whose methods call these functions in the place of Megatron's of those names."""
    methods = {
        name: types.FunctionType(
            method.__code__,
            {**method.__globals__, **functions},
            name,
            method.__defaults__,
            method.__closure__,
        )
        for name, method in vars(parent).items()
        if inspect.isfunction(method) and not {*functions}.isdisjoint(method.__code__.co_names)
    }
    return type(parent.__name__, (parent,), methods)


def asynchronous_save_options() -> dict[str, Any]:
    """Arguments of `dist_checkpointing.save` that ask for Megatron's own files, where it asks."""
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def _answer_for_torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = lambda device=None: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _rewrite_literals() -> None:
    for name in _MODULES_WITH_LITERALS:
        module = importlib.import_module(name)
        for function in _functions_of(module):
            function.__code__ = _without_cuda(function.__code__)


def _functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Every function and method defined in `module`, decorated ones included."""
    for value in vars(module).values():
        members = vars(value).values() if inspect.isclass(value) else (value,)
        for member in members:
            candidate = inspect.unwrap(getattr(member, "__func__", member))
            if inspect.isfunction(candidate) and candidate.__module__ == module.__name__:
                yield candidate


def _without_cuda(value: Any) -> Any:
    """A constant of a function, or its code, with each device literal naming the CPU instead."""
    if isinstance(value, str):
        return {"cuda": "cpu"}.get(value, value.replace("torch.cuda.", "torch."))
    if isinstance(value, tuple):
        return tuple(_without_cuda(item) for item in value)
    if isinstance(value, types.CodeType):
        return value.replace(co_consts=_without_cuda(value.co_consts))
    return value


def _share_the_random_state() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Forking the tracker moves the CPU's random state, as it must here.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _keep_splits_on_the_host() -> None:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def splits_as_arrays(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(self, name, None)
            if isinstance(splits, Tensor):
                setattr(self, name, splits.numpy())
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none: there is no GPU"
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = splits_as_arrays


def _gather_unequal_parts() -> None:
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gathered(
        input_: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        comm = Communicator(group)
        everywhere = torch.cat([input_] * comm.size)
        return comm.all_to_all(everywhere, [len(input_)] * comm.size, output_split_sizes).wait()

    def scattered(
        input_: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        comm = Communicator(group)
        own = input_split_sizes[comm.rank]
        parts = comm.all_to_all(input_, input_split_sizes, [own] * comm.size).wait()
        return parts.view(comm.size, own, *input_.shape[1:]).sum(0)

    mappings._gather_along_first_dim = gathered
    mappings._reduce_scatter_along_first_dim = scattered


def _pin_no_memory() -> None:
    """Two flags of one function, pin_memory and non_blocking, are the only True in it."""
    from megatron.core.models.common.embeddings import rope_utils

    code = rope_utils.get_pos_emb_on_this_cp_rank.__code__
    constants = tuple(False if value is True else value for value in code.co_consts)
    rope_utils.get_pos_emb_on_this_cp_rank.__code__ = code.replace(co_consts=constants)
