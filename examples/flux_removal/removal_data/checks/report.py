"""Run all checks of a data set, and describe it and what was found."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from removal_data.buckets import assign_buckets
from removal_data.checks.contents import check_content, check_crop, read_content
from removal_data.checks.headers import Size, check_headers
from removal_data.options import DataOptions
from removal_data.sources.layouts import find_samples
from removal_data.sources.samples import Finding, Sample

ADVICE = "Run check_data.py for the whole report, or pass --skip_broken to leave these out."


@dataclass
class Report:
    """What the checks found.

    Attributes:
        samples: the complete ones.
        findings: errors and warnings.
        sizes: width and height by the name of the sample.
        areas: share of the mask by the name of the sample.
        buckets: width and height that samples are scaled and cropped to, with a resolution.
    """

    samples: list[Sample]
    findings: list[Finding]
    sizes: dict[str, Size] = field(default_factory=dict)
    areas: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, Size] = field(default_factory=dict)

    @property
    def broken(self) -> set[str]:
        """Return the names of the samples that cannot be used."""
        return {finding.sample for finding in self.findings if finding.error}

    @property
    def usable(self) -> list[Sample]:
        """Return the samples that can be used."""
        broken = self.broken
        return [sample for sample in self.samples if sample.name not in broken]


def start_report(folder: str | Path, options: DataOptions, *, batch_size: int = 1) -> Report:
    """Find the samples of a folder, and check them by the headers of their files.

    Args:
        folder: with the samples.
        options: how they are read, scaled and cropped.
        batch_size: samples that buckets have at least.
    """
    samples, findings = find_samples(folder)
    sizes, of_headers = check_headers(samples, options)
    report = Report(samples, findings + of_headers, sizes)
    if options.resolution is not None:
        names = [sample.name for sample in report.usable]
        known = [sizes[name] for name in names]
        found = assign_buckets(known, options, batch_size=batch_size)
        report.buckets = dict(zip(names, found, strict=True))
    return report


def add_contents(
    report: Report, options: DataOptions, *, process: int = 0, processes: int = 1
) -> None:
    """Check the pixels of all samples that can be used so far, in threads.

    Args:
        report: receives what was found.
        options: how images and masks are read, scaled and cropped.
        process: the index of this process, which checks its own share of the samples.
        processes: their number.
    """

    def check(sample: Sample) -> tuple[float | None, list[Finding]]:
        content, findings = read_content(sample, options)
        if content is None:
            return None, findings
        findings = check_content(sample, content)
        if bucket := report.buckets.get(sample.name):
            findings += check_crop(sample, content, bucket, options.crop_context)
        return content.area, findings

    samples = report.usable[process::processes]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for sample, (area, findings) in zip(samples, threads.map(check, samples), strict=True):
            report.findings += findings
            if area is not None:
                report.areas[sample.name] = area


def lines_of(findings: Sequence[Finding]) -> list[str]:
    """Return a table of findings, errors first.

    Example:
        >>> print(*lines_of([Finding("a", "mask", "mask", "It is empty.", error=False)]), sep="\\n")
        warning  mask       a  mask    It is empty.
    """
    ordered = sorted(findings, key=lambda finding: (not finding.error, finding.sample))
    width = max((len(finding.sample) for finding in ordered), default=0)
    return [
        f"{'error' if finding.error else 'warning':<9}{finding.kind:<11.10}"
        f"{finding.sample:<{width}}  {finding.part:<8}{finding.text}"
        for finding in ordered
    ]


def describe(report: Report, folder: str | Path) -> str:
    """Return the table that `check_data.py` prints."""
    errors, warned = report.broken, {f.sample for f in report.findings if not f.error}
    total = len({sample.name for sample in report.samples} | errors)
    lines = [
        f"{total} samples in {folder}: {total - len(errors | warned)} without findings, "
        f"{len(warned - errors)} with warnings, {len(errors)} with errors."
    ]
    sizes = Counter(report.sizes.values())
    for (width, height), count in sizes.most_common(10):
        lines.append(f"size       {width}x{height}: {count}")
    if len(sizes) > 10:
        lines.append(f"size       {len(sizes) - 10} more")
    for (width, height), count in sorted(Counter(report.buckets.values()).items()):
        lines.append(f"bucket     {width}x{height}: {count}")
    if report.areas:
        low, middle, high = np.percentile(list(report.areas.values()), (0, 50, 100))
        lines.append(f"mask area  {low:.1%} to {high:.1%} of the image, median {middle:.1%}")
    return "\n".join([*lines, *lines_of(report.findings)])


def raise_errors(report: Report, *, limit: int = 10) -> None:
    """Raise for the errors of a report, up to `limit` of them spelled out.

    Raises:
        ValueError: when there are any.
    """
    errors = [finding for finding in report.findings if finding.error]
    if errors:
        more = f"\n... and {len(errors) - limit} more." if len(errors) > limit else ""
        listed = "\n".join(finding.text for finding in errors[:limit])
        raise ValueError(
            f"Expected data without errors, but got {len(errors)} in {len(report.broken)} "
            f"samples:\n{listed}{more}\n{ADVICE}"
        )
