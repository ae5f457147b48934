"""The tables of benchmarks/README.md and of mixture_or_lora.md, made of the stored results.

`python -m benchmark_tables`, run in `tests/`, writes them into the page. The commands on the page
write the results with `--json benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import layer
import masks_and_losses
import removal_report
from measuring import table
from reference_tables import ROOT, written_into

import model

PAGE = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
LORA = "PEFT LoRA"

Row = dict[str, Any]


def result(name: str) -> dict[str, Any]:
    """Return the stored results of a benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def by_variant(rows: list[Row]) -> dict[str, Row]:
    return {row["variant"]: row for row in rows}


def between(numbers: list[float]) -> str:
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return low if low == high else f"{low} to {high}"


def layer_targets() -> str:
    """Return what one layer was to reach in float32, and what it reached."""
    rows, half, mixed = (
        by_variant(result(f"layer_{name}")["rows"]) for name in ("fp32", "bf16", "bf16_fp32")
    )
    counts = [name.split()[0] for name in rows if name.endswith("uniform")]

    def over(variant: str, column: str = "to PEFT LoRA") -> list[float]:
        return [rows[f"{count} {variant}"][column] for count in counts]

    def own(name: str) -> float:
        return float(rows[name]["seconds"] - rows["bare layer"]["seconds"])

    saved = [ratio / rows[LORA]["saved MiB"] for ratio in over("per sample", "saved MiB")]
    by_token = [ratio / rows[LORA]["saved MiB"] for ratio in over("per token", "saved MiB")]
    dense = rows["E=16 per sample"]["seconds"] / rows["E=1 per sample"]["seconds"]
    in_half = statistics.median(half[f"E={n} per sample"]["to PEFT LoRA"] for n in (1, 3, 16))
    in_mixed = statistics.median(1 / mixed[f"E={n} per sample"]["to PEFT LoRA"] for n in (1, 3, 16))
    return table(
        ["", "target", "found"],
        [
            ["weights per sample, to PEFT's LoRA", "at most 1.00", between(over("per sample"))],
            ["the same, E = 16 to E = 1", "at most 1.05", f"{dense:.2f}"],
            ["weights per token", "at most 1.05", between(over("per token"))],
            ["uniform", "at most 0.98", between(over("uniform"))],
            ["saved for backward", "at most 1.00", between(saved)],
            ["saved, weights per token", "at most 1.00", between(by_token)],
            [
                "top-2 of 16, own time to the dense one's",
                "at most 0.3",
                f"{own('E=16 top-2') / own('E=16 per sample'):.2f}",
            ],
            [
                "bfloat16 on a GPU",
                "1.25 × faster",
                f"not measured; on this CPU {1 / in_half:.2f} ×, {in_mixed:.2f} × with PEFT's "
                "usual float32 adapters",
            ],
        ],
    )


def model_rows() -> dict[tuple[str, str], list[Row]]:
    """Return the rows of the model benchmark by step and mode."""
    found: dict[tuple[str, str], list[Row]] = {}
    for name in ("model_training", "model_denoising"):
        for row in result(name)["rows"]:
            found.setdefault((row["step"], row["mode"]), []).append(row)
    return found


def model_targets() -> str:
    """Return what a whole step was to reach, and what it reached."""
    tables = {key: by_variant(rows) for key, rows in model_rows().items()}
    training, kept = tables["training", "plain"], tables["training", "checkpointing"]
    denoising = tables["denoising", "plain"]

    def three(rows: dict[str, Row]) -> str:
        return f"{rows['ours soft']['seconds'] / rows['3 PEFT adapters']['seconds']:.2f}"

    def peak(rows: dict[str, Row]) -> str:
        return f"{rows['ours soft']['peak'] / rows[LORA]['peak']:.2f}"

    def to_lora(rows: dict[str, Row]) -> str:
        soft, uniform = (float(rows[f"ours {v}"]["/ PEFT LoRA"]) for v in ("soft", "uniform"))
        return f"soft {soft:.2f}, uniform {uniform:.2f}"

    merged = float(denoising["ours merged"]["/ bare"])
    return table(
        ["", "target", "found", "found with checkpointing"],
        [
            ["training step, to PEFT LoRA", "at most 1.00", to_lora(training), to_lora(kept)],
            ["training step, to three PEFT adapters", "at most 0.9", three(training), three(kept)],
            ["peak memory", "at most 1.00", peak(training), peak(kept)],
            ["denoising step, to PEFT LoRA", "at most 1.00", to_lora(denoising), ""],
            ["denoising after `merge`, to the bare model", "1.00", f"{merged:.2f}", ""],
        ],
    )


def tables() -> dict[str, str]:
    """Return the tables of the page by name."""
    found = {
        "layer_targets": layer_targets(),
        **{
            f"layer_{name}": layer.table_of(result(f"layer_{name}")["rows"])
            for name in ("fp32", "bf16", "bf16_fp32")
        },
        "model_targets": model_targets(),
    }
    for (step, mode), rows in model_rows().items():
        found[f"model_{step}_{mode}"] = model.table_of(rows)
    losses = result("masks_and_losses")
    for name in ("masks", "losses"):
        found[name] = masks_and_losses.table_of(losses[name])
    return found


def removal_tables() -> dict[str, str]:
    """Return the tables of the removal benchmark by name."""
    stored = [result(name)["tables"] for name in ("removal", "removal_search")]
    return {
        name: removal_report.markdown(cells["columns"], cells["rows"])
        for tables in stored
        for name, cells in tables.items()
    }


def measured() -> dict[str, str]:
    """Return where and when each stored result was measured, by name."""
    return {file.stem: result(file.stem)["machine"] for file in sorted(RESULTS.glob("*.json"))}


def with_tables(page: str) -> str:
    """Return the page with its present tables."""
    names = [name for name in measured() if not name.startswith(("kinds", "five"))]
    rows = [[f"`{name}.json`", measured()[name]] for name in names]
    return written_into(page, {**tables(), "measured": table(["result", "measured on"], rows)})


WRITERS = {
    PAGE: with_tables,
    ROOT / "docs" / "explanation" / "mixture_or_lora.md": lambda page: written_into(
        page, removal_tables()
    ),
}
"""What renews each page."""

if __name__ == "__main__":
    for path, renewed in WRITERS.items():
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
