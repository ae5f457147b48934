"""Run a script in two processes that train together, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_in_two_processes(script: str, *arguments: str, timeout: int = 300) -> str:
    """Return what the processes print, or fail with the first error of a process.

    Args:
        script: a path.
        *arguments: of the script.
        timeout: in seconds.
    """
    # `--standalone` takes a free port by itself.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return _run([*launch, script, *arguments], {"ACCELERATE_USE_CPU": "true"}, timeout)


def launch_with_accelerate(config: Path, *arguments: str, timeout: int = 300) -> str:
    """Run train.py of the Flux example as a configuration file of accelerate says, on the CPU.

    Args:
        config: the file.
        *arguments: of train.py.
        timeout: in seconds.

    Returns:
        What the processes print; see `distributed/train_on_cpu.py`.
    """
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    cpu = {"ACCELERATE_USE_CPU": "true"} if config.stem == "ddp" else {}
    script = Path(__file__).parent / "distributed" / "train_on_cpu.py"
    return _run([*launch, "--config_file", str(config), str(script), *arguments], cpu, timeout)


def _run(command: list[str], environment: dict[str, str], timeout: int) -> str:
    ended = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if ended.returncode:
        start = max(ended.stderr.find("Traceback"), 0)
        raise AssertionError(ended.stdout[-2000:] + ended.stderr[start : start + 6000])
    return ended.stdout
