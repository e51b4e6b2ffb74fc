"""One optimizer step, and one held-out loss, over packed sequences."""

import math
import resource
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func

from seqpar import Layout, SequenceParallel
from seqpar.launch.data import PackedStream
from seqpar.launch.failure import together
from seqpar.launch.nonfinite import gradients_are_finite, locate
from seqpar.launch.setup import Run
from seqpar.models.language_model import Batch, forward_step


@dataclass(frozen=True)
class StepResult:
    """What a step came to.

    loss: mean over all valid tokens. tokens: how many those were. bytes_sent: by all ranks, for the
    sequence. waited: seconds that the slowest rank's host waited for the sequence. memory: most
    bytes that a rank has held so far. traffic: this rank's bytes sent and seconds waited for the
    sequence, by kind of layer. nonfinite: where a NaN or Inf arose; nothing was learned then.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    bytes_sent: int
    waited: float
    memory: int
    traffic: dict[str, tuple[int, float]]
    nonfinite: str | None


def read(run: Run, stream: PackedStream, sequences: range) -> list[Batch]:
    """This rank's batches of a step on `sequences`.

    Raises:
        UserError: on every rank, when a rank cannot read its part of the data.
    """
    own = sequences[run.groups.dp.rank() :: run.sizes.data]
    return together(run.control, partial(_batches, run, stream, own))


def train_step(run: Run, batches: list[Batch]) -> StepResult:
    """Train on the batches that `read` gave; leave the model as it is where that cannot be."""
    before = _traffic(run)
    _zero_gradients(run)
    loss_sum, tokens = _forward(run, batches, train=True)
    traffic = {
        kind: (sent - before.get(kind, (0, 0.0))[0], waited - before.get(kind, (0, 0.0))[1])
        for kind, (sent, waited) in _traffic(run).items()
    }
    own_sent = sum(sent for sent, _ in traffic.values())
    own_waited = sum(waited for _, waited in traffic.values())
    broken = not (math.isfinite(loss_sum) and gradients_are_finite(run))
    loss_sum, tokens, sent = _sum_over_ranks(run, loss_sum, tokens, own_sent)
    most = torch.tensor([broken, own_waited, _memory()], dtype=torch.float64)
    broken, waited, memory = run.control.all_reduce(most, "max").tolist()
    grad_norm, nonfinite = 0.0, None
    if broken:
        _zero_gradients(run)
        nonfinite = locate(run, lambda: _forward(run, batches, train=True))
    elif tokens:
        _, norm, _ = run.optimizer.step()
        grad_norm = float(norm or 0)
    lr = get_canonical_lr_for_logging(run.optimizer.param_groups)
    run.scheduler.step(1)
    return StepResult(
        loss_sum / max(tokens, 1),
        grad_norm,
        float(lr or 0),
        int(tokens),
        int(sent),
        waited,
        int(memory),
        traffic,
        nonfinite,
    )


def _zero_gradients(run: Run) -> None:
    for stage in run.model:
        stage.zero_grad_buffer()
    run.optimizer.zero_grad()


def _memory() -> int:
    """Most bytes that this rank has held: of its GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def held_out_loss(run: Run, stream: PackedStream) -> float:
    """Mean loss in nats over the valid tokens of the first train.evaluate_sequences of `stream`.

    Raises:
        UserError: on every rank, when a rank cannot read its part of the data.
    """
    sequences = min(run.config.train.evaluate_sequences, stream.sequences)
    # every data-parallel rank takes part in every round, with nothing that counts if need be
    rounds = -(-sequences // run.sizes.data)
    if len(run.model) > 1:  # stages that take turns work on as many sequences as there are ranks
        rounds = -(-rounds // run.sizes.pipeline) * run.sizes.pipeline
    own = [i * run.sizes.data + run.groups.dp.rank() for i in range(rounds)]
    loss_sum, tokens = 0.0, 0.0
    for stage in run.model:
        stage.eval()
    at_once = run.sizes.pipeline  # fill the stages; more would only take room
    for first in range(0, rounds, at_once):
        here = own[first : first + at_once]
        batches = together(run.control, partial(_batches, run, stream, here))
        for index, batch in zip(here, batches, strict=True):
            if index >= sequences:
                batch.loss_mask.zero_()
        found = _forward(run, batches, train=False)
        loss_sum, tokens = loss_sum + found[0], tokens + found[1]
    for stage in run.model:
        stage.train()
    loss_sum, tokens, _ = _sum_over_ranks(run, loss_sum, tokens, 0)
    return loss_sum / max(tokens, 1)


def _traffic(run: Run) -> dict[str, tuple[int, float]]:
    return {kind: (t.bytes_sent, t.seconds_waited) for kind, t in run.sequence.traffic.items()}


def _batches(run: Run, stream: PackedStream, indices: Sequence[int]) -> list[Batch]:
    return [_batch(run, stream, index) for index in indices]


def _batch(run: Run, stream: PackedStream, index: int) -> Batch:
    layout = Layout(
        run.config.data.sequence_length,
        run.sizes.context,
        run.config.parallel.layout,
        stream.cu_seqlens(index),
    )
    shard = stream.read(index, layout, run.sequence.rank)
    sp = SequenceParallel(
        layout=layout,
        exchange=run.config.parallel.exchange,
        comm=run.sequence,
        links=run.links,
    )
    return Batch(
        shard.tokens.to(run.device),
        shard.labels.to(run.device),
        shard.loss_mask.to(run.device),
        sp,
    )


def _forward(run: Run, batches: list[Batch], train: bool) -> tuple[float, float]:
    """Run Megatron's schedule; (loss sum, valid tokens) of this rank, 0 but on the last stage."""
    with nullcontext() if train else torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in run.model],
            model=run.model,
            num_microbatches=len(batches),
            seq_length=run.config.data.sequence_length,
            micro_batch_size=1,
            forward_only=not train,
        )
    return (
        sum(float(report["loss_sum"]) for report in reports),
        sum(float(report["tokens"]) for report in reports),
    )


def _sum_over_ranks(run: Run, loss_sum: float, tokens: float, sent: int) -> tuple[float, ...]:
    # tensor-parallel ranks report the same losses
    own = torch.tensor([loss_sum, tokens, sent], dtype=torch.float64)
    own[:2] /= run.sizes.tensor
    return tuple(run.control.all_reduce(own).tolist())
