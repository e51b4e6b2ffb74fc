"""Which implementation of a function runs: Triton kernels or plain PyTorch."""

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from seqpar.kernels.delta import DELTA
from seqpar.kernels.dplr import DPLR
from seqpar.kernels.family import Family
from seqpar.kernels.linear import DECAYED_LINEAR, LINEAR

logger = logging.getLogger(__name__)
VARIABLE = "SEQPAR_KERNELS"
CHOICES = ("auto", "triton", "torch")
WIDEST = 256


def choose_linear(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> Family:
    """Linear attention for tensors k [B, T, H, K], v [B, T, HV, V] and at most one gate.

    Raises:
        ValueError: as `uses_triton`.
    """
    if not uses_triton("linear attention", k, _too_wide(k, v)):
        return DECAYED_LINEAR if gates else LINEAR
    from seqpar.kernels.decay import TritonLinear  # triton only where it is used

    if not gates:
        return TritonLinear("none")
    return TritonLinear("scalar" if gates[0].shape[-1] == 1 else "diagonal")


def choose_delta(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> Family:
    """The delta rule, likewise; gates beta and at most one decay.

    Raises:
        ValueError: as `uses_triton`.
    """
    if not uses_triton("the delta rule", k, _too_wide(k, v)):
        return DELTA
    from seqpar.kernels.delta_triton import TritonDelta

    return TritonDelta(len(gates) > 1)


def choose_dplr(k: Tensor, v: Tensor) -> Family:
    """Diagonal plus rank one, likewise; gates a, b and log_decay.

    Raises:
        ValueError: as `uses_triton`.
    """
    if not uses_triton("DPLR", k, _too_wide(k, v)):
        return DPLR
    from seqpar.kernels.dplr_triton import TritonDPLR

    return TritonDPLR()


def _too_wide(k: Tensor, v: Tensor) -> str | None:
    K, V = k.shape[-1], v.shape[-1]
    return f"K={K} and V={V} must be at most {WIDEST}" if max(K, V) > WIDEST else None


def uses_triton(function: str, x: Tensor, unfit: str | None = None) -> bool:
    """Whether `function` runs by Triton kernels on tensors of x's dtype and device; logged once.

    The environment variable SEQPAR_KERNELS forces "triton" or "torch"; "auto" is the default.

    Args:
        function: its name, for the log.
        x: one of its tensors.
        unfit: why its kernels cannot take the other arguments, if they cannot.

    Raises:
        ValueError: SEQPAR_KERNELS has another value, or asks for Triton where it cannot run.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in CHOICES:
        raise ValueError(f"{VARIABLE}={asked!r} must be one of {', '.join(CHOICES)}")
    against = unfit or _against_triton(x.device, x.dtype, asked == "triton")
    if asked == "triton" and against:
        raise ValueError(f"{VARIABLE}='triton' cannot be had: {against}; nearest: 'auto'")
    if asked == "torch" or against:
        _say(function, "PyTorch", against or f"{VARIABLE}=torch")
        return False
    _say(function, "Triton", f"{x.dtype} on {x.device.type}")
    return True


@cache
def _against_triton(device: torch.device, dtype: torch.dtype, forced: bool) -> str | None:
    """Why Triton cannot be used; None if it can."""
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
def _say(function: str, implementation: str, reason: str) -> None:
    """Once for each decision."""
    logger.info("%s by %s kernels: %s", function, implementation, reason)
