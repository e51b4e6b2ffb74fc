"""Packages that training does without: which are there and what for, which are not.

Megatron-Core itself looks for Transformer Engine and NVIDIA's apex and takes their fused Adam and
gradient clipping. Attention and experts need no package: PyTorch brings cuDNN's and
FlashAttention's operators, and grouped products.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# what for, and what it means that it is missing
_OPTIONAL = {
    "triton": ("kernels on GPUs", "plain PyTorch in place of kernels, slow"),
    "tensorboard": ("its files", "none of its files"),
    "matplotlib": ("loss plot", "no loss plot"),
}
_FUSED = ("transformer_engine", "apex")


def packages() -> str:
    """One line: packages with their versions and uses, and what the lack of others means."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads

    taken: dict[str, list[str]] = {}
    for use, part in (
        ("fused Adam", optimizer.Adam),
        ("fused gradient clipping", clip_grads.multi_tensor_applier),
    ):
        taken.setdefault(part.__module__.partition(".")[0], []).append(use)
    used = [_named(name, *taken[name]) for name in _FUSED if name in taken]
    missing = [] if used else ["transformer_engine, NVIDIA's apex (Adam is PyTorch's)"]
    for name, (use, otherwise) in _OPTIONAL.items():
        if find_spec(name):
            used.append(_named(name, use))
        else:
            missing.append(f"{name} ({otherwise})")
    lines = {"packages": used, "missing": missing}
    return "; ".join(f"{key} {', '.join(names)}" for key, names in lines.items() if names)


def _named(name: str, *uses: str) -> str:
    found = getattr(sys.modules.get(name), "__version__", None)
    try:
        found = found or version(name)
    except PackageNotFoundError:  # installed under another name
        found = "of unknown version"
    return f"{name} {found} ({', '.join(uses)})"
