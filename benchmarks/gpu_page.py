"""The page of `gpu.py`: what was run, targets reached or missed, and every table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SOFT, DENSE, LORA, BARE = "E=3 per sample", "E=16 per sample", "PEFT LoRA", "bare layer"


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare layer figures with what is aimed at.

    Args:
        report: of `gpu.py`.

    Returns:
        For every layer section: its name, the target, its limit, what was found, and whether it
        was reached.
    """
    found = []
    for part in report["sections"]:
        if not part["name"].startswith("layer-") or part.get("figures") is None:
            continue
        seconds = {row["variant"]: row["seconds"] for row in part["figures"]["rows"]}
        ratios = {
            ("soft mixture faster than PEFT's LoRA", ">=", 1.25): seconds[LORA] / seconds[SOFT],
            ("E = 16 to E = 1", "<=", 1.05): seconds[DENSE] / seconds["E=1 per sample"],
            ("top-2 of 16, own time to the dense one's", "<=", 0.3): (
                seconds["E=16 top-2"] - seconds[BARE]
            )
            / (seconds[DENSE] - seconds[BARE]),
        }
        for (what, relation, limit), ratio in ratios.items():
            reached = ratio >= limit if relation == ">=" else ratio <= limit
            found.append(
                {
                    "layer": part["title"],
                    "target": f"{what} {relation} {limit}",
                    "found": round(ratio, 3),
                    "reached": bool(reached),
                }
            )
    return found


def page(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    yield "# What a GPU shows\n"
    yield f"{report['machine']}\n"
    if report["small"]:
        yield "Every part ran at its smallest: the figures show only that the commands work.\n"
    yield "| part | outcome | s |"
    yield "|---|---|---|"
    for part in report["sections"]:
        outcome = " ".join(filter(None, (part["status"], part["why"])))
        yield f"| {part['title']} | {outcome} | {part['seconds']:.0f} |"
    found = targets(report)
    if found and report["device"] != "cpu":
        yield "\n## Targets\n\n| layer | target | found | |\n|---|---|---|---|"
        for row in found:
            mark = "reached" if row["reached"] else "missed"
            yield f"| {row['layer']} | {row['target']} | {row['found']} | {mark} |"
    for part in report["sections"]:
        if part["status"] != "skipped":
            yield from _section(part)


def _section(part: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {part['title']}\n\n`{part['command']}`\n"
    yield part["printed"].strip()
    if part["errors"]:
        yield f"\n```\n{part['errors'].strip()[-2000:]}\n```"
