"""Compare a plain LoRA with mixtures at removing objects from real photographs.

Every row is trained by examples/flux_removal/train.py on the same data in the same order, with the
same number of trainable parameters (a router's come on top) and of steps, and measured on
photographs that no training sees. A finished run is kept, so that the whole can be stopped and
started again, or be run by several processes over different --rows or --seeds.

python benchmarks/removal.py --seeds 0 1 2          trains and measures what is not done yet
python benchmarks/removal.py --report               writes OUT/report.md and OUT/contact_sheet.png
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "flux_removal"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

from removal_report import write_report
from removal_rows import ROWS, available, options_of, read_base, variants

import evaluate
import make_data
import train

CONFIG = Path(__file__).with_suffix(".yaml")
BASE_MODEL = "base"
# The model's own images: what is kept of the source says nothing about the training.
MEASURING = ("--batch_size", "8", "--device", "cpu", "--dtype", "fp32", "--outside", "prediction")
ALL_LOSSES = ("base_loss", "boundary_loss", "consistency_loss", "detail_loss")
SHARED_WITH_MEASURING = (
    *("batch_size", "max_sigma"),
    *("weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
)


class StoppedError(Exception):
    """Say that a training was told to stop."""


def prepare_data(folder: Path, *, train_scenes: int, scenes: int, size: int) -> Path:
    """Write the triplets, unless they are there; another process may do the same meanwhile.

    Raises:
        ValueError: when the folder holds other triplets.
    """
    stamp = folder / "complete.json"
    if not stamp.exists():
        ours = folder.with_name(f"{folder.name}.{os.getpid()}")
        counts = ["--train_count", str(train_scenes), "--test_count", str(scenes)]
        make_data.main(["--output_dir", str(ours), *counts, "--size", str(size)])
        try:
            ours.rename(folder)
        except OSError:
            shutil.rmtree(ours)
    found = json.loads(stamp.read_text(encoding="utf-8"))
    if (found["train"], found["test"], found["size"]) != (train_scenes, scenes, size):
        raise ValueError(
            f"Expected {folder} to hold {train_scenes} and {scenes} scenes of {size} pixels, but "
            f"it holds {found['train']} and {found['test']} of {found['size']}. Use another --out."
        )
    return folder


def run_one(
    folder: Path, name: str, losses: bool, seed: int, settings: dict[str, Any], data: Path
) -> None:
    """Train and measure one run, as far as that is not done yet.

    Raises:
        ValueError: when the folder holds a run of other settings.
        StoppedError: when the training was told to stop.
    """
    if begin(folder, settings):
        print(f"{folder.name}: done before")
        return
    start = time.monotonic()
    checkpoint = train_one(folder, settings["train"], data)
    trained = time.monotonic() - start
    result = {"row": name, "losses": losses, "seed": seed, "parameters": count(checkpoint)}
    measured = measure(folder, checkpoint, settings, data, ablate=not ROWS[name].plain)
    seconds = {"training": round(trained, 1), "evaluation": measured.pop("seconds")}
    entries = result | {"seconds": seconds} | measured
    write_atomically(folder / "result.json", json.dumps(entries, indent=1))
    print(f"{folder.name}: done in {time.monotonic() - start:.0f} s", flush=True)


def begin(folder: Path, settings: dict[str, Any]) -> bool:
    """Make a run's folder, or go on in it; tell whether the run is finished.

    Raises:
        ValueError: when the run began with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.yaml"
    if not file.exists():
        write_atomically(file, yaml.safe_dump(settings))
    held = yaml.safe_load(file.read_text(encoding="utf-8"))
    if held != settings:
        before, now = held["train"] | held["evaluation"], settings["train"] | settings["evaluation"]
        changed = sorted(k for k in before | now if before.get(k) != now.get(k))
        raise ValueError(
            f"Expected {folder} to go on as it began, but {changed} differ. Use another --out, "
            "or delete the folder."
        )
    return (folder / "result.json").exists()


def train_one(folder: Path, entries: dict[str, Any], data: Path) -> Path:
    """Train a run to its end, from its last checkpoint if there is one; return the checkpoint."""
    kept = folder / "checkpoint"
    if kept.is_dir():
        return kept
    file = folder / "train.yaml"
    where = {
        "train_data_dir": str(data / "train"),
        "output_dir": str(folder / "training"),
        "logging_dir": str(folder / "logs"),
        "report_to": "none",
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
    }
    write_atomically(file, yaml.safe_dump(entries | where))
    train.main([str(file)])
    trained = folder / "training" / f"checkpoint-{entries['max_train_steps']}"
    if not trained.is_dir():
        raise StoppedError(f"{folder.name} was stopped; it will go on from its last checkpoint.")
    trained.rename(kept)
    shutil.rmtree(kept / "training_state")
    shutil.rmtree(folder / "training")
    return kept


def count(checkpoint: Path) -> dict[str, int]:
    """Count the parameters of a checkpoint: of its adapter, and of its router."""
    numbers = {"adapter": 0, "router": 0}
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            whose = "router" if "router" in key else "adapter"
            numbers[whose] += file.get_tensor(key).numel()
    return numbers


def measure(
    folder: Path,
    checkpoint: Path | None,
    settings: dict[str, Any],
    data: Path,
    *,
    ablate: bool = False,
) -> dict[str, Any]:
    """Run `evaluate.py` on the test scenes, and return its measurements.

    Args:
        folder: of the run; it keeps the images.
        checkpoint: of the run; None for the base model.
        settings: of the run.
        data: the scenes.
        ablate: measure losses and metrics without each expert, too.
    """
    start = time.monotonic()
    output = folder / "evaluation"
    flags = ["--data_dir", str(data / "test"), "--output_dir", str(output), *MEASURING]
    flags += ["--steps", str(settings["evaluation"]["denoising_steps"])]
    if "flux_fill_id" in settings["train"]:
        flags += ["--flux_fill_id", settings["train"]["flux_fill_id"]]
    if checkpoint is not None:
        flags += ["--checkpoint", str(checkpoint)]
    if ablate:
        file = folder / "ablation.yaml"
        write_atomically(file, yaml.safe_dump(ablation_options(settings["train"])))
        flags += ["--ablate_experts", str(file)]
    evaluate.main(flags)
    found = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    (samples,) = found["samples"].values()
    lines = (data / "test" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = {entry["stem"]: entry["mask"] for entry in map(json.loads, lines)}
    measured = {"samples": [sample | {"kind": kinds[sample["stem"]]} for sample in samples]}
    if ablate:
        measured["specialization"] = found["specialization"]
    return measured | {"seconds": round(time.monotonic() - start, 1)}


def ablation_options(entries: dict[str, Any]) -> dict[str, Any]:
    """Return options with all losses, whatever the run was trained by."""
    known = {name: entries[name] for name in SHARED_WITH_MEASURING if name in entries}
    return known | {f"enable_{name}": True for name in (*ALL_LOSSES, "mask_info")}


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def measure_base(
    folder: Path, base: dict[str, Any], evaluation: dict[str, Any], data: Path
) -> None:
    """Measure the model that all rows start from."""
    which = {name: base[name] for name in ("flux_fill_id",) if name in base}
    settings = {"train": which, "evaluation": evaluation}
    if not begin(folder, settings):
        entries = {"row": BASE_MODEL} | measure(folder, None, settings, data)
        write_atomically(folder / "result.json", json.dumps(entries, indent=1))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", nargs="+", help=f"of {list(ROWS)}; all that this version can run by default")
    add("--losses", action="store_true", help="only with the specialized losses")
    add("--no_losses", action="store_true", help="only without them")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, help="of training; those of --config by default")
    add("--scenes", type=int, default=48, help="test scenes")
    add("--train_scenes", type=int, default=480)
    add("--size", type=int, default=128, help="side of a scene in pixels")
    add("--denoising_steps", type=int, default=4)
    add("--config", type=Path, default=CONFIG, help="options of train.py for all rows")
    add("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="change what --config says")
    add("--out", type=Path, default=Path("outputs") / "removal")
    add("--threads", type=int, help="of torch")
    add("--report", action="store_true", help="train nothing; write the report of what is done")
    add("--baseline", default="plain", choices=list(ROWS), help="row that the report compares with")
    add(
        "--baseline_losses",
        default="same",
        choices=("same", "with", "without"),
        help="and by which losses it was trained",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    out: Path = args.out
    if args.report:
        print(write_report(out, args.baseline, args.baseline_losses))
        return 0
    both = args.losses == args.no_losses
    losses = [False, True] if both else [args.losses]
    try:
        chosen = variants(args.rows or available(), losses)
        base = read_base(args.config, args.set, args.steps)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    diffusers_logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    data = prepare_data(
        out / "data", train_scenes=args.train_scenes, scenes=args.scenes, size=args.size
    )
    evaluation = {"denoising_steps": args.denoising_steps}
    measure_base(out / "runs" / BASE_MODEL, base, evaluation, data)
    for seed in args.seeds:
        for name, with_losses in chosen:
            settings = {
                "train": options_of(ROWS[name], with_losses, seed, base),
                "evaluation": evaluation,
            }
            folder = out / "runs" / f"{name}-{'losses' if with_losses else 'base'}-{seed}"
            try:
                run_one(folder, name, with_losses, seed, settings, data)
            except StoppedError as stopped:
                print(stopped)
                return 1
    print(f"Now: python benchmarks/removal.py --report --out {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
