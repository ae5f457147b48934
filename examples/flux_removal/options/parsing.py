"""Options from the command line and from YAML files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser

from options.train_options import TrainOptions
from options.yaml_files import yaml_flags


def enable_weighed_losses(flags: list[str]) -> list[str]:
    """Add the switches of losses whose weights are given, unless these are given, too."""
    given = {flag.partition("=")[0] for flag in flags}
    names = [
        name
        for name in ("boundary", "consistency", "detail")
        if f"--{name}_loss_weight" in given and f"--enable_{name}_loss" not in given
    ]
    added = [f"--enable_{name}_loss" for name in names]
    if added and "--enable_mask_info" not in given:
        added.append("--enable_mask_info")
    return flags + added


def parse_options(arguments: Sequence[str] | None = None) -> TrainOptions:
    """Read options from YAML files, which come first, and from flags, which win.

    Args:
        arguments: `[file.yaml ...] [--flag value ...]`; those of the command line by default. The
            weight of a specialized loss enables it, unless its switch is given.

    Raises:
        ValueError: for options that cannot be honored together. Unknown options and values end
            the program with a message, as argparse does.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags: list[str] = []
    while given and given[0].endswith((".yaml", ".yml")):
        flags += yaml_flags(Path(given.pop(0)))
    parser = HfArgumentParser(
        TrainOptions,
        prog="train.py",
        usage="%(prog)s [config.yaml ...] --train_data_dir DIR [--option value ...]",
        description="Train LoRA experts and their router to remove objects.",
        allow_abbrev=False,
    )
    options, unknown = parser.parse_args_into_dataclasses(
        enable_weighed_losses(flags + given),
        return_remaining_strings=True,
        look_for_args_file=False,
    )
    if unknown:
        parser.error(f"unknown options: {' '.join(unknown)}")
    result: TrainOptions = options
    return result
