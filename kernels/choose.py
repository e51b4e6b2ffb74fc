"""Which implementation of a family runs: Triton kernels or plain PyTorch."""

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from seqpar.kernels.family import Family
from seqpar.kernels.linear import DECAYED_LINEAR, LINEAR

logger = logging.getLogger(__name__)
VARIABLE = "SEQPAR_KERNELS"
CHOICES = ("auto", "triton", "torch")
WIDEST = 256


def choose_linear(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> Family:
    """Linear attention for tensors k [B, T, H, K], v [B, T, HV, V] and at most one gate.

    The environment variable SEQPAR_KERNELS forces "triton" or "torch"; "auto" is the default.

    Raises:
        ValueError: SEQPAR_KERNELS has another value, or asks for Triton where it cannot run.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in CHOICES:
        raise ValueError(f"{VARIABLE}={asked!r} must be one of {', '.join(CHOICES)}")
    against = _against_triton(k.device, k.dtype, k.shape[-1], v.shape[-1], asked == "triton")
    if asked == "triton" and against:
        raise ValueError(f"{VARIABLE}='triton' cannot be had: {against}; nearest: 'auto'")
    if asked == "torch" or against:
        _say("PyTorch", against or f"{VARIABLE}=torch")
        return DECAYED_LINEAR if gates else LINEAR
    from seqpar.kernels.decay import TritonLinear  # triton only where it is used

    _say("Triton", f"{k.dtype} on {k.device.type}, K={k.shape[-1]}, V={v.shape[-1]}")
    if not gates:
        return TritonLinear("none")
    return TritonLinear("scalar" if gates[0].shape[-1] == 1 else "diagonal")


@cache
def _against_triton(
    device: torch.device, dtype: torch.dtype, K: int, V: int, forced: bool
) -> str | None:
    """Why Triton cannot be used; None if it can."""
    if max(K, V) > WIDEST:
        return f"K={K} and V={V} must be at most {WIDEST}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{dtype} must be torch.bfloat16, torch.float16 or torch.float32"
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"compute capability {major}.{minor} must be at least 8.0"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.float32
    if forced and device.type == "cpu" and interpreted:
        return None
    return f"{dtype} on {device.type}: only float32 with TRITON_INTERPRET=1 runs without a GPU"


@cache
def _say(implementation: str, reason: str) -> None:
    """Once for each decision."""
    logger.info("linear attention by %s kernels: %s", implementation, reason)
