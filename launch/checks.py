"""Rules that tie settings to each other and to the number of ranks, each with its remedy."""

import re
from dataclasses import dataclass
from math import lcm

from seqpar.exchange import EXCHANGES
from seqpar.launch.config import Config, check_choice
from seqpar.models.config import check_memory, check_sizes
from seqpar.softmax import METHODS

_LEAST = {
    "train.steps": 1,
    "train.global_batch": 1,
    "train.seed": 0,
    "train.evaluate_every": 0,
    "train.evaluate_sequences": 1,
    "data.sequence_length": 1,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.expert": 1,
    "parallel.expert_tensor": 1,
    "optimizer.lr": 0,
    "optimizer.min_lr": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "checkpoint.keep_hours": 0,
    "log.every": 1,
}


@dataclass(frozen=True)
class Sizes:
    """How many ranks each kind of parallelism has.

    All but `expert` and `expert_tensor` multiply to all ranks.
    """

    context: int
    tensor: int
    pipeline: int
    expert: int
    data: int
    expert_tensor: int = 1

    @property
    def of_model(self) -> dict[str, int]:
        """Those that cut a model, by the names that `seqpar.models` has for them."""
        return {
            "tensor_parallel": self.tensor,
            "context_parallel": self.context,
            "pipeline_parallel": self.pipeline,
            "expert_parallel": self.expert,
            "expert_tensor_parallel": self.expert_tensor,
        }


ALONE = Sizes(1, 1, 1, 1, 1)


def check(config: Config, ranks: int) -> Sizes:
    """The parallel sizes of `config` on that many ranks.

    Raises:
        ValueError: settings that do not fit each other; names them, the rule and what would do.
    """
    for key, least in _LEAST.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not value >= least:  # so that NaN is refused too
            raise ValueError(f"{key}={value} must be at least {least}; nearest: {least}")
    _check_names(config)
    _check_optimizer(config)
    sizes = _sizes(config, ranks)
    _check_lengths(config, sizes)
    _check_model(config, sizes)
    return sizes


def _check_names(config: Config) -> None:
    for key, value, legal in (
        ("parallel.exchange", config.parallel.exchange, ["auto", *EXCHANGES]),
        ("parallel.softmax", config.parallel.softmax, ["auto", *METHODS]),
    ):
        check_choice(key, value, legal)
    resume = config.checkpoint.resume
    if resume is not None and resume not in ("latest", "auto") and not resume.isdecimal():
        raise ValueError(
            f'checkpoint.resume={resume} must be "latest", "auto" or the step of a checkpoint, '
            "such as 100"
        )


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(
            f"optimizer.min_lr={optimizer.min_lr} must not be above optimizer.lr={optimizer.lr}; "
            f"nearest: {optimizer.lr}"
        )
    if optimizer.warmup_steps >= config.train.steps:
        raise ValueError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be below "
            f"train.steps={config.train.steps}; nearest: {config.train.steps - 1}"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise ValueError(
                f"optimizer.{name}={getattr(optimizer, name)} must be at least 0 and below 1"
            )
    if not optimizer.eps > 0:
        raise ValueError(f"optimizer.eps={optimizer.eps} must be above 0, such as 1e-8")


def _sizes(config: Config, ranks: int) -> Sizes:
    parallel = config.parallel
    model = parallel.tensor * parallel.pipeline
    if ranks % model:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} times parallel.pipeline={parallel.pipeline} must "
            f"divide the number of ranks={ranks}; nearest number of ranks: {_around(ranks, model)}"
        )
    left = ranks // model
    context = left if parallel.context is None else parallel.context
    if context < 1 or left % context:
        legal = [size for size in range(1, left + 1) if left % size == 0]
        nearest = sorted(sorted(legal, key=lambda size: abs(size - context))[:2])
        raise ValueError(
            f"parallel.context={context} must divide the {left} ranks that "
            f"parallel.tensor={parallel.tensor} and parallel.pipeline={parallel.pipeline} leave of "
            f"{ranks}; nearest: {', '.join(map(str, nearest))}"
        )
    stage = ranks // parallel.pipeline
    experts = parallel.expert * parallel.expert_tensor
    if stage % experts:
        times = f" times parallel.expert_tensor={parallel.expert_tensor}"
        raise ValueError(
            f"parallel.expert={parallel.expert}{times if parallel.expert_tensor > 1 else ''} must "
            f"divide the {stage} ranks of a pipeline stage; set it to a divisor of {stage}"
        )
    return Sizes(
        context,
        parallel.tensor,
        parallel.pipeline,
        parallel.expert,
        left // context,
        parallel.expert_tensor,
    )


def _check_model(config: Config, sizes: Sizes) -> None:
    try:
        check_sizes(config.model, stages=config.parallel.stages, **sizes.of_model)
    except ValueError as error:  # names its arguments, here they are settings
        told = re.sub(r"\b(\w+)_parallel=", r"parallel.\1=", str(error))
        raise ValueError(re.sub(r"\bstages=", "parallel.stages=", told)) from None
    check_memory(config.memory, config.model, sizes.tensor)


def _check_lengths(config: Config, sizes: Sizes) -> None:
    length, zigzag = config.data.sequence_length, config.parallel.layout == "zigzag"
    # Megatron's sequence parallelism cuts a rank's tokens once more over tensor-parallel ranks.
    multiple = lcm(sizes.context * (2 if zigzag else 1), sizes.context * sizes.tensor)
    if length % multiple:
        rule = "2*cp" if zigzag else "cp"
        if sizes.tensor > 1:
            rule = f"lcm({rule}, cp*tp)" if zigzag else "cp*tp"
        raise ValueError(
            f"data.sequence_length={length} must be a multiple of {rule}={multiple} for layout "
            f"{config.parallel.layout}; nearest: {_around(length, multiple)}"
        )
    batch = config.train.global_batch
    if batch % sizes.data:
        raise ValueError(
            f"train.global_batch={batch} must be a multiple of the {sizes.data} data-parallel "
            f"ranks; nearest: {_around(batch, sizes.data)}"
        )
    turns = len(config.parallel.stages or ()) > sizes.pipeline
    if turns and batch // sizes.data % sizes.pipeline:
        raise ValueError(
            f"train.global_batch={batch} must be a multiple of {sizes.data} data-parallel times "
            f"{sizes.pipeline} pipeline ranks where these take turns (parallel.stages="
            f"{config.parallel.stages}); nearest: {_around(batch, sizes.data * sizes.pipeline)}"
        )


def _around(value: int, multiple: int) -> str:
    below = value // multiple * multiple
    return ", ".join(str(n) for n in (below, below + multiple) if n)
