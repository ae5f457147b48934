"""The plans on the pages of recipes, made of their commands.

`python -m recipes`, run in `tests/`, writes them into the pages.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from reference_tables import written_into

from options.parsing import parse_options
from training_run.plan import describe, plan_run

FOLDER = Path(__file__).parents[1] / "docs" / "how_to"
RECIPES = sorted(FOLDER.glob("train_flux_fill_on_*.md"))
SIDE = 1024


def flags_on(page: str) -> list[str]:
    """Return the options of the command on a page."""
    (line,) = re.findall(r"^.*train\.py (.*)$", page.partition("## The plan")[0], re.MULTILINE)
    return shlex.split(line)


def with_plan(page: str) -> str:
    """Return a page with the present plan of its command."""
    plan = describe(plan_run(parse_options([*flags_on(page), "--plan"]), SIDE, SIDE))
    return written_into(page, {"plan": f"```text\n{plan}\n```\n"})


if __name__ == "__main__":
    for path in RECIPES:
        path.write_text(with_plan(path.read_text(encoding="utf-8")), encoding="utf-8")
