"""Where a NaN or Inf arose: which layer or parameter, on which rank.

Gradients are summed over ranks before anyone looks at them, and states carry a NaN from rank to
rank. So the step is computed once more with hooks, which note on each rank the first tensor that
is not finite; the first of all ranks, in the order of the computation, is the cause.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from seqpar.launch.setup import Run

# Where it was found, in the order of causes, and the words for it.
Found = tuple[tuple[int, ...], str]


def gradients_are_finite(run: Run) -> bool:
    """Whether this rank's gradients, summed over ranks, are; reads them once."""
    buffers = [b for stage in run.model for b in (*stage.buffers, *stage.expert_parallel_buffers)]
    largest = [torch.linalg.vector_norm(b.grad_data, torch.inf) for b in buffers]
    return bool(torch.stack(largest).isfinite().all().item()) if largest else True


def locate(run: Run, compute: Callable[[], object]) -> str:
    """Where the first NaN or Inf is, for a person to read. All ranks call it.

    Args:
        compute: the forward and backward pass, again.
    """
    found = [each for index, stage in enumerate(run.model) for each in _weights(run, stage, index)]
    if not any(run.control.all_gather_object(bool(found))):
        found = _watched(run, compute)
    everywhere = [each for own in run.control.all_gather_object(found[:1]) for each in own]
    if not everywhere:
        return (
            "the sum of gradients over ranks is not finite though each rank's is: it overflows, or "
            "a machine errs now and then"
        )
    return min(everywhere)[1]


def _weights(run: Run, stage: nn.Module, index: int) -> list[Found]:
    order = (0, _place(run, index), 0, run.control.rank)
    return [
        (order, f"parameter {_name(stage, name)} is {_kind(p)} itself")
        for name, p in stage.named_parameters()
        if not p.isfinite().all()
    ]


def _watched(run: Run, compute: Callable[[], object]) -> list[Found]:
    """What is not finite on this rank, first."""
    rank, moment = run.control.rank, count()
    found: list[Found] = []
    modules: dict[nn.Module, tuple[str, int]] = {}

    def note(x: Tensor, what: str, backward: bool, place: int) -> None:
        now = next(moment)
        if not found and not x.isfinite().all():
            # a state goes from earlier ranks to later ones, its gradient the other way
            order = (2, -place, now, -rank) if backward else (1, place, now, rank)
            found.append((order, f"{what} is {_kind(x)} on rank {rank} ({run.device})"))

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        name, place = modules.get(module, ("", 0))
        for x in output if isinstance(output, tuple) else (output,):
            if name and isinstance(x, Tensor) and x.is_floating_point():
                note(x, f"the output of {name}", False, place)
                if x.requires_grad:
                    what = f"the gradient at the output of {name}"
                    x.register_hook(partial(note, what=what, backward=True, place=place))

    handles = [register_module_forward_hook(after)]
    for index, stage in enumerate(run.model):
        place = _place(run, index)
        modules |= {each: (_name(stage, name), place) for name, each in stage.named_modules()}
        for name, p in stage.named_parameters():
            what = f"the gradient of parameter {_name(stage, name)}"
            handles.append(p.register_hook(partial(note, what=what, backward=True, place=place)))
    try:
        compute()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _place(run: Run, index: int) -> int:
    """Of this rank's stage of that index among all of the pipeline."""
    return index * run.sizes.pipeline + run.groups.pp.rank()


def _kind(x: Tensor) -> str:
    return "NaN" if x.isnan().any() else "Inf"


def _name(stage: nn.Module, name: str) -> str:
    """The name of a module or parameter, with its layer's number in the whole model."""
    inner = re.sub(r"^(module\.?)+", "", name)
    layer = re.match(r"decoder\.layers\.(\d+)\.?", inner)
    if not layer:
        return inner or "the model"
    layers: Any = stage
    while hasattr(layers, "module"):
        layers = layers.module
    number = layers.decoder.layers[int(layer[1])].layer_number
    rest = inner.removeprefix(layer[0])
    return f"layer {number}" + (f", {rest}" if rest else "")
