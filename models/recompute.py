"""Layers that keep their input alone and make everything else again in the backward pass.

Megatron's recomputation runs a layer again whole. Here a layer is a chain of two parts, its mixer
and its MLP; the second run makes the first part, and then of the last one a tile of tokens at a
time, each with its gradient. So the activations of an MLP never exist for all tokens; those of a
mixer may be of a group of its heads (`groups.py`). What the first run exchanged and is small
(memory states, halos), or is costly (the output of softmax attention), is kept: see
`seqpar/kept.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from seqpar.comm import Communicator
from seqpar.kept import Kept, Row
from seqpar.models.config import MemoryConfig, made_again
from seqpar.models.groups import gradients, plus
from seqpar.models.offload import Offloaded, Offloader


class SavingLayer(TransformerLayer):
    """Megatron's layer, which recomputes and offloads as `memory` says.

    Args:
        memory: what is made again.
        mixers: of all layers of the model, see seqpar.models.config.layer_mixers.
        runs: shared by all layers.

    Raises:
        ValueError: with dropout, or beside Megatron's own recomputation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *arguments: Any,
        layer_number: int = 1,
        memory: MemoryConfig,
        mixers: Sequence[str],
        runs: "Runs",
        **others: Any,
    ) -> None:
        super().__init__(config, *arguments, layer_number=layer_number, **others)
        mixer = mixers[self.layer_number - 1]
        self.recomputed = [made_again(memory, mixer), "mlp" in memory.recompute]
        if any(self.recomputed) and config.hidden_dropout:
            raise ValueError(
                f"memory.recompute={list(memory.recompute)} is not possible with hidden_dropout="
                f"{config.hidden_dropout}: a second run would drop others; set one of them to 0"
            )
        if any(self.recomputed) and config.recompute_granularity:
            raise ValueError(
                f"memory.recompute={list(memory.recompute)} and Megatron's recompute_granularity="
                f"{config.recompute_granularity!r} both make layers again; set one of them only"
            )
        if self.recomputed[0]:
            self.self_attention.head_groups = min(memory.head_groups, self.self_attention.heads)
        self.mlp_tokens, self.keep_attention = memory.mlp_tokens, memory.keep_attention
        # Megatron counts within the stage here, and over all stages in self.layer_number
        self.goes_on = bool((layer_number - 1) % memory.keep_every)
        self.away, self.runs = layer_number <= memory.offload_layers, runs

    def forward(self, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, None]:
        """Megatron's call: hidden_states [s, b, h] -> ([s, b, h], no context)."""
        if not any(self.recomputed):
            return super().forward(hidden_states, **inputs)
        last = [*self.pre_mlp_layernorm.parameters(), *self.mlp.parameters()]
        others = {id(p) for p in last}
        first = [p for p in self.parameters() if id(p) not in others]
        tiles = 1
        if self.recomputed[1] and self.mlp_tokens:
            tiles = self._tiles(hidden_states.shape[:2].numel(), inputs.get("packed_seq_params"))

        def mix(x: Tensor) -> Tensor:
            return self._forward_attention(x, **inputs)[0]

        x, parts = hidden_states, [Part(mix, first), Part(self._forward_mlp, last, tiles)]
        together = [parts] if all(self.recomputed) else [[part] for part in parts]
        for chain, recomputed in zip(together, self.recomputed, strict=False):
            if recomputed and torch.is_grad_enabled():
                x = self._recompute(chain, x)
            else:
                for part in chain:
                    x = part(x)
        return x, None

    def _recompute(self, chain: "list[Part]", x: Tensor) -> Tensor:
        run = self.runs.go_on() if self.goes_on else self.runs.begin(self.layer_number, self.away)
        return run(chain, x, self.keep_attention)

    def _tiles(self, tokens: int, given: Any) -> int:
        """How many tiles `tokens` are; as many on all ranks that exchange tokens of experts."""
        own = max(1, -(-tokens // self.mlp_tokens))
        if not self.is_moe_layer or self.pg_collection.tp_ep.size() == 1:
            return own
        agreed = {} if given is None else vars(given).setdefault("_tiles", {})  # of one pass
        if tokens not in agreed:
            comm = Communicator(self.pg_collection.tp_ep)
            sizes = torch.tensor([own, -tokens], device=torch.cuda.current_device())
            most, least = comm.all_reduce(sizes, "max", "tiles").tolist()
            agreed[tokens] = max(1, min(most, -least))  # Megatron's router needs a token
        return agreed[tokens]


@dataclass
class Part:
    """A function of [s, b, h], with its parameters, of which each token's output depends only on
    the same token if there are several tiles."""

    run: Callable[[Tensor], Tensor]
    parameters: list[Any]
    tiles: int = 1

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.parameters if p.requires_grad]

    def __call__(self, x: Tensor) -> Tensor:
        if self.tiles == 1:
            return self.run(x)
        y = torch.empty_like(x)
        for tile, out in zip(x.tensor_split(self.tiles), y.tensor_split(self.tiles), strict=True):
            out.copy_(self.run(tile))
        return y

    def gradients(self, x: Tensor, dy: Tensor) -> list[Tensor | None]:
        """Run again on x; the gradients of x and of the parameters."""
        if self.tiles == 1:
            x.requires_grad_()
            return gradients(get_gradient_edge(self.run(x)), [x, *self.parameters], dy)
        dx = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * len(self.parameters)
        tiles = (each.tensor_split(self.tiles) for each in (x, dy, dx))
        for tile, d_out, d_tile in zip(*tiles, strict=True):
            tile.requires_grad_()
            edge = get_gradient_edge(self.run(tile))
            found, *own = gradients(edge, [tile, *self.parameters], d_out)
            assert found is not None
            d_tile.copy_(found)
            # summed in fp32, and handed on as one gradient: Megatron acts on the first that comes
            sums = [plus(total, each) for total, each in zip(sums, own, strict=True)]
            del found, own  # before the next tile
        typed = zip(sums, self.parameters, strict=True)
        return [dx, *(None if total is None else total.to(p.dtype) for total, p in typed)]


class Here:
    """What is kept stays where it is; otherwise as `Offloaded`."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        self._rows += rows

    def get(self) -> list[Row]:
        rows, self._rows = self._rows, []
        return rows


class Run:
    """Some layers, each a chain of parts, of which the first one's input is kept in `stored`."""

    def __init__(self, stored: Here | Offloaded) -> None:
        self._stored = stored
        self._layers: list[_Layer] = []

    def __call__(self, chain: list[Part], x: Tensor, keep_large: bool = False) -> Tensor:
        """One more layer's output for x, its input.

        keep_large: whether what is costly is kept even if it grows with the tokens.
        """
        if not self._layers:
            self._stored.add([(x,)])
        layer = _Layer(chain, Kept(keep_large))
        self._layers.append(layer)
        for index, part in enumerate(chain):
            x = _Part.apply(self, layer, index, x, *part.parameters)
        return x

    def forward(self, layer: "_Layer", index: int, x: Tensor) -> Tensor:
        with layer.kept.first():
            y = layer.chain[index](x)
        if index + 1 == len(layer.chain):
            rows, layer.kept.rows = layer.kept.rows, []
            layer.rows = len(rows)
            self._stored.add(rows)
        return y

    def backward(self, layer: "_Layer", index: int, dy: Tensor) -> list[Tensor | None]:
        """A layer's last part makes all before it again, whose gradients follow."""
        part = layer.chain[index]
        if index + 1 < len(layer.chain):
            leaf, edge = layer.made.pop()
            return gradients(edge, [leaf, *part.parameters], dy)
        if layer.x is None:
            self._restore()
        x: Any = layer.x
        layer.x = None
        with layer.kept.second(), torch.enable_grad():
            for before in layer.chain[:-1]:
                leaf = x.detach().requires_grad_()
                x = before(leaf)
                layer.made.append((leaf, get_gradient_edge(x)))
            return part.gradients(x.detach(), dy)

    def _restore(self) -> None:
        """Every layer's input, and what it kept."""
        first, *rows = self._stored.get()
        x: Any = first[0]
        for layer in self._layers:
            layer.x = x
            layer.kept.rows, rows = rows[: layer.rows], rows[layer.rows :]
            if layer is not self._layers[-1]:
                kept = Kept(large=True)
                with layer.kept.second(), kept.first():
                    for part in layer.chain:
                        x = part(x)
                layer.kept = kept


@dataclass
class _Layer:
    """Of a run. x: its input, once that is known again; rows: how many its first run kept; made:
    inputs and outputs of all parts but the last, in the second run.
    """

    chain: list[Part]
    kept: Kept
    x: Tensor | None = None
    rows: int = 0
    made: list[tuple[Tensor, GradientEdge]] = field(default_factory=list)


class Runs:
    """Gives each layer of a model the run that it belongs to."""

    def __init__(self) -> None:
        self._offloader = Offloader()
        self._latest = Run(Here())

    def begin(self, layer: int, away: bool) -> Run:
        """A new one. away: whether its input waits in the host's memory."""
        self._latest = Run(self._offloader.begin(layer) if away else Here())
        return self._latest

    def go_on(self) -> Run:
        """That of the layer before."""
        return self._latest


class _Part(torch.autograd.Function):
    """One part of a layer. Each is a node of its own, so that what it gets is free after it."""

    @staticmethod
    def forward(
        ctx: Any, run: Run, layer: _Layer, index: int, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.plan = run, layer, index
        return run.forward(layer, index, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run, layer, index = ctx.plan
        return None, None, None, *run.backward(layer, index, dy)
