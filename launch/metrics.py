"""Metrics on disk: JSON lines, TensorBoard, and the loss plot drawn from the former."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
PLOT = "loss.png"


class Recorder:
    """Writes the metrics of a run into its folder, one JSON object a line.

    A resumed run appends: where a step is there twice, the later line counts.
    """

    def __init__(self, folder: Path, tensorboard: bool, first_step: int) -> None:
        self._file = (folder / METRICS).open("a")
        self._writer: Any = None
        if tensorboard and find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            # steps of a run that went on after its checkpoint and was killed are taken back
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, **values: float) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()


def plot(folder: Path, unigram_entropy: float | None) -> Path:
    """Draw training and held-out loss from the metrics in `folder`; the path of the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses: dict[int, float] = {}
    held_out: dict[int, float] = {}
    for line in (folder / METRICS).read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed
        for name, into in (("loss", losses), ("held_out_loss", held_out)):
            if name in values:
                into[values["step"]] = values[name]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(sorted(losses), [losses[step] for step in sorted(losses)], label="training", lw=1.2)
    if held_out:
        steps = sorted(held_out)
        axes.plot(steps, [held_out[step] for step in steps], "o-", label="held out", ms=4)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="0.5", ls="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / PLOT, dpi=150)
    pyplot.close(figure)
    return folder / PLOT
