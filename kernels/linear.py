"""Linear attention with no, scalar or diagonal decay: its chunk maps (arXiv 2312.06635)."""

from collections.abc import Sequence

from torch import Tensor

from seqpar.kernels.chunked import Chunked
from seqpar.kernels.scores import decayed_scores
from seqpar.kernels.transition import Decay, Identity


def _state_maps(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    total = gates[0].cumsum(-2)  # [B, n, H, C, 1 or K]
    end = total[..., -1:, :]
    return end.exp().mT, (k * (end - total).exp()).mT @ v


def _maps(
    q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = gates[0].cumsum(-2)
    A, B = _state_maps(k, v, gates)
    return A, B, q * total.exp(), decayed_scores(q, k, total) @ v


def _plain_state_maps(k: Tensor, v: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return k.new_zeros(*k.shape[:3], 0, 0), k.mT @ v


def _plain_maps(
    q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A, B = _plain_state_maps(k, v, gates)
    return A, B, q, decayed_scores(q, k, None) @ v


LINEAR = Chunked(Identity(), _plain_state_maps, _plain_maps)
"""No gate: S_t = S_{t-1} + k_t v_tᵀ."""

DECAYED_LINEAR = Chunked(Decay(), _state_maps, _maps)
"""One gate, log_decay [B, T, H, 1 or K]: S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ."""
