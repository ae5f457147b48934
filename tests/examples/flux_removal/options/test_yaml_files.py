from __future__ import annotations

import dataclasses
import functools
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import HfArgumentParser

from options.parsing import parse_options
from options.train_options import TrainOptions
from options.yaml_files import dump_options, write_options, yaml_flags

DATA = ["--train_data_dir", "data"]
FIELDS = {field.name: field for field in dataclasses.fields(TrainOptions)}
TYPES = typing.get_type_hints(TrainOptions)


class Unchecked(TrainOptions):
    """Options in any combination."""

    def __post_init__(self) -> None:
        pass


@functools.cache
def parser() -> HfArgumentParser:
    return HfArgumentParser(Unchecked, allow_abbrev=False)


def others(name: str) -> list[Any]:
    """Return values of an option that differ from its default, and are hard to write."""
    arguments = typing.get_args(TYPES[name])
    kinds = arguments if type(None) in arguments else (TYPES[name],)
    kind, default = kinds[0], FIELDS[name].default
    if typing.get_origin(kind) is Literal:
        return [value for value in typing.get_args(kind) if value != default]
    if typing.get_origin(kind) is list:
        return [["to_q", "to_k"], [r".*\.(to_q|to_k)$"], ["all-linear"]]
    if kind is bool:
        return [not default]
    if kind is int:
        return [7, 0]
    if kind is float:
        return [0.5, 1e-05, 3.0]
    assert kind is str, kind
    words = ["yes", "null", "1e3", "-1 degree", "-x", "{}", "3"]
    return [*words, "a: b # c", "two\nlines", "ä 'x' \"y\""]


CASES = [(name, value) for name in FIELDS for value in [*others(name), FIELDS[name].default]]


@pytest.mark.parametrize(("name", "value"), [c for c in CASES if c[1] is not dataclasses.MISSING])
def test_every_option_is_read_as_it_was_written(name: str, value: Any, tmp_path: Path) -> None:
    options = Unchecked(**{"train_data_dir": "data"} | {name: value})
    path = tmp_path / "options.yaml"
    path.write_text(dump_options(options), encoding="utf-8")
    (found,) = parser().parse_args_into_dataclasses(yaml_flags(path), look_for_args_file=False)
    assert getattr(found, name) == value
    assert found == options


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--boundary_loss_weight", "0.8", "--detail_loss_weight", "0.1"],
        [
            "--use_lora",
            "false",
            "--no_enable_base_loss",
            "--enable_detail_loss",
            "--enable_mask_info",
        ],
        ["--target_modules", "to_q", "to_k", "--routing", "always", "--top_k", "2"],
        ["--router_kwargs", '{"hidden_dim": 8, "prior_scale": 0.5}', "--prompt", ""],
        ["--target_modules", r".*single.*\.(to_q|proj_mlp)", "--learning_rate", "1e-05"],
        ["--output_dir", "here", "--logging_dir", "there", "--report_to", "all"],
        ["--validation_data_dir", "held", "--validation_metric", "ssim/inside"],
    ],
)
def test_the_file_starts_the_same_run(flags: list[str], tmp_path: Path) -> None:
    options = parse_options([*DATA, *flags])
    path = tmp_path / "options.yaml"
    path.write_text(dump_options(options), encoding="utf-8")
    assert parse_options([str(path)]) == options


def test_another_output_folder_has_its_own_logs(tmp_path: Path) -> None:
    options = parse_options([*DATA, "--output_dir", str(tmp_path / "one")])
    path = write_options(options)
    assert path == tmp_path / "one" / "options.yaml"
    found = parse_options([str(path), "--output_dir", str(tmp_path / "two")])
    assert found.logging_dir == str(tmp_path / "two" / "logs")
