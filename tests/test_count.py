"""What is counted from a configuration alone is what the real model holds and keeps."""

import dataclasses
from typing import Any

import pytest
import torch
from harness import run_ranks
from hollow import step_bytes
from megatron_setup import Rank, Setting, tiny
from torch import Tensor

from seqpar.launch.checks import ALONE, Sizes, check
from seqpar.launch.config import CONFIGS, Config, load_config
from seqpar.launch.count import Count, parameters
from seqpar.launch.peak import memory
from seqpar.models.config import MIXERS, MemoryConfig, ModelConfig
from seqpar.models.language_model import forward_step


def held(rank: int, model: ModelConfig, setting: Setting) -> tuple[int, int]:
    """(pipeline rank, parameters) of a rank of the real model."""
    state = Rank(model, setting)
    return state.groups.pp.rank(), sum(p.numel() for _, p in state.parameters())


def config_of(model: ModelConfig, setting: Setting) -> Config:
    config = Config()
    config.model, config.memory = model, setting.memory
    config.parallel.stages = list(setting.stages) if setting.stages else None
    config.data.sequence_length = setting.tokens
    return config


SPREAD: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2": (2, {"tensor": 2, "config": {"sequence_parallel": True}}),
    "tp4, ep2": (4, {"tensor": 4, "expert": 2, "config": {"sequence_parallel": True}}),
    "pp2": (2, {"pipeline": 2, "stages": (1, 2)}),
    "pp2 in turns, ep2, etp2": (
        8,
        {"pipeline": 2, "expert": 2, "expert_tensor": 2, "context": 4, "stages": (1, 0, 1, 1)},
    ),
}


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": True, "num_experts": 0, "gate_rank": 3},
        {"pattern": "KMR", "num_heads": 8, "key_heads": 4},
    ],
    ids=["moe", "dense", "others"],
)
def test_parameters_are_those_of_the_model(spread: str, fields: dict[str, Any]) -> None:
    ranks, words = SPREAD[spread]
    if "num_experts" in fields:
        words = {name: size for name, size in words.items() if not name.startswith("expert")}
    model, setting = tiny(**fields), Setting(**words)
    sizes = Sizes(
        setting.context, setting.tensor, setting.pipeline, setting.expert, 1, setting.expert_tensor
    )
    config = config_of(model, setting)
    for stage, count in run_ranks(held, ranks, model, setting):
        assert parameters(config, sizes, stage).total == count


def kept_bytes(rank: int, model: ModelConfig, setting: Setting) -> int:
    """Bytes that a forward pass keeps, parameters and what is given apart."""
    state = Rank(model, setting)
    apart = {p.untyped_storage().data_ptr() for p in state.network.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in apart:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output, _ = forward_step(state.batches(), state.network)  # kept alive: storages stay apart
    assert output.requires_grad
    return sum(found.values())


SHAPE = {"hidden_size": 64, "head_dim": 0, "ffn_hidden_size": 160, "num_experts": 0}


KEPT: list[tuple[str, dict[str, int]]] = [(letter, {}) for letter in MIXERS]
KEPT += [(letter, {"key_heads": 2}) for letter in "DKM"]
KEPT += [("GDN", {"num_experts": 8, "moe_ffn_hidden_size": 48})]


@pytest.mark.parametrize(("pattern", "fields"), KEPT, ids=str)
@pytest.mark.parametrize("cut", ["alone", "cp2", "tp2"])
def test_activations_are_what_the_model_keeps(
    pattern: str, fields: dict[str, int], cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the Triton kernels, interpreted, and so in fp32; on GPUs the same tensors are kept."""
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = tiny(pattern, **{**SHAPE, **fields})
    words: dict[str, Any] = {"cp2": {"context": 2}, "tp2": {"tensor": 2}}.get(cut, {})
    if cut == "tp2":
        words["config"] = {"sequence_parallel": True}
    setting = Setting(documents=None, **words)
    sizes = Sizes(setting.context, setting.tensor, 1, 1, 1)
    counted = Count(config_of(model, setting), sizes)
    states = (len(pattern) - pattern.count("N")) * counted.state_bytes
    wanted = sum(counted.kept()[0].values()) + counted.loss_bytes - states
    # on a CPU PyTorch keeps x twice for its RMS norm
    wanted += (2 * len(pattern) + 1) * counted.tokens * counted.hidden
    found = run_ranks(kept_bytes, setting.context * setting.tensor, model, setting)
    for bytes_kept in found:
        assert bytes_kept == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(
    ("stages", "microbatches", "kept"),
    [
        ((1, 1), 8, [2, 1]),
        ((1, 1), 1, [1, 1]),
        ((1, 1, 1, 1), 8, [2.5, 1.5]),  # stages that take turns
    ],
)
def test_microbatches_in_flight(
    stages: tuple[int, ...], microbatches: int, kept: list[float]
) -> None:
    config = config_of(tiny("GDGN"[: len(stages)]), Setting(pipeline=2, stages=stages))
    config.train.global_batch = microbatches
    sizes = Sizes(1, 1, 2, 1, 1)
    assert [Count(config, sizes, rank).in_flight for rank in range(2)] == kept


ALL = "memory.recompute=[linear,softmax,mlp]"
FEW = "memory.mlp_tokens=4096"  # so that it is the mixer that needs most
STEPS = [
    ("GDNK", ""),
    ("MNR", "memory.recompute=[mlp]"),
    ("NGD", "memory.recompute=[linear,softmax]"),
    *((letter, f"{ALL} {FEW}") for letter in MIXERS),
    ("GN", f"{ALL} memory.head_groups=4 {FEW}"),
    ("DM", f"{ALL} memory.head_groups=2 {FEW}"),
    ("GNK", f"{ALL} memory.head_groups=4 memory.keep_attention=false"),
    ("GGNR", f"{ALL} memory.head_groups=2 memory.keep_every=2 memory.offload_layers=3"),
    ("GNNG", f"{ALL} memory.offload_layers=3"),
    ("GG", f"{ALL} memory.offload_layers=2 model.vocab_size=512000"),
    ("R", f"{ALL} memory.mlp_tokens=128K"),
    ("D", f"{ALL} {FEW} model.key_heads=4"),
    ("M", f"{ALL} {FEW} model.key_heads=4"),
]


@pytest.mark.parametrize(("pattern", "words"), STEPS, ids=str)
def test_the_peak_of_a_step_is_what_is_counted(pattern: str, words: str) -> None:
    """Of layers of the 1.3B hybrid, a quarter of a million tokens on an H200."""
    given = [f"model.pattern={pattern}", "data.sequence_length=256K", *words.split()]
    assert 0.98 < counted_of_measured(given, 1, "meta") < 1.02


SMALL = [
    "model.hidden_size=128",
    "model.num_heads=4",
    "model.kv_heads=4",
    "model.vocab_size=256",
    "model.ffn_hidden_size=256",
    "data.sequence_length=8K",
]
EXPERTS = "model.num_experts=8 model.moe_ffn_hidden_size=96"
SPREAD_STEPS = [
    ("RD", 1, EXPERTS),
    ("RD", 1, f"{EXPERTS} {ALL} memory.mlp_tokens=1024"),
    ("RN", 1, f"{EXPERTS} {ALL} memory.head_groups=2"),
    ("GN", 2, "parallel.context=2"),
    *(
        ("NN", 2, f"{ALL} parallel.context=2 parallel.softmax={method}")
        for method in ("allgather", "ring", "ulysses")
    ),
    ("NG", 2, f"{ALL} parallel.context=2 memory.head_groups=2"),
    ("GN", 2, "parallel.tensor=2"),
    ("GN", 2, f"{ALL} parallel.tensor=2 memory.head_groups=2"),
]


@pytest.mark.parametrize(("pattern", "gpus", "words"), SPREAD_STEPS, ids=str)
def test_the_peak_of_experts_and_of_several_ranks(pattern: str, gpus: int, words: str) -> None:
    """Small, for they need numbers: what does not grow with the tokens is not small beside them."""
    given = [f"model.pattern={pattern}", *SMALL, *words.split()]
    assert 0.94 < counted_of_measured(given, gpus, "cpu") < 1.06


def counted_of_measured(words: list[str], gpus: int, device: str) -> float:
    """What is counted of a step's peak, by that of a hollow one; weights apart."""
    spread = [] if any("parallel.context" in word for word in words) else ["parallel.context=1"]
    words = [*words, *spread, "optimizer.distributed=false", "train.global_batch=1"]
    config = load_config(str(CONFIGS / "hybrid-1.3b.yaml"), words)
    sizes = check(config, gpus)
    found = run_ranks(step_bytes, gpus, config, sizes, device, timeout=300)
    parts = memory(Count(config, sizes))
    apart = ("weights", "gradients", "optimizer", "reserved")
    counted = sum(size for part, size in parts.items() if part not in apart)
    return counted / max(most for _, most in found)


def test_what_is_made_again_is_not_kept() -> None:
    config = config_of(tiny("GDN", num_experts=0), Setting())
    saved = MemoryConfig(recompute=["linear", "softmax", "mlp"], keep_attention=False)
    less = Count(dataclasses.replace(config, memory=saved), ALONE)
    kept, away = less.kept()
    one = less.tokens * less.hidden
    assert kept["linear mixers"] == 2 * (one + less.state_bytes)
    assert (kept["MLPs"], away) == (0, 0)
    saved.offload_layers = 3
    moved = Count(dataclasses.replace(config, memory=saved), ALONE)
    assert moved.host_bytes() == 3 * one
    assert moved.kept()[0]["on its way to the host"] == 2 * one
