"""The rules of boundaries.py hold here, and each is shown to find what it is there to find."""

import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from boundaries import LINKED, LONGEST_FILE, RULES, Source, collectives, is_collective, links
from torch.distributed import distributed_c10d

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("rule", RULES)
def test_the_repository_keeps(rule: str) -> None:
    assert RULES[rule](ROOT) == []


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A tree that keeps every rule, with one file a layer that does what its layer may do."""
    files = {
        "kernels/scan.py": "import triton\nfrom seqpar.kernels import scan",
        "seqpar/__init__.py": "from seqpar.kernels import scan\nfrom .comm import f",
        "seqpar/comm.py": "import torch.distributed as dist\ndef f(x):\n    dist.all_reduce(x)",
        "models/gla.py": "import megatron.core\nfrom seqpar import kernels\nimport seqpar.comm",
        "launch/train.py": "import megatron\nfrom ..models import gla\n"
        "import torch.distributed as dist\nrank = dist.get_rank()\nsend = rank.reduce\n"
        "names = functools.reduce(gather, broadcast)",
        "pyproject.toml": "[tool.setuptools]\n"
        "packages = ['seqpar', 'seqpar.kernels', 'seqpar.models', 'seqpar.launch']",
        "tests/test_a.py": "import seqpar.kernels, torch.distributed as dist\ndist.barrier()",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    for name in LINKED:
        (tmp_path / "seqpar" / name).symlink_to(f"../{name}")
    return tmp_path


@pytest.mark.parametrize("rule", RULES)
def test_a_legal_example_keeps(rule: str, example: Path) -> None:
    assert RULES[rule](example) == []


# A rule, a file that breaks it once, and the file's text.
BREACHES = [
    ("upward_imports", "kernels/a.py", "import seqpar.comm"),
    ("upward_imports", "kernels/a.py", "def f():\n    from seqpar import Layout"),
    ("upward_imports", "kernels/a.py", "from seqpar import models"),
    ("upward_imports", "kernels/a.py", "from .. import Layout"),
    ("upward_imports", "seqpar/a.py", "from seqpar.models.gla import Mixer"),
    ("upward_imports", "seqpar/a.py", "from .launch import train"),
    ("upward_imports", "seqpar/a.py", "from . import launch"),
    ("upward_imports", "seqpar/a.py", "import importlib\nimportlib.import_module('seqpar.launch')"),
    ("upward_imports", "models/a.py", "from ..launch.config import Config"),
    ("upward_imports", "models/a.py", "if TYPE_CHECKING:\n    import seqpar.launch.config as c"),
    ("bare_imports", "launch/a.py", "import models.gla"),
    ("bare_imports", "tests/a.py", "from kernels import reference"),
    ("megatron", "seqpar/a.py", "def f():\n    from megatron.core import parallel_state"),
    ("megatron", "kernels/a.py", "import megatron.core as core"),
    ("triton", "seqpar/a.py", "import triton.language as tl"),
    ("triton", "models/a.py", "__import__('triton')"),
    ("collectives", "seqpar/a.py", "import torch.distributed as dist\ndist.all_reduce(x)"),
    ("collectives", "seqpar/a.py", "import torch\ntorch.distributed.all_gather_into_tensor(y, x)"),
    ("collectives", "launch/a.py", "import torch.distributed\ntorch.distributed.barrier()"),
    (
        "collectives",
        "launch/a.py",
        "from torch import distributed as d\nd.broadcast_object_list(x)",
    ),
    ("collectives", "models/a.py", "from torch.distributed import isend as go"),
    ("collectives", "models/a.py", "from torch.distributed import *"),
    (
        "collectives",
        "models/a.py",
        "import torch.distributed as d\nstart = d.reduce_scatter_tensor",
    ),
    (
        "collectives",
        "models/a.py",
        "import torch.distributed as d\ngetattr(d, 'all_to_all_single')",
    ),
    ("collectives", "models/a.py", "from torch.distributed.nn.functional import anything"),
    ("collectives", "kernels/a.py", "def f(group, x):\n    group.allreduce([x])"),
    ("long_files", "models/a.py", "x = 1\n" * (LONGEST_FILE + 1)),
    ("long_files", "tests/a.py", "x = 1\n" * (LONGEST_FILE + 1)),
    ("root_packages", "kernels/__init__.py", ""),
    ("packages_left_out", "seqpar/new/a.py", ""),
    ("packages_left_out", "launch/new/a.py", ""),
]


@pytest.mark.parametrize(("rule", "file", "text"), BREACHES)
def test_a_breach_is_found(rule: str, file: str, text: str, example: Path) -> None:
    (example / file).parent.mkdir(exist_ok=True)
    (example / file).write_text(text)
    assert len(RULES[rule](example)) == 1


def test_links_that_are_absolute_or_copies_are_found(example: Path) -> None:
    (example / "seqpar/kernels").unlink()
    (example / "seqpar/kernels").symlink_to(example / "kernels")
    (example / "seqpar/models").unlink()
    (example / "seqpar/models").mkdir()
    assert len(links(example)) == 2


def test_every_collective_of_torch_is_known_to_the_rule() -> None:
    """A new release of torch may bring new ones; their arguments tell them."""
    telling = {"async_op", "tensor", "obj", "object_list", "p2p_op_list", "wait_all_ranks"}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # some public names are deprecated and say so when unwrapped
        functions = {
            name: inspect.unwrap(getattr(distributed_c10d, name))
            for name in distributed_c10d.__all__
        }
        names = [
            name
            for name, function in functions.items()
            if inspect.isfunction(function)
            and telling & set(inspect.signature(function).parameters)
        ]
    assert len(names) > 20
    assert [name for name in names if not is_collective(f"torch.distributed.{name}")] == []


def test_the_rule_sees_the_collectives_of_comm() -> None:
    """It is not blind to the way they are written here."""
    comm = Path("seqpar/comm.py")
    assert len(list(collectives(Source(comm, (ROOT / comm).read_text())))) > 3


IMPORT_SEQPAR = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import seqpar
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def import_seqpar() -> list[Any]:
    """[processor seconds, new modules] of `import seqpar` in a fresh process that has torch."""
    command = [sys.executable, "-c", IMPORT_SEQPAR]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=120)
    return json.loads(output.stdout)


def test_importing_seqpar_is_light_and_fast() -> None:
    seconds, modules = import_seqpar()
    assert "seqpar" in modules
    unwanted = ("megatron", "triton", "seqpar.models", "seqpar.launch", "omegaconf", "matplotlib")
    heavy = [m for m in modules if any(f"{m}.".startswith(f"{name}.") for name in unwanted)]
    assert heavy == []
    # Processor time leaves out the waiting on a busy machine; the first import may write bytecode.
    assert min(seconds, *(import_seqpar()[0] for _ in range(2))) < 1.0
