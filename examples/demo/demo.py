"""Remove objects from real photographs: data, training, evaluation and figures in a few minutes.

Everything is left in outputs/demo/: checkpoint/ (each expert also by itself), logs/, metrics.json,
contact_sheet.png, routing_over_training.png, routing_by_mask_size.png,
routing_by_edge_complexity.png and specialization.png. The figures of routing are in TensorBoard,
too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "flux_removal"))

from evaluation.comparison_sheet import draw_comparison
from evaluation.measuring import (
    Results,
    apply_to_all,
    measure,
    regions,
    run_pipeline,
    table,
)
from evaluation.specialization import measure_specialization
from flux_fill.models import Conditioner, load_checkpoint, load_pipeline
from make_data import make_data
from moe_lora import masks, plots
from moe_lora.ablation import Specialization
from options.parsing import parse_options
from options.train_options import TrainOptions
from removal_data.dataset import RemovalDataset
from reporting.routing_figures import usage_over_training
from train import train
from training_run.checkpoints import step_of

CONFIG = Path(__file__).with_suffix(".yaml")
QUICK_FLAGS = ["--max_train_steps", "6", "--uniform_steps", "3", "--logging_steps", "1"]


class Clock:
    """Measure the phases of the demo, and say that they begin."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since, self._phase = time.monotonic(), ""

    def begin(self, phase: str, told: str) -> None:
        """End the last phase and begin another."""
        self.end()
        self._phase, self._since = phase, time.monotonic()
        print(f"[{phase}] {told}", flush=True)

    def end(self) -> None:
        """End the last phase."""
        if self._phase:
            self.seconds[self._phase] = round(time.monotonic() - self._since, 1)


def evaluate(
    options: TrainOptions, checkpoint: Path, dataset: RemovalDataset, steps: int
) -> dict[str, Results]:
    """Run base model and checkpoint with the same noise, through the stock pipeline.

    Returns:
        `base` and `ours`, in which the source is kept outside the mask as `remove.py` does, and
        between them `raw`: what the pipeline with the checkpoint made.
    """
    pipe = load_pipeline(options.flux_fill_id)
    conditioner = Conditioner(pipe)
    base = run_pipeline(pipe, conditioner, dataset, steps=steps)
    load_checkpoint(pipe, checkpoint)
    raw = run_pipeline(pipe, conditioner, dataset, steps=steps)
    kept_base, kept = (apply_to_all(pipe.vae, found, dataset) for found in (base, raw))
    return {"base": kept_base, "raw": raw, "ours": kept}


def draw_routing(
    output: Path, dataset: RemovalDataset, weights: list[Tensor], found: Specialization
) -> dict[str, Figure]:
    """Return the figures of routing by the names of their files."""
    figures = {
        "routing_over_training": usage_over_training(output / "logs" / "metrics.jsonl"),
        "specialization": plots.specialization_matrix(found),
    }
    if weights:
        infos = [masks.analyze(dataset[index]["mask"][None]) for index in range(len(dataset))]
        area = torch.cat([info.area_ratio for info in infos])
        edge = torch.cat([info.edge_complexity for info in infos])
        names = found.expert_names
        figures["routing_by_mask_size"] = plots.weights_by_area(area, weights, names)
        figures["routing_by_edge_complexity"] = plots.weights_by_edge_complexity(
            edge, weights, names
        )
    return figures


def write_figures(figures: dict[str, Figure], output: Path, options: TrainOptions) -> None:
    """Write figures as files and, where the run has its curves there, into TensorBoard."""
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png")
    if options.report_to == "tensorboard":
        with SummaryWriter(str(output / "logs" / "flux_removal")) as writer:
            for name, figure in figures.items():
                writer.add_figure(f"test/{name}", figure, options.max_train_steps)


def write_metrics(
    output: Path,
    options: TrainOptions,
    dataset: RemovalDataset,
    results: dict[str, dict[str, float]],
    found: Specialization,
    seconds: dict[str, float],
) -> None:
    """Write `metrics.json`."""
    shadowed = sum(bool(regions(dataset[i])["shadow"].any()) for i in range(len(dataset)))
    entries = {
        "psnr": results,
        "specialization": found.as_dict(),
        "samples": len(dataset),
        "samples_with_shadow": shadowed,
        "seconds": seconds,
        "train_steps": options.max_train_steps,
        "uniform_steps": options.uniform_steps,
    }
    (output / "metrics.json").write_text(json.dumps(entries, indent=2) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, help="outputs/demo by default")
    parser.add_argument("--config", type=Path, default=CONFIG, help="options of train.py")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps in the evaluation")
    parser.add_argument(
        "--resume_from_checkpoint", choices=("latest",), help="go on after an interruption"
    )
    parser.add_argument("--quick", action="store_true", help="a few samples and steps, for CI")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    args = build_parser().parse_args(arguments)
    output: Path = args.output_dir or Path("outputs") / ("demo_quick" if args.quick else "demo")
    output.mkdir(parents=True, exist_ok=True)
    diffusers_logging.disable_progress_bar()
    clock = Clock()

    clock.begin("data", f"writing triplets of real photographs to {output / 'data'}")
    if args.quick:
        make_data(output / "data", train_count=24, test_count=6)
    else:
        make_data(output / "data")

    flags = [str(args.config), "--train_data_dir", str(output / "data" / "train")]
    flags += ["--output_dir", str(output / "training"), "--logging_dir", str(output / "logs")]
    if args.resume_from_checkpoint:
        flags += ["--resume_from_checkpoint", args.resume_from_checkpoint]
    options = parse_options(flags + (QUICK_FLAGS if args.quick else []))
    stale = ("checkpoint",) if args.resume_from_checkpoint else ("checkpoint", "training", "logs")
    for name in stale:
        shutil.rmtree(output / name, ignore_errors=True)
    clock.begin("training", f"{options.max_train_steps} steps on {options.flux_fill_id}")
    trained = train(options)
    if step_of(trained) != options.max_train_steps:
        print(f"The demo was stopped; {trained} is left.")
        return 1
    checkpoint = trained.rename(output / "checkpoint")
    shutil.rmtree(output / "training")

    dataset = RemovalDataset(output / "data" / "test")
    clock.begin("evaluation", f"{len(dataset)} photographs that training has not seen")
    steps = 3 if args.quick else args.steps
    made = evaluate(options, checkpoint, dataset, steps)
    results = {name: measure(each.images, dataset) for name, each in made.items()}
    clock.begin("specialization", "losses and metrics again, with one expert left out at a time")
    found = measure_specialization(options, checkpoint, dataset, steps=steps)
    clock.begin("figures", f"drawing into {output}")
    shown = {"base model": made["base"].images, "ours": made["ours"].images}
    draw_comparison(dataset, shown, output / "contact_sheet.png")
    write_figures(draw_routing(output, dataset, made["ours"].weights, found), output, options)
    clock.end()
    write_metrics(output, options, dataset, results, found, clock.seconds)
    print(f"\n{table(results)}\n\n{found}\n")
    print("seconds:", ", ".join(f"{name} {value:.0f}" for name, value in clock.seconds.items()))
    print(f"Look at {output / 'contact_sheet.png'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
