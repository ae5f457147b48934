"""Check removal triplets before they are used: a table, a contact sheet, and an exit code.

python check_data.py data/train

The exit code is 0 without findings, 1 with warnings (suspicious samples) and 2 with errors (samples
that cannot be used). With --skip_broken it is 1 as long as one sample can be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from image_io.options import add_reading_flags, options_from
from removal_data.checks.data_sheet import draw_samples
from removal_data.checks.report import Report, add_contents, describe, start_report
from removal_data.options import DataOptions

FINE, WARNINGS, ERRORS = 0, 1, 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data_dir", metavar="DIR", help="a folder, a manifest, or datasets:NAME")
    add(
        "--output_dir",
        type=Path,
        default=Path("outputs") / "check_data",
        help="where contact_sheet.png goes",
    )
    add("--rows", type=int, default=16, help="samples on the contact sheet; 0 for none")
    add("--skip_broken", action="store_true", help="samples with errors are left out in training")
    add("--batch_size", type=int, default=1, help="samples that buckets have at least")
    add("--headers_only", action="store_true", help="do not read pixels")
    add_reading_flags(parser, DataOptions)
    return parser


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, DataOptions]:
    """Read the command line; options that cannot be honored end the program with a message."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.batch_size < 1:
        parser.error(f"expected --batch_size to be >= 1, but got {args.batch_size}")
    if args.rows < 0:
        parser.error(f"expected --rows to be >= 0, but got {args.rows}")
    try:
        return args, options_from(args, DataOptions)
    except ValueError as error:
        parser.error(str(error))


def exit_code(report: Report, *, skip_broken: bool) -> int:
    """Return the exit code that says what was found."""
    if report.broken and not (skip_broken and report.usable):
        return ERRORS
    return WARNINGS if report.findings else FINE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    args, options = parse(arguments)
    try:
        report = start_report(args.data_dir, options, batch_size=args.batch_size)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return ERRORS
    if not args.headers_only:
        add_contents(report, options)
    print(describe(report, args.data_dir))
    path = args.output_dir / "contact_sheet.png"
    if args.rows and report.usable and not args.headers_only:
        shown = draw_samples(report, options, path, rows=args.rows)
        print(f"Wrote {path} with {shown} samples, those with warnings first.")
    return exit_code(report, skip_broken=args.skip_broken)


if __name__ == "__main__":
    sys.exit(main())
