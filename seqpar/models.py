"""Layers, specs and the language model for Megatron-Core; what is in models/, under one name.

Megatron is imported when one of these names is first used. The modules lie in the folder `models`
beside this file, which makes it their package.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqpar.models.config import MemoryConfig as MemoryConfig
    from seqpar.models.config import ModelConfig as ModelConfig
    from seqpar.models.language_model import Batch as Batch
    from seqpar.models.language_model import build_language_model as build_language_model
    from seqpar.models.language_model import forward_step as forward_step
    from seqpar.models.loss import linear_cross_entropy as linear_cross_entropy
    from seqpar.models.norm import RMSNorm as RMSNorm
    from seqpar.models.sequence import SequenceParallelParams as SequenceParallelParams
    from seqpar.models.specs import core_attention_spec as core_attention_spec
    from seqpar.models.specs import hybrid_stack_spec as hybrid_stack_spec
    from seqpar.models.specs import linear_attention_spec as linear_attention_spec
    from seqpar.models.specs import pattern_spec as pattern_spec
    from seqpar.models.specs import softmax_attention_spec as softmax_attention_spec
    from seqpar.models.transformer import transformer_config as transformer_config

__path__ = [str(Path(__file__).with_suffix(""))]

_HOMES = {
    "Batch": "language_model",
    "MemoryConfig": "config",
    "ModelConfig": "config",
    "RMSNorm": "norm",
    "SequenceParallelParams": "sequence",
    "build_language_model": "language_model",
    "core_attention_spec": "specs",
    "forward_step": "language_model",
    "hybrid_stack_spec": "specs",
    "linear_attention_spec": "specs",
    "linear_cross_entropy": "loss",
    "pattern_spec": "specs",
    "softmax_attention_spec": "specs",
    "transformer_config": "transformer",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
