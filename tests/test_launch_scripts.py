"""torchrun.sh and slurm.sh: what they start, how signals and exit codes pass through them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_setup import losses

ROOT = Path(__file__).parents[1]
TORCHRUN, SLURM = ROOT / "launch/torchrun.sh", ROOT / "launch/slurm.sh"

# Stands for torchrun: writes down its words, and runs one rank, given by $RANK_DOES.
AGENT = """#!/bin/bash
[[ "$*" == *--help* ]] && { echo --signals-to-handle; exit; }
echo "$*" >> "$CALLS"
eval "$RANK_DOES" &
wait $!
"""
# As the ranks do, it listens to a signal that was ignored when it was started.
RANK = """
import os, pathlib, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
pathlib.Path(os.environ["CALLS"] + ".ready").touch()
if signal.sigtimedwait([signal.SIGUSR1], 15) is None:
    sys.exit(3)
pathlib.Path(os.environ["SEQPAR_EXIT_CODE_FILE"]).write_text("75\\n")
"""
SAVES = f"exec {sys.executable} -S -c '{RANK}'"


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    python = executable(tmp_path / "python", AGENT)
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "PYTHON": str(python), "CALLS": f"{tmp_path}/calls", "TMPDIR": str(tmp_path)}


def until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("does", "code"),
    [
        ("exit 0", 0),
        ('echo 1 > "$SEQPAR_EXIT_CODE_FILE"', 1),
        ('echo 75 > "$SEQPAR_EXIT_CODE_FILE"', 75),
        ("exit 1", 76),
        ("kill -9 $BASHPID", 76),
    ],
)
def test_exit_codes(does: str, code: int, env: dict[str, str], tmp_path: Path) -> None:
    env |= {"RANK_DOES": does, "NNODES": "1:4", "RENDEZVOUS": "host:1", "RANKS_PER_NODE": "2"}
    done = subprocess.run([TORCHRUN, "a.yaml", "train.steps=3"], env=env, timeout=20)
    assert done.returncode == code
    assert (tmp_path / "calls").read_text() == (
        "-m torch.distributed.run --nnodes 1:4 --nproc-per-node 2 --rdzv-backend c10d "
        "--rdzv-endpoint host:1 --rdzv-id seqpar --max-restarts 3 --signals-to-handle SIGINT "
        "-m seqpar.launch.train a.yaml train.steps=3 checkpoint.resume=auto\n"
    )
    assert not list(tmp_path.glob("tmp.*"))


def test_a_choice_of_checkpoint_is_left_as_it_is(env: dict[str, str], tmp_path: Path) -> None:
    words = [str(TORCHRUN), "a.yaml", "checkpoint.resume=100"]
    subprocess.run(words, env={**env, "RANK_DOES": ""}, check=True, timeout=20)
    assert (tmp_path / "calls").read_text().endswith("a.yaml checkpoint.resume=100\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks(
    number: signal.Signals, env: dict[str, str], tmp_path: Path
) -> None:
    script = subprocess.Popen([TORCHRUN, "a.yaml"], env={**env, "RANK_DOES": SAVES})
    until((tmp_path / "calls.ready").exists, 20)
    script.send_signal(number)
    assert script.wait(20) == 75


# As Slurm's: starts the command once a node, passes signals on, ends with the highest code.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift 2; done
tasks=()
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
  wait "$task"; found=$?
  while kill -0 "$task" 2>/dev/null; do wait "$task"; found=$?; done
  (( found > code )) && code=$found
done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
[[ $1 == show ]] && printf "localhost\\nother\\n"
exit 0
"""


@pytest.fixture
def slurm(env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes."""
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin/srun", SRUN)
    executable(tmp_path / "bin/scontrol", SCONTROL)
    (tmp_path / "spool").mkdir()
    executable(tmp_path / "spool/slurm_script", SLURM.read_text())  # as Slurm copies it
    job = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    path = f"{tmp_path}/bin:{env['PATH']}"
    return {**env, **job, "PATH": path, "SLURM_SUBMIT_DIR": str(ROOT)}


def test_a_slurm_job_starts_every_node(slurm: dict[str, str], tmp_path: Path) -> None:
    script = [str(tmp_path / "spool/slurm_script"), "a.yaml"]
    subprocess.run(script, env={**slurm, "RANK_DOES": "exit 0"}, check=True, timeout=20)
    first, *starts = (tmp_path / "calls").read_text().splitlines()
    assert first == "scontrol show hostnames n[1-2]"
    assert len(starts) == 2
    for start in starts:
        assert "--nnodes 2 " in start
        assert "--rdzv-endpoint localhost:29321 --rdzv-id seqpar-4321-0 " in start


@pytest.mark.parametrize(
    ("does", "code"), [('echo 1 > "$SEQPAR_EXIT_CODE_FILE"', 1), ("exit 1", 76)]
)
def test_a_slurm_job_that_fails_is_not_requeued(
    does: str, code: int, slurm: dict[str, str], tmp_path: Path
) -> None:
    script = [str(tmp_path / "spool/slurm_script"), "a.yaml"]
    assert subprocess.run(script, env={**slurm, "RANK_DOES": does}, timeout=20).returncode == code
    assert "requeue" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_slurm_job_near_its_limit_saves_and_is_requeued(
    number: signal.Signals, slurm: dict[str, str], tmp_path: Path
) -> None:
    script = [str(tmp_path / "spool/slurm_script"), "a.yaml"]
    job = subprocess.Popen(script, env={**slurm, "RANK_DOES": SAVES})
    until((tmp_path / "calls.ready").exists, 20)
    time.sleep(1)  # both nodes
    job.send_signal(number)
    assert job.wait(20) == 0
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "scontrol requeue 4321"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """Agents of torchrun.sh on loopback, each with one rank, as nodes of one job."""

    def __init__(self, config: str, folder: Path, steps: int, **settings: str) -> None:
        self.folder = folder
        words = [f"log.folder={folder}", f"train.steps={steps}", "checkpoint.every=1"]
        self._command = ["bash", str(TORCHRUN), config, *words]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, **settings}
        self._env |= {"RANKS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
        self._env |= {"RENDEZVOUS": f"localhost:{_free_port()}"}
        self._logs = 0

    def start(self) -> subprocess.Popen[bytes]:
        self._logs += 1
        with Path(f"{self.folder}.log{self._logs}").open("wb") as log:
            return subprocess.Popen(
                self._command, env=self._env, stdout=log, stderr=log, start_new_session=True
            )

    def trained(self) -> int:
        """Steps whose metrics are on disk."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(x)["step"] for x in lines if x.endswith("}")), default=0)


def kill_node(script: subprocess.Popen[bytes]) -> None:
    """All its processes at once: the script, torchrun, and ranks in sessions of their own."""
    found, pids = [script.pid], [script.pid]
    while found:
        children = Path(f"/proc/{found[0]}/task/{found[0]}/children")
        more = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        found, pids = found[1:] + more, pids + more
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    script.wait()


@pytest.mark.complete
@pytest.mark.parametrize("nodes", ["2", "1:2"], ids=["replaced", "left out"])
def test_a_node_that_is_killed_does_not_end_the_run(
    nodes: str, config: str, tmp_path: Path
) -> None:
    """It is replaced by another, or the run goes on with one node less."""
    whole = Nodes(config, tmp_path / "whole", 60, NNODES="2")
    agents = [whole.start(), whole.start()]
    assert [agent.wait(120) for agent in agents] == [0, 0]

    job = Nodes(config, tmp_path / "run", 60, NNODES=nodes)
    first = job.start()
    time.sleep(1)  # the one that hosts the rendezvous
    second = job.start()
    until(lambda: job.trained() >= 5, 120)
    kill_node(second)
    if nodes == "2":
        assert job.start().wait(200) == 0
    assert first.wait(200) == 0
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert sorted(found) == list(range(1, 61))
    if nodes == "2":
        assert found == expected  # to the last bit
    for step in expected:
        assert found[step][0] == pytest.approx(expected[step][0], abs=1e-4)


@pytest.mark.complete
def test_a_real_run_saves_at_a_signal_and_goes_on(config: str, tmp_path: Path) -> None:
    job = Nodes(config, tmp_path / "run", 60, NNODES="1")
    agent = job.start()
    until(lambda: job.trained() >= 3, 120)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(60) == 75
    assert 3 <= job.trained() < 60
    agent = job.start()
    assert agent.wait(120) == 0
    assert job.trained() == 60
    wrong = Nodes(config, tmp_path / "wrong", 0, NNODES="1").start()
    assert wrong.wait(60) == 1
    text = (tmp_path / "wrong.log1").read_text()
    assert text.count("error: train.steps=0 must be at least 1") == 1
    assert "Traceback" not in text
