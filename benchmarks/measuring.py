"""What the benchmarks measure with: interleaved medians, memory, and what they were run on."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


class Times:
    """Hold the seconds of every round of every variant."""

    def __init__(self, names: Iterable[str]) -> None:
        self.rounds: dict[str, list[float]] = {name: [] for name in names}

    def seconds(self, name: str) -> float:
        """Return a variant's median."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, reference: str) -> float:
        """Return the median over the rounds of the time relative to the reference's in that round.

        What disturbs a whole round, such as a clock that changes, cancels out.
        """
        pairs = zip(self.rounds[name], self.rounds[reference], strict=True)
        return statistics.median(own / other for own, other in pairs)


def interleaved(
    steps: Mapping[str, Step], rounds: int, *, warmup: int = 3, device: str = "cpu"
) -> Times:
    """Time variants in turn, every round in a random order, after rounds that do not count.

    Args:
        steps: by name, what one measurement runs.
        rounds: how often each is measured.
        warmup: rounds before that; the first compiles.
        device: whose queue is emptied before a clock is read.
    """
    times, order, shuffled = Times(steps), list(steps), random.Random(0)
    for round_ in range(-warmup, rounds):
        # A variant must not always inherit the caches of the same neighbor.
        shuffled.shuffle(order)
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            if round_ >= 0:
                times.rounds[name].append(time.perf_counter() - start)
    return times


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(step: Step, beside: Iterable[Tensor] = ()) -> int:
    """Count what a forward pass saves for backward.

    Args:
        step: the forward pass.
        beside: tensors that are there anyway, such as parameters and the input; neither they nor
            views of them count.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in beside}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The result holds the graph, so that no saved tensor's address is used again meanwhile.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    del result
    return sum(sizes.values())


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Measure by how much the memory in use rises at most during a step.

    On the CPU the profiler's record of every allocation is added up.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    used = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        used += change
        peak = max(peak, used)
    return peak


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def machine(device: str = "cpu", packages: Sequence[str] = ("torch", "peft")) -> str:
    """Return one line: date, processor, threads, Python and package versions."""
    where = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {where}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    today = datetime.date.today().isoformat()
    return f"{today}, {where}, Python {platform.python_version()}, {versions}"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table whose columns are aligned in the terminal, too."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    written = []
    for index, line in enumerate(lines):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        written.append("| " + " | ".join(cells) + " |")
        if index == 0:
            written.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(written)


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Add the options that all benchmarks share."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file, too")
