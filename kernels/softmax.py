"""One block of softmax attention with its log-sum-exp, by PyTorch's own operators.

Blocks of keys are merged through their log-sum-exp; the backward of each block takes the merged
output and log-sum-exp, so its gradients are those of the whole row. Tensors are [B, H, T, D], k and
v may have a divisor of q's heads. `causal` is for square blocks only: operators disagree about
where the diagonal of others lies.
"""

import logging
from functools import cache

import torch
from torch import Tensor

_aten = torch.ops.aten
logger = logging.getLogger(__name__)


def uses_cudnn(q: Tensor, whole: bool) -> bool:
    """Whether cuDNN attends, the faster on Hopper; on other GPUs the flash operator. Logged once.

    cuDNN makes a plan for each new shape of block, which takes tens of milliseconds: it is taken
    where sequences are `whole`, so that shapes come again, and not for packed documents. PyTorch's
    own switches turn it off (torch.backends.cuda.enable_cudnn_sdp, use_deterministic_algorithms).
    """
    if not q.is_cuda:
        return False
    against = _against_cudnn(q.device, q.shape[-1])
    if not torch.backends.cuda.cudnn_sdp_enabled():
        against = "switched off by torch.backends.cuda.enable_cudnn_sdp"
    elif torch.get_deterministic_debug_mode() == 2:  # an error; 1 only warns
        against = "it is not deterministic"
    elif not whole:
        against = "documents make blocks of ever new shapes"
    _say(against)
    return against is None


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, cudnn: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Tq, D] and log-sum-exp [B, H, Tq] of queries over this block of keys."""
    if not q.is_cuda:
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if cudnn and k.shape[2] > 1:  # one key it does not take
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        return out, lse.view(q.shape[:3])
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def block_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    cudnn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the merged output and log-sum-exp of the rows."""
    lse = lse.contiguous()  # its strides are taken for granted
    if not q.is_cuda:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal, scale=scale
        )
    lengths, none = (q.shape[2], k.shape[2]), (None, None)
    if cudnn and k.shape[2] > 1:
        no_seed = torch.empty(0, dtype=torch.long, device=q.device)
        if _cudnn_lse_dims(q.device) == 4:
            lse = lse.unsqueeze(-1)
        # cuDNN's plan is found again by the strides of q, k and v, but has those of o built in
        do, o = _strided_as(do, q), _strided_as(o, q)
        return _aten._scaled_dot_product_cudnn_attention_backward(
            *(do, q, k, v, o, lse, no_seed, no_seed, None),
            *(*none, *lengths, 0.0, causal),
            scale=scale,
        )
    no_seed = torch.empty(0, dtype=torch.uint64, device=q.device)
    return _aten._scaled_dot_product_flash_attention_backward(
        *(do, q, k, v, o, lse, *none, *lengths, 0.0, causal, no_seed, no_seed), scale=scale
    )


def merge(o: Tensor, lse: Tensor, block_o: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp of rows over two disjoint blocks of keys, all in one dtype.

    o is written over.
    """
    share = torch.sigmoid(block_lse - lse)[..., None]
    return o.lerp_(block_o, share), torch.logaddexp(lse, block_lse)


def _strided_as(x: Tensor, like: Tensor) -> Tensor:
    pairs = zip(x.stride(), like.stride(), like.shape, strict=True)
    if all(own == other for own, other, size in pairs if size > 1):
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


@cache
def _against_cudnn(device: torch.device, dim: int) -> str | None:
    """Why cuDNN is not taken for heads of `dim` on this GPU; None if it is."""
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return f"compute capability {major}.{minor}, it is faster from 9.0 to 10.x only"
    if dim % 8 or dim > 128:
        return f"heads of {dim}, it takes multiples of 8 up to 128"
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return None if version and version >= 90501 else f"version {version} is before 9.5.1"


@cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """Whether its log-sum-exp is [B, H, T] or [B, H, T, 1]: versions of PyTorch differ."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return _aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


@cache
def _say(against: str | None) -> None:
    """Once for each decision."""
    if against is None:
        logger.info("softmax attention by cuDNN")
    else:
        logger.info("softmax attention by the flash operator, not cuDNN: %s", against)
