"""How the Triton kernels are cut and scheduled: a table; tests/bench/tune.py finds better ones."""

from dataclasses import dataclass, replace
from functools import cache

import torch

# tokens between the states that the gradient of the decays needs (see decay_kernels.py)
BLOCK = {"none": 1024, "scalar": 1024, "diagonal": 512}
# channels of a head that Hopper's own run kernel takes
HOPPER_WIDTHS = (64, 128)


@dataclass(frozen=True)
class Config:
    """rows, columns: of the state a program holds; tokens a chunk; warps; pipeline stages."""

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int


def run_config(DY: int, DZ: int, dtype: torch.dtype) -> Config:
    """For the general run kernel, which keeps all DY rows."""
    wide = dtype != torch.bfloat16  # products of fp32 take twice the room
    columns = min(16 if wide and DY > 128 else 32, padded(DZ))
    return Config(padded(DY), columns, 32, 8 if DY > 128 else 4, 1 if wide else 2)


def fold_config(DY: int, DZ: int, dtype: torch.dtype, hopper: bool) -> Config:
    """For the fold kernel; hopper: with its shared memory."""
    if hopper and DY == DZ == 128:
        return Config(128, 128, 128, 8, 3)
    if dtype != torch.bfloat16:
        return Config(min(64, padded(DY)), min(64, padded(DZ)), 32, 4, 1)
    return Config(min(128, padded(DY)), min(128, padded(DZ)), 64, 4, 3)


def walk_config(
    DY: int, DZ: int, dtype: torch.dtype, framed: bool, walks: int, device: torch.device
) -> Config:
    """For the delta rule's walks, which keep all DY rows.

    walks: over how many heads and pieces. Steps follow each other, so fewer columns are taken
    where that fills the chip, or spares registers. framed: where a step's tokens are found in a
    list first, which takes stages of its own.
    """
    found = run_config(DY, DZ, dtype)
    few = walks * ceil_div(DZ, found.columns) < processors(device)
    columns = 16 if few or DY > 128 else found.columns
    return replace(found, columns=columns, stages=3 + 2 * framed if dtype == torch.bfloat16 else 1)


def frame_warps(columns: int, chunk: int) -> int:
    """For a tile of the kernels of frame_kernels.py."""
    return max(4, columns * chunk // 2048)


def leave_tile(dim: int, chunk: int, pairs: bool) -> tuple[int, int]:
    """Columns and warps of the kernel that leaves frames, which holds tiles of many tensors."""
    columns = min(padded(dim), 64 if pairs else 32)
    return columns, frame_warps(columns, chunk)


def piece_tokens(tokens: int, programs: int, device: torch.device) -> int:
    """Into how long pieces `tokens` are cut so that the chip is full.

    programs: that one piece takes, over all its heads, for each that a processor can hold.
    """
    wanted = max(1, processors(device) // programs)
    return max(256, ceil_div(ceil_div(tokens, wanted), 64) * 64)


def scan_rows(chains: int, rows: int, device: torch.device) -> int:
    """How many of a state's rows a program takes through its chain of pieces, so that the chip is
    full: what limits it is how many bytes are on their way."""
    wanted = min(8, max(1, chains * rows // (4 * processors(device))))
    return 1 << (wanted.bit_length() - 1)


def delta_piece_tokens(tokens: int, heads: int, device: torch.device) -> int | None:
    """The same for the delta rule, where a pass takes a processor for each head; None: do not cut.

    Cutting costs a further walk, over K more columns: too much for but a few pieces.
    """
    return None if processors(device) < 4 * heads else piece_tokens(tokens, heads, device)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors; few under the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether Gluon's Hopper instructions are there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def padded(size: int) -> int:
    """The next power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
