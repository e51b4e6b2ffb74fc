"""The processes of a run: how they find each other, and what each computes on."""

import os

import torch
import torch.distributed as dist

from seqpar.comm import Communicator

SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""What in the environment says how PyTorch holds memory of GPUs."""


def start_ranks() -> Communicator:
    """Join the other ranks of torchrun, or be alone without it; a communicator of all, on the host.

    Reads the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...).
    """
    gpu = torch.cuda.is_available()
    if gpu:
        _hold_growing_memory()
    backend = "nccl" if gpu else "gloo"
    if "RANK" in os.environ:
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return Communicator(dist.new_group(backend="gloo") if gpu else dist.group.WORLD)


def _hold_growing_memory() -> None:
    """Let PyTorch extend what it holds of a GPU, unless the user has said how it is to hold memory.

    Otherwise each size that finds no gap is another piece: of long sequences, a fifth was held in
    vain. Symmetric memory has an allocator of its own, and is left alone.
    """
    if SETTINGS.isdisjoint(os.environ):
        # torch 2.9 renames it, later ones warn at the old name
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (change or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def device_of_this_rank() -> torch.device:
    """Its GPU, or the CPU of a machine without one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
