"""Grouped-query softmax attention with rotary embedding as a Megatron attention module."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import softmax_attention
from seqpar.kernels.pieces import Late
from seqpar.models.groups import Heads
from seqpar.models.mixer import SequenceMixer
from seqpar.models.sequence import SequenceParallelParams

# Fields of TransformerConfig that would change the result, and the only value honoured here: in the
# product of scores and values, and before and after it.
_SCORES = {
    "apply_query_key_layer_scaling": False,
    "softmax_type": "vanilla",
    "window_size": None,
}
_PROJECTIONS = {
    "attention_output_gate": False,
    "multi_latent_attention": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
}


def refuse_other_attention(config: TransformerConfig, owner: str, *, projected: bool) -> None:
    """Raise ValueError where `config` asks for another kind of softmax attention than `owner`'s.

    projected: whether others make the queries, keys and values.
    """
    for name, only in (_SCORES if projected else {**_SCORES, **_PROJECTIONS}).items():
        if getattr(config, name, only) != only:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not possible in {owner}; set it to {only!r}"
            )


class SoftmaxAttention(SequenceMixer):
    """Causal softmax attention over the whole sequence, its keys and values on other ranks.

    Heads come from the configuration: num_attention_heads, num_query_groups, kv_channels,
    softmax_scale. The rotary embedding uses each token's true position in its document; build
    GPTModel with position_embedding_type="none", Megatron's own is for its zigzag layout alone.

    Args:
        config, layer_number, pg_collection: given by Megatron's layer.
        rope_base, rope_fraction: rotary embedding, over this part of each head (0 for none).
        method: how keys and values reach other ranks, see seqpar.softmax_attention.
        layout: see SequenceMixer.

    Raises:
        ValueError: a configuration that asks for another kind of softmax attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *,
        rope_base: float = 10000.0,
        rope_fraction: float = 1.0,
        method: str = "auto",
        layout: str | None = None,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        refuse_other_attention(config, type(self).__name__, projected=False)
        dim, groups = config.kv_channels, config.num_query_groups
        queries = config.num_attention_heads // groups
        widths = [queries * dim, dim, dim]
        super().__init__(
            config,
            heads=groups,
            in_width=sum(widths),
            out_width=queries * dim,
            shared=True,
            layout=layout,
            pg_collection=pg_collection,
        )
        self.widths, self.head_dim, self.rope_base = widths, dim, rope_base
        self.method = method
        self.rotary_dim = int(dim * rope_fraction) // 2 * 2

    def mix(
        self,
        x: Tensor,
        late: Late,
        low: Tensor | None,
        heads: Heads,
        params: SequenceParallelParams,
    ) -> Tensor:
        """See SequenceMixer; a head of x is a group of query heads with their key and value."""
        q, k, v = x.split(self.widths, -1)
        q = q.chunk(self.share, -1)[self.tp_group.rank() % self.share]
        q = q.unflatten(-1, (-1, self.head_dim)).flatten(2, 3)
        if self.rotary_dim:
            cos, sin = params.rotary(self.rotary_dim, self.rope_base, x.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = softmax_attention(
            q, k, v, scale=self.config.softmax_scale, method=self.method, sp=params.sp
        )
        return out.unflatten(2, (len(heads), -1)).flatten(3)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [b, s, heads, dim] by cos and sin [s, n], n <= dim / 2.

    Channel i < n turns with channel n + i; channels from 2n on stay. In x's dtype.
    """
    cos, sin = cos[:, None], sin[:, None]
    n = cos.shape[-1]
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    turned = [first * cos - second * sin, first * sin + second * cos]
    return torch.cat([part.to(x.dtype) for part in turned] + [rest], -1)
