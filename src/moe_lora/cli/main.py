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
from moe_lora.export.formats.tools import TOOLS

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
        description="Plan trainings; inspect, export and merge mixtures of LoRA experts.",
    )
    sub = root.add_subparsers(required=True, metavar="COMMAND")

    inspect = _command(
        sub, "inspect", commands.inspect, "Show the experts, ranks, layers and norms of a file."
    )
    inspect.add_argument("path", help="Folder of a checkpoint; file or folder of a plain LoRA.")

    export = _command(sub, "export", commands.export, "Write one plain LoRA of a fixed mixture.")
    export.add_argument("checkpoint", help="Folder of a checkpoint.")
    export.add_argument("out", help="Output file or folder; always a folder for the peft format.")
    _add_weights(export)
    export.add_argument(
        "--format", choices=get_args(Format), default="diffusers", help="Layout of the output."
    )
    export.add_argument(
        "--tool", choices=tuple(TOOLS), help="Warn if this tool would not load the output."
    )
    export.add_argument("--rank", type=int, help="Maximum rank per layer; compresses by an SVD.")
    export.add_argument(
        "--dtype", choices=DTYPES, help="Dtype of the output; that of the checkpoint by default."
    )

    merge = _command(
        sub, "merge", commands.merge, "Write a base model with a fixed mixture merged into it."
    )
    merge.add_argument("checkpoint", help="Folder of a checkpoint.")
    merge.add_argument("base", help="Folder of a diffusers model or pipeline.")
    merge.add_argument("out", help="New folder for the merged model.")
    _add_weights(merge)

    plan_command = _command(sub, "plan", plan, "Show the memory and the disk space of a training.")
    add_plan_arguments(plan_command)

    copy = _command(sub, "example", example, "Copy an example into a folder.")
    copy.add_argument("name", choices=EXAMPLES, help="Name of the example.")
    copy.add_argument("directory", help="New or empty folder.")
    copy.add_argument("--overwrite", action="store_true", help="Replace existing files.")
    copy.add_argument("--list", action=ListExamples, help="List the examples and exit.")
    return root


def _command(
    sub: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    command = sub.add_parser(name, help=text, description=text)
    command.add_argument("--json", action="store_true", help="Print JSON.")
    command.set_defaults(run=run)
    return command


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights",
        type=_weights,
        help='Routing weights: one number per expert ("0.5,0.3,0.2"), the name of an expert, or '
        '"uniform"; the fixed weights of the checkpoint by default.',
    )


def _weights(text: str) -> list[float] | str:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return text
