"""The rules of the repository: who imports whom, who talks to other ranks, how long a file is.

A rule is a function from the root of a source tree to the list of its breaches, one string each.
"""

import ast
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Folders of the repository from the lowest layer up: a file imports its own layer and lower ones.
LAYERS = ["kernels", "seqpar", "models", "launch"]
LINKED = ["kernels", "models", "launch"]
LONGEST_FILE = 500

COLLECTIVE = re.compile(
    r"_?(all_reduce|all_gather|all_to_all|reduce|reduce_scatter|broadcast|gather|scatter|send|recv"
    r"|isend|irecv|batch_isend_irecv|P2POp|barrier|monitored_barrier)(_.*)?"
)
# Every name of these modules is a collective under another name.
COLLECTIVE_MODULES = ("torch.distributed.nn", "torch.distributed._functional_collectives")
# The same operations as methods of a process group.
GROUP_METHODS = {"allreduce", "allgather", "_allgather_base", "_reduce_scatter_base", "alltoall"}
GROUP_METHODS |= {"alltoall_base", "allreduce_coalesced", "allgather_into_tensor_coalesced"}


@dataclass(frozen=True)
class Source:
    """One file; `path` is relative to the root it was read from."""

    path: Path
    text: str

    @property
    def layer(self) -> str:
        """Its folder's; a module of seqpar/ named like a folder gives that folder's names."""
        named = self.path.parts[0] == "seqpar" and self.path.stem in LINKED
        return self.path.stem if named else self.path.parts[0]

    @property
    def package(self) -> list[str]:
        """The dotted parts of the package that the file belongs to."""
        folder = list(self.path.parent.parts)
        return folder if folder[0] == "seqpar" else ["seqpar", *folder]

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.text, self.path))


def sources(root: Path, folders: list[str] = LAYERS) -> list[Source]:
    """Every Python file below `folders`, each once: the links inside seqpar/ are not followed."""
    files = [
        Path(folder, name).relative_to(root)
        for top in folders
        for folder, _, names in os.walk(root / top)
        for name in names
        if name.endswith(".py")
    ]
    return [Source(file, (root / file).read_text()) for file in sorted(files)]


@dataclass(frozen=True)
class Import:
    """`import module as local` (name is None) or `from module import name as local`."""

    line: int
    module: str
    name: str | None
    local: str

    @property
    def target(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def imports(source: Source) -> Iterator[Import]:
    """Every import of a file, wherever it stands: in functions and under TYPE_CHECKING too.

    A module named by a string in `import_module` or `__import__` counts as imported.
    """
    for node in source.nodes():
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None, alias.asname or "")
        elif isinstance(node, ast.ImportFrom):
            parents = source.package[: len(source.package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, module, alias.name, alias.asname or alias.name)
        elif isinstance(node, ast.Call) and node.args:
            named = node.args[0]
            called = (dotted(node.func) or [""])[-1]
            if called in ("import_module", "__import__") and isinstance(named, ast.Constant):
                yield Import(node.lineno, str(named.value), None, "")


def upward_imports(root: Path) -> list[str]:
    found = []
    for source in sources(root):
        for each in imports(source):
            parts = each.target.split(".")
            if parts[0] == "seqpar":
                layer = parts[1] if len(parts) > 1 and parts[1] in LINKED else "seqpar"
                if LAYERS.index(layer) > LAYERS.index(source.layer):
                    found.append(f"{source.path}:{each.line}: imports {each.target} of {layer}/")
    return found


def bare_imports(root: Path) -> list[str]:
    return [
        f"{source.path}:{each.line}: {each.module} is another module than seqpar.{each.module}"
        for source in sources(root, [*LAYERS, "tests"])
        for each in imports(source)
        if each.module.split(".")[0] in LINKED
    ]


def only_in(layers: list[str], library: str) -> Callable[[Path], list[str]]:
    """The rule that no other layer imports `library`."""
    return lambda root: [
        f"{source.path}:{each.line}: imports {each.target}; only {layers} may"
        for source in sources(root)
        for each in imports(source)
        if each.module.split(".")[0] == library and source.layer not in layers
    ]


def dotted(node: ast.AST) -> list[str]:
    """The parts of `a.b.c`, or [] for anything but a name and its attributes."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return [*base, node.attr]
    return []


def is_collective(full_name: str) -> bool:
    module, _, name = full_name.rpartition(".")
    if full_name.startswith(COLLECTIVE_MODULES):
        return True
    return module.startswith("torch.distributed") and (
        name == "*" or COLLECTIVE.fullmatch(name) is not None
    )


def collectives(source: Source) -> Iterator[str]:
    """Each mention of a collective, called or not, under whatever name its module was imported."""
    full_names = {each.local: each.target for each in imports(source) if each.local}
    for each in imports(source):
        if is_collective(each.target):
            yield f"{source.path}:{each.line}: imports {each.target}"
    for node in source.nodes():
        if isinstance(node, ast.Attribute):
            parts = dotted(node)
            if node.attr in GROUP_METHODS:
                yield f"{source.path}:{node.lineno}: calls {node.attr}"
        elif isinstance(node, ast.Call) and dotted(node.func) == ["getattr"]:
            constants = [str(arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
            parts = [*dotted(node.args[0]), *constants]
        else:
            continue
        full_name = ".".join([full_names.get(parts[0], parts[0]), *parts[1:]]) if parts else ""
        if is_collective(full_name):
            yield f"{source.path}:{node.lineno}: names {full_name}"


def collectives_outside_comm(root: Path) -> list[str]:
    return [
        breach
        for source in sources(root)
        if source.path != Path("seqpar/comm.py")
        for breach in collectives(source)
    ]


def long_files(root: Path) -> list[str]:
    return [
        f"{source.path}: {lines} lines"
        for source in sources(root, [*LAYERS, "tests"])
        if (lines := len(source.text.splitlines())) > LONGEST_FILE
    ]


def root_packages(root: Path) -> list[str]:
    """A root folder with an `__init__.py` would shadow packages of that name, such as `kernels`."""
    return [f"{name}/__init__.py" for name in LINKED if (root / name / "__init__.py").exists()]


def links(root: Path) -> list[str]:
    return [
        f"seqpar/{name} is not a link to ../{name}"
        for name in LINKED
        if not (link := root / "seqpar" / name).is_symlink() or os.readlink(link) != f"../{name}"
    ]


def packages_left_out(root: Path) -> list[str]:
    """Folders of Python files that pyproject.toml does not list, and listed ones without any."""
    folders = {".".join(source.package) for source in sources(root)}
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    return sorted(folders.symmetric_difference(listed))


RULES: dict[str, Callable[[Path], list[str]]] = {
    "upward_imports": upward_imports,
    "bare_imports": bare_imports,
    "megatron": only_in(["models", "launch"], "megatron"),
    "triton": only_in(["kernels"], "triton"),
    "collectives": collectives_outside_comm,
    "long_files": long_files,
    "root_packages": root_packages,
    "links": links,
    "packages_left_out": packages_left_out,
}
