"""A model that reads a sequence part by part gives what it gives for the whole at once."""

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from harness import assert_close, run_ranks
from torch import Tensor

import seqpar
from seqpar.incremental import Incremental
from seqpar.models.config import ModelConfig

MODEL = ModelConfig(
    "GDN GN",
    hidden_size=32,
    vocab_size=61,
    num_heads=4,
    kv_heads=2,
    gate_rank=4,
    num_experts=4,
    moe_ffn_hidden_size=16,
)


def build(pattern: str = MODEL.pattern) -> torch.nn.Module:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from seqpar.models import compat
    from seqpar.models.language_model import build_language_model
    from seqpar.models.transformer import transformer_config

    compat.install()
    parallel_state.initialize_model_parallel()
    torch.manual_seed(3)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    shape = replace(MODEL, pattern=pattern)
    config = transformer_config(shape, init_method_std=0.2)
    [model] = build_language_model(shape, config, groups, softmax_method="ring")
    return model.eval()


@torch.no_grad()
def at_once(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits of the parallel forward pass, as in training."""
    from seqpar import Layout, SequenceParallel
    from seqpar.models.sequence import SequenceParallelParams

    params = SequenceParallelParams(SequenceParallel(layout=Layout(len(tokens), 1)))
    logits: Tensor = model(
        tokens[None], position_ids=None, attention_mask=None, packed_seq_params=params
    )
    return logits[0]


@pytest.mark.parametrize("pattern", [MODEL.pattern, "KMRN"])
@pytest.mark.parametrize("parts", [[200], [1] * 12, [130, 1, 1, 68], [2, 1, 97, 64, 1]])
def test_parts_give_the_logits_of_the_whole(parts: list[int], pattern: str) -> None:
    def work(rank: int) -> tuple[Tensor, Tensor]:
        from seqpar.launch.generate import Reader

        model = build(pattern)
        tokens = torch.randint(61, (sum(parts),), generator=torch.Generator().manual_seed(1))
        reader = Reader(model)
        return torch.cat([reader.read(x) for x in tokens.split(parts)]), at_once(model, tokens)

    [(found, expected)] = run_ranks(work, 1)
    assert_close("logits", found, expected, 1e-5)


def test_what_parts_cannot_do_is_refused() -> None:
    q = torch.randn(1, 4, 2, 4, requires_grad=True)
    for method in ("auto", "allgather", "ulysses"):
        sp = Incremental().part(4)
        with torch.no_grad(), pytest.raises(ValueError, match="must have method='ring'"):
            seqpar.softmax_attention(q, q, q, method=method, sp=sp)
    sp = Incremental().part(4)
    for o in (
        seqpar.linear_attention(q, q, q, sp=sp),
        seqpar.softmax_attention(q, q, q, method="ring", sp=sp),
        seqpar.causal_conv1d(q, torch.randn(8, 4), sp=sp),
    ):
        with pytest.raises(ValueError, match=r"no gradients; use torch\.no_grad"):
            o.sum().backward()


def test_generation_is_the_argmax_of_the_parallel_forward_pass() -> None:
    """And computes one token at a time."""

    def work(rank: int) -> tuple[list[int], list[int], list[int]]:
        from seqpar.launch.generate import generate

        model: Any = build()
        prompt = torch.randint(61, (90,), generator=torch.Generator().manual_seed(2))
        lengths: list[int] = []
        hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        found = list(islice(generate(model, prompt, part=64), 40))
        hook.remove()
        whole = torch.cat([prompt, torch.tensor(found)])
        return found, at_once(model, whole)[89:-1].argmax(-1).tolist(), lengths

    [(found, expected, lengths)] = run_ranks(work, 1)
    assert found == expected
    assert len(set(found)) > 5  # no constant, which a broken state would give as well
    assert lengths == [64, 26, *[1] * 39]
