"""What `import moe_lora` costs beside `import peft` and `import kornia`.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --base ../before

Every import runs in a process of its own, interleaved; the figures are medians of the wall time
that the import statement takes after `import torch`, which all three need. With `--base`, another
checkout's `moe_lora` is imported, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

STATEMENTS = {
    "peft": "import peft",
    "peft and kornia": "import peft, kornia",
    "moe_lora": "import moe_lora",
}
BASE = "moe_lora of base"
HERE = Path(__file__).parents[1]


def seconds(statement: str, checkout: Path | None = None) -> float:
    code = (
        "import torch, time; start = time.perf_counter();"
        f"{statement}; print(time.perf_counter() - start)"
    )
    paths = {} if checkout is None else {"PYTHONPATH": str(checkout.resolve() / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **paths},
    )
    return float(done.stdout.split()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--base", type=Path, help="a checkout to compare with")
    args = parser.parse_args(argv)
    imports = {name: partial(seconds, statement) for name, statement in STATEMENTS.items()}
    imports["moe_lora"] = partial(seconds, STATEMENTS["moe_lora"], HERE)
    if args.base is not None:
        imports[BASE] = partial(seconds, STATEMENTS["moe_lora"], args.base)
    for measure in imports.values():
        measure()
    times: dict[str, list[float]] = {name: [] for name in imports}
    for _ in range(args.rounds):
        for name, measure in imports.items():
            times[name].append(measure())
    medians = {name: statistics.median(values) for name, values in times.items()}
    limit = 1.2 * medians["peft"] + (medians["peft and kornia"] - medians["peft"])
    for name, value in medians.items():
        print(f"{name:16} {value:6.3f} s")
    print(f"{'limit':16} {limit:6.3f} s   1.2 x peft + kornia's own import")
    print(f"{'share of limit':16} {medians['moe_lora'] / limit:6.3f}")
    if args.base is not None:
        pairs = zip(times["moe_lora"], times[BASE], strict=True)
        ratio = statistics.median(now / base for now, base in pairs)
        print(f"{'moe_lora / base':16} {ratio:6.3f}")


if __name__ == "__main__":
    main()
