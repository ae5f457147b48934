"""What `removal.py` tells of its runs: tables in Markdown, and a contact sheet."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measuring import machine
from removal_rows import ROWS
from removal_sheet import draw_sheet

from moe_lora.losses import EXPERT_OF_LOSS

KINDS, SIZES = ("blob", "stroke", "box"), ("small", "medium", "large")
NONE = "–"


class Column(NamedTuple):
    """Describe a column of numbers; `sign` is -1 where less is better."""

    title: str
    metric: str
    digits: int
    sign: int


METRICS = (
    *(Column(f"PSNR {n}", f"psnr/{n}", 2, 1) for n in ("whole", "inside", "outside", "boundary")),
    Column("PSNR effect", "psnr/effect", 2, 1),
    Column("SSIM inside", "ssim/inside", 4, 1),
    Column("SSIM effect", "ssim/effect", 4, 1),
    Column("seam error", "seam_error", 4, -1),
)

Variant = tuple[str, bool]
Runs = dict[Variant, dict[int, dict[str, Any]]]


def read_runs(out: Path) -> tuple[Runs, dict[str, Any] | None]:
    """Return the finished runs by row, losses and seed, in the order of the rows, and the base's.

    Raises:
        FileNotFoundError: when no run is finished.
    """
    found = [json.loads(p.read_text(encoding="utf-8")) for p in out.glob("runs/*/result.json")]
    base = next((entry for entry in found if entry["row"] not in ROWS), None)
    runs: Runs = {}
    for losses in (False, True):
        for name in ROWS:
            ours = [e for e in found if e["row"] == name and e["losses"] == losses]
            if ours:
                runs[name, losses] = {e["seed"]: e for e in sorted(ours, key=lambda e: e["seed"])}
    if not runs:
        raise FileNotFoundError(f"Expected finished runs in {out / 'runs'}, but there are none.")
    return runs, base


def mean_of(
    run: dict[str, Any], metric: str, *, kind: str | None = None, size: str | None = None
) -> float | None:
    """Average a metric over a run's samples, of a kind and a size of mask where these are named."""
    values = [
        sample[metric]
        for sample in run["samples"]
        if sample[metric] is not None
        and kind in (None, sample["kind"])
        and size in (None, sample["size"])
    ]
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float | None], digits: int) -> str:
    """Write mean ± standard deviation over the seeds.

    >>> spread([20.0, 22.0, None], 2)
    '21.00 ± 1.41'
    """
    there = [value for value in values if value is not None]
    if not there:
        return NONE
    text = f"{statistics.fmean(there):.{digits}f}"
    return f"{text} ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else text


def differences(
    runs: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]], metric: str
) -> list[float]:
    """Return run minus reference for every seed that both have."""
    pairs = (
        (mean_of(runs[seed], metric), mean_of(reference[seed], metric))
        for seed in runs
        if seed in reference
    )
    return [a - b for a, b in pairs if a is not None and b is not None]


def tell_difference(values: Sequence[float], digits: int, sign: int) -> str:
    """Write the mean difference and that of each seed; bold and ticked when all are ahead.

    >>> tell_difference([0.5, 0.25], 2, 1)
    '**+0.38** ✓ (+0.50, +0.25)'
    >>> tell_difference([0.5, -0.25], 2, 1)
    '+0.12 (+0.50, -0.25)'
    """
    if not values:
        return NONE
    mean = f"{statistics.fmean(values):+.{digits}f}"
    each = ", ".join(f"{value:+.{digits}f}" for value in values)
    ahead = all(sign * value > 0 for value in values)
    behind = all(sign * value < 0 for value in values)
    mark = f"**{mean}** ✓" if ahead else f"{mean} ✗" if behind else mean
    return f"{mark} ({each})"


def title_of(variant: Variant) -> str:
    name, losses = variant
    return f"{ROWS[name].title}{' + losses' if losses else ''}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(text: str) -> dict[str, Any]:
    """Return the columns and rows of a table in Markdown.

    >>> cells(markdown(["row", "dB"], [["base", "20.1"]]))
    {'columns': ['row', 'dB'], 'rows': [['base', '20.1']]}
    """
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return {"columns": lines[0], "rows": lines[2:]}


def table_of_means(runs: Runs, base: dict[str, Any] | None) -> str:
    rows = [
        [title_of(variant), str(len(seeds))]
        + [spread([mean_of(r, c.metric) for r in seeds.values()], c.digits) for c in METRICS]
        for variant, seeds in runs.items()
    ]
    if base is not None:
        told = [spread([mean_of(base, c.metric)], c.digits) for c in METRICS]
        rows.insert(0, ["base model", NONE, *told])
    return markdown(["row", "seeds", *(c.title for c in METRICS)], rows)


def reference_of(variant: Variant, baseline: str, losses: str) -> Variant:
    return baseline, {"same": variant[1], "with": True, "without": False}[losses]


def table_of_differences(runs: Runs, baseline: str, losses: str) -> str:
    rows = []
    for variant, seeds in runs.items():
        reference = reference_of(variant, baseline, losses)
        if variant != reference and reference in runs:
            found = [differences(seeds, runs[reference], c.metric) for c in METRICS]
            cells = zip(found, METRICS, strict=True)
            rows.append([title_of(variant), *(tell_difference(d, c[2], c[3]) for d, c in cells)])
    return markdown(["row", *(c.title for c in METRICS)], rows)


def table_of_specialization(runs: Runs) -> str:
    """Write what each expert is for: its share of the rise of its own component, and the mean."""
    rows = []
    for variant, seeds in runs.items():
        found = [run["specialization"] for run in seeds.values() if "specialization" in run]
        if found:
            pairs = found[0]["pairs"]
            own = [spread([entry["shares"][expert] for entry in found], 2) for expert in pairs]
            rows.append([title_of(variant), *own, spread([entry["score"] for entry in found], 2)])
    heads = [f"{expert.removesuffix('_expert')}: {of}" for of, expert in EXPERT_OF_LOSS.items()]
    return markdown(["row", *heads, "score"], rows)


def table_of_groups(runs: Runs, metric: str, digits: int) -> str:
    groups = [{"kind": kind} for kind in KINDS] + [{"size": size} for size in SIZES]
    rows = [
        [title_of(variant)]
        + [spread([mean_of(r, metric, **g) for r in seeds.values()], digits) for g in groups]
        for variant, seeds in runs.items()
    ]
    return markdown(["row", *KINDS, *SIZES], rows)


def tell_parameters(runs: Runs) -> str:
    """Write how many parameters are trained, and whether the rows are equal in that."""
    adapters, routers = (by_count(runs, part) for part in ("adapter", "router"))
    routers.pop(0, None)
    extra = "".join(f" Routers add {n:,} ({'; '.join(names)})." for n, names in routers.items())
    if len(adapters) == 1:
        return f"Trained parameters of the adapter: {next(iter(adapters)):,} in every row.{extra}"
    told = ", ".join(f"{n:,} ({'; '.join(names)})" for n, names in adapters.items())
    return f"**The rows are not equal in trained parameters: {told}.**{extra}"


def by_count(runs: Runs, part: str) -> dict[int, list[str]]:
    """Return the titles of the rows by the number of parameters of a part of their checkpoints."""
    found: dict[int, dict[str, None]] = {}
    for (name, _), seeds in runs.items():
        for run in seeds.values():
            found.setdefault(run["parameters"][part], {})[ROWS[name].title] = None
    return {number: list(titles) for number, titles in found.items()}


def tables(runs: Runs, base: dict[str, Any] | None, baseline: str, losses: str) -> dict[str, str]:
    """Return all tables by name."""
    return {
        "regions": table_of_means(runs, base),
        "differences": table_of_differences(runs, baseline, losses),
        "specialization": table_of_specialization(runs),
        "groups_inside": table_of_groups(runs, "psnr/inside", 2),
        "groups_effect": table_of_groups(runs, "psnr/effect", 2),
    }


def report(runs: Runs, base: dict[str, Any] | None, baseline: str, losses: str) -> str:
    """Return all tables as one page of Markdown."""
    found = tables(runs, base, baseline, losses)
    compared = {"same": "trained by the same losses", "with": "trained by all losses"}.get(
        losses, "trained by the base loss"
    )
    samples = len(next(iter(next(iter(runs.values())).values()))["samples"])
    parts = [
        f"{tell_parameters(runs)} {samples} test scenes; mean ± standard deviation over the seeds; "
        "PSNR in dB; less is better for the seam error only.",
        found["regions"],
        f"Difference to {ROWS[baseline].title}, {compared}: mean, and in brackets seed by seed. "
        "✓: ahead in every seed; ✗: behind in every seed.",
        found["differences"],
        "Specialization: leaving out one expert after the other, the share of a component's rises "
        "that is its own expert's; a third without specialization. The score is the mean.",
        found["specialization"],
        "PSNR inside the mask by kind and size of the mask:",
        found["groups_inside"],
        "PSNR in the effect region by kind and size of the mask:",
        found["groups_effect"],
    ]
    return "\n\n".join(parts) + "\n"


def image_folders(out: Path, runs: Runs) -> dict[str, Path]:
    """Return where the base model's images and those of every row's first seed are."""
    folders = {"base model": out / "runs" / "base" / "evaluation" / "images" / "base"}
    for variant, seeds in runs.items():
        name, losses = variant
        run = f"{name}-{'losses' if losses else 'base'}-{min(seeds)}"
        folders[title_of(variant)] = out / "runs" / run / "evaluation" / "images" / "trained"
    return folders


def write_report(out: Path, baseline: str, losses: str) -> str:
    """Write `report.md`, `tables.json` and `contact_sheet.png` of the finished runs.

    Returns:
        The text of `report.md`.

    Raises:
        FileNotFoundError: when no run is finished.
    """
    runs, base = read_runs(out)
    text = report(runs, base, baseline, losses)
    (out / "report.md").write_text(text, encoding="utf-8")
    stored = {name: cells(table) for name, table in tables(runs, base, baseline, losses).items()}
    result = {"machine": machine(packages=("torch", "peft", "diffusers")), "tables": stored}
    (out / "tables.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_sheet(out / "data" / "test", image_folders(out, runs), out / "contact_sheet.png")
    return text
