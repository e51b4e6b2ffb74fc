"""Time and memory of linear attention or the delta rule on one GPU, beside the memory's floor.

    python -m tests.bench.kernels [--family delta] [--out DIR] [--quick] [--fla]

B = 1, K = V = 128, bf16, fp32 gates; medians over CUDA events. The floor moves each tensor once:
forward q, k, v, gates and o; backward those, do, and the gradients. `--fla` times
flash-linear-attention beside it, whose first calls tune for minutes; softmax is cuDNN's.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.profiler import DeviceType  # type: ignore[attr-defined]

import seqpar

DIM = 128
DECAYS = ("none", "constant", "scalar", "diagonal")
# delta rule without, with scalar and with diagonal decay; DPLR
DELTAS = ("delta", "gated delta", "kda", "rwkv7")


@dataclass(frozen=True)
class Row:
    """One measured case. Times in ms; bandwidth in TB/s, of the floor's bytes."""

    case: str
    who: str
    heads: int
    tokens: int
    forward: float
    both: float
    forward_floor: float
    both_floor: float
    bandwidth: float
    host: float  # ms the host takes to launch forward and backward
    first: float  # seconds of the first forward and backward, compilation included
    memory: float  # peak over inputs, output and gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for kernels.csv and kernels.png")
    parser.add_argument("--quick", action="store_true", help="only 64K tokens")
    parser.add_argument("--profile", action="store_true", help="the time of each kernel as well")
    parser.add_argument("--family", choices=("linear", "delta"), default="linear")
    parser.add_argument("--fla", action="store_true", help="flash-linear-attention as well")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.kernels needs an NVIDIA GPU")
    import triton

    rate = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"copies move {rate / 1e12:.2f} TB/s"
    )
    print(" ".join(f"{field.name:>13}" for field in fields(Row)))
    rows: list[Row] = []
    try:
        for case in cases(args.family, args.quick):
            run(*case, args, rate, rows)
    finally:  # what there is when it is interrupted
        summarise(rows)
        if args.out:
            write(rows, args.out)


def run(
    decay: str, heads: int, tokens: int, args: argparse.Namespace, rate: float, rows: list[Row]
) -> None:
    """Measure and print one case, by all there are to compare."""
    ours: Callable[..., Tensor] = seqpar.linear_attention
    if decay in DELTAS:
        ours = seqpar.dplr_attention if decay == "rwkv7" else seqpar.delta_attention
    makers = {"seqpar": ours}
    makers |= fla(decay) if args.fla else {}
    if decay == "none" and heads == 16 and tokens <= 2**16:
        makers["cuDNN softmax"] = softmax
    for who, function in makers.items():
        row = measure(decay, who, function, heads, tokens, rate)
        rows.append(row)
        print(" ".join(f"{show(value):>13}" for value in astuple(row)), flush=True)
        if args.profile and who == "seqpar":
            profile(function, make(decay, heads, tokens))


def write(rows: list[Row], folder: Path) -> None:
    """kernels.csv and kernels.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "kernels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)
    plot(rows, folder / "kernels.png")


def cases(family: str, quick: bool) -> list[tuple[str, int, int]]:
    """(case, heads, tokens)"""
    if family == "delta":
        found = [(case, 16, 2**16) for case in DELTAS]
        sizes = () if quick else ((16, 2**15), (2, 2**18), (16, 2**14), (16, 2**17), (16, 2**18))
        return found + [(case, *size) for case in DELTAS for size in sizes]
    found = [(decay, 16, 2**16) for decay in DECAYS]
    if not quick:
        found += [
            (decay, *size) for decay in ("none", "scalar") for size in ((16, 2**15), (2, 2**18))
        ]
        found += [("scalar", 16, 2**i) for i in (17, 18, 19, 20)]
        found += [(decay, 16, 2**i) for decay in ("none", "diagonal") for i in (14, 18)]
        found += [("diagonal", *size) for size in ((16, 2**15), (2, 2**18))]
    return found


def measure(
    decay: str, who: str, function: Callable[..., Tensor], heads: int, tokens: int, rate: float
) -> Row:
    """Time one function; NaN where it cannot run."""
    torch.cuda.empty_cache()
    inputs = make(decay, heads, tokens)
    do = torch.randn_like(inputs[2])
    wanted = [x for x in inputs if x.requires_grad]

    def both() -> None:
        torch.autograd.grad(function(*inputs), wanted, do)

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    begin = time.perf_counter()
    try:
        both()
    except RuntimeError as error:
        print(f"{who} {decay}: {str(error).splitlines()[0][:90]}")
        both_ms, host, first, peak = float("nan"), float("nan"), float("nan"), 0
    else:
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        torch.cuda.reset_peak_memory_stats()
        both()
        peak = torch.cuda.max_memory_allocated()
        both_ms, host = median_ms(both), host_ms(both)
    sizes = [x.numel() * x.element_size() for x in inputs]
    v = inputs[2].numel() * inputs[2].element_size()
    gradients = sum(x.numel() * x.element_size() for x in wanted)
    one_way, two_ways = sum(sizes) + v, 2 * sum(sizes) + 2 * v + gradients
    needed = sum(sizes) + 2 * v + gradients
    forward_ms = median_ms(forward)
    return Row(
        decay,
        who,
        heads,
        tokens,
        forward_ms,
        both_ms,
        one_way / rate * 1e3,
        two_ways / rate * 1e3,
        two_ways / both_ms / 1e9,
        host,
        first,
        peak / needed,
    )


def profile(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Print each kernel of one forward and backward pass, in order, with its microseconds."""
    wanted = [x for x in inputs if x.requires_grad]
    do = torch.randn_like(inputs[2])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        torch.autograd.grad(function(*inputs), wanted, do)
        torch.cuda.synchronize()
    for event in sorted(trace.events() or [], key=lambda event: event.time_range.start):
        if event.device_type != DeviceType.CUDA:
            continue
        print(f"    {event.name[:60]:<60} {event.time_range.elapsed_us():8.0f} us")


def make(decay: str, heads: int, tokens: int) -> list[Tensor]:
    """q, k, v and the gates, all random, keys normalised."""
    torch.manual_seed(0)
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(1, tokens, heads, DIM, **kind) for _ in range(3))  # type: ignore[call-overload]
    inputs = [q, torch.nn.functional.normalize(k, dim=-1), v]
    for x in inputs:
        x.requires_grad_()
    if decay == "rwkv7":
        gate = -torch.rand(1, tokens, heads, DIM, device="cuda") * 0.1
        a = torch.nn.functional.normalize(torch.randn(1, tokens, heads, DIM, **kind), dim=-1)  # type: ignore[call-overload]
        return [*inputs, *(x.requires_grad_() for x in (-a, a * torch.rand_like(a), gate))]
    if decay in DELTAS:
        inputs.append(torch.rand(1, tokens, heads, device="cuda").requires_grad_())
    if decay == "constant":
        inputs.append(-torch.rand(heads, device="cuda") * 0.1)
    elif decay in ("scalar", "gated delta"):
        inputs.append((-torch.rand(1, tokens, heads, device="cuda") * 0.1).requires_grad_())
    elif decay in ("diagonal", "kda"):
        gate = -torch.rand(1, tokens, heads, DIM, device="cuda") * 0.1
        inputs.append(gate.requires_grad_())
    return inputs


Chunked = Callable[..., tuple[Tensor, Tensor]]


def fla(case: str) -> dict[str, Callable[..., Tensor]]:
    """flash-linear-attention's function for this case, where it is installed."""
    try:
        function = (fla_delta() if case in DELTAS else fla_linear())[case]
    except ImportError as error:
        raise SystemExit(f"--fla: {error}") from None
    return {"fla": lambda *inputs: function(*inputs)[0]}


def fla_linear() -> dict[str, Chunked]:
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    return {
        "none": partial(chunk_linear_attn, normalize=False),
        "constant": lambda q, k, v, g: chunk_simple_gla(q, k, v, g_gamma=g),
        "scalar": lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g),
        "diagonal": lambda q, k, v, g: chunk_gla(q, k, v, g=g),
    }


def fla_delta() -> dict[str, Chunked]:
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda
    from fla.ops.rwkv7 import chunk_rwkv7

    return {
        "delta": lambda q, k, v, beta: chunk_delta_rule(q, k, v, beta.to(q.dtype)),
        "gated delta": lambda q, k, v, beta, g: chunk_gated_delta_rule(q, k, v, g=g, beta=beta),
        "kda": lambda q, k, v, beta, g: chunk_kda(q, k, v, g=g, beta=beta),
        "rwkv7": lambda q, k, v, a, b, g: chunk_rwkv7(
            q, g, k, v, a, b, scale=DIM**-0.5, safe_gate=True
        ),
    }


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return o.transpose(1, 2)


def median_ms(function: Callable[[], object], repeats: int = 15) -> float:
    """The GPU's time; the host launches while the GPU is kept waiting."""
    for _ in range(3):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        torch.cuda._sleep(6_000_000)  # cycles, 3 to 4 ms
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def host_ms(function: Callable[[], object], repeats: int = 15) -> float:
    """What launching takes, with room in the GPU's queue."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e3


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) * 1e3


def summarise(rows: list[Row]) -> None:
    """The two ratios that show how well the chip is filled and how time grows with tokens."""
    ours = {(row.case, row.heads, row.tokens): row for row in rows if row.who == "seqpar"}
    for decay in (*DECAYS, *DELTAS):
        few, many = ours.get((decay, 2, 2**18)), ours.get((decay, 16, 2**15))
        if few and many:
            forward, both = few.forward / many.forward, few.both / many.both
            print(f"{decay}: 2 heads, 256K over 16 heads, 32K: {forward:.2f}, {both:.2f}")
    base = ours.get(("scalar", 16, 2**16))
    for (decay, heads, tokens), row in ours.items():
        if base and decay == "scalar" and heads == 16 and tokens > 2**16:
            ratio = row.both / base.both / (tokens / 2**16)
            print(f"scalar {tokens >> 10}K: {ratio:.3f} of 64K's time a token")


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, rates) = pyplot.subplots(1, 2, figsize=(11, 4))
    for key in dict.fromkeys((row.who, row.case) for row in rows):
        found = sorted(
            (row for row in rows if (row.who, row.case) == key and row.heads == 16),
            key=lambda row: row.tokens,
        )
        tokens = [row.tokens for row in found]
        times.plot(tokens, [row.both for row in found], marker="o", label=" ".join(key))
        rates.plot(tokens, [row.bandwidth for row in found], marker="o")
    for axes, label in ((times, "forward and backward, ms"), (rates, "bytes of the floor, TB/s")):
        axes.set(xscale="log", yscale="log", xlabel="tokens, 16 heads", ylabel=label)
        axes.grid(alpha=0.3)
    times.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(value: object) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3f}"
    return str(value)


if __name__ == "__main__":
    main()
