"""Packages that may be there or not: those that are get used, and a run says which."""

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from launch_setup import losses, train_on

HERE = Path(__file__).parent
WRITTEN = {"config.yaml", "metrics.jsonl", "checkpoints"}
STEPS = ["train.steps=3", "optimizer.warmup_steps=1", "checkpoint.every=2"]

# Stand in for NVIDIA's fused code, by PyTorch's and Megatron's.
ADAM = """
    import torch
    __version__ = "9.8"
    class FusedAdam(torch.optim.Adam):
        def __init__(self, *args, adam_w_mode=True, **kwargs):
            super().__init__(*args, decoupled_weight_decay=adam_w_mode, **kwargs)
    FusedSGD = torch.optim.SGD
"""
CLIPPING = """
    from megatron.core.utils import local_multi_tensor_applier as apply
    from megatron.core.utils import local_multi_tensor_l2_norm as multi_tensor_l2norm
    from megatron.core.utils import local_multi_tensor_scale as multi_tensor_scale
    def multi_tensor_applier(*args):
        return apply(*args)
"""
APEX = {
    "apex/__init__.py": '__version__ = "9.8"',
    "apex/optimizers.py": ADAM,
    "apex/multi_tensor_apply.py": CLIPPING,
    "amp_C.py": CLIPPING,
}
TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": (HERE / "stand_in.py").read_text(),
    "transformer_engine/pytorch/optimizers.py": ADAM
    + CLIPPING
    + "    multi_tensor_scale_tensor = None\n",
}
# Some distribution of that name that has nothing to do with it.
OTHER_APEX = {"apex/__init__.py": '__version__ = "0.1"'}


def modules(folder: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    return str(folder)


def train_with(path: str, config: str, folder: Path) -> str:
    """Three steps by the command, with `path` before other packages; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "seqpar.launch.train", config, f"log.folder={folder}", *STEPS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([path, str(HERE.parent)])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def without(config: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run without such packages prints, and its folder."""
    folder = tmp_path_factory.mktemp("without") / "run"
    return train_on(1, config, f"log.folder={folder}", *STEPS), folder


def test_what_is_missing_is_told_once(without: tuple[str, Path]) -> None:
    lines = [line for line in without[0].splitlines() if "transformer_engine" in line]
    assert len(lines) == 1
    assert "missing transformer_engine, NVIDIA's apex (Adam is PyTorch's)" in lines[0]
    assert re.search(r"^packages triton [\d.]+ \(kernels on GPUs\), tensorboard ", lines[0])


@pytest.mark.parametrize(
    ("name", "files"), [("apex", APEX), ("transformer_engine", TRANSFORMER_ENGINE)]
)
def test_what_is_there_is_used(
    name: str, files: dict[str, str], config: str, without: tuple[str, Path], tmp_path: Path
) -> None:
    text = train_with(modules(tmp_path / "path", files), config, tmp_path / "run")
    assert f"packages {name} 9.8 (fused Adam, fused gradient clipping), " in text
    assert "PyTorch's" not in text
    assert losses(tmp_path / "run") == losses(without[1])


def test_another_package_called_apex_is_not_taken_for_it(config: str, tmp_path: Path) -> None:
    text = train_with(modules(tmp_path / "path", OTHER_APEX), config, tmp_path / "run")
    assert "missing transformer_engine, NVIDIA's apex (Adam is PyTorch's)" in text
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]


def test_training_needs_neither_plots_nor_tensorboard(config: str, tmp_path: Path) -> None:
    def hide(rank: int) -> None:
        for name in ("matplotlib", "tensorboard", "torch.utils.tensorboard"):
            vars(sys)["modules"][name] = None

    words = [f"log.folder={tmp_path}/run", "log.tensorboard=true", *STEPS]
    text = train_on(1, config, *words, before=hide)
    assert "tensorboard (none of its files), matplotlib (no loss plot)" in text
    assert {path.name for path in (tmp_path / "run").iterdir()} == WRITTEN


def test_nothing_called_apex_is_ever_installed() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert not [name for name in wanted if name.startswith(("apex", "flash", "grouped"))]
