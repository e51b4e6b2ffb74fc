"""The configuration of a training run: defaults, then a YAML file, then `section.key=value` words.

Whole numbers may be written with K or M (1024 and 1024·1024): `data.sequence_length=8K`.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seqpar.models.config import MemoryConfig, ModelConfig

CONFIGS = Path(__file__).resolve().with_name("configs")
"""The folder of the configurations that come with the project."""


@dataclass
class TrainSection:
    """How long, and from which seed."""

    steps: int = 100
    global_batch: int = 1  # packed sequences a step, over all data-parallel ranks
    seed: int = 1234
    precision: Literal["fp32", "bf16"] = "fp32"
    evaluate_every: int = 0  # steps between held-out losses; 0: only at the end
    evaluate_sequences: int = 8  # packed sequences of the held-out corpus, at most
    # what to do with a step whose loss or gradient is NaN or Inf; after 5 skipped in a row: stop
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclass
class DataSection:
    """Prefixes of corpora that `seqpar prepare` wrote."""

    path: str = MISSING
    held_out: str | None = None
    sequence_length: int = 8192  # tokens of one packed sequence, over all ranks that share it


@dataclass
class ParallelSection:
    """How many ranks share one of each; the remaining ranks are data-parallel."""

    context: int | None = None  # ranks that share a sequence; null: all that are left
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1  # ranks that share the matrices of each expert
    # layers of each pipeline stage, equal by default; twice (...) as many stages as pipeline ranks
    # are dealt to them in turn
    stages: list[int] | None = None
    layout: Literal["contiguous", "zigzag"] = "contiguous"
    exchange: str = "auto"  # how memory states cross ranks
    softmax: str = "auto"  # how keys and values of softmax layers cross ranks
    # whether "auto" reckons with links measured at the start, not with those usual for GPUs; null:
    # on GPUs. A run that is resumed on as many ranks goes on with the figures it began by
    measure_links: bool | None = None


@dataclass
class OptimizerSection:
    """AdamW and the course of its learning rate."""

    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 10
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    distributed: bool = False  # its state is shared out over data- and context-parallel ranks
    # whether gradients are summed over ranks while the backward pass goes on, and parameters
    # (distributed) gathered while the next forward pass begins
    overlap: bool = True


@dataclass
class CheckpointSection:
    """Checkpoints lie in `log.folder`/checkpoints."""

    every: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 0  # how many of the newest to keep; 0: all
    keep_hours: float = 0.0  # older ones are removed, but never the newest; 0: none is
    asynchronous: bool = False  # whether training goes on while one is written
    # "latest": the newest intact one; "auto": likewise, but begin anew where there is none; or the
    # step of a checkpoint
    resume: str | None = None


@dataclass
class LogSection:
    """Where a run writes, and how often it speaks."""

    folder: str = MISSING
    every: int = 1  # steps between step lines
    tensorboard: bool = True
    wandb: str | None = None  # a project of Weights & Biases to log to as well
    profile_steps: list[int] = field(default_factory=list)  # profiled into log.folder/profile
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    memory_history: bool = False  # add to the snapshot of a full GPU where memory was allocated


@dataclass
class Config:
    """Everything that determines a run."""

    train: TrainSection = field(default_factory=TrainSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    log: LogSection = field(default_factory=LogSection)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path`, changed by `overrides` ("section.key=value").

    Raises:
        ValueError: a file that cannot be read, an unknown key, a value of the wrong kind, a missing
            setting. The message names the key and what would be right.
    """
    merged = OmegaConf.structured(Config)
    try:
        for layer in (_from_file(path), *map(_from_word, overrides)):
            merged = OmegaConf.merge(merged, _resolve(layer, Config, ""))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(
                f"{missing[0]} is not set; add it to {path} or to the command line as "
                f"{missing[0]}=VALUE"
            )
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        # the first of OmegaConf's several lines says what is wrong, the key says where
        raise ValueError(f"{error.full_key}: {str(error.msg or error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_container(config: Config) -> Any:
    """The whole configuration as dicts and lists."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def whole_number(name: str, text: str) -> int:
    """A number from 1 that may be written with K or M.

    Raises:
        ValueError: it is none; names the option.
    """
    value = _whole_number(text, name)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={text} must be a whole number from 1, such as 8K")
    return value


def _from_file(path: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.create(Path(path).read_text()))
    except OSError as error:
        names = [str(file) for file in CONFIGS.glob("*.yaml")]
        close = difflib.get_close_matches(Path(path).stem, [Path(name).stem for name in names], 1)
        found = [name for name in names if close and Path(name).stem == close[0]]
        hint = f"; did you mean {os.path.relpath(found[0])}?" if found else ""
        raise ValueError(f"config {path}: cannot be read ({error.strerror}){hint}") from None
    except Exception as error:  # what the YAML parser raises passes through OmegaConf as it is
        reason = " ".join(str(error).split())
        raise ValueError(f"config {path}: not valid YAML ({reason})") from None


def _from_word(word: str) -> Any:
    key, equals, _ = word.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"{word!r} must have the form section.key=value")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([word]))
    except Exception:  # as above
        raise ValueError(f"{word!r}: the value is not valid YAML; quote it") from None


def _resolve(value: Any, kind: Any, key: str) -> Any:
    """`value` with known keys only, and with K and M of whole numbers written out."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{key or 'the file'}={value!r} must be a section with the settings {_listed(kind)}"
            )
        hints = typing.get_type_hints(kind)
        found = {}
        for name, item in value.items():
            full = f"{key}.{name}" if key else str(name)
            if name not in hints:
                raise ValueError(_unknown(full, kind))
            found[name] = _resolve(item, hints[name], full)
        return found
    if typing.get_origin(kind) is Literal:
        check_choice(key, value, typing.get_args(kind))
    if int in _alternatives(kind):
        return _whole_number(value, key)
    return value


def check_choice(key: str, value: object, legal: Iterable[str]) -> None:
    """Raise ValueError, with the one that was probably meant, unless `value` is one of `legal`."""
    names = list(legal)
    if value not in names:
        close = difflib.get_close_matches(str(value), names, 1, 0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{key}={value} must be one of {', '.join(names)}{hint}")


def _whole_number(value: Any, key: str) -> Any:
    """`value` with its K or M written out; what is no number is left to OmegaConf."""
    if isinstance(value, float) and value.is_integer():
        raise ValueError(f"{key}={value} must be a whole number; did you mean {int(value)}?")
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([KMkm])", value) if isinstance(value, str) else None
    if not number:
        return value
    if number[2].islower():
        raise ValueError(f"{key}={value} must be a whole number; did you mean {value.upper()}?")
    tokens = float(number[1]) * {"K": 2**10, "M": 2**20}[number[2]]
    return int(tokens) if tokens.is_integer() else value


def _alternatives(kind: Any) -> set[Any]:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return set(typing.get_args(kind)) - {type(None)}
    return {kind}


def _listed(kind: Any) -> str:
    return ", ".join(item.name for item in dataclasses.fields(kind))


def all_keys(kind: Any = None, prefix: str = "") -> list[str]:
    """Every section and setting, such as "train" and "train.steps"."""
    hints = typing.get_type_hints(kind or Config)
    keys = []
    for name, hint in hints.items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += all_keys(hint, f"{prefix}{name}.")
    return keys


def _unknown(key: str, kind: Any) -> str:
    section, _, name = key.rpartition(".")
    names = {other: other.rpartition(".") for other in all_keys()}
    close = difflib.get_close_matches(name, [last for *_, last in names.values()], 1, 0.7)
    meant = [other for other, (*_, last) in names.items() if last in close]
    # a misspelt name is of its own section, a right one of another
    meant = [other for other in meant if names[other][0] == section] or meant
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"{key} is not a setting; {hint}{section or 'settings'}: {_listed(kind)}"
