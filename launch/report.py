"""What a run says on the terminal and writes to disk, step by step."""

import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from seqpar.launch.data import PackedStream
from seqpar.launch.flops import peak_of_this_gpu, step_flops
from seqpar.launch.metrics import METRICS, Recorder, plot
from seqpar.launch.packages import packages
from seqpar.launch.setup import Run
from seqpar.launch.step import StepResult


class Clock:
    """Speed and remaining time from the last steps.

    The tokens of a step are counted once, however many ranks share them.
    """

    def __init__(self, tokens_a_step: int) -> None:
        self.tokens = tokens_a_step
        self._seconds: deque[float] = deque(maxlen=20)
        self._begin = 0.0

    def start(self) -> None:
        self._begin = time.perf_counter()

    def stop(self) -> None:
        self._seconds.append(time.perf_counter() - self._begin)

    @property
    def last(self) -> float:
        """Seconds of the last step."""
        return self._seconds[-1]

    def tokens_per_second(self) -> float:
        return self.tokens / self._mean()

    def remaining(self, steps: int) -> float:
        return steps * self._mean()

    def _mean(self) -> float:
        # the first step also builds what later ones find ready
        seconds = list(self._seconds)[1 if len(self._seconds) > 1 else 0 :]
        return sum(seconds) / len(seconds)


class Report:
    """What the first rank tells of a run; it begins with the headline.

    Args:
        first_step: steps done before, in the run that this one resumes.
        held_out: its unigram entropy, if known, is what a model reaches that knows only how
            frequent tokens are.
    """

    def __init__(
        self,
        run: Run,
        first_step: int,
        stream: PackedStream,
        held_out: PackedStream | None,
        clock: Clock,
    ) -> None:
        config, sizes, corpus = run.config, run.sizes, stream.corpus
        self._config, self._stream, self._clock = config, stream, clock
        self._entropy = held_out.unigram_entropy if held_out else None
        self._folder = Path(config.log.folder)
        self._first_step, self._ranks = first_step, run.control.size
        self._peak = peak_of_this_gpu()
        self._checkpoint: Path | None = None
        self._recorder = Recorder(config, first_step)
        parameters = sum(p.numel() for stage in run.model for p in stage.parameters())
        _say(
            f"model {config.model.pattern}: {parameters:,} parameters a rank; sequences of "
            f"{config.data.sequence_length:,} tokens cut over {_count(sizes.context, 'rank')} "
            f"({config.parallel.layout}); {_count(config.train.global_batch, 'sequence')} a step "
            f"over {_count(sizes.data, 'data-parallel rank')}"
        )
        _say(
            f"data {config.data.path}: {corpus.tokens:,} tokens in "
            f"{len(corpus.lengths):,} documents; {config.train.steps} steps are "
            f"{config.train.steps * clock.tokens / corpus.tokens:.3g} epochs"
        )
        longer = int((corpus.lengths > config.data.sequence_length).sum())
        if longer:
            _say(f"{_count(longer, 'document')} longer than a sequence, cut at its end")
        _say(packages())
        _say(f"settings and everything else in {self._folder}")
        if first_step:
            _say(f"resumed after step {first_step}")

    def step(self, step: int, result: StepResult, sequences: range) -> None:
        """A step on `sequences` that has just been clocked."""
        if result.nonfinite:
            _say(f"step {step}: {result.nonfinite}")
        elif not result.tokens:
            _say(f"step {step}: no token to predict in its sequences, nothing is learned")
        speed = self._clock.tokens_per_second()
        here = {
            "tokens_per_second": speed,
            "tokens_per_second_per_rank": speed / self._ranks,
            "memory_bytes": result.memory,
            "eta_seconds": self._clock.remaining(self._config.train.steps - step),
        }
        if self._peak and self._config.train.precision == "bf16":
            documents = map(self._stream.cu_seqlens, sequences)
            flops = step_flops(self._config.model, documents)
            here["mfu"] = flops / self._clock.last / (self._peak * self._ranks)
        self._recorder.write(
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            seconds=self._clock.last,
            tokens=step * self._clock.tokens,
            skipped=int(result.nonfinite is not None or not result.tokens),
            bytes_exchanged=result.bytes_sent,
            seconds_waited=result.waited,
            **here,
            **{f"bytes_{kind}": sent for kind, (sent, _) in result.traffic.items()},
            **{f"waited_{kind}": waited for kind, (_, waited) in result.traffic.items()},
        )
        steps, done_now = self._config.train.steps, step - self._first_step
        if step % self._config.log.every == 0 or step == steps or done_now == 1:
            unit = "rank" if self._peak is None else "GPU"
            mfu = f"  MFU {here['mfu']:.1%}" if "mfu" in here else ""
            eta = timedelta(seconds=round(here["eta_seconds"]))
            _say(
                f"step {step:>{len(str(steps))}}/{steps}  loss {result.loss:.5f}  "
                f"grad {result.grad_norm:.3f}  lr {result.lr:.2e}  {speed:,.0f} tokens/s "
                f"({speed / self._ranks:,.0f} a {unit}){mfu}  "
                f"exchanged {_bytes(result.bytes_sent)}, waited {result.waited:.2f} s  "
                f"memory {_bytes(result.memory)}  ETA {eta}"
            )

    def held_out(self, step: int, loss: float) -> None:
        """A held-out loss, in nats a token."""
        self._recorder.write(step, held_out_loss=loss)
        known = f"  unigram entropy {self._entropy:.5f}" if self._entropy is not None else ""
        _say(f"step {step}: held-out loss {loss:.5f}{known}  (nats a token)")

    def checkpoint(self, path: Path) -> None:
        """A checkpoint that is on disk."""
        self._checkpoint = path
        _say(f"checkpoint {path}")

    def close(self) -> None:
        """Have all metrics written, where there is room for them."""
        with suppress(OSError):
            self._recorder.close()

    def end(self, resume: str) -> None:
        """Where everything is, and the command that trains on."""
        _say("")
        if self._checkpoint:
            _say(f"checkpoint  {self._checkpoint}")
        _say(f"metrics     {self._folder / METRICS}")
        if find_spec("matplotlib"):
            _say(f"loss plot   {plot(self._folder, self._entropy)}")
        _say(f"to resume   {resume}")


def _say(line: str) -> None:
    print(line, flush=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
