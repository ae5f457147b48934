"""Compare the time of a benchmark between two checkouts.

    python benchmarks/against.py --base ../before layer.py
    python benchmarks/against.py --base ../before --only ours model.py --modes plain

Arguments after the benchmark's name are the benchmark's own. Each checkout runs in a process of its
own, with its own `src` and, where it has this benchmark, its own `benchmarks`. Both processes build
everything once and then wait; this one lets them take turns in the order base, now, now, base, one
step of one variant at a time, so that a change of the machine's load reaches both. On the CPU the
clock is the process's own, which stands still while other programs have the core. Fresh processes
(`--processes`) make up for the luck of one process's place in memory.

"ratio" is the median over the rounds of now / base in that round; "95 %" is the confidence interval
of that median, from the order statistics, without any assumption about the noise. "fastest" is the
ratio of the fastest rounds of both, which other programs disturbed least.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parents[1]
Ratios = dict[str, list[tuple[float, float]]]


class Checkout:
    """Run a benchmark in a process of its own that waits to be told which step is next."""

    def __init__(self, folder: Path, script: str, arguments: list[str], repeat: float) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(repeat)]
        paths = [str(folder / "src"), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [*command, "--now", str(folder), script, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> Any:
        """Return the next answer: the names of a table's steps, seconds, or `None` at the end."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"Expected an answer, but {self.process.args!r} ended.")
        return json.loads(line)

    def tell(self, name: str | None) -> None:
        """Ask for one step, or with `None` for the next table."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(name) + "\n")
        self.process.stdin.flush()

    def seconds(self, name: str) -> float:
        self.tell(name)
        found: float = self.read()
        return found

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def serve(folder: Path, script: str, arguments: list[str], repeat: float) -> None:
    """Run a benchmark whose measuring function does what the other process asks for."""
    own = folder / "benchmarks"
    benchmarks = own if (own / script).is_file() else HERE / "benchmarks"
    sys.path[0] = str(benchmarks)
    import measuring

    import moe_lora

    assert Path(moe_lora.__file__).resolve().is_relative_to(folder.resolve())
    answers, asked = sys.stdout, sys.stdin

    def interleaved(
        steps: Mapping[str, Any], rounds: int, *, warmup: int = 3, device: str = "cpu"
    ) -> Any:
        times, warm = measuring.Times(steps), set()
        times.rounds = {name: [1.0] for name in steps}  # what the benchmark prints is discarded
        answer(answers, list(steps))
        while (name := json.loads(asked.readline())) is not None:
            for _ in range(0 if name in warm else warmup):
                steps[name]()
            warm.add(name)
            answer(answers, measured(steps[name], repeat, device))
        return times

    def measured(step: Any, repeat: float, device: str) -> float:
        clock = time.process_time if device == "cpu" else time.perf_counter
        count, start = 0, clock()
        while count == 0 or clock() - start < repeat:
            step()
            measuring.synchronize(device)
            count += 1
        return (clock() - start) / count

    measuring.interleaved = interleaved
    # Not compared, and slow.
    measuring.peak_bytes = lambda *args: 1
    measuring.saved_bytes = lambda *args: 1
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(benchmarks / script), run_name="__main__")
    answer(answers, None)


def answer(answers: TextIO, value: Any) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def compare(base: Checkout, now: Checkout, only: str, rounds: int, found: Ratios) -> None:
    """Add pairs of seconds, base and now, to those that were found before."""
    table = 0
    while (names := base.read()) is not None:
        table += 1
        others = now.read() or []
        for round_ in range(rounds):
            for name in (n for n in names if n in others and re.search(only, n)):
                order = (base, now) if round_ % 2 == 0 else (now, base)
                seconds = {checkout: checkout.seconds(name) for checkout in order}
                found.setdefault(f"{table}: {name}", []).append((seconds[base], seconds[now]))
        base.tell(None)
        now.tell(None)


def median_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of a median; all values where they are few.

    Example:
        >>> median_interval([float(i) for i in range(1, 101)])
        (40.0, 61.0)
    """
    ordered, count = sorted(values), len(values)
    left_out = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2) - 1)
    return ordered[left_out], ordered[count - 1 - left_out]


def rows(found: Ratios) -> list[dict[str, Any]]:
    result = []
    for name, pairs in found.items():
        ratios = [now / base for base, now in pairs]
        base, now = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
        row: dict[str, Any] = {
            "variant": name,
            "base ms": base,
            "now ms": now,
            "rounds": len(pairs),
        }
        fastest = min(now for _, now in pairs) / min(base for base, _ in pairs)
        row.update(
            {
                "ratio": statistics.median(ratios),
                "95 %": median_interval(ratios),
                "fastest": fastest,
            }
        )
        result.append(row)
    return result


def report(result: list[dict[str, Any]]) -> None:
    from measuring import machine, table

    print(machine() + "\n")
    cells = [
        [
            row["variant"],
            f"{row['base ms']:.3f}",
            f"{row['now ms']:.3f}",
            f"{row['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*row["95 %"]),
            f"{row['fastest']:.3f}",
        ]
        for row in result
    ]
    print(table(["variant", "base ms", "now ms", "ratio", "95 %", "fastest"], cells))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="the checkout to compare with")
    parser.add_argument("--now", type=Path, default=HERE, help="by default the one of this file")
    parser.add_argument("--rounds", type=int, default=20, help="of each pair of processes")
    parser.add_argument("--processes", type=int, default=2, help="pairs of processes")
    parser.add_argument("--repeat", type=float, default=0.02, help="seconds of a step at least")
    parser.add_argument("--only", default="", help="a regular expression of variants")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file, too")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("benchmark", help="a file of this folder that calls `interleaved`")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the benchmark")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.serve is not None:
        serve(args.now, args.benchmark, args.arguments, args.serve)
        return
    if args.base is None:
        raise SystemExit("Expected `--base` to be the checkout to compare with, but got none.")
    found: Ratios = {}
    for _ in range(args.processes):
        run = (args.benchmark, args.arguments, args.repeat)
        with Checkout(args.base, *run) as base, Checkout(args.now, *run) as now:
            compare(base, now, args.only, args.rounds, found)
    result = rows(found)
    report(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
