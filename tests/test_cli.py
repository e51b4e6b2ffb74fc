"""The command line: commands, their help, what is meant by a wrong word, completion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqpar.launch import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_has_examples(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, "--help"] if command else [])
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    assert text.startswith(f"usage: seqpar {command or ''}".rstrip())
    assert f"\n  seqpar {command or 'train'} " in text.partition("examples:")[2]
    if command is None:
        assert all(f"    {name} " in text for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trian is not a command; did you mean train? commands: train, "),
        (["zzz"], "zzz is not a command; commands: train, "),
        (["prepare", "nowhere", "--output", "x"], "input nowhere: no such file"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(words)
    assert message in str(leaving.value.code)
    assert "\n" not in str(leaving.value.code)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'omegaconf'", name="omegaconf")

    monkeypatch.setattr(cli, "import_module", missing)
    with pytest.raises(SystemExit, match=r"omegaconf is not installed: pip install 'seqpar"):
        cli.main(["train"])


def test_a_shell_completes_commands_settings_and_files(tmp_path: Path) -> None:
    script = tmp_path / "completion.sh"
    (tmp_path / "my.yaml").touch()
    command = [sys.executable, "-m", "seqpar.launch.cli", "completion", "bash"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    env = {**os.environ, "PYTHONPATH": path}
    script.write_text(
        subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    )

    def completed(*words: str) -> list[str]:
        typed = " ".join(words)
        program = (
            f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
            '_shtab_seqpar; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        bash = ["bash", "-c", program, "seqpar"]
        output = subprocess.run(bash, cwd=tmp_path, check=True, capture_output=True, text=True)
        return output.stdout.split()

    assert completed("seqpar", "tr") == ["train"]
    assert completed("seqpar", "train", "my.yaml", "train.st") == ["train.steps="]
    assert completed("seqpar", "train", "log.fo") == ["log.folder="]
    assert completed("seqpar", "train", "my") == ["my.yaml"]
