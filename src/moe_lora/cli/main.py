"""The command line of `moe-lora`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import get_args

from moe_lora.cli import commands
from moe_lora.cli.example import EXAMPLES, ListExamples, example
from moe_lora.cli.plan import add_plan_arguments, plan
from moe_lora.export.formats import Format

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after `moe-lora`; those of the process by default.

    Returns:
        The exit code: 0, or 1 for a fault of the files, which one sentence on stderr names.
        A wrong command line ends the process with 2.
    """
    try:
        options = parser().parse_args(argv)
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"moe-lora: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(
        prog="moe-lora",
        description="Plan trainings of mixtures of LoRA experts, inspect and export mixtures.",
    )
    sub = root.add_subparsers(required=True, metavar="COMMAND")

    inspect = _command(sub, "inspect", commands.inspect, "experts, ranks, targets and norms")
    inspect.add_argument("path", help="a checkpoint's folder, or a plain LoRA's file or folder")

    export = _command(sub, "export", commands.export, "one plain LoRA of a fixed mixture")
    export.add_argument("checkpoint", help="folder of adapter_config.json and its weights")
    export.add_argument("out", help="a file, or a folder; for the peft format always a folder")
    _add_weights(export)
    export.add_argument("--format", choices=get_args(Format), default="diffusers")
    export.add_argument("--rank", type=int, help="compress every layer to at most this rank")
    export.add_argument("--dtype", choices=DTYPES, help="the checkpoint's dtype by default")

    merge = _command(sub, "merge", commands.merge, "a base model with a fixed mixture merged in")
    merge.add_argument("checkpoint", help="folder of adapter_config.json and its weights")
    merge.add_argument("base", help="folder of a diffusers model or pipeline")
    merge.add_argument("out", help="a new folder, for the merged copy")
    _add_weights(merge)

    plan_command = _command(sub, "plan", plan, "memory and disk that a training needs")
    add_plan_arguments(plan_command)

    copy = _command(sub, "example", example, "a copy of an example, ready to run")
    copy.add_argument("name", choices=EXAMPLES, help="the example")
    copy.add_argument("directory", help="a new or an empty folder")
    copy.add_argument("--overwrite", action="store_true", help="replace files that are there")
    copy.add_argument("--list", action=ListExamples, help="print the examples")
    return root


def _command(
    sub: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    command = sub.add_parser(name, help=text, description=f"Show or write {text}.")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)
    return command


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights",
        type=_weights,
        help='one number per expert ("0.5,0.3,0.2"), an expert\'s name, or "uniform"; by default '
        "what the checkpoint's routing fixes",
    )


def _weights(text: str) -> list[float] | str:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return text
