"""Is this machine ready? `seqpar doctor [CONFIG ...]`, or on all ranks of torchrun.

Each check yields findings: what was looked at, what was found, and what to do if that is bad.
"""

import ctypes
import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path

import torch
import torch.distributed as dist

from seqpar.comm import Communicator
from seqpar.launch import checkpoint_files
from seqpar.launch.config import Config, load_config
from seqpar.launch.failure import leave
from seqpar.launch.ranks import device_of_this_rank, start_ranks
from seqpar.launch.terminal import command_parser, plain_messages

GOOD, NOTE, BAD = "ok", "note", "FAULT"

_NEEDED = {"torch": (2, 8), "megatron-core": (0, 16, 1), "omegaconf": (2, 4), "numpy": (1,)}


@dataclass(frozen=True)
class Finding:
    """One line of the report; remedy: what to do, where it is not good."""

    level: str
    what: str
    found: str
    remedy: str = ""


Findings = Iterator[Finding]


def versions() -> Findings:
    python = sys.version.split()[0]
    yield Finding(GOOD, "python", f"{python} ({sys.executable})")
    for name, least in _NEEDED.items():
        wanted = ".".join(map(str, least))
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(BAD, name, "not installed", "pip install 'seqpar[train]'")
            continue
        numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
        good = numbers >= least
        remedy = "" if good else f"pip install '{name}>={wanted}'"
        yield Finding(GOOD if good else BAD, name, found, remedy)
    if util.find_spec("megatron"):
        from seqpar.launch.packages import packages  # takes seconds to import

        yield Finding(GOOD, "optional", packages().removeprefix("packages "))
    there = "installed" if util.find_spec("wandb") else "not installed; log.wandb needs it"
    yield Finding(GOOD, "wandb", there)


def gpus() -> Findings:
    count = torch.cuda.device_count()
    if not count:
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            yield Finding(BAD, "GPU", "torch is a CPU build", "install torch with CUDA")
        else:
            yield Finding(NOTE, "GPU", "none: trains on the CPU, with gloo")
        return
    yield Finding(GOOD, "CUDA", f"{torch.version.cuda}, NCCL {_nccl()}")
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{properties.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        if free < 0.9 * total:
            yield Finding(NOTE, f"GPU {index}", found, "others use it: see nvidia-smi")
        elif properties.major < 8:
            remedy = "bf16 and the Triton kernels need Ampere or later; SEQPAR_KERNELS=torch"
            yield Finding(BAD, f"GPU {index}", found, remedy)
        else:
            yield Finding(GOOD, f"GPU {index}", found)
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        remedy = "they exchange through the host: see nvidia-smi topo -m, and IOMMU or ACS settings"
        yield Finding(NOTE, "links", f"no peer access between GPUs {apart[0]}", remedy)
    elif pairs:
        yield Finding(GOOD, "links", f"peer access between all {count} GPUs{_nvlink()}")


def network() -> Findings:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        remedy = "other nodes cannot reach it there: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        local = address.startswith("127.")
        yield Finding(
            NOTE if local else GOOD, "host name", f"{name} is {address}", remedy if local else ""
        )
    except OSError:
        remedy = f"add it to /etc/hosts, or set RENDEZVOUS to an address others reach {name} by"
        yield Finding(BAD, "host name", f"{name} has no address", remedy)
    fast = Path("/sys/class/infiniband")
    if fast.is_dir() and any(fast.iterdir()):
        names = ", ".join(sorted(path.name for path in fast.iterdir()))
        if os.environ.get("NCCL_IB_DISABLE") == "1":
            yield Finding(BAD, "InfiniBand", f"{names}, but off", "unset NCCL_IB_DISABLE")
        else:
            yield Finding(GOOD, "InfiniBand", names)
        if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
            yield Finding(BAD, "locked memory", "limited", "ulimit -l unlimited")
    for name in sorted(os.environ):
        if name.startswith("NCCL_"):
            yield Finding(NOTE, name, os.environ[name], "set in the environment; is it meant?")


def host() -> Findings:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(GOOD, "host", f"{cores} cores, {memory / 1e9:.0f} GB")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < 4096:
        yield Finding(NOTE, "open files", f"at most {files}", "ulimit -n 65536")
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    if shared < 1e9:
        remedy = "NCCL may need more: docker run --shm-size=8g, or --ipc=host"
        yield Finding(NOTE, "/dev/shm", f"{shared / 1e6:.0f} MB", remedy)
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024))
    except (AttributeError, OSError):
        state = -1
    if state == 5:  # TIME_ERROR
        remedy = "logs of several nodes cannot be compared: start chronyd or systemd-timesyncd"
        yield Finding(NOTE, "clock", "is not synchronised", remedy)
    else:
        yield Finding(GOOD, "clock", "synchronised" if state >= 0 else "not known")


def disk(config: Config) -> Findings:
    folder = Path(config.log.folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    block = os.urandom(2**20)
    try:
        if existing != folder and folder.exists():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file, not a folder")
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".doctor-") as file:
            begin = time.perf_counter()
            for _ in range(32):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = 32 * len(block) / (time.perf_counter() - begin)
    except OSError as error:
        remedy = "choose another log.folder, or make room and give the right to write"
        yield Finding(BAD, "log.folder", f"{existing}: {error.strerror}", remedy)
        return
    free = shutil.disk_usage(existing).free
    found = f"{folder}: {free / 1e9:.0f} GB free, writes {speed / 1e6:.0f} MB/s"
    yield Finding(GOOD, "log.folder", found)
    yield from _checkpoints(folder / "checkpoints", free)


def _checkpoints(folder: Path, free: int) -> Findings:
    found = checkpoint_files.complete(folder)
    for path in reversed(found):
        if wrong := checkpoint_files.damage(path, contents=False):
            remedy = "checkpoint.resume=latest passes over it; remove it"
            yield Finding(NOTE, "checkpoint", f"{path.name} is damaged: {wrong}", remedy)
            continue
        size = sum(file.stat().st_size for file in path.iterdir())
        told = f"{len(found)}, the newest good one is {path.name} ({size / 1e9:.2g} GB)"
        if free < 2 * size:
            remedy = "there is hardly room for another: set checkpoint.keep, or make room"
            yield Finding(BAD, "checkpoints", told, remedy)
        else:
            yield Finding(GOOD, "checkpoints", told)
        return


def data(config: Config) -> Findings:
    from seqpar.launch.data import open_stream

    for field in ("path", "held_out"):
        if getattr(config.data, field) is None:
            continue
        try:
            stream = open_stream(config, field)
        except ValueError as error:
            told, _, remedy = str(error).partition("; ")
            yield Finding(BAD, f"data.{field}", told, remedy or "prepare it: seqpar prepare --help")
            continue
        corpus = stream.corpus
        told = f"{corpus.tokens:,} tokens in {len(corpus.lengths):,} documents"
        yield Finding(GOOD, f"data.{field}", told)


def ranks(control: Communicator) -> Findings:
    """Whether the ranks of torchrun reach each other, and have the same software and clock."""
    device = device_of_this_rank()
    world = Communicator(dist.group.WORLD)
    x = torch.ones(2**24, device=device)
    for _ in range(3):  # the first connects
        control.barrier()
        begin = time.perf_counter()
        total = world.all_reduce(x)[0].item()
    seconds = time.perf_counter() - begin
    speed = 2 * (control.size - 1) / control.size * x.numel() * 4 / seconds
    if total == control.size:
        told = f"{control.size} sum 67 MB at {speed / 1e9:.2g} GB/s ({dist.get_backend()})"
        yield Finding(GOOD, "ranks", told)
    else:
        yield Finding(BAD, "ranks", f"a sum of ones is {total}", "a GPU or link errs: replace it")
    now = time.time()
    nodes = control.all_gather_object((socket.gethostname(), now, torch.__version__))
    clocks = [moment for _, moment, _ in nodes]
    if max(clocks) - min(clocks) > 1:
        told = f"{max(clocks) - min(clocks):.1f} s apart"
        yield Finding(NOTE, "clocks", told, "start chronyd or systemd-timesyncd on all nodes")
    if len({version for *_, version in nodes}) > 1:
        told = ", ".join(sorted({f"{name}: torch {version}" for name, _, version in nodes}))
        yield Finding(BAD, "versions", told, "install the same on all nodes")


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


def _nvlink() -> str:
    try:
        command = ["nvidia-smi", "topo", "-m"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    kinds = {word for line in text.splitlines() for word in line.split() if word[:2] == "NV"}
    kinds = {kind for kind in kinds if kind[2:].isdigit()}
    return f" ({', '.join(sorted(kinds))})" if kinds else ", none by NVLink"


def examine(config: Config | None) -> list[Finding]:
    """All findings on this machine."""
    checks = [versions(), gpus(), network(), host()]
    if config is not None:
        checks += [disk(config), data(config)]
    return [finding for check in checks for finding in check]


EXAMPLES = """examples:
  seqpar doctor
  seqpar doctor launch/configs/demo.yaml log.folder=runs/next
  torchrun --nproc-per-node 8 -m seqpar.launch.doctor      also sums over all ranks

Exit code: 0 if training can start, 1 if there is a fault.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser(
        "seqpar doctor",
        "Look at GPUs, links, versions, data, folders, disk and clock before training.",
        EXAMPLES,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="whose data and folders to see")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(argv)
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    try:
        config = load_config(args.config, args.overrides) if args.config else None
    except ValueError as error:
        leave(str(error), rank)
    plain_messages()
    findings = examine(config) if local_rank == 0 else []
    if "RANK" in os.environ:
        control = start_ranks()
        findings += [*ranks(control), *_of_other_nodes(findings, control)]
        control.barrier()
        dist.destroy_process_group()
    faults = sum(finding.level == BAD for finding in findings)
    if rank > 0:
        sys.exit(faults > 0)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.level:>5}  {finding.what:<{width}}  {finding.found}")
        if finding.remedy:
            print(f"{'':>5}  {'':<{width}}  -> {finding.remedy}")
    sys.exit(f"{faults} fault{'s' * (faults > 1)} to put right" if faults else 0)


def _of_other_nodes(findings: list[Finding], control: Communicator) -> list[Finding]:
    """What is not good on nodes other than the first rank's, once a node."""
    own = (socket.gethostname(), findings)
    nodes = dict(reversed(control.all_gather_object(own)))
    first = control.broadcast_object(own[0])
    return [
        replace(finding, what=f"{name}: {finding.what}")
        for name, found in nodes.items()
        for finding in found
        if name != first and finding.level != GOOD
    ]


if __name__ == "__main__":
    main()
