"""A GPT trained with Megatron-Core alone, by a project with its own data and its own loop.

torchrun --nproc-per-node 2 pretrain_gpt.py --tensor 2
"""

import argparse
import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

SEQUENCE, BATCH = 128, 2


def build_model(args: argparse.Namespace) -> GPTModel:
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=args.tensor,
        context_parallel_size=args.context,
        pipeline_dtype=torch.float32,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(config, spec, 256, SEQUENCE, position_embedding_type="rope")


def batches(step: int) -> Iterator[dict[str, torch.Tensor]]:
    text = torch.tensor(list(Path(__file__).read_bytes()), device=torch.cuda.current_device())
    replica, replicas = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    starts = [97 * (BATCH * (step * replicas + replica) + i) for i in range(BATCH)]
    rows = torch.stack([text[(torch.arange(SEQUENCE + 1) + s) % len(text)] for s in starts])
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    batch = {"tokens": tokens, "labels": labels, "loss_mask": (labels != ord(" ")).float()}
    group = parallel_state.get_context_parallel_group()
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        yield get_batch_on_this_cp_rank({**batch, "cu_seqlens": None}, False, cp_group=group)
    else:
        yield get_batch_on_this_cp_rank(batch, cp_group=group)


def forward_step(data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple:
    batch = next(data)
    losses = model(batch["tokens"], None, None, labels=batch["labels"])

    def loss_function(losses: torch.Tensor) -> tuple:
        total = (losses.float() * batch["loss_mask"]).sum()
        tokens = batch["loss_mask"].sum().int()
        report = torch.stack([total.detach(), tokens.float()])
        torch.distributed.all_reduce(
            report, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        return total, tokens, {"loss": (report[0] / report[1]).item()}

    return losses, loss_function


def main(words: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--load")
    parser.add_argument("--save")
    args = parser.parse_args(words)
    parallel_state.initialize_model_parallel(args.tensor, context_parallel_size=args.context)
    torch.manual_seed(1234)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    model = build_model(args).to(torch.cuda.current_device())
    if args.load:
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), args.load))
    config = model.config
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [ddp])
    config.finalize_model_grads_func = finalize_model_grads
    losses = []
    for step in range(args.steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches(step),
            model=[ddp],
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        optimizer.step()
        losses.append(reports[0]["loss"])
    if args.save:
        os.makedirs(args.save, exist_ok=True)
        dist_checkpointing.save(model.sharded_state_dict(), args.save)
    return losses


if __name__ == "__main__":
    torch.distributed.init_process_group()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    found = main()
    if torch.distributed.get_rank() == 0:
        print(found)
