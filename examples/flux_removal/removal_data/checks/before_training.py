"""Check the data of a run before its model is loaded."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import gather_object

from options.train_options import TrainOptions
from removal_data.checks.report import (
    Report,
    add_contents,
    lines_of,
    raise_errors,
    start_report,
)
from removal_data.dataset import RemovalDataset

MOST_LINES = 20


def check_run_data(options: TrainOptions, accelerator: Accelerator) -> Report:
    """Check headers, then pixels, of which every process reads its share.

    Raises:
        FileNotFoundError: when there are no samples.
        ValueError: for errors, unless `skip_broken` is on; and when it leaves no sample.
    """
    report = start_report(options.train_data_dir, options, batch_size=options.batch_size)
    if not options.skip_broken:
        raise_errors(report)
    if options.check_data == "all":
        process, processes = accelerator.process_index, accelerator.num_processes
        add_contents(report, options, process=process, processes=processes)
        if processes > 1:
            report.findings = list(dict.fromkeys(gather_object(report.findings)))
    if not (options.skip_broken and report.usable):
        raise_errors(report)
    return report


def open_checked(options: TrainOptions, accelerator: Accelerator) -> RemovalDataset:
    """Return the data set of a run without broken samples; print what was found."""
    report = check_run_data(options, accelerator)
    lines = lines_of(report.findings)
    for line in lines[:MOST_LINES]:
        accelerator.print(line)
    if len(lines) > MOST_LINES:
        accelerator.print(f"... and {len(lines) - MOST_LINES} more; check_data.py lists all.")
    if report.broken:
        accelerator.print(f"Left out {len(report.broken)} samples with errors.")
    return RemovalDataset(
        options.train_data_dir, reading=options, skip=report.broken, batch_size=options.batch_size
    )
