"""The short causal convolution of one rank's tokens: Triton kernels, launched, and plain PyTorch.

Both take the tokens as equal ranges of a stream, each of which may have a halo: the width-1 tokens
before it, zeros where there are none.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels.strides import dense, in_units
from seqpar.kernels.tuned import ceil_div, processors

WIDEST = 8
"""Taps that the Triton kernels keep in registers."""


@dataclass(frozen=True)
class Convolution:
    """y_t = SiLU(Σ_j weight[:, width-1-j] x_{t-j} + bias), with or without SiLU.

    In `forward` and `backward`: x [B, T, H, D], whose heads, tokens and sequences may lie anywhere;
    halo [ranges * (width-1), B, H, D] or None; weight [H*D, width]; bias [H*D] or None.

    Args:
        silu: whether there is an activation.
        ranges: of the same length, one after the other in T.
        seen: int32 [T], for each token how many of the width-1 before it belong to its document;
            None where a range holds one document.
        triton: which implementation; the kernels take widths up to WIDEST.
    """

    silu: bool
    ranges: int
    seen: Tensor | None
    triton: bool

    def forward(
        self, x: Tensor, halo: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """y [B, T, H, D] in x's dtype."""
        if not self.triton:
            return self._plain(x, halo, weight, bias)
        from seqpar.kernels.conv_kernels import conv_kernel  # triton only where it is used
        from seqpar.kernels.launch import Launch, alike

        x = dense(x)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inputs = self._inputs(x, halo, weight, bias)

        def make() -> Launch:
            block = _block(len(weight), 256 if x.element_size() == 2 else 128)  # 16 bytes a thread
            programs, rows = self._cut(x, block, 64)
            return Launch(
                conv_kernel,
                programs * ceil_div(len(weight), block),
                **in_units(x=x),
                **self._values(x, halo, weight, bias),
                BLOCK=block,
                ROWS=rows,
            )

        kind = self._kind(halo, bias)
        alike(*kind, *inputs).once("forward", make)(*inputs, y)
        return y

    def backward(
        self, x: Tensor, halo: Tensor | None, weight: Tensor, bias: Tensor | None, dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The gradients of the four inputs, from that of y."""
        if not self.triton:
            return self._plain_backward(x, halo, weight, bias, dy)
        from seqpar.kernels.conv_kernels import conv_backward_kernel
        from seqpar.kernels.launch import Launch, alike

        x, dy = dense(x), dense(dy)
        channels, width = weight.shape
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_halo = None if halo is None else torch.empty_like(halo)
        block = _block(channels, 128)  # with more, too few programs fit for their registers
        programs, rows = self._cut(x, block, 128)
        lines = width + (bias is not None)
        sums = torch.empty(programs, lines, channels, dtype=torch.float32, device=x.device)
        inputs = *self._inputs(x, halo, weight, bias), dy

        def make() -> Launch:
            return Launch(
                conv_backward_kernel,
                programs * ceil_div(channels, block),
                **in_units(x=x, y=dy),
                **self._values(x, halo, weight, bias),
                BLOCK=block,
                ROWS=rows,
            )

        kind = self._kind(halo, bias)
        launch = alike(*kind, *inputs).once("backward", make)
        launch(*inputs, dx, dx if d_halo is None else d_halo, sums)
        total = sums.sum(0)
        d_weight = total[:width].T.to(weight.dtype, memory_format=torch.contiguous_format)
        return dx, d_halo, d_weight, None if bias is None else total[width].to(bias.dtype)

    def _inputs(
        self, x: Tensor, halo: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What the kernels read; in place of what is missing, something they leave alone."""
        weight = weight.contiguous()
        return (
            x,
            x if halo is None else halo,
            weight,
            weight if bias is None else bias.contiguous(),
            x if self.seen is None else self.seen,
        )

    def _kind(self, halo: Tensor | None, bias: Tensor | None) -> tuple[object, ...]:
        """All that calls alike share beside the form of their tensors."""
        missing = halo is None, bias is None, self.seen is None
        return "conv", self.silu, self.ranges, *missing

    def _values(
        self, x: Tensor, halo: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> dict[str, Any]:
        return {
            "batches": x.shape[0],
            "length": x.shape[1] // self.ranges,
            "CHANNELS": weight.shape[0],
            "DIM": x.shape[3],
            "WIDTH": weight.shape[1],
            "BIAS": bias is not None,
            "SILU": self.silu,
            "HALO": halo is not None,
            "PACKED": self.seen is not None,
            "RANGES": self.ranges,
            "FAST": x.is_cuda,
            "UNROLL": 4,
            "num_warps": 1,
        }

    def _cut(self, x: Tensor, block: int, most: int) -> tuple[int, int]:
        """How many programs there are along the tokens, and how many tokens each has.

        At most `most`, and few enough for 16 programs a multiprocessor.
        """
        batch, tokens, heads, dim = x.shape
        blocks = ceil_div(heads * dim, block)
        rows = most
        while rows > 16 and batch * tokens * blocks < 16 * processors(x.device) * rows:
            rows //= 2
        return batch * self.ranges * ceil_div(tokens // self.ranges, rows), rows

    def _plain(self, x: Tensor, halo: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        reach = weight.shape[1] - 1
        own = x.flatten(2).unflatten(1, (self.ranges, -1))  # [B, ranges, tokens, C]
        length = own.shape[2]
        if halo is None:
            before = own.new_zeros(*own.shape[:2], reach, own.shape[3])
        else:
            before = halo.flatten(2).unflatten(0, (self.ranges, reach)).permute(2, 0, 1, 3)
        extended = torch.cat([before, own], 2)
        y = own * weight[:, reach]
        for j in range(1, reach + 1):
            earlier = extended[:, :, reach - j : reach - j + length]
            if self.seen is not None:  # tokens of the document before must not leak in
                hidden = (self.seen < j).unflatten(0, (self.ranges, -1))
                earlier = earlier.masked_fill(hidden[None, :, :, None], 0)
            y = y + earlier * weight[:, reach - j]
        if bias is not None:
            y = y + bias
        y = torch.nn.functional.silu(y) if self.silu else y
        return y.to(x.dtype).reshape(x.shape)

    def _plain_backward(
        self, x: Tensor, halo: Tensor | None, weight: Tensor, bias: Tensor | None, dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        inputs = [None if t is None else t.detach() for t in (x, halo, weight, bias)]
        given = [t.requires_grad_() for t in inputs if t is not None]
        with torch.enable_grad():
            x, halo, weight, bias = inputs  # type: ignore[assignment]
            found = iter(torch.autograd.grad(self._plain(x, halo, weight, bias), given, dy))
        dx, d_halo, d_weight, d_bias = (None if t is None else next(found) for t in inputs)
        assert dx is not None
        assert d_weight is not None
        return dx, d_halo, d_weight, d_bias


def _block(channels: int, most: int) -> int:
    """Channels of a program, which is one warp: half of the most where those do not divide them."""
    return most if channels % most == 0 else most // 2
