"""The (gated) delta rule: its chunk maps in WY form (arXiv 2406.06484, 2412.06464).

With G the running sum of log decays in the chunk, each token adds k_t u_tᵀ to the decayed state,
u_t = beta_t (v_t - what the state returns for k_t). Written out, U solves a unit-triangular system:

    (I + M) U = beta V - beta (K e^G) S,      M_tj = beta_t Σ_d k_td k_jd e^(G_td - G_jd), j < t
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
    total = gates[1].cumsum(-2) if len(gates) > 1 else None
    scores = decayed_scores(q, k, total)
    reach = q if total is None else q * total.exp()
    return A, B, reach - scores @ W, scores @ U


def _solve(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, and U [C, V], W [C, K] with u_t = U_t - W_t S."""
    beta = gates[0]  # [B, n, H, C, 1]
    total = gates[1].cumsum(-2) if len(gates) > 1 else None  # [B, n, H, C, 1 or K]
    if total is None:
        from_start, to_end, decay = k, k, k.new_ones(())
    else:
        end = total[..., -1:, :]
        from_start, to_end, decay = k * total.exp(), k * (end - total).exp(), end.exp()
    system = beta * decayed_scores(k, k, total)  # the solver takes its diagonal to be one
    right = beta * torch.cat([v, from_start], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    U, W = solved.split([v.shape[-1], k.shape[-1]], -1)
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return decay * identity - to_end.mT @ W, to_end.mT @ U, U, W


DELTA = Chunked(Dense(), _state_maps, _maps)
"""Gates beta [B, T, H, 1] and, if there is one, log_decay [B, T, H, 1 or K]."""
