"""The configurations that come with the project fit where their plans say they do."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_plans", ROOT / "docs/make_plans.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = generator()


def test_every_configuration_but_the_demo_has_recipes() -> None:
    names = {path.stem for path in (ROOT / "launch/configs").glob("*.yaml")}
    assert names == {*MADE.RECIPES, "demo"}


@pytest.mark.parametrize("name", MADE.RECIPES)
def test_plans_are_up_to_date_and_all_fit(name: str) -> None:
    current = (ROOT / f"launch/configs/{name}.plans.txt").read_text()
    assert current == MADE.page(name), "run python docs/make_plans.py"
    plans = MADE.plans(name)
    assert all(plan.fits for _, plan in plans)
    lengths = [plan.config.data.sequence_length >> 17 for _, plan in plans]
    assert set(lengths) == {1, 8, 16, 32, 64}  # 128K to 8M
