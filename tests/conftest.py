"""Settings every test relies on."""

import os

import pytest
import torch
from hypothesis import settings

# Triton kernels run on the CPU then; it is read when triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Workers are forked: a parent with an OpenMP pool would hand its children a pool without threads.
torch.set_num_threads(1)
# Fills what torch.empty and its kin return with NaN: memory read before it is written shows.
# On a GPU some operators have no deterministic form: there it warns.
torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
# The same examples in each run, whatever the load; others each time: --hypothesis-profile=default.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a tiny configuration, beside the corpus that it names."""
    from launch_setup import workplace

    return workplace(tmp_path_factory.mktemp("corpus"))
