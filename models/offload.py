"""Activations that wait for the backward pass in the host's memory.

Copies run on a stream of their own, beside the layers' work: a layer's activations leave while the
layer runs and are back before its backward pass, for fetching begins one layer ahead. So those of
two layers are on the GPU at any time, and the last layer's never left. Without a GPU they are
copied at once, to memory of their own.

PyTorch's `save_on_cpu` copies within the layers' own stream, which waits; Megatron-Core's
offloading knows activations of its own layers only, and not those that are recomputed.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.kept import Row

BLOCK = 1 << 27
"""Bytes of a block of pinned memory: PyTorch gives it in powers of two, so larger ones are cut."""


class Offloader:
    """Moves activations of successive layers to the host and back; one for a model."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # blocks, by their size
        self._latest: Offloaded | None = None

    def begin(self, layer: int) -> "Offloaded":
        """Of one run of a layer; those of a pass come with rising numbers."""
        before = self._latest
        if before is not None:
            before.leave()
        same_pass = before is not None and before.layer < layer
        self._latest = Offloaded(self, layer, before if same_pass else None)
        return self._latest

    def stream(self, device: torch.device) -> Any:
        """The stream of the copies, which begins after what has been asked of `device` so far."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)

    def blocks(self, size: int, pinned: bool) -> list[Tensor]:
        """Memory of the host for `size` bytes."""
        sizes = [min(BLOCK, size - start) for start in range(0, size, BLOCK)]
        return [
            self._free[n].pop()
            if self._free[n]
            else torch.empty(n, dtype=torch.uint8, pin_memory=pinned)
            for n in sizes
        ]

    def give_back(self, blocks: list[Tensor]) -> None:
        for block in blocks:
            self._free[block.numel()].append(block)


class Offloaded:
    """The activations of one run of one layer."""

    def __init__(self, offloader: Offloader, layer: int, before: "Offloaded | None") -> None:
        self.layer, self._offloader, self._before = layer, offloader, before
        self._rows: list[list[_Copy | None]] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Start copying these tensors to the host."""
        for row in rows:
            self._rows.append([None if x is None else _Copy(self._offloader, x) for x in row])

    def get(self) -> list[Row]:
        """What was added, on its device again. Starts fetching the layer before."""
        self.fetch()
        if self._before is not None:
            self._before.fetch()
            self._before = None
        return [tuple(None if x is None else x.get() for x in row) for row in self._rows]

    def leave(self) -> None:
        """Give their memory on the device back; what is done there next waits for the copies."""
        for x in self._copies():
            x.leave()

    def fetch(self) -> None:
        """Start copying back."""
        for x in self._copies():
            x.fetch()

    def _copies(self) -> list["_Copy"]:
        return [x for row in self._rows for x in row if x is not None]


class _Copy:
    """A tensor and its copy in blocks of the host's memory; here, or there only, or on the way."""

    def __init__(self, offloader: Offloader, x: Tensor) -> None:
        x = x.detach().contiguous()
        self._offloader, self._like = offloader, torch.empty_like(x, device="meta")
        self._device = x.device
        self._here: Tensor | None = x
        flat = x.view(-1).view(torch.uint8)
        self._blocks = offloader.blocks(flat.numel(), x.is_cuda)
        self._done: Any = None
        self._move(flat, to_host=True)
        if not x.is_cuda and self._blocks:
            self._here = None

    def leave(self) -> None:
        if self._here is not None and self._blocks:
            self._wait()
            self._here = None

    def fetch(self) -> None:
        if self._here is None and self._blocks:
            self._here = torch.empty_like(self._like, device=self._device)
            self._move(self._here.view(-1).view(torch.uint8), to_host=False)

    def get(self) -> Tensor:
        """The tensor, which is given up here."""
        assert self._here is not None
        self._wait()
        self._offloader.give_back(self._blocks)  # copies follow each other: none is overtaken
        here, self._here, self._blocks = self._here, None, []
        return here

    def _move(self, flat: Tensor, to_host: bool) -> None:
        if flat.is_cuda:
            with self._offloader.stream(flat.device):
                self._copy(flat, to_host)
                self._done = torch.cuda.current_stream(flat.device).record_event()
        else:
            self._copy(flat, to_host)

    def _copy(self, flat: Tensor, to_host: bool) -> None:
        for part, block in zip(flat.split(BLOCK), self._blocks, strict=False):  # none: of nothing
            if to_host:
                block.copy_(part, non_blocking=True)
            else:
                part.copy_(block, non_blocking=True)

    def _wait(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
