"""Run everything that needs a GPU, in at most 25 minutes and without downloads.

    python benchmarks/gpu.py                  on a CUDA machine
    python benchmarks/gpu.py --small          every part at its smallest, also on a CPU

Tests on CUDA, the layer and model benchmarks at the sizes of FLUX.1, quantized base models,
`torch.compile`, planned and measured memory, pixel losses and longer training of the bundled model.
Each part is a process of its own. After each of them `gpu.json` and `gpu.md` are written anew, so
that an interruption leaves what was found until then; they say what was skipped and why.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gpu_page import page
from gpu_sections import ROOT, Section, sections
from measuring import machine

PACKAGES = ("torch", "peft", "diffusers", "accelerate")
KEPT_CHARACTERS = 20_000


class Stopped(BaseException):
    """End the report because a signal came."""


def stop(number: int, _: FrameType | None) -> None:
    raise Stopped(signal.Signals(number).name)


def run(section: Section, seconds: float) -> dict[str, Any]:
    """Run a section's command and return its outcome.

    Args:
        section: of the report.
        seconds: after which its process and those that it started are killed.
    """
    start = time.monotonic()
    paths = (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        section.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    status, why = "done", ""
    try:
        printed, errors = process.communicate(timeout=seconds)
        if process.returncode:
            status, why = "failed", f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        printed, errors = end(process)
        status, why = "stopped", f"after {seconds:.0f} s"
    except Stopped:
        end(process)
        raise
    figures = section.figures
    return {
        "status": status,
        "why": why,
        "seconds": round(time.monotonic() - start, 1),
        "printed": printed[-KEPT_CHARACTERS:],
        "errors": errors[-KEPT_CHARACTERS:] if status != "done" else "",
        "figures": json.loads(figures.read_text()) if figures and figures.exists() else None,
    }


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Kill a process and its children, and return what they had printed."""
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()


def skipped(why: str) -> dict[str, Any]:
    """Return the outcome of a section that did not run."""
    return {"status": "skipped", "why": why, "seconds": 0.0, "printed": "", "errors": ""}


def write(report: dict[str, Any], output: Path) -> None:
    """Write figures and page."""
    (output / "gpu.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (output / "gpu.md").write_text(page(report), encoding="utf-8")


def run_all(parts: Iterable[Section], report: dict[str, Any], output: Path, minutes: float) -> None:
    """Run the sections in turn, as long as time is left, and write the report after each."""
    waiting, deadline = list(parts), time.monotonic() + 60 * minutes
    why = f"no time left of {minutes:g} minutes"
    try:
        while waiting and (left := deadline - time.monotonic()) > 0:
            section = waiting[0]
            print(f"[{section.name}] {section.title}", flush=True)
            found = run(section, min(60 * section.minutes, left))
            print(f"  {found['status']} {found['why']} ({found['seconds']:.0f} s)", flush=True)
            report["sections"].append(entry(waiting.pop(0)) | found)
            write(report, output)
    except Stopped as signal_name:
        why = f"the report was stopped by {signal_name}"
    report["sections"] += [entry(section) | skipped(why) for section in waiting]
    write(report, output)


def entry(section: Section) -> dict[str, Any]:
    """Return what the report says of a section before it ran."""
    command = shlex.join(["python", *section.command[1:]])
    return {"name": section.name, "title": section.title, "command": command}


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs") / "gpu")
    parser.add_argument("--minutes", type=float, default=25, help="after which nothing runs")
    parser.add_argument("--small", action="store_true", help="all at its smallest")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sections by name, or its start")
    args = parser.parse_args(arguments)
    if not (args.small or torch.cuda.is_available()):
        parser.error("expected a CUDA device; --small runs every part at its smallest on the CPU")
    return args


def chosen(parts: list[Section], names: Sequence[str] | None) -> list[Section]:
    """Return the sections whose names begin with one of the given ones."""
    found = [part for part in parts if names is None or part.name.startswith(tuple(names))]
    if not found:
        known = ", ".join(part.name for part in parts)
        raise SystemExit(f"Expected sections among {known}, but got {', '.join(names or ())}.")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; the exit status is 0 when every section is done."""
    args = parse_args(arguments)
    output: Path = args.output_dir.resolve()
    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = chosen(sections(output, device, small=args.small), args.only)
    for part in parts:
        if part.figures is not None:
            part.figures.unlink(missing_ok=True)
    report: dict[str, Any] = {
        "machine": machine(device, PACKAGES),
        "device": device,
        "small": args.small,
        "sections": [],
    }
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    run_all(parts, report, output, args.minutes)
    print(f"Look at {output / 'gpu.md'}.")
    return int(any(part["status"] != "done" for part in report["sections"]))


if __name__ == "__main__":
    sys.exit(main())
