"""Builds what a training run consists of on this rank: groups, model, optimizer, schedule."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from seqpar import Layout, SequenceParallel
from seqpar.comm import Communicator
from seqpar.cost import Links, measure
from seqpar.launch.checks import Sizes
from seqpar.launch.config import Config
from seqpar.launch.optimizer_state import fuse
from seqpar.launch.ranks import device_of_this_rank
from seqpar.models import compat
from seqpar.models.language_model import build_language_model
from seqpar.models.transformer import transformer_config


@dataclass
class Run:
    """One rank's part of a training run.

    control: communicator of all ranks, on the host. sequence: of the ranks that share a sequence;
    its traffic is what layers exchange; links: what their exchanges are chosen by, the usual if
    None. model: Megatron's DDP around each of this rank's pipeline stages.
    """

    config: Config
    sizes: Sizes
    groups: ProcessGroupCollection
    control: Communicator
    sequence: Communicator
    links: Links | None
    device: torch.device
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def complete_parameters(self) -> None:
        """Gather the parameters that the next forward pass would; all ranks call it."""
        if self.config.optimizer.distributed and self.config.optimizer.overlap:
            for stage in self.model:
                stage.start_param_sync(force_sync=True)


def build(config: Config, sizes: Sizes, control: Communicator) -> Run:
    """Build the run on this rank. All ranks call it, after torch.distributed is initialised.

    Raises:
        ValueError: a model that is not possible, or not with these parallel sizes.
    """
    device = device_of_this_rank()
    model_config, groups, stages = build_model(config, sizes)
    distributed, overlap = config.optimizer.distributed, config.optimizer.overlap
    model = data_parallel(model_config, stages, groups, distributed=distributed, overlap=overlap)
    for ddp in model:
        ddp.broadcast_params()
    optimizer = get_megatron_optimizer(
        _optimizer_config(config), model, use_gloo_process_groups=False, pg_collection=groups
    )
    fuse(optimizer)
    model_config.grad_scale_func = optimizer.scale_loss
    sequence = Communicator(groups.cp)
    measured = config.parallel.measure_links
    links = None
    if sequence.size > 1 and (device.type == "cuda" if measured is None else measured):
        links = measure(sequence, device)
        links = replace(control.broadcast_object(links), nodes=links.nodes)  # all choose alike
    layout = Layout(2 * sizes.context, sizes.context, config.parallel.layout)
    SequenceParallel(
        layout=layout, exchange=config.parallel.exchange, comm=sequence, links=links
    ).warm_up(device)
    return Run(
        config,
        sizes,
        groups,
        control,
        sequence,
        links,
        device,
        model,
        optimizer,
        _scheduler(config, optimizer),
    )


def seed_ranks(seed: int) -> None:
    """Begin random numbers, alike on data- and context-parallel ranks.

    Each step has a seed of its own, so a resumed run draws what it would have drawn, on any ranks.
    """
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def data_parallel(
    config: TransformerConfig,
    stages: list[Any],
    groups: ProcessGroupCollection,
    *,
    distributed: bool,
    overlap: bool,
) -> list[DistributedDataParallel]:
    """Megatron's DDP around each stage of this rank. Sums gradients in fp32 in any precision.

    distributed: for its distributed optimizer. overlap: gradients are summed while the backward
    pass goes on, and that optimizer's parameters gathered while the next forward pass begins.
    """
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed,
    )
    # only the stage that is done last can overlap its reduction with anything
    model = [
        DistributedDataParallel(
            config, options, stage, pg_collection=groups, disable_bucketing=index > 0
        )
        for index, stage in enumerate(stages)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if overlap:  # after the last micro-batch only
        waits = [ddp.no_sync for ddp in model]
        config.no_sync_func = waits if len(waits) > 1 else waits[0]
    return model


def build_model(
    config: Config, sizes: Sizes
) -> tuple[TransformerConfig, ProcessGroupCollection, list[Any]]:
    """The model's configuration, Megatron's groups, and this rank's stages, on its device."""
    compat.install()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]
    model_config = transformer_config(
        config.model,
        stages=config.parallel.stages,
        sequence_parallel=sizes.tensor > 1,
        dtype=dtype,
        **sizes.of_model,
    )
    parallel_state.initialize_model_parallel(
        sizes.tensor,
        sizes.pipeline,
        model_config.virtual_pipeline_model_parallel_size,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
    )
    seed_ranks(config.train.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stages: list[Any] = build_language_model(
        config.model,
        model_config,
        groups,
        softmax_method=config.parallel.softmax,
        memory=config.memory,
    )
    stages = [stage.to(device_of_this_rank()) for stage in stages]
    if dtype == torch.bfloat16:
        stages = [Float16Module(model_config, stage) for stage in stages]
    return model_config, groups, stages


def _optimizer_config(config: Config) -> OptimizerConfig:
    optimizer = config.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        use_distributed_optimizer=optimizer.distributed,
        overlap_param_gather=optimizer.distributed and optimizer.overlap,
        bf16=config.train.precision == "bf16",
        params_dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
    )


def _scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    wanted = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=wanted.lr / (wanted.warmup_steps + 1),  # from 0 the first step would change nothing
        max_lr=wanted.lr,
        min_lr=wanted.min_lr,
        lr_warmup_steps=wanted.warmup_steps,
        lr_decay_steps=config.train.steps,
        lr_decay_style=wanted.schedule,
        start_wd=wanted.weight_decay,
        end_wd=wanted.weight_decay,
        wd_incr_steps=config.train.steps,
        wd_incr_style="constant",
        # A resumed run keeps the count of its steps, the course is the configuration's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
