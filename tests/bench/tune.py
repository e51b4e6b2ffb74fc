"""Find the fastest right configuration of the Triton kernels on this GPU, for kernels/tuned.py.

    python -m tests.bench.tune [--decay diagonal] [--dim 128] [--dtype bfloat16] [--tokens 16384]

Every candidate runs in a process of its own, for a miscompiled one may take the GPU's context with
it, and is held against fp64 first: only right ones are timed. Candidates are compiled side by side,
timed one after the other. Prints them from the fastest, for the run kernel and for the fold kernel.
"""

import argparse
import multiprocessing as mp
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from multiprocessing.pool import AsyncResult

import torch

import seqpar
from seqpar.kernels import decay, passes
from seqpar.kernels.tuned import Config, padded

from .kernels import DECAYS, median_ms

WRONG = 2e-2  # far above rounding in bf16, far below a miscompiled kernel


@dataclass(frozen=True)
class Trial:
    """One configuration of one kernel ("run" or "fold"), all else as it is."""

    kernel: str
    config: Config
    decay: str
    dim: int
    dtype: torch.dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decay", choices=DECAYS, default="diagonal")
    parser.add_argument("--dim", type=int, default=128, help="K and V of a head")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--workers", type=int, default=12, help="compilers side by side")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.tune needs an NVIDIA GPU")
    trials = [
        Trial(kernel, config, args.decay, args.dim, getattr(torch, args.dtype))
        for kernel in ("run", "fold")
        for config in candidates(kernel, args.dim)
    ]
    context = mp.get_context("spawn")
    with context.Pool(args.workers, maxtasksperchild=1) as pool:
        right = [t for t, fine in zip(trials, gather(pool, check, trials), strict=True) if fine]
    print(f"{len(right)} of {len(trials)} configurations compile and are right")
    with context.Pool(1, maxtasksperchild=1) as pool:
        times = gather(pool, measure, [(trial, args.tokens) for trial in right])
    for kernel in ("run", "fold"):
        found = [(ms, t.config) for ms, t in zip(times, right, strict=True) if t.kernel == kernel]
        for ms, config in sorted(((ms, c) for ms, c in found if ms), key=lambda pair: pair[0])[:5]:
            print(f"{kernel:<5}{ms:8.3f} ms forward and backward  {config}")


def candidates(kernel: str, dim: int) -> list[Config]:
    width = padded(dim)
    if kernel == "run":  # all rows; see decay_kernels.py for why not more columns or tokens
        sizes = [(width, columns, chunk) for columns in (16, 32) for chunk in (16, 32)]
    else:
        sides = [side for side in (32, 64, 128) if side <= width] or [width]
        sizes = [(rows, columns, 64) for rows in sides for columns in sides]
    return [Config(*size, *rest) for size in sizes for rest in product((2, 4, 8), (1, 2, 3))]


def gather(pool: "mp.pool.Pool", function: Callable[..., object], tasks: list) -> list:
    """Results in order; None for a process that died or hung."""
    pending: list[AsyncResult] = [pool.apply_async(function, (task,)) for task in tasks]
    results = []
    for result in pending:
        try:
            results.append(result.get(timeout=120))
        except Exception:  # whatever a wrong configuration leads to
            results.append(None)
    return results


def use(trial: Trial) -> None:
    """Let the launchers take this configuration, and no kernels but the general ones."""
    passes.__dict__["is_hopper"] = lambda device: False
    for launcher in (decay, passes):
        launcher.__dict__[f"{trial.kernel}_config"] = lambda *arguments: trial.config


def inputs(trial: Trial, tokens: int, heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    make = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, trial.dim, device="cuda", generator=make).to(trial.dtype)
        for _ in range(3)
    )
    found = [q, torch.nn.functional.normalize(k, dim=-1), v]
    shape = {"none": None, "constant": (heads,), "scalar": (1, tokens, heads), "diagonal": q.shape}
    if size := shape[trial.decay]:
        found.append(-torch.rand(size, device="cuda", generator=make) * 0.1)
    wide = torch.float64 if dtype == torch.float64 else None
    return [x.to(wide or x.dtype).requires_grad_() for x in found]


def run(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    o = seqpar.linear_attention(*leaves)
    return [o.detach(), *torch.autograd.grad(o.float().square().sum(), leaves)]


def check(trial: Trial) -> bool:
    """Whether a few hundred tokens come out right."""
    use(trial)
    right = run(inputs(trial, 700, 2, torch.float64))
    found = run(inputs(trial, 700, 2, trial.dtype))
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, right, strict=True)]
    return all(error < WRONG for error in errors)  # False for NaN


def measure(task: tuple[Trial, int]) -> float:
    trial, tokens = task
    use(trial)
    leaves = inputs(trial, tokens, 16, trial.dtype)
    return median_ms(lambda: run(leaves), repeats=5)


if __name__ == "__main__":
    main()
