"""The processes of a run: how they find each other, and what each computes on."""

import os

import torch
import torch.distributed as dist

from seqpar.comm import Communicator


def start_ranks() -> Communicator:
    """Join the other ranks of torchrun, or be alone without it; a communicator of all, on the host.

    Reads the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...).
    """
    gpu = torch.cuda.is_available()
    backend = "nccl" if gpu else "gloo"
    if "RANK" in os.environ:
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return Communicator(dist.new_group(backend="gloo") if gpu else dist.group.WORLD)


def device_of_this_rank() -> torch.device:
    """Its GPU, or the CPU of a machine without one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
