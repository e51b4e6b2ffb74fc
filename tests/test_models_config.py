"""The model's configuration: what a pattern means, derived sizes, and errors that name the knob."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_setup import tiny
from omegaconf import OmegaConf

from seqpar.models.config import ModelConfig, layer_mixers, resolved
from seqpar.models.transformer import transformer_config


@pytest.mark.parametrize(
    ("pattern", "linear", "mixers"),
    [
        ("LLN", "gla", ["gla", "gla", "softmax"]),
        ("LN LN", "gated_deltanet", ["gated_deltanet", "softmax"] * 2),
        ("GDN", "gla", ["gla", "gated_deltanet", "softmax"]),
    ],
)
def test_pattern(pattern: str, linear: str, mixers: list[str]) -> None:
    assert layer_mixers(ModelConfig(pattern=pattern, linear_mixer=linear)) == mixers


def test_derived_sizes() -> None:
    model = resolved(ModelConfig(hidden_size=1024, num_heads=8, moe_top_k=8, num_experts=64))
    assert (model.head_dim, model.value_head_dim, model.softmax_head_dim) == (64, 128, 128)
    assert (model.kv_heads, model.ffn_hidden_size, model.moe_ffn_hidden_size) == (8, 2752, 344)
    assert resolved(model) == model


def test_as_a_structured_config() -> None:
    config = OmegaConf.merge(OmegaConf.structured(ModelConfig), {"pattern": "LN", "num_heads": 2})
    assert OmegaConf.to_object(config) == ModelConfig(pattern="LN", num_heads=2)


def test_needs_neither_torch_nor_megatron() -> None:
    file = Path(__file__).parents[1] / "models" / "config.py"
    code = (
        "import sys; sys.modules.update(torch=None, megatron=None);"
        f"import importlib.util as u; s = u.spec_from_file_location('c', {str(file)!r});"
        "m = u.module_from_spec(s); sys.modules['c'] = m; s.loader.exec_module(m);"
        "print(m.resolved(m.ModelConfig()).head_dim)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("32\n", 0), done.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pattern": "LLXN"},
            r"model.pattern='LLXN' holds the unknown letter 'X'; legal.* L \(gla",
        ),
        ({"pattern": " "}, "model.pattern=' ' must hold one letter a layer"),
        ({"linear_mixer": "softmax"}, "model.linear_mixer='softmax' must be one of gla, gated_"),
        ({"hidden_size": 0}, "model.hidden_size=0 must be at least 1; nearest: 1"),
        ({"num_experts": -1}, "model.num_experts=-1 must be at least 0; nearest: 0"),
        ({"num_heads": 5}, "model.num_heads=5 must divide model.hidden_size=256; nearest: 4, 8"),
        ({"num_heads": 4, "kv_heads": 3}, "model.kv_heads=3 must divide model.num_heads=4"),
        ({"softmax_head_dim": 7}, "model.softmax_head_dim=7 must be even.* nearest: 6, 8"),
        ({"rope_fraction": 1.5}, "model.rope_fraction=1.5 must be from 0 to 1; nearest: 1"),
        ({"init_std": 0.0}, "model.init_std=0.0 must be above 0"),
        ({"moe_aux_loss": -0.1}, "model.moe_aux_loss=-0.1 must not be negative; nearest: 0"),
        (
            {"num_experts": 4, "moe_top_k": 5},
            "model.moe_top_k=5 must not be above model.num_experts=4; nearest: 4",
        ),
    ],
)
def test_bad_models(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(ModelConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({}, {"tensor_parallel": 3}, "tensor_parallel=3 must divide model.num_heads=4; nearest"),
        (
            {"kv_heads": 3, "num_heads": 6, "hidden_size": 24},
            {"tensor_parallel": 2},
            "tensor_parallel=2 must divide model.kv_heads=3; nearest: 1, 3",
        ),
        ({"vocab_size": 33}, {"tensor_parallel": 2}, "must divide model.vocab_size=33"),
        ({}, {"pipeline_parallel": 2}, "must divide the layers of model.pattern=3; nearest: 1, 3"),
        ({}, {"expert_parallel": 3}, "expert_parallel=3 must divide model.num_experts=4"),
        ({"num_experts": 0}, {"expert_parallel": 2}, "expert_parallel=2 must divide"),
        ({}, {"context_parallel": 0}, "context_parallel=0 must be at least 1"),
        ({}, {"sequence_parallel": True}, "sequence_parallel=True needs tensor_parallel above 1"),
        ({}, {"tensor_parallel": 2}, "tensor_parallel=2 .* needs sequence_parallel=True"),
        (
            {},
            {"pipeline_parallel": 2, "stages": [1, 1, 1]},
            r"stages=\[1, 1, 1\] has 3 entries, .* multiple of pipeline_parallel=2",
        ),
        ({}, {"stages": [2]}, r"stages=\[2\] must be layers .* the 3 of model.pattern, not 2"),
        (
            {"moe_ffn_hidden_size": 9},
            {"expert_tensor_parallel": 2},
            "expert_tensor_parallel=2 must divide model.moe_ffn_hidden_size=9",
        ),
        ({}, {"dtype": torch.float16}, "dtype=torch.float16 must be torch.float32 or"),
    ],
)
def test_bad_parallel_sizes(fields: dict[str, Any], sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformer_config(tiny(**fields), **sizes)


def test_translation() -> None:
    config = transformer_config(tiny("GDN"), context_parallel=2, recompute_granularity="selective")
    assert (config.num_layers, config.num_query_groups, config.context_parallel_size) == (3, 2, 2)
    assert config.calculate_per_token_loss
    assert config.recompute_granularity == "selective"
    assert (config.attention_dropout, config.hidden_dropout) == (0, 0)
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields.isdisjoint({"dtype", "layout"})  # of a run, not of the model
