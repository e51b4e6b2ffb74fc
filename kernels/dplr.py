"""Diagonal plus low rank (RWKV-7): its chunk maps (arXiv 2503.14456).

Each token adds b_t u_tᵀ with u_t = S_{t-1}ᵀ a_t, what the state before it returns for a_t. With G
the running sum of log decays in the chunk, U solves a unit-triangular system:

    (I - M_ab) U = (A e^G') S + M_ak V,     M_ab[t,j] = Σ_d a_td b_jd e^(G_(t-1)d - G_jd), j < t

and G' is G one token earlier, for a_t reads the state before token t decays it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.kernels.chunked import Chunked
from seqpar.kernels.scores import decayed_scores
from seqpar.kernels.transition import Dense


def _state_maps(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    A, B, _, _ = _solve(k, v, gates)
    return A, B


def _maps(
    q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A, B, U, W = _solve(k, v, gates)
    _, b, log_decay = gates
    total = log_decay.cumsum(-2)
    read = decayed_scores(q, b, total)
    return A, B, q * total.exp() + read @ W, read @ U + decayed_scores(q, k, total) @ v


def _solve(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, and U [C, V], W [C, K] with u_t = U_t + W_t S."""
    a, b, log_decay = gates  # [B, n, H, C, K] each
    total = log_decay.cumsum(-2)
    end = total[..., -1:, :]
    before = torch.cat([torch.zeros_like(end), total[..., :-1, :]], -2)
    right = torch.cat([_earlier_scores(a, k, total) @ v, a * before.exp()], -1)
    system = -_earlier_scores(a, b, total)  # its unit diagonal is implied
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    U, W = solved.split([v.shape[-1], k.shape[-1]], -1)
    to_end = (end - total).exp()
    b_end, k_end = (b * to_end).mT, (k * to_end).mT
    return torch.diag_embed(end.exp().squeeze(-2)) + b_end @ W, b_end @ U + k_end @ v, U, W


def _earlier_scores(a: Tensor, y: Tensor, total: Tensor) -> Tensor:
    """Σ_d a[t,d] y[j,d] e^(total[t-1,d] - total[j,d]) for j < t: the scores of the row above."""
    following = torch.cat([a[..., 1:, :], torch.zeros_like(a[..., :1, :])], -2)
    scores = decayed_scores(following, y, total)
    return torch.cat([torch.zeros_like(scores[..., :1, :]), scores[..., :-1, :]], -2)


DPLR = Chunked(Dense(), _state_maps, _maps)
"""Gates a, b, log_decay, each [B, T, H, K]."""
