"""The pages of benchmarks have the numbers of the stored results."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_tables import WRITERS, measured


@pytest.mark.parametrize("page", WRITERS, ids=lambda page: page.stem)
def test_a_page_has_the_stored_numbers(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert WRITERS[page](text) == text, "run `python -m benchmark_tables` in tests/"


def test_every_result_says_where_and_when_it_was_measured() -> None:
    for name, told in measured().items():
        assert told, name
