"""The Linear-MoE-style language model: Megatron's GPTModel over the layers of a pattern."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from seqpar import SequenceParallel
from seqpar.models.config import MemoryConfig, ModelConfig, check_memory
from seqpar.models.loss import linear_cross_entropy
from seqpar.models.norm import RMSNorm
from seqpar.models.sequence import SequenceParallelParams
from seqpar.models.specs import hybrid_layer_spec


def build_language_model(
    model: ModelConfig,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    softmax_method: str = "auto",
    memory: MemoryConfig | None = None,
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
        memory: what is kept of a forward pass; None: the defaults.

    Returns:
        the stages in their order; the last one of all, called with labels, gives the loss of each
        token, fp32 [b, local tokens].

    Raises:
        ValueError: a shape that is not possible, see seqpar.models.config.resolved.
    """
    memory = memory or MemoryConfig()
    check_memory(memory, model, config.tensor_model_parallel_size)
    layer = hybrid_layer_spec(model, memory, softmax_method)
    rank, last = groups.pp.rank(), groups.pp.size() - 1
    turns = config.virtual_pipeline_model_parallel_size
    stages = []
    for turn in range(turns or 1):
        vp_stage = turn if turns else None
        layers = get_num_layers_to_build(config, vp_stage, rank)
        stage = _Stage(
            memory,
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


class _Stage(GPTModel):
    """Megatron's model of some layers; the last one's loss never has all logits at once."""

    def __init__(self, memory: MemoryConfig, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loss_tokens = memory.loss_tokens
        if self.post_process:
            self.output_layer.__class__ = _OutputLayer  # GPTModel builds Megatron's by its name

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None, **others: Any) -> Any:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **others)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return self.output_layer(hidden_states, weight, labels=labels, chunk=self.loss_tokens)


class _OutputLayer(ColumnParallelLinear):
    """Megatron's, which can also give the loss of each token.

    By a call of the module, for Megatron's hooks on it wait for its weight.
    """

    def forward(
        self,
        x: Tensor,
        *arguments: Any,
        labels: Tensor | None = None,
        chunk: int = 0,
        **others: Any,
    ) -> Any:
        if labels is None:
            return super().forward(x, *arguments, **others)
        [weight] = arguments
        return linear_cross_entropy(
            x,
            self.weight if weight is None else weight,
            labels,
            chunk_tokens=chunk,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
        )


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
