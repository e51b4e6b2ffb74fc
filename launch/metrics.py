"""Metrics on disk: JSON lines, TensorBoard, W&B, and the loss plot drawn from the first."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seqpar.launch.config import Config, to_container

METRICS = "metrics.jsonl"
PLOT = "loss.png"


class Recorder:
    """Writes the metrics of a run into its folder, one JSON object a line, and where else asked.

    A resumed run appends: where a step is there twice, the later line counts.

    Raises:
        ValueError: log.wandb without the package.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        folder = Path(config.log.folder)
        path = folder / METRICS
        before = path.read_bytes() if first_step and path.exists() else b""
        # unbuffered: what a full disk does not take must not come again when the file is closed
        self._file = path.open("ab", buffering=0)
        if before and not before.endswith(b"\n"):
            self._file.write(b"\n")  # half a line, of a disk that was full
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.log.tensorboard and find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            # steps of a run that went on after its checkpoint and was killed are taken back
            self._tensorboard = SummaryWriter(
                str(folder / "tensorboard"), purge_step=first_step + 1
            )
        if config.log.wandb is not None:
            self._wandb = _wandb(config)

    def write(self, step: int, **values: float) -> None:
        self._file.write((json.dumps({"step": step, **values}) + "\n").encode())
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({**values, "trained_steps": step})

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _wandb(config: Config) -> Any:
    folder = Path(config.log.folder)
    try:
        import wandb

        # the folder's name, so that a resumed run goes on in the same curves
        run = wandb.init(
            project=config.log.wandb,
            id=folder.name,
            name=folder.name,
            dir=str(folder),
            resume="allow",
            config=to_container(config),
        )
    except Exception as error:  # it is not there, nobody has logged in, ...
        raise ValueError(
            f"log.wandb={config.log.wandb}: {error}; pip install wandb and run wandb login, or "
            "leave log.wandb out"
        ) from None
    run.define_metric("*", step_metric="trained_steps")
    return run


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
