"""What the profiler saw of a GPU: which stream was at work when, and how much transfers hid."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Span:
    """Something that a stream (without a GPU: a thread) did, in us from the first."""

    row: str
    what: str
    begin: float
    length: float


KINDS = {  # by what their names hold, the first that fits
    "transfer": ("nccl", "handover", "gloo", "c10d", "memcpyptop"),
    "softmax": ("cudnn", "flash", "fmha", "sdpa"),
    "product": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "addmm", "bmm"),
    "recurrence": (
        *("run_", "fold_", "walk_", "solve_", "scan_", "enter_", "leave_", "keys_", "gate_"),
        *("steps_", "pairs_", "_start", "_finish"),  # the last two without a GPU
    ),
    "convolution and norms": ("conv", "norm", "unit_"),
}


def kind_of(name: str) -> str:
    lower = name.lower()
    found = (kind for kind, parts in KINDS.items() if any(part in lower for part in parts))
    return next(found, "other")


def read_trace(path: Path) -> list[Span]:
    """Kernels and copies by stream; without a GPU, operators by thread."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found = kernels or outermost([e for e in events if e.get("cat") == "cpu_op"])
    first = min(e["ts"] for e in found)
    return [
        Span(
            f"stream {e['args']['stream']}" if kernels else f"thread {e['tid']}",
            kind_of(e["name"]),
            e["ts"] - first,
            e["dur"],
        )
        for e in found
    ]


def outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a known kind that no other such is part of."""
    found: list[dict[str, Any]] = []
    known = (e for e in events if kind_of(e["name"]) != "other")
    for e in sorted(known, key=lambda e: (e["tid"], e["ts"], -e["dur"])):
        last = found[-1] if found else None
        if last is None or last["tid"] != e["tid"] or last["ts"] + last["dur"] <= e["ts"]:
            found.append(e)
    return found


def overlap(spans: list[Span]) -> tuple[float, float]:
    """us of transfers beside kernels of other streams, and in all."""
    hidden = total = 0.0
    for span in (s for s in spans if s.what == "transfer"):
        total += span.length
        at, end = span.begin, span.begin + span.length
        for other in sorted((s for s in spans if s.row != span.row), key=lambda s: s.begin):
            begin, stop = max(at, other.begin), min(end, other.begin + other.length)
            if begin < stop and other.what != "transfer":
                hidden, at = hidden + stop - begin, stop
    return hidden, total


def draw(spans: list[Span], path: Path, title: str) -> None:
    """Streams as rows, time from left to right."""
    from matplotlib import pyplot

    rows = sorted({span.row for span in spans})
    figure, axes = pyplot.subplots(figsize=(14, 1.2 + 0.7 * len(rows)))
    for color, kind in enumerate([*KINDS, "other"]):
        for index, row in enumerate(rows):
            of_kind = [s for s in spans if s.row == row and s.what == kind]
            axes.broken_barh(
                [(s.begin, s.length) for s in of_kind],
                (index - 0.4, 0.8),
                facecolors=f"C{color}",
                label=kind if index == 0 else None,
            )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("us")
    axes.set_title(title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncol=len(KINDS) + 1, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
