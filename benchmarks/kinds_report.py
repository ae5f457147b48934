"""What `removal_kinds.py` tells of its rows: a JSON file with all numbers, and tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from measuring import processor

SETS = {"test": "3 test photographs", "others": "31 other photographs"}
PACKAGES = ("torch", "peft", "diffusers")
MERGE = "best merge"
HINTED, TOLD, PLAIN = "composed, hinted", "plain, kind in the prompt", "plain"
LEARNED = "composed, learned, many photographs"
TOP_1 = "composed, learned, top-1, many photographs"
MAIN = (
    *("base", MERGE),
    *("plain, rank of one expert", PLAIN, TOLD),
    "joint, learned",
    "composed, learned, top-1, 60 scenes",
    *("composed, learned", "composed, learned, top-1", LEARNED),
    *(TOP_1, HINTED, "joint, hinted"),
)
LAST = "composed, learned, 2 kinds"
"""The row that ends a seed."""

REGIONS = ("effect", "inside", "outside")

Results = dict[str, Any]


def collect(out: Path) -> Results:
    """Return the rows of a folder's seeds, and where and when they were measured.

    If any seed is finished, only finished seeds count.

    Raises:
        FileNotFoundError: when there is no row.
    """
    finished = [file.parent for file in out.glob(f"seed-*/rows/{LAST}.json")]
    folders = finished or list(out.glob("seed-*/rows"))
    files = [file for folder in folders for file in folder.glob("*.json")]
    entries = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not entries:
        raise FileNotFoundError(f"Expected rows of a seed in {out}, but there are none.")
    rows: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda entry: (entry["row"], entry["seed"])):
        kept = {
            name: entry[name]
            for name in ("psnr", "accuracy", "specialization", "weights")
            if name in entry
        }
        rows.setdefault(entry["row"], {})[str(entry["seed"])] = kept
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 thread per seed, float32",
        "versions": versions,
        "rows": rows,
    }


def values(
    results: Results, row: str, scenes: str, region: str, kind: str = "mean"
) -> dict[str, float]:
    """Return the PSNR of a row by seed."""
    found = {}
    for seed, entry in results["rows"].get(row, {}).items():
        number = entry["psnr"].get(scenes, {}).get(kind, {}).get(region)
        if number is not None:
            found[seed] = number
    return found


def spread(numbers: Iterable[float], digits: int = 2) -> str:
    """Write mean ± standard deviation.

    >>> spread([20.0, 22.0]), spread([])
    ('21.00 ± 1.41', '–')
    """
    there = list(numbers)
    if not there:
        return "–"
    text = f"{statistics.fmean(there):.{digits}f}"
    return f"{text} ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main_table(results: Results) -> str:
    """Return the mean over the kinds, by row, region and scenes."""
    heads = ["row", *(f"{region}, {scenes}" for scenes in SETS for region in REGIONS)]
    rows = []
    for row in MAIN:
        cells = [spread(values(results, row, s, r).values()) for s in SETS for r in REGIONS]
        rows.append([row, *cells])
    return table(heads, rows)


def kind_table(results: Results) -> str:
    """Return the effect region on the test scenes, by row and kind."""
    kinds = found_kinds(results)
    singles = [f"LoRA for {kind}" for kind in kinds]
    rows = []
    for row in (*MAIN[:1], *singles, *MAIN[1:]):
        cells = [spread(values(results, row, "test", "effect", kind).values()) for kind in kinds]
        rows.append([row, *cells])
    return table(["row", *kinds], rows)


def merge_table(results: Results) -> str:
    """Return PEFT's merges on the test scenes, the best first."""
    merges = [row for row in results["rows"] if row.startswith("merge ")]
    found = {row: values(results, row, "test", "effect") for row in merges}
    merges.sort(key=lambda row: -statistics.fmean(found[row].values()))
    return table(
        ["merge, weight of each LoRA", "effect", "inside"],
        (
            [
                row.removeprefix("merge "),
                spread(found[row].values()),
                spread(values(results, row, "test", "inside").values()),
            ]
            for row in merges
        ),
    )


def growth_table(results: Results) -> str:
    """Return the effect region of each kind after every addition."""
    rows, kinds = [], found_kinds(results)[:3]
    for row in (
        f"LoRA for {kinds[0]}",
        *(f"plain, {n} kinds one by one{r}" for r in ("", ", replay") for n in (2, 3)),
        "composed, hinted, 2 kinds",
        HINTED,
        "composed, learned, 2 kinds",
        LEARNED,
    ):
        known = 1 if row.startswith("LoRA") else 2 if "2 kinds" in row else 3
        cells = [
            spread(values(results, row, "test", "effect", kind).values()) if i < known else ""
            for i, kind in enumerate(kinds)
        ]
        rows.append([row, *cells])
    return table(["row", *kinds], rows)


def accuracy_table(results: Results) -> str:
    """Return the share of scenes whose largest logit is that of their kind."""
    rows = []
    for row, seeds in results["rows"].items():
        if "learned" not in row or "top-1" in row or "2 kinds" in row:
            continue
        cells = [
            spread([100 * e["accuracy"][s] for e in seeds.values() if s in e["accuracy"]], 0)
            for s in SETS
        ]
        rows.append([row, *cells])
    return table(["router of the row", *(f"{title}, %" for title in SETS.values())], rows)


def specialist_table(results: Results) -> str:
    """Return what each kind loses without each expert, and the diagonal share."""
    rows = []
    for row, seeds in results["rows"].items():
        found = [entry["specialization"] for entry in seeds.values() if "specialization" in entry]
        if not found:
            continue
        for expert, losses in found[0]["rises"].items():
            cells = [spread(f["rises"][expert][kind] for f in found) for kind in losses]
            rows.append([row, f"without {expert}", *cells, ""])
        share = spread(f["score"] for f in found)
        rows.append([row, "diagonal share", *[""] * len(found[0]["rises"]), share])
    kinds = list(found_kinds(results))
    return table(["row", "", *kinds, "share"], rows)


def weight_table(results: Results) -> str:
    """Return the mean routing weights by kind."""
    rows = []
    for row, seeds in results["rows"].items():
        found = [entry["weights"] for entry in seeds.values() if "weights" in entry]
        for kind in found[0] if found else ():
            cells = [spread(numbers) for numbers in zip(*(f[kind] for f in found), strict=True)]
            rows.append([row, kind, *cells])
    return table(["row", "scenes", *(f"{kind} expert" for kind in found_kinds(results))], rows)


def found_kinds(results: Results) -> list[str]:
    means = next(iter(results["rows"]["base"].values()))["psnr"]["test"]
    return [kind for kind in means if kind != "mean"]


def difference(results: Results, row: str, other: str, scenes: str = "test") -> list[float]:
    """Return how far a row is ahead of another in the effect region, by seed."""
    ours, theirs = (values(results, name, scenes, "effect") for name in (row, other))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def worst_difference(results: Results, row: str, other: str) -> list[float]:
    """Return the least lead of a row over another on the test scenes, by seed.

    The least over the kinds and the regions: effect, inside, outside.
    """
    by_seed: dict[str, list[float]] = {}
    for kind in found_kinds(results):
        for region in REGIONS:
            ours, theirs = (values(results, name, "test", region, kind) for name in (row, other))
            for seed in ours:
                by_seed.setdefault(seed, []).append(ours[seed] - theirs[seed])
    return [min(found) for found in by_seed.values()]


def goal_table(results: Results) -> str:
    """Return what was hoped for, and what was found in each seed."""
    singles = max(
        (PLAIN, MERGE),
        key=lambda row: statistics.fmean(values(results, row, "test", "effect").values()),
    )
    gains = [
        g / whole
        for g, whole in zip(
            difference(results, LEARNED, MERGE), difference(results, HINTED, MERGE), strict=True
        )
    ]
    first = found_kinds(results)[0]
    alone, grown = (
        values(results, row, "test", "effect", first) for row in (f"LoRA for {first}", HINTED)
    )
    checks = [
        ("hinted composition over the best merge, dB", 2.0, difference(results, HINTED, MERGE)),
        (
            "hinted composition over the plain LoRA with the kind in the prompt, dB",
            -0.2,
            difference(results, HINTED, TOLD),
        ),
        (
            f"learned router over the best adapter without the kind ({singles}), dB",
            0.5,
            difference(results, LEARNED, singles),
        ),
        (
            "learned router's share of the gain from the best merge to the hinted composition",
            0.7,
            gains,
        ),
        (
            f"{first}s after {len(found_kinds(results)) - 1} further kinds were added, hinted, dB",
            -0.05,
            [grown[seed] - alone[seed] for seed in alone],
        ),
        (
            "hinted composition over the plain LoRA, worst kind and region, dB",
            -0.1,
            worst_difference(results, HINTED, PLAIN),
        ),
        (
            "learned router with top-1 over the plain LoRA, worst kind and region, dB",
            -0.1,
            worst_difference(results, TOP_1, PLAIN),
        ),
    ]
    return table(
        ["goal, test scenes, effect region", "wanted", "found by seed", "held"],
        (
            [
                text,
                f">= {least}",
                ", ".join(f"{v:+.2f}" for v in found),
                "yes" if found and all(v >= least for v in found) else "no",
            ]
            for text, least, found in checks
        ),
    )


def measured(results: Results) -> str:
    """Return where and when the rows were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seeds = len(results["rows"]["base"])
    return f"Measured on {results['date']} with {versions}; {results['machine']}; seeds: {seeds}.\n"


def tables(results: Results) -> dict[str, str]:
    """Return all tables by name."""
    return {
        "measured": measured(results),
        "regions": main_table(results),
        "goals": goal_table(results),
        "kinds": kind_table(results),
        "merges": merge_table(results),
        "growth": growth_table(results),
        "accuracy": accuracy_table(results),
        "specialists": specialist_table(results),
        "weights": weight_table(results),
    }


FIVE = ("base", MERGE, PLAIN, TOLD, "composed, learned", TOP_1, HINTED, "joint, hinted")


def five_tables(results: Results) -> dict[str, str]:
    """Return the tables of a run with five kinds: the effect region by kind, and the routers."""
    kinds = found_kinds(results)
    rows = [
        [
            row,
            *(
                spread(values(results, row, scenes, "effect", kind).values())
                for scenes, columns in (("test", (*kinds, "mean")), ("others", ("mean",)))
                for kind in columns
            ),
        ]
        for row in FIVE
    ]
    heads = ["row", *(f"{kind}, test" for kind in (*kinds, "mean")), "mean, others"]
    return {
        "five": table(heads, rows),
        "five_accuracy": accuracy_table(results),
        "five_measured": measured(results),
    }


def mask_tables(results: Results) -> dict[str, str]:
    """Return the tables of a run with `--by_mask`: regions by kind of mask, and the specialists."""
    kinds, regions = found_kinds(results), ("inside", "effect")
    rows = [
        [
            row,
            *(
                spread(values(results, row, "test", region, kind).values())
                for region in regions
                for kind in kinds
            ),
        ]
        for row in ("base", PLAIN, "joint, learned", "joint, hinted")
    ]
    heads = ["row", *(f"{kind}, {region}" for region in regions for kind in kinds)]
    return {
        "by_mask": table(heads, rows),
        "by_mask_accuracy": accuracy_table(results),
        "by_mask_specialists": specialist_table(results),
        "by_mask_measured": measured(results),
    }


def write_report(out: Path) -> str:
    """Write `kinds.json` and `report.md` into the folder, and return the report."""
    results = collect(out)
    (out / "kinds.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report = "\n".join(f"## {name}\n\n{text}" for name, text in tables(results).items())
    (out / "report.md").write_text(report, encoding="utf-8")
    return report
