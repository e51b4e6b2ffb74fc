"""What is counted from a configuration alone is what the real model holds and keeps."""

import dataclasses
import gc
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron_setup import Rank, Setting, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar.kernels import grouped
from seqpar.launch.checks import ALONE, Sizes
from seqpar.launch.config import Config
from seqpar.launch.count import Count, parameters
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


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it, and not given, took at once."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {x.untyped_storage()._cdata for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gc.collect()  # Triton's interpreter leaves tensors in cycles
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self._known:
                size = x.untyped_storage().nbytes()
                self._known.add(key)
                weakref.finalize(x.untyped_storage(), self._gone, key, size)
                self.now += size
                self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(rank: int, model: ModelConfig, setting: Setting) -> int:
    state = Rank(model, setting)
    batches = list(state.batches())
    gc.freeze()  # what there is already need not be looked through again and again
    with Peak(p for _, p in state.parameters()) as peak:
        output, loss_of = forward_step(iter(batches), state.network)
        loss_of(output)[0].backward()
    return peak.most


@pytest.mark.parametrize(
    ("pattern", "groups", "fields"),
    [
        ("GDN", 0, {}),
        pytest.param("GDN", 1, {}, marks=pytest.mark.complete),
        pytest.param("GDN", 4, {}, marks=pytest.mark.complete),
        ("D", 2, {}),
        ("N", 4, {}),
        ("N", 4, {"keep_attention": True}),
        ("GNG", 4, {"keep_every": 2}),
        pytest.param("GDN", 0, {"num_experts": 8}, marks=pytest.mark.complete),
        ("GDN", 1, {"num_experts": 8}),
    ],
    ids=str,
)
def test_the_peak_of_a_step_is_not_above_what_is_counted(
    pattern: str, groups: int, fields: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """groups: of heads, where layers are made again; 0: they are not."""
    monkeypatch.setenv("SEQPAR_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(grouped, "at_once", lambda x, weight: True)  # as on a GPU
    again = ["linear", "softmax", "mlp"] if groups else []
    saved = {"head_groups": max(1, groups), "keep_attention": False, **fields}
    experts = saved.pop("num_experts", 0)
    # a narrow MLP: gradients of its matrices, small beside many tokens, are not counted
    sizes = {"kv_heads": 4, "num_experts": experts, "moe_ffn_hidden_size": 48}
    sizes |= {} if experts else {"ffn_hidden_size": 32}
    model = tiny(pattern, **{**SHAPE, **sizes})
    memory = MemoryConfig(recompute=again, mlp_tokens=32, **saved)  # type: ignore[arg-type]
    setting = Setting(documents=None, memory=memory, tokens=256)
    config = config_of(model, setting)
    count = Count(config, ALONE)
    counted = sum(count.kept()[0].values()) + max(count.working().values())
    counted += count.exchange_bytes() + 4 * parameters(config).total
    linear = [mixer for mixer in count.mixers if mixer != "softmax"]
    counted -= count.state_bytes * sum(map(count.groups, linear))  # their shape is a GPU's
    if groups:  # on a CPU PyTorch keeps x twice for its RMS norm
        counted += count.tokens * count.hidden
    [most] = run_ranks(peak_bytes, 1, model, setting, timeout=300)
    assert 0.68 * counted < most < 1.02 * counted


def test_what_is_made_again_is_not_kept() -> None:
    config = config_of(tiny("GDN"), Setting())
    memory = MemoryConfig(recompute=["linear", "softmax", "mlp"], keep_attention=False)
    less = Count(dataclasses.replace(config, memory=memory), ALONE)
    kept, away = less.kept()
    one = less.tokens * less.hidden
    assert kept["linear mixers"] == 2 * (one + less.state_bytes)
    assert (kept["experts"], away) == (0, 0)
    memory.offload_layers = 3
    moved = Count(dataclasses.replace(config, memory=memory), ALONE)
    assert moved.host_bytes() == 3 * one
    assert moved.kept()[0]["on its way to the host"] == 2 * one
