"""Short causal convolution over a sequence cut over ranks: each range gets a halo of width-1."""

import torch
from torch import Tensor

from seqpar.context import SequenceParallel
from seqpar.fetch import fetch
from seqpar.layout import Layout


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
        x: [B, T, C], this rank's tokens.
        weight: [C, width], the last column for the token itself (as in torch's depthwise Conv1d).
        bias: [C] or None.
        activation: None or "silu".
        sp: how the sequence is cut over ranks; None when this rank holds whole sequences.

    Returns:
        y [B, T, C] in x's dtype.

    Raises:
        ValueError: shapes that do not fit each other or the layout, or an unknown activation.
    """
    _check(x, weight, bias, activation, sp)
    if sp is None:
        sp = SequenceParallel(layout=Layout(x.shape[1], 1))
    reach = weight.shape[1] - 1
    layout, rank = sp.layout, sp.rank

    def halos(rank: int) -> list[tuple[int, int]]:
        """The up to width-1 tokens of its document before each range."""
        firsts = [segments[0] for segments in layout.segments(rank)]
        return [(max(s.start - reach, s.document), s.start) for s in firsts]

    mine = halos(rank)
    lengths = [stop - start for start, stop in mine]
    if reach and any(layout.chain.linked):
        sp.enter("causal_conv1d", x=x, weight=weight.T[None])
        arrived = fetch(x, layout.ranges, halos, sp.comm, kind="halo").split(lengths, 1)
    else:
        arrived = x[:, :0].split([0] * len(lengths), 1)

    outs = []
    positions = layout.positions(rank).to(x.device)
    for halo, segments in zip(arrived, layout.segments(rank), strict=True):
        here = slice(segments[0].local.start, segments[-1].local.stop)
        own = x[:, here]
        blank = x.new_zeros(x.shape[0], reach - halo.shape[1], x.shape[2])
        extended = torch.cat([blank, halo, own], 1)
        y = own * weight[:, reach]
        for j in range(1, reach + 1):
            earlier = extended[:, reach - j : extended.shape[1] - j]
            if len(segments) > 1:  # tokens of the document before must not leak in
                earlier = earlier.masked_fill((positions[here] < j)[None, :, None], 0)
            y = y + earlier * weight[:, reach - j]
        outs.append(y)
    out = torch.cat(outs, 1)
    if bias is not None:
        out = out + bias
    return torch.nn.functional.silu(out) if activation == "silu" else out


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    sp: SequenceParallel | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x is {list(x.shape)}, it must be [batch, tokens, channels]")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"weight is {list(weight.shape)}, it must be [channels={x.shape[2]}, width >= 1]"
        )
    if bias is not None and bias.shape != (x.shape[2],):
        raise ValueError(f"bias is {list(bias.shape)}, it must be [channels={x.shape[2]}]")
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r} must be None or 'silu'")
    if sp is not None:
        sp.check_shard("x", x)
