"""What the mixers share: projections cut by heads, the sequence's cut, checkpoints, refusals.

Shapes: Megatron's tensors are [s, b, h], the functions of seqpar take [b, s, heads, dim]. Here s
counts the tokens of this rank's shard of the sequence (all of them, also where Megatron's sequence
parallelism cuts the hidden states once more between the projections).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from seqpar.models.config import check_divides
from seqpar.models.sequence import CallSequence, SequenceParallelParams


class SequenceMixer(MegatronModule, ABC):
    """Base of the modules for the `self_attention` slot of a Megatron layer.

    A subclass builds what it needs beside `in_proj` and `out_proj` and implements `mix`.

    Args:
        config: the model's configuration.
        heads: number of heads (of key-value groups for softmax attention), cut over the
            tensor-parallel ranks.
        shared: whether several of these ranks may share a head: each then has all of its
            `in_width` numbers, and gives its part of the `out_width`.
        in_width, out_width: numbers a head takes from `in_proj`, and gives to `out_proj`. Both
            weights are laid out head by head, so a checkpoint fits any tensor-parallel size.
        layout: how the sequence is cut over the context-parallel ranks where the caller passes no
            SequenceParallelParams, see CallSequence.
        pg_collection: the process groups; tp and cp are used.

    Raises:
        ValueError: heads that do not divide, or dropout.
    """

    ignored_inputs: frozenset[str] = frozenset()

    def __init__(
        self,
        config: TransformerConfig,
        *,
        heads: int,
        in_width: int,
        out_width: int,
        shared: bool = False,
        layout: str | None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        if config.attention_dropout:
            raise ValueError(
                f"attention_dropout={config.attention_dropout} is not possible in "
                f"{type(self).__name__}; set it to 0"
            )
        self.tp_group = pg_collection.tp
        self.sequence = CallSequence(type(self).__name__, config, pg_collection.cp, layout)
        ranks = self.tp_group.size()
        self.share = ranks // heads if shared and ranks > heads else 1  # ranks of one head
        check_divides("tensor_model_parallel_size", ranks, "heads", heads * self.share)
        check_divides("the ranks of a head", self.share, "the width of a head", in_width)
        self.heads = heads * self.share // ranks
        # Megatron's selective recomputation; what is exchanged is exchanged once more then.
        selective = config.recompute_granularity == "selective"
        self.recomputes = selective and "core_attn" in config.recompute_modules
        self.in_proj = self.column_linear(config.hidden_size, heads * in_width)
        self.out_proj = RowParallelLinear(
            heads * out_width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )

    @abstractmethod
    def mix(self, x: Tensor, hidden_states: Tensor, params: SequenceParallelParams) -> Tensor:
        """The layer between its projections.

        Args:
            x: [b, s, local heads, in_width], the output of `in_proj`.
            hidden_states: [s, b, h], the layer's input (cut over tensor-parallel ranks with
                Megatron's sequence parallelism).
            params: how the sequence is cut.

        Returns:
            [b, s, local heads, out_width].
        """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Any = None,
        **inputs: Any,
    ) -> tuple[Tensor, None]:
        """Megatron's call of an attention module: hidden_states [s, b, h] -> ([s, b, h], no bias).

        Raises:
            ValueError: an input this mixer would have to ignore (a mask, an inference context,
                ...), or a sequence cut in a way that is not said.
        """
        self._refuse(attention_mask=attention_mask, **inputs)
        projected, _ = self.in_proj(hidden_states)
        params = self.sequence(packed_seq_params, projected.shape[0])
        if self.share > 1:
            whole = all_gather_last_dim_from_tensor_parallel_region(projected, self.tp_group)
            heads = self.tp_group.size() // self.share
            projected = whole.chunk(heads, -1)[self.tp_group.rank() // self.share]
        x = projected.transpose(0, 1).unflatten(-1, (self.heads, -1))
        if self.recomputes and self.training:
            y = checkpoint(lambda x, h: self.mix(x, h, params), False, x, hidden_states)
        else:
            y = self.mix(x, hidden_states, params)
        out, _ = self.out_proj(y.flatten(2).transpose(0, 1).contiguous())
        return out, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's description of the parameters for a distributed checkpoint."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {name: 0 for name, tensor in own.items() if tensor.tensor_model_parallel},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded

    def column_linear(self, in_size: int, out_size: int, bias: bool = False) -> Any:
        """A Megatron linear layer whose output is cut over the tensor-parallel ranks."""
        return ColumnParallelLinear(
            in_size,
            out_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=bias,
            gather_output=False,
            tp_group=self.tp_group,
        )

    def head_parameter(self, full: Tensor) -> torch.nn.Parameter:
        """This tensor-parallel rank's part of a parameter [heads, ...].

        `full` must be the same on every tensor-parallel rank: draw it from the default random
        state, which Megatron seeds alike on all of them.
        """
        part = full.chunk(self.tp_group.size())[self.tp_group.rank()]
        parameter = torch.nn.Parameter(part.to(self.config.params_dtype, copy=True))
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        return parameter

    def _refuse(self, **inputs: Any) -> None:
        for name, value in inputs.items():
            if value is not None and name not in self.ignored_inputs:
                raise ValueError(
                    f"{name} is given, {type(self).__name__} cannot use it: it attends causally "
                    "within the documents of its layout, in training; pass None"
                )
