"""Small Megatron models on forked gloo ranks: groups, weights, data and one training step."""

import functools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from harness import assert_close, run_ranks
from torch import Tensor

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex|deprecated).*")
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

import seqpar  # noqa: E402
from seqpar.launch.ranks import device_of_this_rank  # noqa: E402
from seqpar.launch.setup import data_parallel  # noqa: E402
from seqpar.models.compat import install  # noqa: E402
from seqpar.models.config import MemoryConfig, ModelConfig  # noqa: E402
from seqpar.models.language_model import Batch, build_language_model, forward_step  # noqa: E402
from seqpar.models.transformer import transformer_config  # noqa: E402

install()
logging.getLogger("megatron").setLevel(logging.ERROR)

TOKENS = 48
DOCUMENTS = (0, 5, 21, 22, 40, TOKENS)


def tiny(pattern: str = "GDN", **fields: Any) -> ModelConfig:
    """A model of a few thousand parameters, with a mixture of experts and grouped queries."""
    sizes = {"hidden_size": 16, "num_heads": 4, "kv_heads": 2, "head_dim": 4, "vocab_size": 32}
    # A heavy balancing loss: a wrong share of it must be seen.
    others = {"num_experts": 4, "ffn_hidden_size": 16, "gate_rank": 4, "moe_aux_loss": 0.5}
    return ModelConfig(pattern=pattern, **{**sizes, **others, **fields})


@dataclass
class Setting:
    """How a step is spread over ranks, and what it reads."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    stages: tuple[int, ...] | None = None  # layers of each pipeline stage
    distributed: bool = False  # optimizer
    overlap: bool = False  # its exchanges, with the passes
    softmax: str = "auto"  # method
    layout: str = "contiguous"
    shards: tuple[int, ...] | None = None  # tokens of each rank, where they differ
    tokens: int = TOKENS
    documents: tuple[int, ...] | None = DOCUMENTS
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    microbatches: int = 1  # of each data-parallel rank
    config: dict[str, Any] = field(default_factory=dict)  # more fields for transformer_config


@dataclass
class Step:
    """This rank's own loss sum and token count, and its gradients by the whole model's names."""

    loss: float
    tokens: int
    gradients: dict[str, Tensor]


class Rank:
    """One rank's groups and part of the model, seeded as a trainer would."""

    def __init__(self, model: ModelConfig, setting: Setting) -> None:
        turns = len(setting.stages or ()) // setting.pipeline
        parallel_state.initialize_model_parallel(
            setting.tensor,
            setting.pipeline,
            turns if turns > 1 else None,
            context_parallel_size=setting.context,
            expert_model_parallel_size=setting.expert,
            expert_tensor_parallel_size=setting.expert_tensor,
        )
        torch.manual_seed(11)
        tensor_parallel.model_parallel_cuda_manual_seed(11)
        self.setting = setting
        self.groups = groups = ProcessGroupCollection.use_mpu_process_groups()
        self.config = transformer_config(
            model,
            tensor_parallel=setting.tensor,
            context_parallel=setting.context,
            pipeline_parallel=setting.pipeline,
            expert_parallel=setting.expert,
            expert_tensor_parallel=setting.expert_tensor,
            stages=setting.stages,
            **setting.config,
        )
        stages: list[Any] = build_language_model(
            model,
            self.config,
            groups,
            softmax_method=setting.softmax,
            memory=setting.memory,
        )
        self.device = device_of_this_rank()
        stages = [stage.to(self.device) for stage in stages]
        half = self.config.bf16
        self.stages = [Float16Module(self.config, stage) if half else stage for stage in stages]
        self.tied = model.tie_embeddings

    @property
    def network(self) -> Any:
        """The model, where this rank has one stage of it."""
        [network] = self.stages
        return network

    @functools.cached_property
    def ddp(self) -> list[DistributedDataParallel]:
        setting, options = self.setting, DistributedDataParallelConfig
        # many messages, as of a large model, not one
        small = functools.partial(options, bucket_size=500 if setting.overlap else None)
        with mock.patch("seqpar.launch.setup.DistributedDataParallelConfig", small):
            return data_parallel(
                self.config,
                self.stages,
                self.groups,
                distributed=setting.distributed,
                overlap=setting.overlap,
            )

    def parameters(self) -> Iterator[tuple[str, Any]]:
        """(the whole model's name, this rank's parameter), over all its stages."""
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                yield self._name(stage, name), parameter

    def _name(self, stage: Any, name: str) -> str:
        parts = name.removeprefix("module.").split(".")
        layers = getattr(stage, "module", stage).decoder.layers
        if "layers" in parts:
            at = parts.index("layers") + 1
            parts[at] = str(int(parts[at]) + layers[0].layer_number - 1)
        whole = ".".join(parts)
        tied = self.tied and whole == "output_layer.weight"
        return "embedding.word_embeddings.weight" if tied else whole

    def part(self, whole: Tensor, parameter: Any) -> Tensor:
        """The part of a whole weight, or gradient, that belongs to this rank's `parameter`."""
        if whole.shape == parameter.shape:
            return whole
        group = self.groups.tp
        if not getattr(parameter, "allreduce", True):
            group = self.groups.expt_tp
            whole = whole.chunk(self.groups.ep.size())[self.groups.ep.rank()]
        rank, size, dim = group.rank(), group.size(), parameter.partition_dim
        # SwiGLU's first layer holds two matrices, each cut over the ranks.
        matrices = whole.chunk(parameter.partition_stride, dim)
        return torch.cat([matrix.chunk(size, dim)[rank] for matrix in matrices], dim)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take this rank's part of the whole model's weights."""
        with torch.no_grad():
            for name, parameter in self.parameters():
                parameter.copy_(self.part(weights[name], parameter))

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """Its shards of its micro-batches. A third of the labels, unevenly, does not count."""
        setting, count = self.setting, self.setting.microbatches
        layout = seqpar.Layout(
            setting.tokens, setting.context, setting.layout, setting.documents, setting.shards
        )
        sp = seqpar.SequenceParallel(self.groups.cp, layout)
        for index in range(count):
            seed = 1000 * step + self.groups.dp.rank() * count + index
            generator = torch.Generator().manual_seed(seed)
            stream = torch.randint(0, 32, (1, setting.tokens + 1), generator=generator)
            draws = torch.rand(1, setting.tokens, generator=generator)
            mask = (draws > torch.linspace(0.1, 0.6, setting.tokens)).float()
            whole = stream[:, :-1], stream[:, 1:], mask
            tokens, labels, mask = (layout.shard(x, sp.rank).to(self.device) for x in whole)
            yield Batch(tokens, labels, mask, sp)


def train_step(state: Rank, step: int = 0) -> Step:
    """One step's gradients by Megatron's schedule, its DDP and its finalisation."""
    ddp = state.ddp
    for stage in ddp:
        stage.zero_grad_buffer()
    batches = list(state.batches(step))
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in ddp],
        model=ddp,
        num_microbatches=state.setting.microbatches,
        seq_length=state.setting.tokens,
        micro_batch_size=1,
        forward_only=False,
    )
    gradients = {name: parameter.main_grad.clone() for name, parameter in state.parameters()}
    loss = sum(report["loss_sum"].item() for report in reports)
    return Step(loss, sum(int(report["tokens"]) for report in reports), gradients)


def adam(state: Rank, lr: float) -> Any:
    """Megatron's optimizer. Clipping bites, so that a wrong gradient norm changes what follows."""
    half = state.config.bf16
    options = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=0.1,
        clip_grad=0.2,
        adam_eps=1e-5,
        use_distributed_optimizer=state.setting.distributed,
        overlap_param_gather=state.setting.distributed and state.setting.overlap,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
    )
    return get_megatron_optimizer(options, state.ddp, use_gloo_process_groups=False)


def own_share(rank: int, model: ModelConfig, setting: Setting, weights: dict[str, Tensor]) -> Step:
    """The rank's own share of the loss and of its gradients, by autograd alone."""
    state = Rank(model, setting)
    state.load(weights)
    loss, tokens = 0.0, 0
    batches = state.batches()
    for _ in range(setting.microbatches):
        output, loss_function = forward_step(batches, state.network)
        total, count, _ = loss_function(output)
        total.backward()
        loss, tokens = loss + total.item(), tokens + int(count)
    named = state.network.named_parameters()
    return Step(loss, tokens, {name: parameter.grad for name, parameter in named})


@functools.cache
def _weights(description: str) -> dict[str, Tensor]:
    model = eval(description)
    # Halved: in a steep landscape rounding errors grow a thousandfold in five steps.
    return {name: weight / 2 for name, weight in run_ranks(draw_weights, 1, model)[0].items()}


def draw_weights(rank: int, model: ModelConfig) -> dict[str, Tensor]:
    """`whole_weights`, on a rank that has no other groups yet."""
    state = Rank(model, Setting())
    return {
        name: parameter.detach().cpu() + 0.3 * torch.randn(parameter.shape)
        for name, parameter in state.network.named_parameters()
    }


def whole_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Weights of the whole model by name; none is at a value that would hide an error."""
    return _weights(repr(model))


@functools.cache
def _whole_step(description: str, documents: tuple[int, ...] | None, microbatches: int) -> Step:
    model = eval(description)
    setting = Setting(documents=documents, microbatches=microbatches)
    return run_ranks(own_share, 1, model, setting, whole_weights(model))[0]


def whole_step(
    model: ModelConfig, documents: tuple[int, ...] | None = DOCUMENTS, microbatches: int = 1
) -> Step:
    """What one process without any Megatron reduction finds; gradients of the loss sum."""
    return _whole_step(repr(model), documents, microbatches)


def assert_same_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float
) -> None:
    """Every parameter is there and no gradient is zero everywhere; see harness.assert_close."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(name, actual[name], gradient, bound)
