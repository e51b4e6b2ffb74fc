"""What a run says on the terminal and writes to disk, step by step."""

import time
from collections import deque
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from seqpar.launch.checks import Sizes
from seqpar.launch.config import Config
from seqpar.launch.data import PackedStream
from seqpar.launch.flops import peak_of_this_gpu, step_flops
from seqpar.launch.metrics import METRICS, Recorder, plot
from seqpar.launch.packages import packages
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
    """Reports a run; `silent` on all ranks but one.

    Args:
        first_step: steps done before, in the run that this one resumes.
        ranks: how many there are.
        unigram_entropy: of the held-out corpus, if known: what a model reaches that knows only how
            frequent tokens are.
    """

    _stream: PackedStream

    def __init__(
        self,
        config: Config,
        first_step: int,
        ranks: int,
        unigram_entropy: float | None,
        silent: bool,
    ) -> None:
        self._config, self._entropy, self._silent = config, unigram_entropy, silent
        self._folder = Path(config.log.folder)
        self._first_step, self._ranks, self._peak = first_step, ranks, peak_of_this_gpu()
        self._checkpoint: Path | None = None
        self.clock = Clock(config.train.global_batch * config.data.sequence_length)
        if not silent:
            self._recorder = Recorder(config, first_step)

    def begin(self, sizes: Sizes, stream: PackedStream, parameters: int) -> None:
        """The headline. parameters: of this rank's part of the model."""
        self._stream = stream
        corpus, train = stream.corpus, self._config.train
        self._say(
            f"model {self._config.model.pattern}: {parameters:,} parameters a rank; sequences of "
            f"{self._config.data.sequence_length:,} tokens cut over {_count(sizes.context, 'rank')}"
            f" ({self._config.parallel.layout}); {_count(train.global_batch, 'sequence')} a step "
            f"over {_count(sizes.data, 'data-parallel rank')}"
        )
        self._say(
            f"data {self._config.data.path}: {corpus.tokens:,} tokens in "
            f"{len(corpus.lengths):,} documents; {train.steps} steps are "
            f"{train.steps * self.clock.tokens / corpus.tokens:.3g} epochs"
        )
        longer = int((corpus.lengths > self._config.data.sequence_length).sum())
        if longer:
            self._say(f"{_count(longer, 'document')} longer than a sequence, cut at its end")
        self._say(packages())
        self._say(f"settings and everything else in {self._folder}")
        if self._first_step:
            self._say(f"resumed after step {self._first_step}")

    def step(self, step: int, result: StepResult, sequences: range) -> None:
        """A step on `sequences` that has just been clocked."""
        if self._silent:
            return
        if result.nonfinite:
            self._say(f"step {step}: {result.nonfinite}")
        elif not result.tokens:
            self._say(f"step {step}: no token to predict in its sequences, nothing is learned")
        speed = self.clock.tokens_per_second()
        here = {
            "tokens_per_second": speed,
            "tokens_per_second_per_rank": speed / self._ranks,
            "memory_bytes": result.memory,
            "eta_seconds": self.clock.remaining(self._config.train.steps - step),
        }
        if self._peak and self._config.train.precision == "bf16":
            documents = map(self._stream.cu_seqlens, sequences)
            flops = step_flops(self._config.model, documents)
            here["mfu"] = flops / self.clock.last / (self._peak * self._ranks)
        self._recorder.write(
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            seconds=self.clock.last,
            tokens=step * self.clock.tokens,
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
            self._say(
                f"step {step:>{len(str(steps))}}/{steps}  loss {result.loss:.5f}  "
                f"grad {result.grad_norm:.3f}  lr {result.lr:.2e}  {speed:,.0f} tokens/s "
                f"({speed / self._ranks:,.0f} a {unit}){mfu}  "
                f"exchanged {_bytes(result.bytes_sent)}, waited {result.waited:.2f} s  "
                f"memory {_bytes(result.memory)}  ETA {_duration(here['eta_seconds'])}"
            )

    def held_out(self, step: int, loss: float) -> None:
        """A held-out loss, in nats a token."""
        if self._silent:
            return
        self._recorder.write(step, held_out_loss=loss)
        known = f"  unigram entropy {self._entropy:.5f}" if self._entropy is not None else ""
        self._say(f"step {step}: held-out loss {loss:.5f}{known}  (nats a token)")

    def checkpoint(self, path: Path) -> None:
        """A checkpoint that is on disk."""
        self._checkpoint = path
        self._say(f"checkpoint {path}")

    def close(self) -> None:
        """Have all metrics written, where there is room for them."""
        if not self._silent:
            with suppress(OSError):
                self._recorder.close()

    def end(self, resume: str) -> None:
        """Where everything is, and the command that trains on."""
        if self._silent:
            return
        self._say("")
        if self._checkpoint:
            self._say(f"checkpoint  {self._checkpoint}")
        self._say(f"metrics     {self._folder / METRICS}")
        if find_spec("matplotlib"):
            self._say(f"loss plot   {plot(self._folder, self._entropy)}")
        self._say(f"to resume   {resume}")

    def _say(self, line: str) -> None:
        if not self._silent:
            print(line, flush=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
