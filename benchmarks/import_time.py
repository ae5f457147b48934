"""What `import moe_lora` costs beside `import peft` and `import kornia`.

    python benchmarks/import_time.py

Every import runs in a process of its own, interleaved; the figures are medians of the wall time
that the import statement takes after `import torch`, which all three need.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

STATEMENTS = {
    "peft": "import peft",
    "peft and kornia": "import peft, kornia",
    "moe_lora": "import moe_lora",
}


def seconds(statement: str) -> float:
    code = (
        "import torch, time; start = time.perf_counter();"
        f"{statement}; print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    for statement in STATEMENTS.values():
        seconds(statement)
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(rounds):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values) for name, values in times.items()}
    limit = 1.2 * medians["peft"] + (medians["peft and kornia"] - medians["peft"])
    for name, value in medians.items():
        print(f"{name:16} {value:6.3f} s")
    print(f"{'limit':16} {limit:6.3f} s   1.2 x peft + kornia's own import")
    print(f"{'share of limit':16} {medians['moe_lora'] / limit:6.3f}")


if __name__ == "__main__":
    main()
