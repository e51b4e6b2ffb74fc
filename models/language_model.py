"""The Linear-MoE-style language model: Megatron's GPTModel over the layers of a pattern."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import SequenceParallel
from seqpar.models.config import ModelConfig
from seqpar.models.norm import RMSNorm
from seqpar.models.sequence import SequenceParallelParams
from seqpar.models.specs import hybrid_layer_spec


def build_language_model(
    model: ModelConfig,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    softmax_method: str = "auto",
) -> list[GPTModel]:
    """Build this rank's part of the model: one GPTModel for each of its pipeline stages.

    That is one, or several where `transformer_config` was given virtual stages. The first stage of
    all holds the embedding, the last the output layer.

    Args:
        model: its shape.
        config: what `transformer_config(model, ...)` returned.
        groups: the process groups; tp, cp, pp and embd, and ep, expt_tp, expt_dp, tp_cp, tp_ep and
            tp_dp_cp for a mixture of experts.
        softmax_method: how keys and values of softmax layers cross ranks.

    Returns:
        the stages in their order; the last one of all, called with labels, gives the loss of each
        token, fp32 [b, local tokens].

    Raises:
        ValueError: a shape that is not possible, see seqpar.models.config.resolved.
    """
    layer = hybrid_layer_spec(model, softmax_method)
    rank, last = groups.pp.rank(), groups.pp.size() - 1
    turns = config.virtual_pipeline_model_parallel_size
    stages = []
    for turn in range(turns or 1):
        vp_stage = turn if turns else None
        layers = get_num_layers_to_build(config, vp_stage, rank)
        stage = GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules([layer] * layers, RMSNorm),
            vocab_size=model.vocab_size,
            max_sequence_length=0,  # bounds learned positions, of which there are none
            pre_process=rank == 0 and turn == 0,
            post_process=rank == last and turn == (turns or 1) - 1,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none",  # the softmax mixer turns by true positions itself
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        stages.append(stage)
    return stages


@dataclass
class Batch:
    """This rank's shard of one micro-batch.

    Attributes:
        tokens, labels: int64 [b, local tokens]; labels were shifted on the global stream, before
            it was cut, and are legal tokens everywhere.
        loss_mask: float [b, local tokens], 1 where the label counts and 0 where not.
        sp: how the sequence is cut, documents included.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    sp: SequenceParallel


Loss = tuple[Tensor, Tensor, dict[str, Tensor]]


def forward_step(
    batches: Iterator[Batch], model: MegatronModule
) -> tuple[Tensor, Callable[[Tensor], Loss]]:
    """One forward pass, as Megatron's schedules (get_forward_backward_func) call it.

    Returns:
        the model's output and the function that turns it into `masked_loss`.
    """
    batch = next(batches)
    params = SequenceParallelParams(batch.sp)
    params.check(model.config)
    output = model(
        batch.tokens,
        position_ids=None,
        attention_mask=None,
        labels=batch.labels,
        packed_seq_params=params,
    )
    return output, partial(masked_loss, batch.loss_mask)


def masked_loss(loss_mask: Tensor, losses: Tensor) -> Loss:
    """(sum, token count, report) of this rank's losses [b, local tokens] where the mask is 1.

    Megatron sums all three numbers' gradients and counts over data- and context-parallel ranks
    and divides once. The report {"loss_sum", "tokens"} is this rank's own share, for the caller to
    sum over the same ranks.
    """
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum().to(torch.int)
    return total, tokens, {"loss_sum": total.detach().clone(), "tokens": tokens.clone()}
