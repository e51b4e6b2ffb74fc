"""Writes docs/api.md from the docstrings of all public names: `python docs/make_api.py`."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """# Public names

Written by `docs/make_api.py` from the docstrings; a test fails when it is out of date. These names
and what they mean stay; everything else may change. How they go together:
[adoption.md](adoption.md).
"""
MODULES = ("seqpar", "seqpar.models")
WIDTH = 100


def page() -> str:
    """The text of docs/api.md."""
    parts = [INTRODUCTION]
    for name in MODULES:
        module = import_module(name)
        parts.append(f"## {name}\n\n{inspect.getdoc(module)}\n")
        parts += [section(module, public) for public in sorted(module.__all__, key=str.lower)]
    return "\n".join(parts)


def section(module: ModuleType, name: str) -> str:
    """The heading and text of one name: a function, or a class with its methods."""
    thing = getattr(module, name)
    text = "\n\n".join(described(thing, name))
    return f"### {module.__name__}.{name}\n\n```text\n{text}\n```\n"


def described(thing: Any, name: str) -> Iterator[str]:
    yield f"{signature(thing, name)}\n\n{inspect.getdoc(thing)}"
    if not inspect.isclass(thing):
        return
    for member, value in vars(thing).items():
        value = getattr(value, "func", getattr(value, "fget", value))  # of a property
        if not member.startswith("_") and inspect.isfunction(value):
            called = inspect.isfunction(vars(thing)[member])
            head = signature(value, member) if called else member
            yield textwrap.indent(f".{head}\n{inspect.getdoc(value)}", "    ")


def signature(thing: Any, name: str) -> str:
    """As it stands in the source, whatever Python makes of the annotations."""
    function = vars(thing)["__init__"] if inspect.isclass(thing) else thing
    if "__dataclass_params__" in vars(thing):
        text = fields(thing)
    else:
        [node] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        assert isinstance(node, ast.FunctionDef)
        node.args.args = [each for each in node.args.args if each.arg != "self"]
        returns = f" -> {ast.unparse(node.returns)}" if function is thing and node.returns else ""
        text = f"{name}({ast.unparse(node.args)}){returns}"
    return textwrap.fill(
        text, WIDTH, subsequent_indent=" " * 4, break_long_words=False, break_on_hyphens=False
    )


def fields(thing: type) -> str:
    """The call of a dataclass."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(node, ast.ClassDef)
    named = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
    return f"{thing.__name__}({', '.join(named)})"


if __name__ == "__main__":
    PAGE.write_text(page())
