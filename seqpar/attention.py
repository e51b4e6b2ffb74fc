"""The public linear recurrences: boundary checks, then one call into the shared scan."""

from torch import Tensor

from seqpar.checks import check_beside, check_qkv, scale_of, uncompiled
from seqpar.context import SequenceParallel
from seqpar.kernels.choose import choose_delta, choose_dplr, choose_linear
from seqpar.kernels.pieces import Late
from seqpar.recurrence import recurrence


@uncompiled
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    sp: SequenceParallel | None = None,
) -> Tensor:
    """Causal linear attention with or without decay.

        S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ;   o_t = scale · S_tᵀ q_t

    No decay: linear attention (arXiv 2006.16236). Constant: Retention (2307.08621), Lightning
    Attention (2401.04658). Scalar: Mamba-2 (2405.21060). Diagonal: GLA (2312.06635), HGRN2
    (2404.07904).

    Args:
        q, k: [B, T, H, K], this rank's tokens.
        v: [B, T, HV, V]; HV may be a multiple of H (grouped heads).
        log_decay: None | [HV] constant | [B, T, HV] per head | [B, T, HV, K] per key channel;
            natural log, <= 0.
        scale: multiplies q; K**-0.5 by default.
        sp: how the sequence is cut over ranks; None when this rank holds whole sequences.

    Returns:
        o [B, T, HV, V] in v's dtype. States are fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes or dtypes that do not fit each other or the layout.
    """
    return start_linear_attention(q, k, v, log_decay, scale=scale, sp=sp, beside=False)()


@uncompiled
def start_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    sp: SequenceParallel | None = None,
    beside: bool = True,
) -> Late:
    """`linear_attention` in two halves: the returned function, called once, gives o.

    What is done in between runs while states travel between ranks, and what autograd records of it
    is differentiated while their gradients do. beside: whether anything is.
    """
    _check(q, k, v, sp)
    gates = {}
    if log_decay is not None:
        gates["log_decay"] = _check_decay(log_decay, k, v, constant=True)
    family, scale = choose_linear(k, v, list(gates.values())), scale_of(scale, q)
    return recurrence("linear_attention", family, q, k, v, gates, scale, sp, beside=beside)


@uncompiled
def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    sp: SequenceParallel | None = None,
) -> Tensor:
    """The delta rule with or without decay: each token replaces what the state returns for its key.

        S_t = (I - beta_t k_t k_tᵀ) exp(log_decay_t) S_{t-1} + beta_t k_t v_tᵀ
        o_t = scale · S_tᵀ q_t

    DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464), Kimi Delta Attention (2510.26692).
    Stable for keys with beta_t |k_t|² <= 2: normalise k.

    Args:
        q, k, v, scale, sp: as in `linear_attention`.
        beta: [B, T, HV].
        log_decay: None | [B, T, HV] per head | [B, T, HV, K] per key channel; natural log, <= 0.

    Returns:
        o [B, T, HV, V] in v's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit each other or the layout.
    """
    return start_delta_attention(q, k, v, beta, log_decay, scale=scale, sp=sp, beside=False)()


@uncompiled
def start_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    sp: SequenceParallel | None = None,
    beside: bool = True,
) -> Late:
    """`delta_attention` in two halves, as `start_linear_attention`."""
    _check(q, k, v, sp)
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta is {_shape(beta)}, it must be [B, T, HV] = {_shape(v[..., 0])}")
    check_beside("beta", beta, "q", q)
    gates = {"beta": beta[..., None]}
    if log_decay is not None:
        gates["log_decay"] = _check_decay(log_decay, k, v, constant=False)
    family, scale = choose_delta(k, v, list(gates.values())), scale_of(scale, q)
    return recurrence("delta_attention", family, q, k, v, gates, scale, sp, beside=beside)


@uncompiled
def dplr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    sp: SequenceParallel | None = None,
) -> Tensor:
    """A recurrence whose transition is diagonal plus rank one: RWKV-7 (arXiv 2503.14456).

        S_t = (diag(exp(log_decay_t)) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ;   o_t = scale · S_tᵀ q_t

    Args:
        q, k, v, scale, sp: as in `linear_attention`.
        a, b, log_decay: [B, T, HV, K]; log_decay is a natural log, <= 0.

    Returns:
        o [B, T, HV, V] in v's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit each other or the layout.
    """
    _check(q, k, v, sp)
    wanted = [*v.shape[:3], k.shape[-1]]
    gates = {"a": a, "b": b, "log_decay": log_decay}
    for name, x in gates.items():
        if list(x.shape) != wanted:
            raise ValueError(f"{name} is {_shape(x)}, it must be [B, T, HV, K] = {wanted}")
        check_beside(name, x, "q", q)
    family, scale = choose_dplr(k, v), scale_of(scale, q)
    return recurrence("dplr_attention", family, q, k, v, gates, scale, sp, beside=False)()


def _check(q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel | None) -> None:
    check_qkv(q, k, v)
    if k.shape != q.shape:
        raise ValueError(f"k is {_shape(k)}, it must have q's shape {_shape(q)}")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v is {_shape(v)}, its batch and tokens must be q's {list(q.shape[:2])}")
    if v.shape[2] % q.shape[2]:
        heads = q.shape[2]
        below = max(v.shape[2] // heads, 1) * heads
        raise ValueError(
            f"v has {v.shape[2]} heads, it must have a multiple of q's and k's {heads}; "
            f"nearest: {below}"
        )
    if sp is not None:
        sp.check_shard("q", q)


def _check_decay(log_decay: Tensor, k: Tensor, v: Tensor, *, constant: bool) -> Tensor:
    """log_decay as a gate [B, T, HV, 1 or K]."""
    heads = v.shape[:3]
    allowed = {"[B, T, HV]": heads, "[B, T, HV, K]": heads + k.shape[-1:]}
    if constant:
        allowed = {"[HV]": heads[2:], **allowed}
    if log_decay.shape not in allowed.values():
        rule = " or ".join(f"{name} = {list(shape)}" for name, shape in allowed.items())
        raise ValueError(f"log_decay is {_shape(log_decay)}, it must be {rule}")
    check_beside("log_decay", log_decay, "v", v)
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(heads)
    return log_decay if log_decay.dim() == 4 else log_decay[..., None]


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
