"""Layer specs: one mixer for any Megatron model, or a whole hybrid chosen by a pattern."""

from collections.abc import Mapping
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from seqpar.models import compat
from seqpar.models.config import MemoryConfig, ModelConfig, layer_mixers, resolved
from seqpar.models.core_attention import CoreAttention
from seqpar.models.gated_deltanet import GatedDeltaNet
from seqpar.models.gla import GatedLinearAttention
from seqpar.models.kda import KimiDeltaAttention
from seqpar.models.mamba2 import Mamba2
from seqpar.models.mixer import SequenceMixer
from seqpar.models.moe import moe_spec
from seqpar.models.norm import RMSNorm
from seqpar.models.recompute import Runs, SavingLayer
from seqpar.models.retention import Retention
from seqpar.models.softmax import SoftmaxAttention

LINEAR_MIXERS: dict[str, type[SequenceMixer]] = {
    "gla": GatedLinearAttention,
    "gated_deltanet": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "mamba2": Mamba2,
    "retention": Retention,
}


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
        name: "gla", "gated_deltanet", "kda", "mamba2" or "retention".
        num_heads, head_dim, value_head_dim: its heads, their key and value dimensions.
        layout: "contiguous" or "zigzag", how the caller cuts the sequence over context-parallel
            ranks; not needed where SequenceParallelParams are passed. Megatron cuts it zigzag, and
            packed documents (PackedSeqParams) one by one.
        **options: gate_rank (gla, kda), key_heads and conv_width (gated_deltanet, kda, mamba2),
            rope_base (retention).

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


def core_attention_spec(method: str = "auto", layout: str | None = "zigzag") -> ModuleSpec:
    """Softmax attention for the `core_attention` slot of Megatron's own attention.

    Megatron projects and turns; its rotary embedding takes the zigzag layout for granted.

    Args:
        method, layout: see softmax_attention_spec.
    """
    return ModuleSpec(CoreAttention, params={"method": method, "layout": layout})


def pattern_spec(pattern: str, mixers: Mapping[str, ModuleSpec]) -> ModuleSpec:
    """For the `self_attention` slot of one layer spec: another mixer in each layer.

    Args:
        pattern: one letter a layer, of all pipeline stages; spaces allowed ("LLLN LLLN").
        mixers: what each letter stands for; specs of this module, or of any attention that works
            on a cut sequence.

    Raises:
        ValueError: a letter that stands for nothing.
    """
    letters = "".join(pattern.split())
    for letter in letters:
        if letter not in mixers:
            raise ValueError(
                f"pattern={pattern!r} holds the letter {letter!r}; mixers has {', '.join(mixers)}"
            )
    return ModuleSpec(PatternMixer, params={"mixers": [mixers[letter] for letter in letters]})


class PatternMixer:
    """Builds the mixer of a layer: `mixers` holds one spec a layer, by global layer number.

    Megatron numbers a layer over all pipeline stages, so one static spec serves any split.

    Raises:
        ValueError: no mixer for the layer; or, with more than one context-parallel rank, one that
            would attend within its rank's tokens only.
    """

    def __new__(
        cls,
        config: TransformerConfig,
        *,
        mixers: list[ModuleSpec],
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **inputs: Any,
    ) -> Any:
        if not 0 < layer_number <= len(mixers):
            raise ValueError(f"layer {layer_number} has no letter in a pattern of {len(mixers)}")
        built = build_module(
            mixers[layer_number - 1],
            config=config,
            layer_number=layer_number,
            pg_collection=pg_collection,
            **inputs,
        )
        core = getattr(built, "core_attention", built)
        path = isinstance(core, SequenceMixer | CoreAttention)
        path = path or type(core).__module__ == "megatron.core.extensions.transformer_engine"
        if pg_collection.cp.size() > 1 and not path:
            raise ValueError(
                f"layer {layer_number} is a {type(core).__name__}, which has no sequence-parallel "
                f"path: its tokens are cut over {pg_collection.cp.size()} context-parallel ranks; "
                "take linear_attention_spec, softmax_attention_spec or core_attention_spec"
            )
        return built


def hybrid_stack_spec(
    linear: ModuleSpec, *, softmax_method: str = "auto", layout: str | None = None
) -> ModuleSpec:
    """A stack for Megatron's own HybridModel (MambaModel in 0.16), its linear slot taken.

    Its pattern's letters: `M` (and `G`, where Megatron has it) the linear mixer, `*` softmax
    attention, `-` an MLP, `E` a mixture of experts (with a gated SiLU, without biases).

    Args:
        linear: what `linear_attention_spec` returned.
        softmax_method, layout: of softmax attention, see softmax_attention_spec.
    """
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mixing = ModuleSpec(
        MambaLayer,
        submodules=MambaLayerSubmodules(norm=RMSNorm, mixer=linear, mamba_bda=get_bias_dropout_add),
    )
    softmax = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=softmax_attention_spec(method=softmax_method, layout=layout),
        self_attn_bda=get_bias_dropout_add,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(MLP, submodules=linears),
        mlp_bda=get_bias_dropout_add,
    )
    experts = TransformerLayerSubmodules(
        pre_mlp_layernorm=RMSNorm, mlp=moe_spec(), mlp_bda=get_bias_dropout_add
    )
    layers = {
        "mamba_layer": mixing,
        "gdn_layer": mixing,
        "attention_layer": ModuleSpec(TransformerLayer, submodules=softmax),
        "mlp_layer": ModuleSpec(MLPLayer, submodules=mlp),
        "moe_layer": ModuleSpec(TransformerLayer, submodules=experts),
    }
    return compat.hybrid_stack(layers, RMSNorm)


def hybrid_layer_spec(
    model: ModelConfig, memory: MemoryConfig, softmax_method: str = "auto"
) -> ModuleSpec:
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
    keys = {"key_heads": model.key_heads, "conv_width": model.conv_width}
    options: dict[str, dict[str, Any]] = {
        "gla": {"gate_rank": model.gate_rank},
        "gated_deltanet": keys,
        "kda": {"gate_rank": model.gate_rank, **keys},
        "mamba2": keys,
        "retention": {"rope_base": model.rope_base},
    }
    specs = {name: linear_attention_spec(name, **sizes, **options[name]) for name in LINEAR_MIXERS}
    specs["softmax"] = softmax_attention_spec(
        rope_base=model.rope_base, rope_fraction=model.rope_fraction, method=softmax_method
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mixers = layer_mixers(model)
    return ModuleSpec(
        SavingLayer,
        params={"memory": memory, "mixers": mixers, "runs": Runs()},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                PatternMixer, params={"mixers": [specs[name] for name in mixers]}
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=moe_spec() if model.num_experts else ModuleSpec(MLP, submodules=linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )
