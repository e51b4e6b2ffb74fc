"""One pass over the tokens, as both run kernels take it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """Arguments of a run kernel (see decay_kernels.py); what a pass does not use repeats another.

    x, y, z, other [B, T, H, D] at their own numbers of heads; gate [B, T, heads, 1 or D]; out [B,
    T, heads, DZ]; entering [B, slots, heads, K, V]. decay: "none", "scalar", "key" or "value".
    transposed: DZ is K and DY is V. gated: whether the gradient of the decays is wanted.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    other: Tensor
    gate: Tensor
    entering: Tensor
    saved: Tensor
    out: Tensor
    shares: Tensor
    flows: Tensor
    table: Tensor
    blocks: int
    scale: float
    decay: str
    reverse: bool
    transposed: bool
    gated: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """batches, tokens, blocks, slots, saves."""
        batch, tokens = self.out.shape[:2]
        return batch, tokens, self.blocks, self.entering.shape[1], self.saved.shape[1]

    @property
    def state_strides(self) -> tuple[int, int]:
        """Of a state's rows (channels of y) and columns (channels of z)."""
        return (1, self.y.shape[-1]) if self.transposed else (self.z.shape[-1], 1)

    @property
    def groups(self) -> dict[str, int]:
        """How many heads of v share a head of each tensor."""
        heads = self.out.shape[2]
        named = {"X": self.x, "Y": self.y, "Z": self.z, "W": self.other}
        return {f"{name}_GROUP": heads // x.shape[2] for name, x in named.items()}
