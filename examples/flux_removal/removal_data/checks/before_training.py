"""Check data before a model is loaded."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import gather_object

from removal_data.checks.report import (
    Report,
    add_contents,
    lines_of,
    raise_errors,
    start_report,
)
from removal_data.dataset import RemovalDataset
from removal_data.options import DataOptions

MOST_LINES = 20


def check_data(
    source: str,
    options: DataOptions,
    *,
    batch_size: int = 1,
    pixels: bool = True,
    skip_broken: bool = False,
    accelerator: Accelerator | None = None,
) -> Report:
    """Check headers, then pixels.

    Args:
        source: what `find_samples` takes.
        options: how images and masks are read, scaled and cropped.
        batch_size: samples that buckets have at least.
        pixels: check these, too.
        skip_broken: raise only when no sample can be used.
        accelerator: of the processes, which share the work.

    Raises:
        FileNotFoundError: when there are no samples.
        ValueError: for errors, unless `skip_broken` is on; and when it leaves no sample.
    """
    report = start_report(source, options, batch_size=batch_size)
    if not skip_broken:
        raise_errors(report)
    if pixels:
        process = accelerator.process_index if accelerator else 0
        processes = accelerator.num_processes if accelerator else 1
        add_contents(report, options, process=process, processes=processes)
        if processes > 1:
            report.findings = list(dict.fromkeys(gather_object(report.findings)))
    if not (skip_broken and report.usable):
        raise_errors(report)
    return report


def open_checked(
    source: str,
    options: DataOptions,
    *,
    batch_size: int = 1,
    pixels: bool = True,
    skip_broken: bool = False,
    accelerator: Accelerator | None = None,
) -> RemovalDataset:
    """Return a data set without broken samples; print what was found.

    The arguments and errors are those of `check_data`.
    """
    report = check_data(
        source,
        options,
        batch_size=batch_size,
        pixels=pixels,
        skip_broken=skip_broken,
        accelerator=accelerator,
    )
    show = print if accelerator is None else accelerator.print
    lines = lines_of(report.findings)
    for line in lines[:MOST_LINES]:
        show(line)
    if len(lines) > MOST_LINES:
        show(f"... and {len(lines) - MOST_LINES} more; check_data.py lists all.")
    if report.broken:
        show(f"Left out {len(report.broken)} samples with errors.")
    return RemovalDataset(source, reading=options, skip=report.broken, batch_size=batch_size)
