"""Run train.py of the Flux example with CPU processes in the place of GPUs.

Usage: accelerate launch --config_file FILE train_on_cpu.py OPTION...

accelerate enables FSDP2 and DeepSpeed for accelerators only. Here it believes that every process
has one, and the device is the CPU; all else is accelerate's own code. With ACCELERATE_USE_CPU,
which is enough for DDP, nothing is replaced.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

EXAMPLE = Path(__file__).parents[2] / "examples" / "flux_removal"


def prepare_backend(self: PartialState, *_: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def main(train: ModuleType, arguments: list[str]) -> None:
    """Train, and print how the model is distributed once it is."""
    fit = train.fit

    def describe_and_fit(run: Any) -> Path:
        accelerator = run.parts.accelerator
        model = accelerator.unwrap_model(run.parts.model)
        kinds = {
            "FSDP": sum(hasattr(p, "full_tensor") for p in model.parameters()),
            "ZeRO-3": sum(hasattr(p, "ds_id") for p in model.parameters()),
            "ZeRO-2": sum(hasattr(p, "_hp_mapping") for p in model.parameters()),
            "DDP": isinstance(run.parts.model, DistributedDataParallel),
        }
        sys.stdout.write(f"distributed: {next(name for name, found in kinds.items() if found)}\n")
        return fit(run)

    train.fit = describe_and_fit  # type: ignore[attr-defined]
    train.main(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if "ACCELERATE_USE_CPU" not in os.environ:
        PartialState._prepare_backend = prepare_backend
    sys.path.insert(0, str(EXAMPLE))
    import train

    main(train, sys.argv[1:])
