"""The tables of docs/reference/compatibility.md, made of the tests.

`python -m compatibility.page`, run in `tests/`, writes them into the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from compatibility.situations import SITUATIONS, Situation
from compatibility.table import CASES

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "compatibility.md"
WORKS = {"not for mixtures": "not applicable"}
GROUPS = {
    ("diffusers", "model"): "diffusers: models",
    ("diffusers", "pipe"): "diffusers: pipelines",
    ("PEFT", "model"): "PEFT",
}
# Names of code: with a call or a value, dotted or with underscores, or in camel case.
CODE = re.compile(
    r"\w[\w.]*(?:\([^)]*\)|=(?:\{[^}]*\}|\([^)]*\)|r?\"[^\"]*\"|\w+))"
    r"|\w+(?:[._]\w+)+|(?!DeepSpeed|LoHa)[A-Z][a-z]+[A-Z][a-z]+\w*"
)


def switches() -> str:
    """Return the tables of public functions, by library."""
    parts = []
    cases = [(_group(case.library, case.switch), case) for case in CASES]
    for group, found in groupby(sorted(cases, key=lambda c: [*GROUPS].index(c[0])), lambda c: c[0]):
        rows = [(c.switch, WORKS.get(c.works, c.works), c.note) for _, c in found]
        parts += [f"### {GROUPS[group]}", _table(("Function", "Support", "Remarks"), rows)]
    return "\n\n".join(parts)


def situations() -> str:
    """Return the tables of situations, with their tests."""
    parts = []
    for heading, group in SITUATIONS.items():
        rows = [(s.what, s.works, s.note, _named(s)) for s in group]
        titles = ("Situation", "Support", "Remarks", "Test")
        parts += [f"### {heading}", _table(titles, rows)]
    return "\n\n".join(parts)


def written_into(page: str) -> str:
    """Return the page with the present tables between its markers."""
    for name, table in (("switches", switches()), ("situations", situations())):
        start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->"
        before, after = page.split(start)[0], page.split(end)[1]
        page = f"{before}{start}\n{table}\n\n{end}{after}"
    return page


def _group(library: str, switch: str) -> tuple[str, str]:
    return library, "pipe" if switch.startswith("pipe.") else "model"


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    marked = [[_with_code(cell) for cell in row] for row in rows]
    lines = [titles, ("---",) * len(titles), *marked]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_code(cell: str) -> str:
    return cell if cell.startswith("`") else CODE.sub(r"`\g<0>`", cell)


def _named(situation: Situation) -> str:
    file, _, test = situation.test.partition("::")
    return f"`{file}`: {test.removeprefix('test_').replace('_', ' ')}"


if __name__ == "__main__":
    PAGE.write_text(written_into(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
