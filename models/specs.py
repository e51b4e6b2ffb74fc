"""Layer specs: one mixer for any Megatron model, or a whole hybrid chosen by a pattern."""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from seqpar.models.config import ModelConfig, layer_mixers, resolved
from seqpar.models.gated_deltanet import GatedDeltaNet
from seqpar.models.gla import GatedLinearAttention
from seqpar.models.moe import moe_spec
from seqpar.models.norm import RMSNorm
from seqpar.models.softmax import SoftmaxAttention

LINEAR_MIXERS = {"gla": GatedLinearAttention, "gated_deltanet": GatedDeltaNet}


def linear_attention_spec(
    name: str,
    *,
    num_heads: int,
    head_dim: int,
    value_head_dim: int,
    layout: str | None = None,
    **options: Any,
) -> ModuleSpec:
    """A linear mixer for the `self_attention` slot of a Megatron layer spec.

    Args:
        name: "gla" or "gated_deltanet".
        num_heads, head_dim, value_head_dim: its heads, their key and value dimensions.
        layout: "contiguous" or "zigzag", how the caller cuts the sequence over context-parallel
            ranks; not needed where SequenceParallelParams are passed. Megatron cuts it zigzag.
        **options: gate_rank (gla), conv_width (gated_deltanet).

    Raises:
        ValueError: an unknown name.
    """
    if name not in LINEAR_MIXERS:
        raise ValueError(f"name={name!r} must be one of {', '.join(LINEAR_MIXERS)}")
    sizes = {"num_heads": num_heads, "head_dim": head_dim, "value_head_dim": value_head_dim}
    return ModuleSpec(LINEAR_MIXERS[name], params={**sizes, "layout": layout, **options})


def softmax_attention_spec(
    *,
    rope_base: float = 10000.0,
    rope_fraction: float = 1.0,
    method: str = "auto",
    layout: str | None = None,
) -> ModuleSpec:
    """Softmax attention for the `self_attention` slot; heads as in the TransformerConfig.

    Args:
        rope_base, rope_fraction: rotary embedding by true positions, over this part of each head;
            build GPTModel with position_embedding_type="none".
        method: how keys and values cross ranks, see seqpar.softmax_attention.
        layout: see linear_attention_spec.
    """
    options = {"rope_base": rope_base, "rope_fraction": rope_fraction, "method": method}
    return ModuleSpec(SoftmaxAttention, params={**options, "layout": layout})


class PatternMixer:
    """Builds the mixer of a layer: `mixers` holds one spec a layer, by global layer number.

    Megatron numbers a layer over all pipeline stages, so one static spec serves any split.
    """

    def __new__(cls, *, mixers: list[ModuleSpec], layer_number: int, **inputs: Any) -> Any:
        return build_module(mixers[layer_number - 1], layer_number=layer_number, **inputs)


def hybrid_layer_spec(model: ModelConfig, softmax_method: str = "auto") -> ModuleSpec:
    """The spec of every layer of `model`: norms, the pattern's mixer, and an MLP or MoE.

    Raises:
        ValueError: see seqpar.models.config.resolved.
    """
    model = resolved(model)
    sizes: dict[str, Any] = {
        "num_heads": model.num_heads,
        "head_dim": model.head_dim,
        "value_head_dim": model.value_head_dim,
    }
    specs = {
        "gla": linear_attention_spec("gla", gate_rank=model.gate_rank, **sizes),
        "gated_deltanet": linear_attention_spec(
            "gated_deltanet", conv_width=model.conv_width, **sizes
        ),
        "softmax": softmax_attention_spec(
            rope_base=model.rope_base, rope_fraction=model.rope_fraction, method=softmax_method
        ),
    }
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                PatternMixer, params={"mixers": [specs[name] for name in layer_mixers(model)]}
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=moe_spec() if model.num_experts else ModuleSpec(MLP, submodules=linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )
