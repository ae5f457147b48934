"""Train an expert for each of three kinds of removal, and a router that recognizes them.

Everything is left in outputs/demo_kinds/: checkpoint/, metrics.json, specialization.png (what each
kind loses without each expert), weights_by_kind.png, and experts.png with a row for each kind: each
expert alone, and the mixture by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers import FluxFillPipeline
from diffusers.utils import logging as diffusers_logging

sys.path.insert(0, str(Path(__file__).parents[1] / "flux_removal"))

import moe_lora
from demo import Clock
from evaluation.by_kind import (
    kind_table,
    measure_by_kind,
    samples_of_kinds,
    specialization_by_kind,
)
from evaluation.measuring import Results, run_pipeline
from flux_fill.kind_hints import KindHints
from flux_fill.models import Conditioner, load_checkpoint, load_pipeline
from make_data import make_data
from moe_lora import plots
from options.parsing import parse_options
from removal_data.dataset import RemovalDataset
from reporting.contact_sheet import contact_sheet, show_mask
from train import train

CONFIG = Path(__file__).with_suffix(".yaml")
KINDS = ("shadow", "glow", "reflection")
QUICK_FLAGS = ["--max_train_steps", "3", "--logging_steps", "1"]


def draw_experts(
    pipe: FluxFillPipeline,
    conditioner: Conditioner,
    dataset: RemovalDataset,
    itself: Results,
    path: Path,
    *,
    steps: int,
) -> None:
    """Draw a scene of each kind as each expert alone makes it, and the mixture by itself."""
    chosen = [indices[0] for indices in samples_of_kinds(dataset).values()]
    columns = {}
    for name in KINDS:
        moe_lora.set_router_inputs(pipe.transformer, task_hint=f"{name}_only")
        alone = run_pipeline(pipe, conditioner, dataset, steps=steps).images
        columns[f"{name} expert"] = alone
    moe_lora.set_router_inputs(pipe.transformer)
    rows = []
    for index in chosen:
        item = dataset[index]
        shown = {"source": item["src"], "mask": show_mask(item["src"], item["mask"])}
        shown |= {title: images[index] for title, images in columns.items()}
        rows.append(shown | {"by itself": itself.images[index], "target": item["result"]})
    contact_sheet(rows, path, labels=list(dataset.kinds))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, help="outputs/demo_kinds by default")
    parser.add_argument("--config", type=Path, default=CONFIG, help="options of train.py")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps in the evaluation")
    parser.add_argument("--quick", action="store_true", help="a few samples and steps, for tests")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    args = build_parser().parse_args(arguments)
    name = "demo_kinds_quick" if args.quick else "demo_kinds"
    output: Path = args.output_dir or Path("outputs") / name
    output.mkdir(parents=True, exist_ok=True)
    diffusers_logging.disable_progress_bar()
    clock, steps = Clock(), 1 if args.quick else args.steps

    clock.begin("data", f"writing triplets of {', '.join(KINDS)} to {output / 'data'}")
    train_count, test_count = (24, 6) if args.quick else (480, 72)
    make_data(output / "data", train_count=train_count, test_count=test_count, kinds=KINDS)
    for old in ("checkpoint", "training", "logs"):
        shutil.rmtree(output / old, ignore_errors=True)
    flags = [str(args.config), "--train_data_dir", str(output / "data" / "train")]
    flags += ["--output_dir", str(output / "training"), "--logging_dir", str(output / "logs")]
    options = parse_options(flags + (QUICK_FLAGS if args.quick else []))
    clock.begin("training", f"{options.max_train_steps} steps on {options.flux_fill_id}")
    checkpoint = train(options).rename(output / "checkpoint")
    shutil.rmtree(output / "training")

    dataset = RemovalDataset(output / "data" / "test")
    clock.begin("evaluation", f"{len(dataset)} scenes on photographs that training has not seen")
    pipe = load_pipeline(options.flux_fill_id)
    conditioner = Conditioner(pipe)
    base = measure_by_kind(run_pipeline(pipe, conditioner, dataset, steps=steps).images, dataset)
    load_checkpoint(pipe, checkpoint)
    hints = KindHints(dataset.kinds, options.kind_experts, options.kind_hint)
    hinted = run_pipeline(pipe, conditioner, dataset, steps=steps, hints=hints)
    itself = run_pipeline(pipe, conditioner, dataset, steps=steps)
    clock.begin("specialization", "the effect region again, with one expert left out at a time")
    found = specialization_by_kind(pipe, conditioner, dataset, KINDS, steps=steps)
    clock.begin("figures", f"drawing into {output}")
    kinds = [str(sample.kind) for sample in dataset.samples]
    plots.weights_by_kind(kinds, itself.weights, KINDS).savefig(output / "weights_by_kind.png")
    plots.specialization_matrix(found).savefig(output / "specialization.png")
    draw_experts(pipe, conditioner, dataset, itself, output / "experts.png", steps=steps)
    clock.end()

    measured = {
        "base": base,
        "hinted": measure_by_kind(hinted.images, dataset),
        "by itself": measure_by_kind(itself.images, dataset),
    }
    right = sum(KINDS[int(w.argmax())] == k for w, k in zip(itself.weights, kinds, strict=True))
    entries = {
        "psnr_by_kind": measured,
        "specialization": found.as_dict(),
        "recognized": right / len(kinds),
        "samples": len(dataset),
        "seconds": clock.seconds,
    }
    (output / "metrics.json").write_text(json.dumps(entries, indent=2) + "\n")
    for title in ("hinted", "by itself"):
        print(f"\n{title}, with the gain over the base model:\n{kind_table(measured[title], base)}")
    print(f"\nThe router recognizes the kind of {right} of {len(kinds)} scenes.\n\n{found}\n")
    print("seconds:", ", ".join(f"{name} {value:.0f}" for name, value in clock.seconds.items()))
    print(f"Look at {output / 'experts.png'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
