"""The public names: documented, typed, and on their page as they are."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import seqpar
import seqpar.models

ROOT = Path(__file__).parents[1]
NAMES = [(module, name) for module in (seqpar, seqpar.models) for name in module.__all__]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date() -> None:
    current = (ROOT / "docs/api.md").read_text()
    assert current == generator().page(), "run python docs/make_api.py"


@pytest.mark.parametrize(
    ("module", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_name_is_documented_and_typed(module: ModuleType, name: str) -> None:
    thing: Any = getattr(module, name)
    assert inspect.getdoc(thing)
    assert name in dir(module)
    function = thing.__init__ if inspect.isclass(thing) else thing
    parameters = list(inspect.signature(function).parameters.values())
    for parameter in parameters[inspect.isclass(thing) :]:
        assert parameter.annotation is not parameter.empty, f"{name}: {parameter.name}"


def test_an_unknown_name_of_models_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'seqpar\.models' has no attribute"):
        seqpar.models.mamba_spec  # noqa: B018
