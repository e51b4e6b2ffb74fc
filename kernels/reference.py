"""The specification: one token after the other, in the dtype given (fp64 for tests).

Every fast implementation is held against these loops. Tensors are [B, T, H, D]; v, decays and beta
may have a multiple HV of the H heads of q and k. Documents (`cu_seqlens`) start from a zero state.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ;  o_t = scale · S_tᵀ q_t.

    Shapes: q, k [B,T,H,K]; v [B,T,HV,V]; log_decay None | [HV] | [B,T,HV] | [B,T,HV,K].
    Returns o [B,T,HV,V] and the last state [B,HV,K,V].
    """
    q, k = _spread(q, v), _spread(k, v)
    decay = _decay(log_decay, k)

    def step(state: Tensor, t: int) -> Tensor:
        return decay[:, t, :, :, None] * state + _outer(k[:, t], v[:, t])

    return _loop(step, q, v, scale, cu_seqlens, initial_state)


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_tᵀ) exp(log_decay_t) S_{t-1} + beta_t k_t v_tᵀ; o as above.

    Shapes as in `linear_attention`; beta [B,T,HV]; log_decay None | [B,T,HV] | [B,T,HV,K].
    """
    q, k = _spread(q, v), _spread(k, v)
    decay = _decay(log_decay, k)

    def step(state: Tensor, t: int) -> Tensor:
        state = decay[:, t, :, :, None] * state
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)  # what the state returns for k_t
        return state + _outer(k[:, t], beta[:, t, :, None] * (v[:, t] - held))

    return _loop(step, q, v, scale, cu_seqlens, initial_state)


def dplr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (diag(exp(log_decay_t)) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ;  o_t = scale · S_tᵀ q_t.

    Shapes: q, k [B,T,H,K]; v [B,T,HV,V]; a, b, log_decay [B,T,HV,K].
    """
    q, k = _spread(q, v), _spread(k, v)
    decay = log_decay.exp()

    def step(state: Tensor, t: int) -> Tensor:
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        return decay[:, t, :, :, None] * state + _outer(b[:, t], read) + _outer(k[:, t], v[:, t])

    return _loop(step, q, v, scale, cu_seqlens, initial_state)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v within each document; q [B,T,H,D], k, v [B,T,HK,D], HK divides H."""
    heads, tokens = q.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    index = torch.arange(tokens)
    document = torch.bucketize(index, torch.tensor(cu_seqlens or [0, tokens]), right=True)
    allowed = document[:, None] == document[None]
    if causal:
        allowed &= index[:, None] >= index[None]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * _scale(scale, q)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """y_t = Σ_j weight[:, W-1-j] x_{t-j} + bias within each document; x [B,T,C], weight [C,W]."""
    bounds = list(cu_seqlens or [0, x.shape[1]])
    rows = []
    for start, stop in pairwise(bounds):
        for t in range(start, stop):
            y = torch.zeros_like(x[:, t]) if bias is None else bias.expand_as(x[:, t])
            for j in range(min(weight.shape[1], t - start + 1)):
                y = y + weight[:, weight.shape[1] - 1 - j] * x[:, t - j]
            rows.append(y)
    out = torch.stack(rows, 1)
    return torch.nn.functional.silu(out) if activation == "silu" else out


def _loop(
    step: Callable[[Tensor, int], Tensor],
    q: Tensor,
    v: Tensor,
    scale: float | None,
    cu_seqlens: Sequence[int] | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, dim = q.shape
    zero = q.new_zeros(batch, heads, dim, v.shape[-1])
    state = zero if initial_state is None else initial_state
    starts = set(cu_seqlens or ()) - {0}
    rows = []
    for t in range(tokens):
        state = step(zero if t in starts else state, t)
        rows.append(_scale(scale, q) * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(rows, 1), state


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def _spread(x: Tensor, v: Tensor) -> Tensor:
    """x [B,T,H,K] with each head repeated for its group of v's heads."""
    return x.repeat_interleave(v.shape[2] // x.shape[2], 2)


def _decay(log_decay: Tensor | None, k: Tensor) -> Tensor:
    """exp(log_decay) as [B, T, HV, K]."""
    if log_decay is None:
        return torch.ones_like(k)
    if log_decay.dim() == 1:
        log_decay = log_decay[None, None]
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    return log_decay.exp().expand_as(k)
