"""Weak scaling: functions and a whole training step on P GPUs, beside one GPU in the same run.

    torchrun --nproc-per-node P -m tests.bench.layer [--seconds 240] [--only NAME ...] [--out DIR]
        [--trace]

Every rank first works alone on as many tokens as it holds later, all ranks at once; then all of
them on one sequence P times as long. Milliseconds of the slowest rank's GPU, the host launching
ahead, medians, forward and backward; `host` is what launching takes. `ideal` is the time alone; of
causal softmax, whose work a token grows with the sequence, the time that one GPU takes for the
whole sequence, divided by P. Efficiency is ideal / P GPUs.

`step` is a training step of a hybrid language model as the trainer runs it: bf16, each layer made
again in the backward pass, beside which gradients are summed over ranks in fp32 by Megatron's DDP,
and AdamW of its optimizer. Without a GPU everything runs over gloo, on small sizes. --out takes
layer.csv, a row as soon as it is measured, and layer.png at the end. --trace writes what the
profiler saw of one layer of each kind, and draws which stream was at work when.
"""

import argparse
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seqpar
from seqpar import Layout, SequenceParallel
from seqpar.comm import Communicator
from seqpar.cost import Links

from .ranks import CUDA, DEVICE, MACHINE, Bench, synchronize

DTYPE = torch.bfloat16 if CUDA else torch.float32
UNIT = 1024 if CUDA else 4  # tokens
# name -> function, gates besides q, k, v (whether they have one number a channel), options, layout
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, bool], dict[str, str], str]] = {
    "linear": (seqpar.linear_attention, {}, {}, "contiguous"),
    "linear scalar": (seqpar.linear_attention, {"log_decay": False}, {}, "contiguous"),
    "linear diagonal": (seqpar.linear_attention, {"log_decay": True}, {}, "contiguous"),
    "gated delta": (
        seqpar.delta_attention,
        {"beta": False, "log_decay": False},
        {},
        "contiguous",
    ),
    "kda": (seqpar.delta_attention, {"beta": False, "log_decay": True}, {}, "contiguous"),
    "softmax allgather": (seqpar.softmax_attention, {}, {"method": "allgather"}, "contiguous"),
    "softmax ring": (seqpar.softmax_attention, {}, {"method": "ring"}, "zigzag"),
    "softmax ulysses": (seqpar.softmax_attention, {}, {"method": "ulysses"}, "contiguous"),
}
CASES = (  # the most wanted first, and how many UNITs of tokens a rank holds
    ("linear scalar", 64),
    ("kda", 64),
    ("step", 32),
    ("softmax allgather", 32),
    ("softmax ring", 32),
    ("linear scalar", 16),
    ("kda", 16),
    ("linear diagonal", 64),
    ("gated delta", 64),
    ("linear", 64),
    ("softmax ulysses", 32),
    ("linear diagonal", 16),
    ("gated delta", 16),
    ("linear", 16),
)


@dataclass(frozen=True)
class Row:
    """One measured case; tokens of a rank, times in ms; rate: tokens a second and GPU, together."""

    case: str
    tokens: int
    gpus: int
    alone: float = 0.0
    ideal: float = 0.0
    together: float = 0.0
    efficiency: float = 0.0
    host: float = 0.0
    rate: float = 0.0
    error: str = ""


class Layers:
    """What all cases share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.bench = Bench(args.seconds, args.out, Row)
        self.comm = self.bench.comm
        self.links = self.bench.links()
        self._network: Any = None

    def sp(self, tokens: int, size: int, kind: str = "contiguous") -> SequenceParallel:
        """This rank alone, or all ranks, with so many tokens each."""
        layout = Layout(size * tokens, size, kind)
        if size == 1:
            return SequenceParallel(layout=layout, comm=Communicator(), links=Links((0,)))
        return SequenceParallel(
            layout=layout, exchange=self.args.exchange, comm=self.comm, links=self.links
        )

    def row(self, name: str, tokens: int) -> None:
        size = self.comm.size
        measured = self.step if name == "step" else partial(self.function, name)
        times, error = self.bench.attempt(name, partial(measured, tokens))
        if times is None:
            self.bench.add(Row(name, tokens, size, error=error))
            return
        alone, ideal, together, host = times
        rate, share = tokens / together * 1e3, ideal / together
        self.bench.add(Row(name, tokens, size, alone, ideal, together, share, host, rate))

    def function(self, name: str, tokens: int) -> tuple[float, float, float, float]:
        """Of one function: alone, ideal, together, and the host's."""
        function, _, options, kind = FUNCTIONS[name]
        size, repeats = self.comm.size, self.args.repeats
        milliseconds = partial(self.bench.milliseconds, repeats=repeats)
        call = self.call(name, tokens, self.sp(tokens, 1))
        alone = ideal = together = milliseconds(call)
        if function is seqpar.softmax_attention and size > 1:
            whole = self.call(name, size * tokens, self.sp(size * tokens, 1))
            ideal = milliseconds(whole) / size
        if size > 1:
            call = self.call(name, tokens, self.sp(tokens, size, kind), options)
            together = milliseconds(call)
        return alone, ideal, together, self.bench.host_milliseconds(call, repeats)

    def call(
        self, name: str, tokens: int, sp: SequenceParallel, options: dict[str, str] | None = None
    ) -> Callable[[], object]:
        """Forward and backward of a function over random inputs of this rank."""
        function, gates, _, _ = FUNCTIONS[name]
        args, make = self.args, torch.Generator(DEVICE).manual_seed(self.comm.rank)
        kv_heads = args.kv_heads if function is seqpar.softmax_attention else args.heads

        def rand(*shape: int) -> Tensor:
            return torch.randn(1, tokens, *shape, device=DEVICE, generator=make)

        q, k, v = (rand(heads, args.dim) for heads in (args.heads, kv_heads, kv_heads))
        k = torch.nn.functional.normalize(k, dim=-1)
        inputs = {name: x.to(DTYPE) for name, x in {"q": q, "k": k, "v": v}.items()}
        for gate, diagonal in gates.items():
            x = rand(args.heads, args.dim) if diagonal else rand(args.heads)
            inputs[gate] = x.sigmoid() if gate == "beta" else -0.1 * x.sigmoid()
        leaves = [x.requires_grad_() for x in inputs.values()]
        do = rand(args.heads, args.dim).to(DTYPE)
        return lambda: torch.autograd.grad(
            function(**inputs, **(options or {}), sp=sp), leaves, grad_outputs=do
        )

    @property
    def letters(self) -> str:
        return (self.args.pattern * self.args.layers)[: self.args.layers]

    def network(self) -> Any:
        """Megatron's DDP of the language model, whole on each rank."""
        if self._network is not None:
            return self._network
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.process_groups_config import ProcessGroupCollection

        from seqpar.launch.setup import data_parallel
        from seqpar.models import (
            MemoryConfig,
            ModelConfig,
            build_language_model,
            compat,
            transformer_config,
        )

        compat.install()
        args = self.args
        model = ModelConfig(
            pattern=self.letters,
            linear_mixer=args.mixer,
            hidden_size=args.heads * args.dim,
            vocab_size=args.vocabulary,
            num_heads=args.heads,
            kv_heads=args.kv_heads,
        )
        parallel_state.initialize_model_parallel(context_parallel_size=self.comm.size)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = transformer_config(model, context_parallel=self.comm.size, dtype=DTYPE)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        memory = MemoryConfig(recompute=["linear", "softmax", "mlp"])
        [network] = build_language_model(model, config, groups, memory=memory)
        network = network.to(DEVICE, DTYPE)
        [self._network] = data_parallel(config, [network], groups, distributed=False, overlap=True)
        numbers = sum(parameter.numel() for parameter in network.parameters())
        self.bench.say(f"{self.letters} of {args.mixer}, {numbers / 1e9:.2f} billion parameters")
        return self._network

    def step(self, tokens: int) -> tuple[float, float, float, float]:
        """Of the training step: alone, ideal, together, and the host's."""
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from seqpar.launch.optimizer_state import fuse

        network, size = self.network(), self.comm.size
        options = OptimizerConfig(optimizer="adam", lr=1e-5, bf16=CUDA, params_dtype=DTYPE)
        optimizer = get_megatron_optimizer(options, [network], use_gloo_process_groups=False)
        fuse(optimizer)

        def step_of(size: int) -> Callable[[], None]:
            return partial(self.one_step, network, optimizer, tokens, self.sp(tokens, size))

        alone = ideal = together = self.bench.milliseconds(step_of(1), self.args.repeats)
        if size > 1:
            together = self.bench.milliseconds(step_of(size), self.args.repeats)
        host = self.bench.host_milliseconds(step_of(size), 3)
        if size > 1:
            more = self.softmax(size * tokens) / size - self.softmax(tokens)
            ideal = alone + self.letters.count("N") * more
        return alone, ideal, together, host

    def one_step(self, network: Any, optimizer: Any, tokens: int, sp: SequenceParallel) -> None:
        from seqpar.models import Batch, forward_step

        network.zero_grad_buffer()
        optimizer.zero_grad()
        ids = torch.arange(tokens, device=DEVICE)[None] % self.args.vocabulary
        batch = Batch(ids, ids, torch.ones(ids.shape, device=DEVICE), sp)
        output, loss_of = forward_step(iter([batch]), network)
        loss, count, _ = loss_of(output)
        alone = sp.comm.size == 1
        with network.no_sync() if alone else nullcontext():
            (loss / count).backward()
        if not alone:
            network.finish_grad_sync()
        optimizer.step()

    def softmax(self, tokens: int) -> float:
        """ms that a layer's softmax attention takes one GPU in a step: forward twice, backward."""
        both = self.call("softmax allgather", tokens, self.sp(tokens, 1))
        args = self.args
        q, k, v = (
            torch.randn(1, tokens, heads, args.dim, device=DEVICE).to(DTYPE)
            for heads in (args.heads, args.kv_heads, args.kv_heads)
        )

        def work() -> None:
            seqpar.softmax_attention(q, k, v)
            both()

        return self.bench.milliseconds(work, args.repeats)

    def traces(self) -> None:
        layers = self.network().module.decoder.layers
        with self.network().no_sync():  # gradients stay where they are
            for index in {letter: self.letters.index(letter) for letter in self.letters}.values():
                self.trace(layers[index], 32 * UNIT)

    def trace(self, layer: Any, tokens: int) -> None:
        """One layer's forward and backward under the profiler: a trace and a picture, of rank 0."""
        from torch.profiler import ProfilerActivity, profile, record_function

        from seqpar.models import SequenceParallelParams

        from .trace import draw, overlap, read_trace

        name = type(layer.self_attention).__name__
        params = SequenceParallelParams(self.sp(tokens, self.comm.size))
        x = torch.randn(tokens, 1, layer.config.hidden_size, device=DEVICE).to(DTYPE)
        dy = torch.randn_like(x)
        x.requires_grad_()

        def both() -> None:
            with record_function("forward"):
                y, _ = layer(x, attention_mask=None, packed_seq_params=params)
            with record_function("backward"):
                y.backward(dy)

        for _ in range(3):
            both()
        synchronize()
        self.comm.barrier()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        with profile(activities=activities) as profiler:
            both()
            synchronize()
        if self.comm.rank:
            return
        path = self.args.out / f"{name}.json"
        profiler.export_chrome_trace(str(path))
        spans = read_trace(path)
        if CUDA:
            hidden, total = overlap(spans)
            self.bench.say(f"{name}: of {total:.0f} us of transfers {hidden:.0f} beside other work")
        if importlib.util.find_spec("matplotlib"):
            draw(spans, path.with_suffix(".png"), f"{name}, forward and backward of one layer")


def main() -> None:
    args = arguments()
    layers = Layers(args)
    for name, units in CASES:
        if not args.only or any(part in name for part in args.only):
            layers.row(name, args.tokens or units * UNIT)
    if args.trace:
        _, error = layers.bench.attempt("traces", layers.traces)
        layers.bench.say(f"traces: {error or 'written'}")
    rows = [row for row in layers.bench.rows if not row.error]
    if args.out and layers.comm.rank == 0 and rows and importlib.util.find_spec("matplotlib"):
        draw_rows(rows, args.out / "layer.png")
    layers.bench.end()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after these")
    parser.add_argument("--tokens", type=int, help="of each rank, for all cases")
    parser.add_argument("--heads", type=int, default=16 if CUDA else 4)
    parser.add_argument("--dim", type=int, default=128 if CUDA else 16, help="of a head")
    parser.add_argument("--kv-heads", type=int, default=4 if CUDA else 2, help="of softmax")
    parser.add_argument("--layers", type=int, default=24 if CUDA else 4)
    parser.add_argument("--pattern", default="LLLN", help="repeated up to the number of layers")
    parser.add_argument("--mixer", default="gla", help="what L is")
    parser.add_argument("--vocabulary", type=int, default=32000 if CUDA else 64)
    parser.add_argument("--exchange", default="auto", help="of states")
    parser.add_argument("--repeats", type=int, default=10 if CUDA else 3)
    parser.add_argument("--only", nargs="+", help="cases whose names hold one of these")
    parser.add_argument("--out", type=Path, help="folder for layer.csv, layer.png and traces")
    parser.add_argument("--trace", action="store_true", help="profile a layer of each kind")
    args = parser.parse_args()
    if args.trace and not args.out:
        parser.error("--trace needs --out")
    return args


def draw_rows(rows: list[Row], path: Path) -> None:
    """Each case alone, ideally and together."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.6 * len(rows)))
    for offset, name in enumerate(("alone", "ideal", "together")):
        places = [index + 0.25 * (offset - 1) for index in range(len(rows))]
        label = f"{rows[0].gpus} GPUs" if name == "together" else name
        axes.barh(places, [getattr(row, name) for row in rows], 0.22, label=label)
    for index, row in enumerate(rows):
        axes.text(row.together, index + 0.25, f" {row.efficiency:.0%}", va="center")
    axes.set_yticks(range(len(rows)), [f"{row.case}, {row.tokens}" for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms, forward and backward")
    axes.set_title(f"{rows[0].gpus} x {MACHINE}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
