"""A trained model on one GPU or CPU, read and continued part by part."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from seqpar.comm import Communicator
from seqpar.incremental import Incremental
from seqpar.launch import checkpoint, checkpoint_files
from seqpar.launch.checks import ALONE
from seqpar.launch.config import Config, ParallelSection
from seqpar.launch.failure import together
from seqpar.launch.setup import build_model
from seqpar.models.config import MemoryConfig
from seqpar.models.sequence import SequenceParallelParams

PART = 4096
"""Tokens that are read at once: their logits are as many times the vocabulary."""


def load_model(config: Config, step: str = "latest") -> tuple[torch.nn.Module, Path]:
    """The model of a run, in evaluation mode on this process's device, and its checkpoint's path.

    Args:
        config: of the run; parallel sizes do not matter.
        step: "latest", or that of a checkpoint.

    Raises:
        UserError: no intact checkpoint, or one of another model.
    """
    control = Communicator(None)
    folder = Path(config.log.folder) / "checkpoints"
    path = checkpoint_files.intact(control, folder, step)
    assert path is not None
    together(
        control,
        lambda: checkpoint_files.read_manifest(path, checkpoint.model_identity(config.model)),
    )
    alone = replace(config, parallel=ParallelSection(softmax="ring"), memory=MemoryConfig())
    _, groups, [model] = build_model(alone, ALONE)
    checkpoint.load_weights([model], groups, path)
    return model.eval(), path


class Reader:
    """Reads one sequence with `model`, part by part; earlier parts are not computed again."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._sequence = model, Incremental()

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Logits [T, vocabulary] of what follows each of the next `tokens` [T]."""
        params = SequenceParallelParams(self._sequence.part(len(tokens)))
        device = next(self._model.parameters()).device
        logits = self._model(
            tokens[None].to(device),
            position_ids=None,
            attention_mask=None,
            packed_seq_params=params,
        )
        return logits[0].float()

    def read_long(self, tokens: Tensor, part: int = PART) -> Iterator[Tensor]:
        """The logits of `tokens`, in parts of so many."""
        return map(self.read, tokens.split(part))


def generate(
    model: torch.nn.Module,
    prompt: Tensor,
    *,
    stop: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    part: int = PART,
) -> Iterator[int]:
    """The tokens after `prompt` [T], one after the other, each from the state the last one left.

    Args:
        stop: the token after which there are no more.
        temperature: 0 takes the most likely token; higher ones draw.
        part: tokens of the prompt that are read at once.
    """
    reader, draw = Reader(model), torch.Generator().manual_seed(seed)
    for logits in reader.read_long(prompt, part):
        last = logits[-1]
    while True:
        if temperature:
            odds = (last.cpu() / temperature).softmax(-1)
            token = int(torch.multinomial(odds, 1, generator=draw))
        else:
            token = int(last.argmax())
        yield token
        if token == stop:
            return
        last = reader.read(torch.tensor([token]))[-1]
