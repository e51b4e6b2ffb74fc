"""One pass over the tokens, as both run kernels take it."""

from dataclasses import dataclass

from torch import Tensor

from seqpar.kernels.frames import Frames


@dataclass(frozen=True)
class Pass:
    """Arguments of a run kernel (see decay_kernels.py); what a pass does not use repeats another.

    x, y, z, other [B, T, H, D] at their own numbers of heads; gate [B, T, heads, 1]; out [B, T,
    heads, DZ]; entering [B, slots, heads, K, V]. decay: "none", "scalar", "key" or "value".
    transposed: DZ is K and DY is V. gated: whether the gradient of the decays is wanted. block: its
    tokens; blocks: how many there are. frames: of diagonal decay.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    other: Tensor
    gate: Tensor
    entering: Tensor
    saved: Tensor
    out: Tensor
    table: Tensor
    block: int
    blocks: int
    scale: float
    decay: str
    reverse: bool
    transposed: bool
    gated: bool
    frames: Frames | None

    @property
    def numbers(self) -> tuple[float, ...]:
        """scale, batches, tokens, blocks, slots, saves, chunks."""
        batch, tokens = self.out.shape[:2]
        chunks = 0 if self.frames is None else self.frames.levels.shape[1]
        counted = self.blocks, self.entering.shape[1], self.saved.shape[1], chunks
        return self.scale, batch, tokens, *counted

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
