"""A training step without its arithmetic: which tensors it has at once on an H200.

The model runs as it is, in bf16. No kernel is launched, and tensors are on the meta device, where
they have a size and nothing in it: a million tokens take a second. Where numbers decide about
shapes, as tokens do that go to experts, they are on the CPU. What runs otherwise without a GPU
(cuDNN's attention, PyTorch's norm, copies to the host) has its tensors here as on one.
"""

import gc
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar import Layout, SequenceParallel
from seqpar.launch.checks import Sizes
from seqpar.launch.config import Config

PROCESSORS = 132


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it, and not given, took at once."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {x.untyped_storage()._cdata for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self._known:
                size = x.untyped_storage().nbytes()
                self._known.add(key)
                weakref.finalize(x.untyped_storage(), self._gone, key, size)
                self.now += size
        if self.now > self.most:
            if dist.is_initialized() and dist.get_world_size() > 1:
                # gloo's threads let go of what they sent a moment after it was waited for
                time.sleep(0.01)
            self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def step_bytes(rank: int, config: Config, sizes: Sizes, device: str) -> tuple[int, int]:
    """Bytes that a rank keeps of a forward pass, and the most of a step, weights apart."""
    with hollow(device):
        from seqpar.comm import Communicator
        from seqpar.launch.setup import build_model
        from seqpar.models.language_model import Batch, forward_step

        with torch.device(device):
            _, groups, [model] = build_model(config, sizes)
            tokens = torch.zeros(1, int(config.data.sequence_length / sizes.context)).long()
            mask = torch.ones(tokens.shape)
        for parameter in model.parameters():  # Megatron adds each to a sum at once
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        layout = Layout(config.data.sequence_length, sizes.context)
        sp = SequenceParallel(layout=layout, comm=Communicator(groups.cp))
        gc.collect()
        with Peak([*model.parameters(), *model.buffers()]) as peak:
            output, loss_of = forward_step(iter([Batch(tokens, tokens, mask, sp)]), model)
            kept = peak.now
            loss_of(output)[0].backward()
    return kept, peak.most


@contextmanager
def hollow(device: str) -> Iterator[None]:
    """Nothing is computed within it, and all is there."""
    from seqpar.comm import Communicator
    from seqpar.kernels import gate_kernels
    from seqpar.models import compat

    compat.install()
    here = torch.device(device)
    changes: dict[str, Any] = {
        "torch.cuda.current_device": lambda: here,
        "seqpar.launch.setup.device_of_this_rank": lambda: here,
        "seqpar.kernels.choose._against_triton": lambda *_: None,
        "seqpar.kernels.launch.Launch.__call__": lambda *_: None,
        "seqpar.kernels.grouped.at_once": lambda *_: True,
        "seqpar.recurrence._full_precision": lambda _: nullcontext(),
        "seqpar.blocks.uses_cudnn": lambda *_: True,
        "seqpar.blocks.block_forward": _attention,
        "seqpar.blocks.block_backward": _attention_backward,
        "seqpar.models.norm.RMSNorm.forward": lambda norm, x: _Norm.apply(x, norm.weight),
        "seqpar.models.offload._Copy": _Copy,
        "seqpar.comm.Communicator.reduce_scatter": _done(Communicator.reduce_scatter),
    }
    for name in ("tuned", "norm", "conv"):
        changes[f"seqpar.kernels.{name}.processors"] = lambda _: PROCESSORS
    for name in ("passes", "walks"):
        changes[f"seqpar.kernels.{name}.is_hopper"] = lambda _: True
    with ExitStack() as stack:
        for place, instead in changes.items():
            stack.enter_context(mock.patch(place, instead))
        for name in ("gated_silu_kernel", "gated_silu_backward_kernel"):
            nothing: Any = defaultdict(lambda: lambda *_, **__: None)  # on any grid
            stack.enter_context(mock.patch.object(gate_kernels, name, nothing))
        yield


def _done(start: Any) -> Any:
    """Messages that are through at once: what they send is free then, however busy a CPU is."""

    def started(*given: Any) -> Any:
        pending = start(*given)
        pending.wait()
        return pending

    return started


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[Tensor]:
    """cuDNN is taken to sum the gradient of q in fp32."""
    found = [torch.empty_like(x) for x in (q, k, v)]
    torch.empty_like(q, dtype=torch.float32)
    return found


class _Norm(torch.autograd.Function):
    """PyTorch's, which on a GPU is one kernel each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Copy:
    """A tensor whose copy to the host is done when it is waited for."""

    def __init__(self, _: Any, x: Tensor) -> None:
        self._here: Tensor | None = x.detach().contiguous()
        self._like: dict[str, Any] = {"size": x.shape, "dtype": x.dtype, "device": x.device}

    def leave(self) -> None:
        self._here = None

    def fetch(self) -> None:
        if self._here is None:
            self._here = torch.empty(**self._like)

    def get(self) -> Tensor:
        here, self._here = self._here, None
        assert here is not None
        return here
