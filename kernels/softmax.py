"""One block of softmax attention with its log-sum-exp, by PyTorch's own operators.

Blocks of keys are merged through their log-sum-exp; the backward of each block takes the merged
output and log-sum-exp, so its gradients are those of the whole row. Tensors are [B, H, T, D].
`causal` is for square blocks only: operators disagree about where the diagonal of others lies.
"""

import torch
from torch import Tensor

_aten = torch.ops.aten


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Tq, D] and log-sum-exp [B, H, Tq] of queries over this block of keys."""
    if q.is_cuda:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def block_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the merged output and log-sum-exp of the rows."""
    if q.is_cuda:
        no_seed = torch.empty(0, dtype=torch.uint64, device=q.device)
        return _aten._scaled_dot_product_flash_attention_backward(
            do,
            q,
            k,
            v,
            o,
            lse,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            no_seed,
            no_seed,
            scale=scale,
        )
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, causal, scale=scale
    )


def merge(o: Tensor, lse: Tensor, block_o: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp of rows over two disjoint blocks of keys."""
    total = torch.logaddexp(lse, block_lse)
    weight, block_weight = (lse - total).exp()[..., None], (block_lse - total).exp()[..., None]
    return o * weight + block_o * block_weight, total
