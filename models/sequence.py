"""How the cut of the sequence reaches the layers: as Megatron's packed-sequence parameters."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import SequenceParallel


class SequenceParallelParams(PackedSeqParams):
    """What a Megatron model hands to each of its layers, here with this project's own meaning.

    Pass it as `packed_seq_params` to GPTModel; the mixers of this package take `sp` from it. One
    object serves one forward and backward pass: it keeps what all layers share.

    Args:
        sp: the group, the layout (documents included) and the exchange of this sequence.

    Attributes: sp.
    """

    def __init__(self, sp: SequenceParallel) -> None:
        super().__init__(cp_group=sp.comm.group)
        self.sp = sp
        self._rotary: dict[tuple[int, float, torch.device], tuple[Tensor, Tensor]] = {}

    def check(self, config: TransformerConfig) -> None:
        """Raise ValueError where ranks hold different numbers of tokens and Megatron cannot."""
        sizes = set(self.sp.layout.shard_sizes)
        if len(sizes) == 1:
            return
        told = f"{self.sp.layout!r} gives ranks {sorted(sizes)} tokens"
        if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
            raise ValueError(
                f"{told}: pipeline stages need to be told, set variable_seq_lengths=True in the "
                "TransformerConfig, or leave out shard_sizes"
            )
        if config.num_moe_experts and config.moe_token_dispatcher_type == "allgather":
            raise ValueError(
                f"{told}: moe_token_dispatcher_type='allgather' gathers equal numbers only; set it "
                "to 'alltoall', or leave out shard_sizes"
            )
        if config.sequence_parallel and any(
            size % config.tensor_model_parallel_size for size in sizes
        ):
            raise ValueError(
                f"{told}: with sequence_parallel=True each must be a multiple of "
                f"tensor_model_parallel_size={config.tensor_model_parallel_size}"
            )

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
