"""How the cut of the sequence reaches the layers: as Megatron's packed-sequence parameters."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import Layout, SequenceParallel


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


LAYOUTS = ("contiguous", "zigzag")


class CallSequence:
    """How the sequence of a layer's call is cut: as the caller says, or by the layer's own layout.

    Args:
        owner: the layer's name, for messages.
        config: the model's configuration.
        group: its context-parallel group.
        layout: how callers cut a sequence that does not say so itself. "contiguous"; "zigzag": as
            Megatron's get_batch_on_this_cp_rank does, and packed documents one by one, as
            Transformer Engine does; None: callers pass SequenceParallelParams.

    Raises:
        ValueError: an unknown layout.
    """

    def __init__(
        self, owner: str, config: TransformerConfig, group: Any, layout: str | None
    ) -> None:
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}, or None")
        self._owner, self._config, self._group, self._layout = owner, config, group, layout
        self._whole: SequenceParallelParams | None = None  # of the last call that said nothing

    def __call__(self, given: PackedSeqParams | None, tokens: int) -> SequenceParallelParams:
        """What the layer works with.

        Args:
            given: the call's `packed_seq_params`. Megatron's own PackedSeqParams name documents
                (cu_seqlens_q of the whole sequence, cu_seqlens_q_padded where there is padding) and
                may bring a context-parallel group, which goes before the layer's.
            tokens: of this rank.

        Raises:
            ValueError: a cut that is not said, or not possible.
        """
        if isinstance(given, SequenceParallelParams):
            given.check(self._config)
            return given
        if given is None:
            known = self._whole
            if known is None or known.sp.layout.local_tokens(known.sp.rank) != tokens:
                known = self._whole = self._make(self._group, tokens, None)
            return known
        # one object serves all layers and its recomputation: what it means is kept with it
        kept = vars(given).setdefault("_seqpar", {})
        if (self._layout, tokens) not in kept:
            group = given.cp_group
            if group is None and given.local_cp_size is None:
                group = self._group
            kept[self._layout, tokens] = self._make(group, tokens, _documents(given, self._owner))
        found: SequenceParallelParams = kept[self._layout, tokens]
        return found

    def _make(self, group: Any, tokens: int, documents: list[int] | None) -> SequenceParallelParams:
        ranks = group.size() if group is not None else 1
        if ranks > 1 and self._layout is None:
            raise ValueError(
                f"the sequence is cut over {ranks} context-parallel ranks, but {self._owner} does "
                "not know how: pass SequenceParallelParams as packed_seq_params, or build the spec "
                'with layout="zigzag" (what Megatron\'s get_batch_on_this_cp_rank does) or '
                'layout="contiguous"'
            )
        kind = self._layout if ranks > 1 and self._layout else "contiguous"
        if documents is not None:
            total = tokens * ranks
            if kind == "zigzag":
                kind = "document_zigzag"
            elif documents[-1] < total:
                documents = [*documents, total]  # padding at the end is one more document
            if documents[-1] != total:
                raise ValueError(
                    f"cu_seqlens_q ends at {documents[-1]}, but {ranks} context-parallel ranks "
                    f"hold {tokens} tokens each: it must count the tokens of the whole sequence, "
                    f"{total}, padding included (cu_seqlens_q_padded)"
                )
        layout = Layout(tokens * ranks, ranks, kind, documents)
        return SequenceParallelParams(SequenceParallel(group, layout))


def _documents(given: PackedSeqParams, owner: str) -> list[int] | None:
    """The boundaries of the documents, with the padding after each, in the whole sequence."""
    found = []
    for side in ("q", "kv"):
        bounds = getattr(given, f"cu_seqlens_{side}_padded")
        if bounds is None:
            bounds = getattr(given, f"cu_seqlens_{side}")
        found.append(None if bounds is None else bounds.tolist())
    own, others = found
    if others is not None and others != own:
        raise ValueError(
            f"cu_seqlens_kv={others} is not cu_seqlens_q={own}: {owner} attends within one sequence"
        )
    return own
