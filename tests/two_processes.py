"""Run a script in two processes that train together, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys


def run_in_two_processes(script: str, *arguments: str, timeout: int = 300) -> str:
    """Return what the processes print, or fail with the first error of a process.

    Args:
        script: a path.
        *arguments: of the script.
        timeout: in seconds.
    """
    # `--standalone` takes a free port by itself.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [sys.executable, *launch, script, *arguments],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if ended.returncode:
        start = max(ended.stderr.find("Traceback"), 0)
        raise AssertionError(ended.stdout[-2000:] + ended.stderr[start : start + 6000])
    return ended.stdout
