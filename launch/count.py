"""What a run consists of, counted from its configuration alone: parameters, FLOPs, bytes a rank.

Parameters are exact. Activations are what the layers keep for the backward pass, tensor by tensor;
what comes and goes within a layer is estimated. Documents are taken to be as long as the sequence,
and tokens to be spread evenly over experts. Imports no Megatron.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from seqpar.cost import GATHERED_HEAD_BYTES
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
from seqpar.sources import ROOM

Parts = defaultdict[str, float]
"""Bytes, or seconds, by what they are for."""

RESERVED = 1.5 * 2**30
"""Bytes of a GPU that CUDA, NCCL and the kernels themselves take."""

FRAGMENTS = 0.05
"""The part of a GPU's memory that PyTorch holds and cannot use."""

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
            traded = query if self.sizes.context > 1 else 0  # on their way to other ranks and back
            return common + (projected + 2 * query + kv + traded + 4 * heads) / tp
        outputs = 2 * heads * value * e + 4 * heads  # of the recurrence and of its norm
        low, _ = low_rank(m, mixer)
        kept = projected + outputs + low * e
        if mixer in CONVOLVED:
            kept += qkv_width(m, mixer) * e
            if m.key_heads < heads:  # values head by head, and what gates them
                kept += (1 + (mixer == "gated_deltanet")) * heads * value * e
        if mixer in ("gated_deltanet", "kda"):
            kept += 2 * m.key_heads * (key * e + 4)  # of unit length
        kept += {
            "gla": 4 * heads * key,
            "gated_deltanet": 2 * 4 * heads,
            "kda": 4 * heads * (key + 1) + heads * value * e,
            "mamba2": 2 * 4 * heads + heads * value * e,
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
        shared = self.sizes.expert_tensor  # ranks that gather each other's tokens
        row = m.hidden_size * shared + 3 * m.moe_ffn_hidden_size  # of a token for an expert
        router = m.num_experts * 9 + m.moe_top_k * 32
        return common + (m.moe_top_k * row * e + router) / tp

    @property
    def state_bytes(self) -> float:
        """Of the states that one linear layer keeps."""
        m = self.model
        pieces = max(PIECES, m.num_heads // self.sizes.tensor)
        return 4 * pieces * m.head_dim * m.value_head_dim

    @property
    def _attended_bytes(self) -> float:
        """A token's output of softmax attention and its log-sum-exp."""
        m = self.model
        return m.num_heads * (m.softmax_head_dim * self.element + 4) / self.sizes.tensor

    # -- memory -----------------------------------------------------------------------------------

    def kept(self) -> tuple[Parts, float]:
        """Bytes that one micro-batch keeps on the GPU, by kind; and in the host's memory."""
        found: Parts = defaultdict(float)
        away, twice = 0.0, 0.0  # in the host's memory; the most of one run of it
        tokens = self.tokens
        for mixers, leaves in self.runs:
            inputs: Parts = defaultdict(float)
            for index, mixer in enumerate(mixers):
                linear, again = mixer != "softmax", self.again(mixer)
                kind = "linear mixers" if linear else "softmax mixers"
                if again:
                    inputs[kind] += 0 if index else tokens * self.hidden
                    if not linear and self.config.memory.keep_attention:
                        inputs[kind] += tokens * self._attended_bytes
                else:
                    found[kind] += tokens * self.mixer_bytes(mixer)
                    late = linear and mixer != "kda"
                    if late and self.sizes.context > 1 and self.sizes.tensor == 1:
                        # projections are made in two products, each with its part of the weight
                        weight = in_width(self.model, mixer) * self.model.hidden_size
                        found[kind] += weight * self.element
                if linear:
                    found[kind] += self.state_bytes * self.groups(mixer)
                if not self.mlp_again:
                    found[self.mlp] += tokens * self.mlp_bytes
                elif not again:
                    inputs[self.mlp] += tokens * self.hidden
            if leaves:
                away += sum(inputs.values())
                twice = max(twice, sum(inputs.values()))
            else:
                for part, size in inputs.items():
                    found[part] += size
        if away:
            found["on its way to the host"] = min(away, 2 * twice)
        if "softmax" in self.mixers:
            found["softmax mixers"] += tokens * 4 * self.model.softmax_head_dim  # cosines, sines
        if self.rank == 0:
            found["tokens"] += tokens * 8
        return found, away

    def working(self) -> dict[str, float]:
        """Bytes that come and go: the most that one layer needs in its backward pass, and the loss.

        Gradients of activations are taken to be as large as the activations.
        """
        memory, m = self.config.memory, self.model
        most = max(map(self._layer_backward, set(self.mixers)), default=0.0)
        most += max(map(self._restored, self.runs), default=0.0)
        found = {"a layer's backward pass": most}
        if self.last:
            rows = m.vocab_size / self.sizes.tensor
            chunk = min(memory.loss_tokens or self.tokens, self.tokens)
            found["loss"] = chunk * rows * (2 * self.element + 4) + self.loss_bytes
            found["loss"] += rows * m.hidden_size * (4 + self.element) + self.tokens * self.hidden
        return found

    @property
    def loss_bytes(self) -> float:
        """That the final norm and the loss keep; the backward pass begins with them."""
        return self.tokens * (2 * self.hidden + 28)

    def _restored(self, run: tuple[list[str], bool]) -> float:
        """What layers that keep no input make of the run, before the last one's backward pass."""
        mixers, _ = run
        attended = 0.0
        if not self.config.memory.keep_attention:
            attended = mixers[:-1].count("softmax") * self._attended_bytes
        return self.tokens * ((len(mixers) - 1) * self.hidden + attended)

    def _layer_backward(self, mixer: str) -> float:
        tokens, hidden = self.tokens, self.tokens * self.hidden
        # Gradients of all experts come at once; what is made again sums them in fp32 first, and
        # autograd copies what it is handed.
        experts = layer_parameters(self.model, mixer, self.sizes).experts
        experts *= 2 * self.element + 4 if self.mlp_again else self.element
        mlp = tokens / self.tiles * self.mlp_bytes * (2 if self.mlp_again else 1) + experts
        heads = tokens * self.mixer_bytes(mixer) - 2 * hidden  # without the input and its norm
        if not self.again(mixer):
            return max(heads + 2 * hidden, mlp) + 3 * hidden
        groups = self.groups(mixer)
        if groups == 1:  # gradients of both ends, the norm of the mixer's input, that of the MLP's
            return heads + max(mlp + 4 * hidden, heads + 3 * hidden)
        # of each tensor-parallel rank all tokens' input and gradients, and the sum of these in fp32
        whole = hidden * self.sizes.tensor
        attended = 0.0
        if mixer == "softmax" and not self.config.memory.keep_attention:
            attended = tokens * self._attended_bytes * (groups - 1) / groups
        summing = heads / groups + (3 + 4 / self.element) * whole
        if self.sizes.tensor > 1:
            summing += hidden
        return heads / groups + attended + max(mlp + 3 * hidden + whole, summing)

    def exchange_bytes(self) -> float:
        """Of keys and values of other ranks, and of gradients of all, in softmax layers."""
        if "softmax" not in self.mixers:
            return 0.0
        heads = max(1, self.model.kv_heads // self.sizes.tensor) // self.groups("softmax")
        head = 2 * self.model.softmax_head_dim  # numbers of a key and its value
        if self.sizes.context == 1:
            return self.tokens * heads * head * 4
        one = self.config.data.sequence_length * head * (self.element + 4)
        method = self.config.parallel.softmax
        if method == "ring" or (method == "auto" and one > GATHERED_HEAD_BYTES):
            return 3 * self.tokens * heads * head * (self.element + 4)
        # gathered, in order, and the next already under way; gradients, and by rank
        at_once = max(1, min(heads // 2, int(ROOM // one)))
        return self.config.data.sequence_length * at_once * head * (3 * self.element + 8)

    def memory(self) -> dict[str, float]:
        """Bytes on the GPU by part, at their highest."""
        own = parameters(self.config, self.sizes, self.rank)
        half = self.config.train.precision == "bf16"
        dense_ranks = expert_ranks = 1.0
        if self.config.optimizer.distributed:
            stage = self.sizes.data * self.sizes.context * self.sizes.tensor
            dense_ranks = self.sizes.data * self.sizes.context
            expert_ranks = stage / (self.sizes.expert * self.sizes.expert_tensor)
        held = (own.total - own.experts) / dense_ranks + own.experts / expert_ranks
        found = {
            "weights": own.total * self.element,
            "gradients": own.total * 4,
            "optimizer": held * (12 if half else 8),
        }
        kept, _ = self.kept()
        found |= {f"activations: {kind}": size * self.in_flight for kind, size in kept.items()}
        working = self.working()
        found["workspace"] = max(working.values())
        found["exchange"] = self.exchange_bytes()
        found["reserved"] = RESERVED + FRAGMENTS * sum(found.values())
        return found

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
