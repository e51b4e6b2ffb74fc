"""What a run consists of, counted from its configuration alone: parameters, FLOPs, bytes a rank.

Parameters are exact. Activations are what the layers keep for the backward pass, tensor by tensor;
what comes and goes within a layer is in peak.py. Documents are taken to be as long as the sequence,
and tokens to be spread evenly over experts. Imports no Megatron.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from seqpar.cost import choose_softmax
from seqpar.launch.checks import ALONE, Sizes
from seqpar.launch.config import Config
from seqpar.launch.flops import (
    CONVOLVED,
    in_width,
    low_rank,
    mixer_weights,
    mlp_weights,
    qkv_width,
)
from seqpar.models.config import ModelConfig, key_heads, layer_mixers, made_again, resolved

Parts = defaultdict[str, float]
"""Bytes, or seconds, by what they are for."""

PIECES = 128
"""States of a linear layer that are kept: its heads times the pieces that a rank's tokens are cut
into so that all multiprocessors have work."""


@dataclass(frozen=True)
class Parameters:
    """Of one layer, or of all a rank holds; of which `experts` belong to experts."""

    total: float = 0
    experts: float = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.total + other.total, self.experts + other.experts)


def layer_parameters(m: ModelConfig, mixer: str, sizes: Sizes = ALONE) -> Parameters:
    """Of one layer of the resolved model `m`, as far as one rank holds them."""
    hidden, heads, key, value = m.hidden_size, m.num_heads, m.head_dim, m.value_head_dim
    tp = sizes.tensor
    out = m.softmax_head_dim if mixer == "softmax" else value
    cut = hidden * (in_width(m, mixer) + heads * out)
    whole = 2 * hidden  # the norms
    low, up = low_rank(m, mixer)
    cut += m.gate_rank * up
    whole += hidden * low
    if mixer != "softmax":
        whole += value * (heads // m.key_heads if mixer == "mamba2" else 1)  # the norm of heads
    if mixer in CONVOLVED:
        cut += qkv_width(m, mixer) * (m.conv_width + (mixer == "mamba2"))
    cut += heads * {
        "gla": key,
        "gated_deltanet": 2,
        "kda": value + 1 + key,
        "mamba2": 3,
    }.get(mixer, 0)
    if not m.num_experts:
        return Parameters((cut + 3 * hidden * m.ffn_hidden_size) / tp + whole)
    ranks = sizes.expert * sizes.expert_tensor
    experts = 3 * hidden * m.moe_ffn_hidden_size * m.num_experts / ranks
    return Parameters(cut / tp + whole + hidden * m.num_experts + experts, experts)


def parameters(config: Config, sizes: Sizes = ALONE, rank: int = 0) -> Parameters:
    """Of the whole model; or of what a rank of pipeline rank `rank` holds."""
    m = resolved(config.model)
    stages = stages_of(config, sizes)
    total = Parameters()
    for stage in range(rank, len(stages), sizes.pipeline):
        for mixer in stages[stage]:
            total += layer_parameters(m, mixer, sizes)
    words = m.vocab_size * m.hidden_size / sizes.tensor
    if rank == 0:
        total += Parameters(words)
    if rank == sizes.pipeline - 1:
        shared = m.tie_embeddings and sizes.pipeline == 1
        total += Parameters(m.hidden_size + (0 if shared else words))
    return total


def stages_of(config: Config, sizes: Sizes) -> list[list[str]]:
    """The mixers of each pipeline stage, in the order of the layers."""
    mixers = layer_mixers(config.model)
    counts = config.parallel.stages or [len(mixers) // sizes.pipeline] * sizes.pipeline
    found, at = [], 0
    for count in counts:
        found.append(mixers[at : at + count])
        at += count
    return found


@dataclass(frozen=True)
class Count:
    """What one rank of a run holds and does.

    Attributes:
        config, sizes: the run.
        rank: the pipeline rank.
    """

    config: Config
    sizes: Sizes
    rank: int = 0

    @cached_property
    def model(self) -> ModelConfig:
        return resolved(self.config.model)

    @cached_property
    def stages(self) -> list[list[str]]:
        """The mixers of this rank's pipeline stages."""
        return stages_of(self.config, self.sizes)[self.rank :: self.sizes.pipeline]

    @property
    def mixers(self) -> list[str]:
        """Of this rank's layers."""
        return [mixer for stage in self.stages for mixer in stage]

    @property
    def runs(self) -> list[tuple[list[str], bool]]:
        """Of layers that keep one input: their mixers, and whether it is in the host's memory."""
        memory = self.config.memory
        return [
            (stage[at : at + memory.keep_every], at < memory.offload_layers)
            for stage in self.stages
            for at in range(0, len(stage), memory.keep_every)
        ]

    @property
    def last(self) -> bool:
        return self.rank == self.sizes.pipeline - 1

    @property
    def element(self) -> int:
        """Bytes of a number in an activation."""
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def tokens(self) -> float:
        """Of a micro-batch, on this rank."""
        return self.config.data.sequence_length / self.sizes.context

    @property
    def microbatches(self) -> int:
        return max(1, self.config.train.global_batch // self.sizes.data)

    @property
    def in_flight(self) -> float:
        """Micro-batches whose activations are kept at once, by Megatron's schedules."""
        after, turns = self.sizes.pipeline - self.rank - 1, len(self.stages)
        if turns > 1:  # stages that take turns begin twice as early, and again for each turn
            chunks = 2 * after + (turns - 1) * self.sizes.pipeline + 1
            return min(self.microbatches, chunks / turns)
        return min(self.microbatches, after + 1)

    @property
    def tiles(self) -> int:
        """Of the tokens that an MLP or its experts work on."""
        tile = self.config.memory.mlp_tokens
        if not tile or not self.mlp_again:
            return 1
        return max(1, math.ceil(self.tokens / self.sizes.tensor / tile))

    @property
    def mlp_again(self) -> bool:
        """Whether MLPs, or experts, are made again."""
        return "mlp" in self.config.memory.recompute

    def again(self, mixer: str) -> bool:
        """Whether a mixer is made again."""
        return made_again(self.config.memory, mixer)

    def groups(self, mixer: str) -> int:
        """Of heads that a mixer works on one after the other."""
        most = key_heads(self.model, mixer, self.sizes.tensor)
        return min(self.config.memory.head_groups, most) if self.again(mixer) else 1

    @cached_property
    def attention(self) -> str:
        """How keys and values of softmax layers reach other ranks, see seqpar.softmax_attention."""
        method = self.config.parallel.softmax
        return choose_softmax(*self.attending) if method == "auto" else method

    @property
    def attending(self) -> tuple[int, int, int, int, int, int, bool]:
        """One group of heads of a softmax layer, as `cost.softmax_bytes` takes it."""
        m, parallel, groups = self.model, self.config.parallel, self.groups("softmax")
        heads, kv = (max(1, x // self.sizes.tensor // groups) for x in (m.num_heads, m.kv_heads))
        sequence = self.config.data.sequence_length
        trades = parallel.layout == "contiguous"
        return self.sizes.context, sequence, heads, kv, m.softmax_head_dim, self.element, trades

    @property
    def mlp(self) -> str:
        return "experts" if self.model.num_experts else "MLPs"

    # -- bytes a token and layer ------------------------------------------------------------------

    @property
    def hidden(self) -> float:
        """Bytes of a token's hidden state on this rank."""
        return self.model.hidden_size / self.sizes.tensor * self.element

    def mixer_bytes(self, mixer: str) -> float:
        """Bytes a token that a mixer keeps, its input and the norm of it included."""
        m, e, tp = self.model, self.element, self.sizes.tensor
        heads, key, value = m.num_heads, m.head_dim, m.value_head_dim
        common = 2 * self.hidden + 4 / tp  # the input, normalised; one number of the norm
        projected = in_width(m, mixer) * e
        if mixer == "softmax":
            query, kv = heads * m.softmax_head_dim * e, m.kv_heads * m.softmax_head_dim * e
            if self.attention == "ulysses":  # as they were dealt, and o as it was and came back
                dealt = max(kv, self.sizes.context * m.softmax_head_dim * e * tp)
                return common + (3 * query + 2 * dealt + 4 * heads) / tp
            traded = 0  # on their way to other ranks and back
            if self.attention == "allgather" and self.sizes.context > 1:
                traded = query
            return common + (projected + 2 * query + kv + traded + 4 * heads) / tp
        outputs = 2 * heads * value * e  # of the recurrence and of its norm
        low, _ = low_rank(m, mixer)
        kept = projected + outputs + low * e
        if mixer in CONVOLVED:
            kept += qkv_width(m, mixer) * e
            if m.key_heads < heads:  # values head by head, and what gates them
                kept += (1 + (mixer == "gated_deltanet")) * heads * value * e
        if mixer in ("gated_deltanet", "kda"):
            kept += 2 * m.key_heads * key * e  # of unit length
        kept += {
            "gla": 4 * heads * key,
            "gated_deltanet": 2 * 4 * heads,
            "kda": 4 * heads * (key + 1) + heads * value * e,
            "mamba2": 4 * 4 * heads + heads * value * e,
            "retention": 2 * heads * key * e,
        }[mixer]
        return common + kept / tp

    @property
    def mlp_bytes(self) -> float:
        """Bytes a token that an MLP, or its experts, keeps; its input and the norm included."""
        m, e, tp = self.model, self.element, self.sizes.tensor
        common = 2 * self.hidden + 4 / tp
        if not m.num_experts:
            return common + 5 * m.ffn_hidden_size * e / tp
        row = self.row + 3 * m.moe_ffn_hidden_size
        router = m.num_experts * 9 + m.moe_top_k * 40 + 8
        return common + (m.moe_top_k * row * e + router) / tp

    @property
    def row(self) -> float:
        """Numbers of a token on its way to an expert; ranks that share experts gather theirs."""
        return self.model.hidden_size * self.sizes.expert_tensor

    @property
    def _routed_bytes(self) -> float:
        """Bytes a token that Megatron's dispatcher holds until its layer's next run."""
        m = self.model
        return (m.num_experts * 5 + m.moe_top_k * 16 + 8) / self.sizes.tensor

    @property
    def state_bytes(self) -> float:
        """Of the states that one linear layer keeps."""
        m = self.model
        pieces = max(PIECES, m.num_heads // self.sizes.tensor)
        return 4 * pieces * m.head_dim * m.value_head_dim

    @property
    def attended_bytes(self) -> float:
        """A token's output of softmax attention and its log-sum-exp."""
        m = self.model
        return m.num_heads * (m.softmax_head_dim * self.element + 4) / self.sizes.tensor

    # -- memory -----------------------------------------------------------------------------------

    def run_bytes(self, mixers: list[str]) -> tuple[Parts, Parts]:
        """Bytes that a micro-batch keeps of a run, by kind: on the GPU, and where its input is."""
        here: Parts = defaultdict(float)
        inputs: Parts = defaultdict(float)
        tokens = self.tokens
        for index, mixer in enumerate(mixers):
            linear, again = mixer != "softmax", self.again(mixer)
            kind = "linear mixers" if linear else "softmax mixers"
            if again:
                inputs[kind] += 0 if index else tokens * self.hidden
                if not linear and self.config.memory.keep_attention:
                    inputs[kind] += tokens * self.attended_bytes
            else:
                here[kind] += tokens * self.mixer_bytes(mixer)
                late = linear and mixer != "kda"
                if late and self.sizes.context > 1 and self.sizes.tensor == 1:
                    # projections are made in two products, each with its part of the weight
                    weight = in_width(self.model, mixer) * self.model.hidden_size
                    here[kind] += weight * self.element
            if linear:
                here[kind] += self.state_bytes * self.groups(mixer)
            if not self.mlp_again:
                here[self.mlp] += tokens * self.mlp_bytes
                continue
            if not again:
                inputs[self.mlp] += tokens * self.hidden
            if self.model.num_experts:
                here[self.mlp] += tokens / self.tiles * self._routed_bytes
        return here, inputs

    @cached_property
    def _leaving(self) -> list[float]:
        """Bytes of each run's input that waits in the host's memory."""
        return [total(self.run_bytes(mixers)[1]) for mixers, leaves in self.runs if leaves]

    def on_the_way(self, run: int) -> float:
        """Of these, what is on the GPU in the backward pass of one of `runs`: its own and the one
        before it; the last one stays until its turn has come."""
        last = min(run, len(self._leaving) - 1)
        return sum(self._leaving[max(0, last - (last == run)) : last + 1])

    def kept(self) -> tuple[Parts, float]:
        """Bytes that one micro-batch keeps on the GPU, by kind; and in the host's memory."""
        found: Parts = defaultdict(float)
        for mixers, leaves in self.runs:
            here, inputs = self.run_bytes(mixers)
            for parts in (here,) if leaves else (here, inputs):
                for part, size in parts.items():
                    found[part] += size
        if self._leaving:
            ways = map(self.on_the_way, range(len(self._leaving)))
            found["on its way to the host"] = max(ways)
        turned = self.model.softmax_head_dim, self.model.head_dim  # by cosines and sines
        for mixer, kind, dim in zip(
            ("softmax", "retention"), ("softmax", "linear"), turned, strict=True
        ):
            if mixer in self.mixers:
                found[f"{kind} mixers"] += self.tokens * 4 * dim
        if self.rank == 0:
            found["tokens"] += self.tokens * 8
        return found, sum(self._leaving)

    @property
    def loss_bytes(self) -> float:
        """That the final norm and the loss keep; the backward pass begins with them."""
        return self.tokens * (2 * self.hidden + 28)

    def host_bytes(self) -> float:
        """Of the host's memory, for what is offloaded."""
        return self.kept()[1] * self.in_flight

    # -- FLOPs of the forward pass of a micro-batch, on this rank ---------------------------------

    def mixer_flops(self, mixer: str) -> float:
        """Of the projections of one mixer."""
        return 2 * mixer_weights(self.model, mixer) * self.tokens / self.sizes.tensor

    @property
    def mlp_flops(self) -> float:
        """Of one MLP, or of the experts that tokens go to."""
        return 2 * mlp_weights(self.model) * self.tokens / self.sizes.tensor

    @property
    def attention_flops(self) -> float:
        """Of the causal half of one softmax layer."""
        pairs = self.config.data.sequence_length / 2 * self.tokens
        return 4 * self.model.num_heads * self.model.softmax_head_dim * pairs / self.sizes.tensor

    @property
    def loss_flops(self) -> float:
        return 2 * self.model.hidden_size * self.model.vocab_size * self.tokens / self.sizes.tensor


def total(parts: Parts) -> float:
    """Of all parts."""
    return sum(parts.values())
