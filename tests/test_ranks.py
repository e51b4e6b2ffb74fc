"""How the processes of a run begin."""

import pytest
import torch

from seqpar.launch import ranks


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, ["expandable_segments:True"]),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, []),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, []),
    ],
)
def test_what_is_held_of_a_gpu_grows_unless_the_user_says_how(
    given: dict[str, str], changed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ranks.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    asked: list[str] = []
    change = "_accelerator_setAllocatorSettings"
    monkeypatch.setattr(torch._C, change, asked.append, raising=False)
    ranks._hold_growing_memory()
    assert asked == changed
