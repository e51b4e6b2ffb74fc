"""`make demo`, `make test`, .ci/run and the pre-commit hooks: what they run, and when they install.

They run here for real, in a folder of their own, on a python3 that only writes down its arguments.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
INSTALL = "-m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev]"
CHECKS = ["-m ruff format --check .", "-m ruff check .", "-m mypy", "-m pytest"]
DEMO = "-m seqpar.launch.demo"

# Passes the check of its version, makes a copy of itself when asked for an environment, and fails
# when it is to run $FAIL.
PYTHON = """#!/bin/sh
case "$*" in
  -c*) exit $OLD ;;
  --version) echo Python 3.9.2; exit ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit ;;
esac
echo "$*" >> calls
[ "$2" != "$FAIL" ]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(
    folder: Path, *command: str, old: bool = False, fail: str = "", fails: bool = False
) -> tuple[list[str], str]:
    """Run a command in `folder`; return the calls of its python and what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env |= {"PYTHON": "./python", "OLD": str(int(old)), "FAIL": fail}
    (folder / "calls").write_text("")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return (folder / "calls").read_text().splitlines(), done.stdout + done.stderr


def test_an_environment_is_made_once_for_both(folder: Path) -> None:
    assert run(folder, "make", "test")[0] == [INSTALL, *CHECKS]
    assert run(folder, "make", "test")[0] == CHECKS
    assert run(folder, "make", "demo")[0] == [DEMO]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_it_is_made_again_when_what_it_depends_on_changes(folder: Path, name: str) -> None:
    assert run(folder, "make", "demo")[0] == [INSTALL, DEMO]
    installed = (folder / ".venv/installed").stat().st_mtime
    os.utime(folder / name, (installed + 5, installed + 5))
    assert run(folder, "make", "demo")[0] == [INSTALL, DEMO]


def test_a_failed_install_is_tried_again(folder: Path) -> None:
    assert run(folder, "make", "demo", fail="pip", fails=True)[0] == [INSTALL]
    assert run(folder, "make", "demo")[0] == [INSTALL, DEMO]


@pytest.mark.parametrize("tool", ["ruff", "mypy", "pytest"])
def test_one_failed_check_fails_all(folder: Path, tool: str) -> None:
    run(folder, "make", "test", fail=tool, fails=True)


def test_an_old_python_is_refused_by_name(folder: Path) -> None:
    calls, printed = run(folder, "make", "demo", old=True, fails=True)
    assert calls == []
    assert "needs Python 3.11 or newer; ./python is Python 3.9.2" in printed
    assert "make demo PYTHON=" in printed
    assert not (folder / ".venv").exists()


def test_ci_runs_make_test(folder: Path) -> None:
    assert run(folder, "bash", ".ci/run")[0] == [INSTALL, *CHECKS]
    run(folder, "bash", ".ci/run", fail="pytest", fails=True)


def test_pre_commit_offers_the_checks_of_make_test() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    entries = {hook["entry"].removeprefix(".venv/bin/python ") for hook in hooks}
    # Hooks get the names of the changed files in place of the dot, and may repair the format.
    checks = {check.removesuffix(" .").removesuffix(" --check") for check in CHECKS}
    assert checks <= entries
