"""The doctor finds what is wrong, says what to do, and tells it by its exit code."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from launch_setup import train_on

from seqpar.comm import Communicator
from seqpar.launch import doctor


def examined(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str]:
    """(exit code or last words, the report)."""
    with pytest.raises(SystemExit) as leaving:
        doctor.main(words)
    return leaving.value.code, capsys.readouterr().out


def test_a_machine_that_is_ready(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = examined(capsys, config, f"log.folder={tmp_path}/run")
    assert code == 0
    assert "FAULT" not in text
    assert len(text.splitlines()) < 40  # a screen
    for what in ("python", "torch", "megatron-core", "optional", "GPU", "host name", "clock"):
        assert f"  {what} " in text
    assert "GB free, writes " in text
    assert "  data.path " in text
    assert " tokens in " in text
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def missing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def version(name: str) -> str:
        if name == "megatron-core":
            raise metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)


def nameless(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror

    monkeypatch.setattr(socket, "gethostbyname", unknown)


def occupied(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "run").write_text("a file where a folder should be")


def old_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    class Volta:
        name, major = "Tesla V100", 7

    for name, value in {
        "device_count": lambda: 2,
        "get_device_properties": lambda index: Volta,
        "mem_get_info": lambda index: (31e9, 32e9),
        "can_device_access_peer": lambda a, b: False,
        "nccl": type("nccl", (), {"version": lambda: (2, 30, 1)}),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch, Path], None], list[str]]] = [
    (missing, ["FAULT  megatron-core", "-> pip install 'seqpar[train]'", "'torch>=2.8'"]),
    (nameless, ["FAULT  host name", "has no address", "-> add it to /etc/hosts"]),
    (occupied, ["FAULT  log.folder", "is a file, not a folder", "-> choose another log.folder"]),
    (old_gpu, ["FAULT  GPU 1", "Tesla V100, 31 of 32 GB free", "need Ampere", "NCCL 2.30.1",
               "no peer access between GPUs (0, 1)"]),
]  # fmt: skip


@pytest.mark.parametrize(("break_it", "parts"), FAULTS)
def test_a_fault_is_named_with_its_remedy(
    break_it: Callable[[pytest.MonkeyPatch, Path], None],
    parts: list[str],
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(monkeypatch, tmp_path)
    code, text = examined(capsys, config, f"log.folder={tmp_path}/run")
    assert "to put right" in str(code)
    for part in parts:
        assert part in text


def test_data_and_checkpoints_are_looked_at(
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [config, f"log.folder={tmp_path}/run"]
    train_on(1, config, words[1], "train.steps=2", "optimizer.warmup_steps=0", "checkpoint.every=1")
    code, text = examined(capsys, *words)
    assert code == 0
    assert "2, the newest good one is step_00000002" in text
    os.truncate(tmp_path / "run/checkpoints/step_00000002/.metadata", 9)
    code, text = examined(capsys, *words, "data.held_out=nowhere")
    assert "1 fault to put right" in str(code)
    assert "step_00000002 is damaged: file .metadata has 9 bytes" in text
    assert "the newest good one is step_00000001" in text
    assert "cannot read nowhere.idx" in text
    usage: Any = type("usage", (), {"free": 10, "total": 1e12})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "hardly room for another" in examined(capsys, *words)[1]


def test_ranks_are_compared() -> None:
    def look(rank: int) -> list[doctor.Finding]:
        if rank == 1:
            torch.__version__ = "2.0"  # type: ignore[assignment]
            now, clock = time.time, vars(time)
            clock["time"] = lambda: now() + 30
        return list(doctor.ranks(Communicator(dist.group.WORLD)))

    for findings in run_ranks(look, 2):
        assert [(finding.level, finding.what) for finding in findings] == [
            (doctor.GOOD, "ranks"),
            (doctor.NOTE, "clocks"),
            (doctor.BAD, "versions"),
        ]


def test_faults_of_other_nodes_are_told_by_the_first() -> None:
    def look(rank: int) -> list[doctor.Finding]:
        vars(socket)["gethostname"] = lambda: f"node{rank}"
        own = [doctor.Finding(doctor.GOOD, "disk", "fast")]
        own += [doctor.Finding(doctor.BAD, "GPU", "gone", "replace it")] * rank
        return doctor._of_other_nodes(own, Communicator(dist.group.WORLD))

    for findings in run_ranks(look, 2):
        assert findings == [doctor.Finding(doctor.BAD, "node1: GPU", "gone", "replace it")]
