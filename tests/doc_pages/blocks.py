"""The pages, and the blocks of code and commands on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
    *sorted((ROOT / "examples").glob("*/README.md")),
]

BLOCK = re.compile(
    r"^(?:```(?P<language>python|bash|shell|sh)|<!-- docs-test)\n(?P<text>.*?)^(?:```|-->)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Args:
        language: `python` or `shell`; hidden blocks `<!-- docs-test ... -->` are Python.
        line: of the page, from 1, on which the text begins.
        text: without the fences.
    """

    language: str
    line: int
    text: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            language="python" if match["language"] in ("python", None) else "shell",
            line=text.count("\n", 0, match.start("text")) + 1,
            text=match["text"],
        )
        for match in BLOCK.finditer(text)
    ]


def commands_in(text: str) -> list[str]:
    """Return the commands of a shell block; a backslash joins lines."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
