"""Ring or gathered softmax attention for the `core_attention` slot of Megatron's attention."""

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import softmax_attention
from seqpar.models.sequence import CallSequence
from seqpar.models.softmax import refuse_other_attention

_CAUSAL = {
    AttnMaskType.causal: True,
    AttnMaskType.padding_causal: True,
    AttnMaskType.no_mask: False,
}


class CoreAttention(MegatronModule):
    """Softmax attention of queries that Megatron has projected and turned, over the whole sequence.

    It has no parameters, and goes where Megatron's DotProductAttention is, which refuses a sequence
    that is cut over context-parallel ranks.

    Args:
        config, layer_number, attn_mask_type, softmax_scale, attention_dropout, pg_collection: given
            by Megatron's attention.
        method: how keys and values cross ranks, see seqpar.softmax_attention.
        layout: see CallSequence.

    Raises:
        ValueError: a configuration that asks for another kind of softmax attention, or dropout.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *_: Any,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        pg_collection: ProcessGroupCollection,
        method: str = "auto",
        layout: str | None = "zigzag",
        **__: Any,
    ) -> None:
        super().__init__(config)
        refuse_other_attention(config, type(self).__name__, projected=True)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout={dropout} is not possible here; set it to 0")
        self.mask_type, self.scale, self.method = attn_mask_type, softmax_scale, method
        self.sequence = CallSequence(type(self).__name__, config, pg_collection.cp, layout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Megatron's call: query [s, b, heads, dim] -> [s, b, heads * dim]; without b when packed.

        Raises:
            ValueError: an input that would have to be ignored.
        """
        inputs |= {"attention_mask": attention_mask, "attention_bias": attention_bias}
        for name, given in inputs.items():
            if given is not None:
                raise ValueError(f"{name} is given, {type(self).__name__} cannot use it; pass None")
        mask_type = attn_mask_type or self.mask_type
        if mask_type not in _CAUSAL:
            raise ValueError(
                f"attn_mask_type={mask_type} must be one of {', '.join(m.name for m in _CAUSAL)}"
            )
        packed = query.dim() == 3
        q, k, v = (
            (x.unsqueeze(1) if packed else x).transpose(0, 1) for x in (query, key, value)
        )  # [b, s, heads, dim]
        out = softmax_attention(
            q,
            k,
            v,
            causal=_CAUSAL[mask_type],
            scale=self.scale,
            method=self.method,
            sp=self.sequence(packed_seq_params, q.shape[1]).sp,
        )
        out = out.flatten(2).transpose(0, 1).contiguous()
        return out.squeeze(1) if packed else out
