"""The recipes for FLUX.1 Fill and the page on scaling have the present plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import RECIPES, with_plan
from scaling import PAGE, with_tables


@pytest.mark.slow
@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_a_recipe_has_the_plan_of_its_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_plan(text) == text, "run `python -m recipes` in tests/"


def test_there_is_a_recipe_for_each_machine() -> None:
    assert [page.stem.rpartition("_on_")[2] for page in RECIPES] == ["24_gb", "48_gb", "8_gpus"]


@pytest.mark.slow
def test_the_page_on_scaling_has_the_present_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `python -m scaling` in tests/"
