"""Short causal convolution over a sequence cut over ranks: each range gets a halo of width-1."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.checks import check_beside, first_order, uncompiled
from seqpar.context import SequenceParallel, alone
from seqpar.fetch import Routes
from seqpar.kept import recall, remember
from seqpar.kernels.choose import uses_triton
from seqpar.kernels.conv import WIDEST, Convolution


@uncompiled
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    sp: SequenceParallel | None = None,
) -> Tensor:
    """Depthwise causal convolution within each document.

        y_t = activation(Σ_j weight[:, width-1-j] · x_{t-j} + bias)

    Args:
        x: [B, T, C], or [B, T, H, D] with C = H·D channels; this rank's tokens. A slice of a packed
            projection is read where it lies.
        weight: [C, width], the last column for the token itself (as in torch's depthwise Conv1d).
        bias: [C] or None.
        activation: None or "silu".
        sp: how the sequence is cut over ranks; None when this rank holds whole sequences.

    Returns:
        y in x's shape and dtype. Triton kernels reckon in fp32 inside, plain PyTorch in the dtype
        of x and weight.

    Raises:
        ValueError: shapes that do not fit each other or the layout, or an unknown activation.
    """
    _check(x, weight, bias, activation, sp)
    heads = x if x.dim() == 4 else x.unsqueeze(2)
    with torch.cuda.device_of(x):  # where Triton launches; nothing on a CPU
        y = _Conv.apply(heads, weight, bias, activation == "silu", sp or alone(x.shape[1]))
    return y if x.dim() == 4 else y.squeeze(2)


@dataclass(frozen=True)
class _Plan:
    """What follows from the layout: how many ranges this rank has, and for `reach` tokens before
    each token which of them belong to its document (see `Convolution`) and where they come from.

    Ranges of different lengths are laid end to end, each after its halo, as one: `order` are the
    rows of that among the halos' followed by x's, `own` those of x's tokens in it.
    """

    ranges: int
    seen: Tensor | None
    routes: Routes | None
    order: Tensor | None = None
    own: Tensor | None = None


def _plan(sp: SequenceParallel, reach: int, device: torch.device) -> _Plan:
    layout, rank = sp.layout, sp.rank

    def halos(rank: int) -> list[tuple[int, int]]:
        """The up to `reach` tokens of its document before each range."""
        starts = [start for start, _ in layout.ranges(rank)]
        return [(max(start - reach, layout.begin(start)), start) for start in starts]

    segments = layout.segments(rank)
    seen = routes = None
    if reach and any(len(found) > 1 for found in segments):
        seen = layout.positions(rank).clamp(max=reach).to(device, torch.int32)
    if reach and sp.exchanges:
        routes = Routes(layout.ranges, halos, sp.comm, device, room=reach)
    lengths = [stop - start for start, stop in layout.ranges(rank)]
    if len(set(lengths)) == 1 or not reach:
        return _Plan(len(segments) if reach else 1, seen, routes)
    halo = torch.arange(len(lengths) * reach if routes is not None else 0).split(reach)
    order, at = [], len(lengths) * reach if routes is not None else 0
    for i, length in enumerate(lengths):
        order += [halo[i]] if routes is not None else []
        order.append(torch.arange(at, at + length))
        at += length
    rows = torch.cat(order)
    own = (rows >= rows.numel() - sum(lengths)).nonzero().flatten()
    counted = torch.zeros(len(rows), dtype=torch.int32)
    counted[own] = layout.positions(rank).clamp(max=reach).to(torch.int32)
    return _Plan(1, counted.to(device), routes, rows.to(device), own.to(device))


class _Conv(torch.autograd.Function):
    """Every rank takes part in fetching halos, both ways, also one that needs none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        sp: SequenceParallel,
    ) -> Tensor:
        width = weight.shape[1]
        unfit = f"width={width} must be at most {WIDEST}" if width > WIDEST else None
        triton = uses_triton("causal_conv1d", x, unfit)
        key = "conv", width, x.device
        plan = sp.once(key, lambda: _plan(sp, width - 1, x.device))
        halo = None
        if plan.routes is not None:
            known = recall()
            if known is None:
                sp.enter(f"causal_conv1d of width {width}", x=x)
                known = (plan.routes.bring(x, sp.comm, kind="halo"),)
            [halo] = known
            remember(halo)
        convolution = Convolution(silu, plan.ranges, plan.seen, triton)
        ctx.plan = convolution, plan, sp
        if plan.order is None or plan.own is None:
            ctx.save_for_backward(x, halo, weight, bias)
            return convolution.forward(x, halo, weight, bias)
        rows = x if halo is None else torch.cat([halo.transpose(0, 1), x], 1)
        together = rows.index_select(1, plan.order)
        ctx.save_for_backward(together, None, weight, bias)
        return convolution.forward(together, None, weight, bias).index_select(1, plan.own)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, halo, weight, bias = ctx.saved_tensors
        convolution, plan, sp = ctx.plan
        if plan.order is not None:
            dy = dy.new_zeros(x.shape).index_copy_(1, plan.own, dy)
        dx, d_halo, d_weight, d_bias = convolution.backward(x, halo, weight, bias, dy)
        if plan.order is not None:
            rows = torch.empty_like(dx).index_copy_(1, plan.order, dx)
            d_halo, dx = rows.split([rows.shape[1] - len(plan.own), len(plan.own)], 1)
            d_halo = d_halo.transpose(0, 1)
        if plan.routes is not None and ctx.needs_input_grad[0]:
            sp.enter("backward of causal_conv1d", x=dx)
            plan.routes.give_back(d_halo, dx, sp.comm, kind="halo")
        return dx, d_weight, d_bias, None, None


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    sp: SequenceParallel | None,
) -> None:
    if x.dim() not in (3, 4) or not x.numel():
        raise ValueError(
            f"x is {list(x.shape)}, it must be [batch, tokens, channels] or "
            "[batch, tokens, heads, dim], none empty"
        )
    channels = x.shape[2:].numel()
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"weight is {list(weight.shape)}, it must be [channels={channels}, width >= 1]"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias is {list(bias.shape)}, it must be [channels={channels}]")
    for name, given in (("x", x), ("weight", weight), ("bias", bias)):
        if given is not None:
            check_beside(name, given, "x", x)
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r} must be None or 'silu'")
    if sp is not None:
        sp.check_shard("x", x)
