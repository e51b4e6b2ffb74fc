"""How the cut of the sequence reaches the layers: as Megatron's packed-sequence parameters."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from seqpar import SequenceParallel


class SequenceParallelParams(PackedSeqParams):
    """What a Megatron model hands to each of its layers, here with this project's own meaning.

    Pass it as `packed_seq_params` to GPTModel; the mixers of this package take `sp` from it. One
    object serves one forward and backward pass: it keeps what all layers share.

    Args:
        sp: the group, the layout (documents included) and the exchange of this sequence.

    Raises:
        ValueError: ranks hold different numbers of tokens, which Megatron's pipeline and its
            load balancing loss cannot express.
    """

    def __init__(self, sp: SequenceParallel) -> None:
        super().__init__(cp_group=sp.comm.group)
        sizes = {sp.layout.local_tokens(rank) for rank in range(sp.layout.world_size)}
        if len(sizes) > 1:
            raise ValueError(
                f"{sp.layout!r} gives ranks {sorted(sizes)} tokens, a Megatron model needs the "
                "same number on each; leave out shard_sizes"
            )
        self.sp = sp
        self._rotary: dict[tuple[int, float, torch.device], tuple[Tensor, Tensor]] = {}

    def rotary(self, dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of this rank's true positions, fp32 [local tokens, dim / 2] each."""
        key = (dim, base, device)
        if key not in self._rotary:
            # fp32 products of position and frequency are off by half a radian at 8M tokens.
            rates = base ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
            positions = self.sp.layout.positions(self.sp.rank).to(device)
            angles = positions.double()[:, None] * rates
            self._rotary[key] = angles.cos().float(), angles.sin().float()
        return self._rotary[key]
