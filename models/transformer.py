"""Megatron-Core's TransformerConfig of a model, for given parallel sizes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from seqpar.models.config import ModelConfig, check_sizes, layer_mixers, resolved


def transformer_config(
    model: ModelConfig,
    *,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int = 1,
    stages: Sequence[int] | None = None,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> TransformerConfig:
    """Megatron-Core's configuration of `model` for these parallel sizes.

    The loss is summed over tokens and divided by the global count once
    (`calculate_per_token_loss`), so a loss function must return (sum, token count, report).

    Args:
        model: the model.
        tensor_parallel, context_parallel, pipeline_parallel, expert_parallel: group sizes.
        expert_tensor_parallel: ranks that share each expert's matrices.
        stages: layers of each pipeline stage, in the order of the layers; None for equal ones.
            Twice (three times, ...) as many stages as pipeline ranks are dealt to them in turn
            (Megatron's interleaved schedule, virtual stages).
        sequence_parallel: Megatron's sequence parallelism within the tensor-parallel group.
        dtype: of the parameters and activations, float32 or bfloat16.
        **overrides: any other field of TransformerConfig (recompute_granularity, ...).

    Raises:
        ValueError: sizes that do not divide the model, with the nearest that do.
    """
    model = resolved(model)
    layers = len(layer_mixers(model))
    sizes = {
        "tensor_parallel": tensor_parallel,
        "context_parallel": context_parallel,
        "pipeline_parallel": pipeline_parallel,
        "expert_parallel": expert_parallel,
        "expert_tensor_parallel": expert_tensor_parallel,
    }
    check_sizes(model, stages=stages, **sizes)
    if sequence_parallel and tensor_parallel == 1:
        raise ValueError("sequence_parallel=True needs tensor_parallel above 1; set it to False")
    if model.num_experts and tensor_parallel > 1 and not sequence_parallel:
        raise ValueError(
            f"tensor_parallel={tensor_parallel} with model.num_experts={model.num_experts} needs "
            "sequence_parallel=True: Megatron's MoE layer trains with both or neither"
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype} must be torch.float32 or torch.bfloat16")
    fields: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.softmax_head_dim,
        "ffn_hidden_size": model.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "init_method_std": model.init_std,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tensor_parallel,
        "context_parallel_size": context_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "expert_model_parallel_size": expert_parallel,
        "expert_tensor_parallel_size": expert_tensor_parallel,
        "sequence_parallel": sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "calculate_per_token_loss": True,
        # Layers differ, so a checkpoint names each instead of stacking all in one tensor.
        "hetereogenous_dist_checkpoint": True,
    }
    if model.num_experts:
        fields |= {
            "num_moe_experts": model.num_experts,
            "moe_router_topk": model.moe_top_k,
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
            "moe_aux_loss_coeff": model.moe_aux_loss,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_router_dtype": "fp32",
            # After the softmax over one chosen expert every weight would be 1.
            "moe_router_pre_softmax": model.moe_top_k == 1,
            "moe_token_dispatcher_type": "alltoall",
        }
    if stages is not None:
        rows = [["decoder"] * count for count in stages]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        fields["pipeline_model_parallel_layout"] = rows
        if len(stages) > pipeline_parallel:
            # Two ranks are each other's next and previous: messages of one batch would be mixed up.
            fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return TransformerConfig(**{**fields, **overrides})
