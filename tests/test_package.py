"""What an installed seqpar looks like: editable, and as a wheel built from the sdist.

Nothing here needs a network. Each kind is installed into a fresh environment and used from a folder
that is not the repository. All of it happens in a copy, so that nothing is left in the real one.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from boundaries import sources

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = (".venv*", ".git", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a command and return what it prints; fail with that unless it exits with `code`."""
    hidden = ("PYTHON", "PIP_", "VIRTUAL_ENV", "MYPY")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    env |= {
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def package_files(root: Path) -> dict[str, str]:
    """{path below site-packages: digest} of all that an installation must hold, and no more."""
    files = {
        str(Path(*source.package, source.path.name)): root / source.path for source in sources(root)
    }
    for pattern in ("launch/configs/*", "launch/*.sh"):
        files |= {f"seqpar/{path.relative_to(root)}": path for path in root.glob(pattern)}
    files["seqpar/py.typed"] = root / "seqpar/py.typed"
    return {name: digest(path.read_bytes()) for name, path in files.items()}


def modules(root: Path) -> list[str]:
    paths = [Path(name) for name in package_files(root)]
    return [".".join([*path.parent.parts, path.stem]) for path in paths if path.suffix == ".py"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path) -> Path:
    """The folder of an sdist and of the wheel built from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=checkout)
    return checkout / "dist"


@dataclass(frozen=True)
class Environment:
    """A fresh environment; this test run's own packages (torch, setuptools) are behind it."""

    kind: str
    folder: Path
    python: Path
    site: Path

    def pip(self, *arguments: str | Path) -> str:
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        return run(*pip, *arguments, cwd=self.folder)

    def install(self, checkout: Path, built: Path) -> None:
        what: list[str | Path] = list(built.glob("*.whl"))
        if self.kind == "editable":
            what = ["--editable", checkout]
        # --ignore-installed: pip sees the seqpar of the packages behind and would leave it there.
        self.pip("install", "--no-deps", "--no-build-isolation", "--ignore-installed", *what)

    @property
    def behind(self) -> Path:
        return self.site / "behind.pth"


def make_environment(kind: str, folder: Path) -> Environment:
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    environment = Environment(
        kind, folder, python, Path(run(python, "-c", where, cwd=folder).strip())
    )
    environment.behind.write_text(sysconfig.get_path("purelib"))
    return environment


@pytest.fixture(scope="module", params=["editable", "wheel"])
def installed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkout: Path,
    built: Path,
) -> Environment:
    environment = make_environment(request.param, tmp_path_factory.mktemp(request.param))
    environment.install(checkout, built)
    return environment


def test_the_sdist_holds_real_files(checkout: Path, built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        assert [name for name, member in members.items() if member.issym() or member.islnk()] == []
        held = {
            name: digest(file.read())
            for name, member in members.items()
            if name.startswith("seqpar/") and (file := archive.extractfile(member))
        }
    assert held == package_files(checkout)
    assert {"pyproject.toml", "README.md"} <= set(members)


def test_the_wheel_holds_the_package_and_no_more(checkout: Path, built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {
            name: digest(archive.read(name))
            for name in archive.namelist()
            if ".dist-info/" not in name
        }
    assert held == package_files(checkout)


def test_a_wheel_without_the_sdist_is_the_same(checkout: Path, built: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run(*build, "--outdir", tmp_path, cwd=checkout)
    contents = []
    for folder in (built, tmp_path):
        [wheel] = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            contents.append({entry.filename: entry.CRC for entry in archive.infolist()})
    assert contents[0] == contents[1]


USE_SEQPAR = """
import importlib.util, json, sys
from importlib.metadata import version
from importlib.resources import files
import seqpar
print(json.dumps({
    "version": version("seqpar"),
    "file": seqpar.__file__,
    "ranges": seqpar.Layout(8, 2).ranges(1),
    "found": [name for name in sys.argv[1:] if importlib.util.find_spec(name)],
    "configs": [path.name for path in (files("seqpar.launch") / "configs").iterdir()],
}))
"""


@pytest.mark.parametrize("from_root", [False, True], ids=["elsewhere", "root"])
def test_it_imports(installed: Environment, checkout: Path, from_root: bool) -> None:
    cwd = checkout if from_root else installed.folder
    answer = json.loads(run(installed.python, "-c", USE_SEQPAR, *modules(checkout), cwd=cwd))
    assert answer["version"] == PROJECT["version"]
    assert answer["ranges"] == [[4, 8]]
    assert answer["found"] == modules(checkout)
    configs = {path.name for path in checkout.glob("launch/configs/*")}
    assert set(answer["configs"]) == configs
    assert configs
    # From its root, the checkout is what is imported, whatever is installed.
    wheel = installed.kind == "wheel" and not from_root
    assert Path(answer["file"]) == (installed.site if wheel else checkout) / "seqpar/__init__.py"


def test_only_an_editable_install_follows_the_checkout(
    installed: Environment, checkout: Path
) -> None:
    new = checkout / "kernels/new_file.py"
    new.write_text("value = 7\n")
    code = "import seqpar.kernels.new_file as new; print(new.value)"
    if installed.kind == "editable":
        assert run(installed.python, "-c", code, cwd=installed.folder).strip() == "7"
    else:
        assert "ModuleNotFound" in run(installed.python, "-c", code, cwd=installed.folder, code=1)
    new.unlink()


def test_its_commands_are_there(installed: Environment, checkout: Path) -> None:
    for name, target in PROJECT["scripts"].items():
        assert (installed.python.parent / name).exists()
        assert target.partition(":")[0] in modules(checkout)


CONSUMER = """
import seqpar
from seqpar.kernels import reference
reveal_type(seqpar.Layout(8, 2).total_tokens)
reveal_type(reference.linear_attention)
seqpar.Layout(8, world=2)
"""


def test_a_type_checker_resolves_it(installed: Environment) -> None:
    (installed.folder / "consumer.py").write_text(CONSUMER.lstrip())
    installed.behind.rename(installed.folder / "behind")  # to read all of torch takes a minute
    try:
        mypy = [sys.executable, "-m", "mypy", "--config-file", os.devnull]
        what = ("--python-executable", installed.python, "consumer.py")
        output = run(*mypy, *what, cwd=installed.folder, code=1).replace("builtins.", "")
    finally:
        (installed.folder / "behind").rename(installed.behind)
    assert 'consumer.py:3: note: Revealed type is "int"' in output
    assert 'consumer.py:4: note: Revealed type is "def (q: ' in output
    assert 'consumer.py:5: error: Unexpected keyword argument "world"' in output
    assert "Found 1 error" in output


# A stand-in for Hugging Face's package, which has the name of one of the folders here.
HUGGING_FACE = {
    "kernels/__init__.py": "def get_kernel():\n    return 'theirs'\n",
    "kernels/reference.py": "",
    "kernels-0.17.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n",
    "kernels-0.17.2.dist-info/INSTALLER": "pip\n",
}
HUGGING_FACE["kernels-0.17.2.dist-info/RECORD"] = "".join(f"{name},,\n" for name in HUGGING_FACE)
IMPORT_KERNELS = """
import importlib.metadata, kernels
print(kernels.get_kernel(), importlib.metadata.version("kernels"))
"""


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_hugging_face_kernels_stay_theirs(
    kind: str, tmp_path: Path, checkout: Path, built: Path
) -> None:
    environment = make_environment(kind, tmp_path)
    for name, text in HUGGING_FACE.items():
        (environment.site / name).parent.mkdir(exist_ok=True)
        (environment.site / name).write_text(text)

    def stay_theirs() -> None:
        assert {n: (environment.site / n).read_text() for n in HUGGING_FACE} == HUGGING_FACE
        for cwd in (tmp_path, checkout):
            assert run(environment.python, "-c", IMPORT_KERNELS, cwd=cwd) == "theirs 0.17.2\n"

    before = {path.name for path in environment.site.iterdir()}
    environment.install(checkout, built)
    assert {path.name for path in environment.site.iterdir()} > before
    stay_theirs()
    environment.behind.unlink()  # the seqpar to remove is ours alone
    environment.pip("uninstall", "--yes", "seqpar")
    stay_theirs()
    after = {path.name for path in environment.site.iterdir() if path.name != "__pycache__"}
    assert after == before - {environment.behind.name}
