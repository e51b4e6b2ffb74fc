"""What the mixers share: projections cut by heads, the sequence's cut, checkpoints, refusals.

Shapes: Megatron's tensors are [s, b, h], the functions of seqpar take [b, s, heads, dim]. Here s
counts the tokens of this rank's shard of the sequence (all of them, also where Megatron's sequence
parallelism cuts the hidden states once more between the projections).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.kernels.pieces import Late
from seqpar.models.config import check_divides
from seqpar.models.groups import Heads, add_up
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
        late_width: how many of these, the last, `mix` asks for late.
        layout: how the sequence is cut over the context-parallel ranks where the caller passes no
            SequenceParallelParams, see CallSequence.
        pg_collection: the process groups; tp and cp are used.

    Attributes: head_groups, how many groups of its heads it works on one after the other, to be
        set where the whole mixer is made again in the backward pass; see seqpar.models.groups.

    Raises:
        ValueError: heads that do not divide, or dropout.
    """

    ignored_inputs: frozenset[str] = frozenset()

    columns = 1
    """Number of the order in which weights hold their numbers; a checkpoint of another order is
    refused, whoever loads it."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        heads: int,
        in_width: int,
        out_width: int,
        late_width: int = 0,
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
        self.head_groups = 1
        self.head_widths = [in_width - late_width, late_width]
        # Megatron's selective recomputation; what is exchanged is exchanged once more then.
        selective = config.recompute_granularity == "selective"
        self.recomputes = selective and "core_attn" in config.recompute_modules
        self.in_proj = self.column_linear(config.hidden_size, heads * in_width)
        self.out_proj = _RowLinear(
            heads * out_width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )

    def down(self, hidden_states: Tensor) -> Tensor | None:
        """A narrow projection [s, b, n] of the layer's input that all heads share, if there is one.

        Like the input, it is cut over tensor-parallel ranks with Megatron's sequence parallelism.
        """
        return None

    @abstractmethod
    def mix(
        self,
        x: Tensor,
        late: Late,
        low: Tensor | None,
        heads: Heads,
        params: SequenceParallelParams,
    ) -> Tensor:
        """The layer between its projections, of some of its heads.

        Args:
            x: [b, s, heads, in_width - late_width], the output of `in_proj`.
            late: gives the rest of it, [b, s, heads, late_width]; called between the two halves of
                a recurrence, it may be projected while states travel.
            low: what `down` returned.
            heads: which of this rank's they are.
            params: how the sequence is cut.

        Returns:
            [b, s, heads, out_width].
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
        cut = self.config.sequence_parallel
        tokens = hidden_states.shape[0] * (self.tp_group.size() if cut else 1)
        params = self.sequence(packed_seq_params, tokens)
        low, heads = self.down(hidden_states), Heads(0, self.heads, self.heads)
        if self.head_groups == 1:
            return self._output(heads, hidden_states, low, params=params), None
        # tensor-parallel ranks talk once for all groups, and not in each of their products
        enter, leave = (
            copy_to_tensor_model_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )
        if cut:
            enter = gather_from_sequence_parallel_region
            leave = reduce_scatter_to_sequence_parallel_region
        shared = [enter(x, group=self.tp_group) for x in (hidden_states, low) if x is not None]
        run = partial(self._output, params=params)
        parameters = [p for p in self.parameters() if p.requires_grad]
        y = add_up(run, heads.split(self.head_groups), shared, parameters)
        return leave(y, group=self.tp_group), None

    def _output(
        self,
        heads: Heads,
        hidden_states: Tensor,
        low: Tensor | None = None,
        *,
        params: SequenceParallelParams,
    ) -> Tensor:
        """What some heads add to the output [s, b, h]."""
        recomputes = self.recomputes and self.training
        # Two products cost tensor-parallel ranks two reductions, and would be recomputed.
        together = heads.whole and self.tp_group.size() > 1
        apart = params.sp.exchanges and not together and not recomputes
        if apart and self.head_widths[1] and isinstance(self.in_proj, _Linear):
            early, late = self.in_proj(hidden_states, heads, self.head_widths)
            x = heads.by_head(early)
            y = self.mix(x, lambda: heads.by_head(late()), low, heads, params)
        else:
            x = self._project(hidden_states, heads)

            def mix(x: Tensor, low: Tensor | None) -> Tensor:
                x, late = x.split(self.head_widths, -1)
                return self.mix(x, lambda: late, low, heads, params)

            y = checkpoint(mix, False, x, low) if recomputes else mix(x, low)
        y = y.flatten(2).transpose(0, 1).contiguous()
        out, _ = self.out_proj(y) if heads.whole else self.out_proj(y, heads)
        return out

    def _project(self, hidden_states: Tensor, heads: Heads) -> Tensor:
        """[s, b, h] -> [b, s, heads, in_width]."""
        given = () if heads.whole else (heads,)
        projected, _ = self.in_proj(hidden_states, *given)
        if self.share > 1:
            whole = all_gather_last_dim_from_tensor_parallel_region(projected, self.tp_group)
            ranks = self.tp_group.size() // self.share
            projected = whole.chunk(ranks, -1)[self.tp_group.rank() // self.share]
        return heads.by_head(projected)

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
            {name: 0 for name, x in own.items() if getattr(x, "tensor_model_parallel", False)},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded

    def get_extra_state(self) -> Tensor:
        """What goes with the weights into checkpoints of every kind: `columns`."""
        return torch.tensor(self.columns)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError unless weights of this order fit."""
        if int(state) != self.columns:
            raise ValueError(
                f"the checkpoint has weights of {type(self).__name__} in order {int(state)}, this "
                f"version of seqpar has them in order {self.columns}: load it with the version "
                "that wrote it"
            )

    def column_linear(self, in_size: int, out_size: int, bias: bool = False) -> Any:
        """A Megatron linear layer whose output is cut over the tensor-parallel ranks."""
        return _Linear(
            in_size,
            out_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=bias,
            gather_output=False,
            tp_group=self.tp_group,
        )

    def whole_linear(self, out_size: int) -> torch.nn.Linear:
        """A linear layer of the hidden states, too narrow to cut: whole on each rank."""
        size, dtype = self.config.hidden_size, self.config.params_dtype
        linear = torch.nn.Linear(size, out_size, bias=False, dtype=dtype)
        self.config.init_method(linear.weight)
        vars(linear.weight)["sequence_parallel"] = self.config.sequence_parallel
        return linear

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


class _Linear(ColumnParallelLinear):
    """Megatron's, which can also give some heads alone, and what it has for each in two products.

    All by a call of the module, for hooks hang on it: Megatron's wait there for parameters that
    are gathered during the forward pass.
    """

    def forward(
        self, x: Tensor, heads: Heads | None = None, widths: Sequence[int] | None = None
    ) -> tuple[Tensor, Any]:
        """What x [tokens, ...] gives for some heads, or all.

        Args:
            heads: which. For a part of them nothing is sent to other tensor-parallel ranks: x has
                all tokens, and the ranks' gradients of it are to be added up by others.
            widths: how many numbers of a head come now, and from the function returned.
        """
        if widths is None and (heads is None or heads.whole):
            return super().forward(x)
        assert heads is not None
        weight = heads.part(self.weight)
        if widths is None:
            return F.linear(x, weight, None if self.bias is None else heads.part(self.bias)), None
        by_head = weight.unflatten(0, (-1, sum(widths)))
        early, late = by_head.split(widths, 1)
        y, again = _Project.apply(x, early.flatten(0, 1))
        return y, lambda: F.linear(again, late.flatten(0, 1))


class _RowLinear(RowParallelLinear):
    """Megatron's, which can also take some heads alone; likewise."""

    def forward(self, x: Tensor, heads: Heads | None = None) -> tuple[Tensor, Any]:
        """heads: whose numbers x has; some alone are not added up over tensor-parallel ranks."""
        if heads is None:
            return super().forward(x)
        return F.linear(x, heads.part(self.weight, 1)), None


class _Project(torch.autograd.Function):
    """x [..., I] and weight [O, I] -> x weightᵀ, and x for another product: the gradients of x are
    added up within the product that gives this one's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dx: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        if wanted_x:  # nobody else has this gradient of the other product
            dx = dx.contiguous()
            dx.view(-1, dx.shape[-1]).addmm_(rows, weight)
        d_weight = rows.mT @ x.reshape(-1, x.shape[-1]) if wanted_weight else None
        return dx if wanted_x else None, d_weight
