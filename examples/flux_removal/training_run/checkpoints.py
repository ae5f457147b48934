"""Write checkpoints from which a run goes on as if it had never stopped.

A folder `checkpoint-N` holds the adapter as PEFT saves it, `experts/` as plain LoRA files, and
`training_state/`. It is written under a temporary name and renamed when it is whole. Everything is
safetensors or JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

import moe_lora

if TYPE_CHECKING:
    from training_run.parts import Run

ADAPTER, TRANSFORMER = "adapter_model.safetensors", "transformer"
BEST = "checkpoint-best"
OF_A_ROUTER = re.compile(r"(^|\.)moe_router\.")
"""The names of a router's parameters, in models and in files."""


@dataclass
class Progress:
    """Say how far a run is.

    Args:
        step: optimizer steps done.
        position: batches dealt to each process, since the order of the data last started anew.
        data: what decides the order of the data.
    """

    step: int = 0
    position: int = 0
    data: dict[str, int] = field(default_factory=dict)


def step_of(folder: Path) -> int:
    """Return N of `checkpoint-N`, and -1 for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0]
    return sorted(folders, key=step_of)


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """Return the folder to resume from, or `None` to start at step 0.

    Args:
        output_dir: where the run's checkpoints are.
        wanted: a folder; "latest", which is none where the run has left none; or `None`.

    Raises:
        FileNotFoundError: when the named folder is no checkpoint of `train.py`.
        FileExistsError: when nothing is to be resumed, but `output_dir` has checkpoints.
    """
    known = list_checkpoints(output_dir)
    if wanted is None:
        kept = [folder for folder in (output_dir / BEST, *known) if folder.is_dir()]
        if kept:
            raise FileExistsError(
                f"{kept[-1]} is there already. Go on from it with --resume_from_checkpoint "
                "latest, or choose another --output_dir."
            )
        return None
    if wanted == "latest":
        return known[-1] if known else None
    folder = Path(wanted)
    if not (folder / "training_state" / "state.json").is_file():
        raise FileNotFoundError(
            f"Expected a checkpoint of train.py in {folder}, but it has no "
            "training_state/state.json."
        )
    return folder


def save_checkpoint(run: Run, output_dir: Path, *, limit: int | None = None) -> Path:
    """Write `output_dir/checkpoint-N`; called by every process.

    Args:
        run: its model, adapted by PEFT or trained whole, optimizer, progress and model card.
        output_dir: where the folder goes.
        limit: how many checkpoints stay, this one included.

    Returns:
        The folder.
    """
    accelerator, optimizer = run.parts.accelerator, run.optimizer
    model = accelerator.unwrap_model(run.parts.model)
    folder = output_dir / f"checkpoint-{run.progress.step}"
    temporary = output_dir / f".{folder.name}.part"
    state = temporary / "training_state"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        state.mkdir(parents=True)
    accelerator.wait_for_everyone()
    save_model(accelerator, model, temporary)
    if accelerator.is_main_process:
        run.card(temporary, run.progress.step)
        tensors = {
            f"{key}/{name}": value.detach().contiguous().cpu()
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        save_file(tensors, state / "optimizer.safetensors")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        (state / "state.json").write_text(json.dumps(asdict(run.progress) | {"scaler": scaler}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in list_checkpoints(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def save_model(accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
    """Write the adapter and its experts, or the whole transformer; called by every process."""
    if not accelerator.is_main_process:
        return
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
        if isinstance(model.active_peft_config, moe_lora.MoELoraConfig):
            moe_lora.save_experts(model, folder / "experts")
    else:
        assert isinstance(model, FluxTransformer2DModel)
        model.save_pretrained(folder / TRANSFORMER)


def load_model(model: nn.Module, folder: Path) -> list[str]:
    """Load a checkpoint's weights into a model that was built as the run built it.

    Returns:
        What to tell of a router that the checkpoint or the run lacks.

    Raises:
        FileNotFoundError: when the checkpoint is of another kind of run.
        ValueError: when names do not agree otherwise.
    """
    if not isinstance(model, PeftModel):
        if not (folder / TRANSFORMER).is_dir():
            raise FileNotFoundError(f"Expected a whole transformer in {folder / TRANSFORMER}.")
        trained = FluxTransformer2DModel.from_pretrained(folder / TRANSFORMER)
        model.load_state_dict(trained.state_dict())
        return []
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"Expected an adapter in {folder / ADAPTER}.")
    outcome = set_peft_model_state_dict(model, load_file(folder / ADAPTER))
    routers = [m for m in model.modules() if isinstance(m, moe_lora.Router)]
    of_router = {id(p) for router in routers for p in router.parameters()}
    trainable = {n: id(p) for n, p in model.named_parameters() if p.requires_grad}
    missing = [name for name in outcome.missing_keys if name in trainable]
    wrong = [name for name in missing if trainable[name] not in of_router]
    unknown = [name for name in outcome.unexpected_keys if not OF_A_ROUTER.search(name)]
    if wrong or unknown:
        raise ValueError(
            f"Expected {folder / ADAPTER} to hold the adapter that the options describe, but it "
            f"lacks {wrong[:3]} and also has {unknown[:3]}."
        )
    notes = ["The checkpoint has no router: it starts fresh."] if missing else []
    if outcome.unexpected_keys:
        notes.append("The checkpoint has a router, but this run asks none: it is left out.")
    return notes


def read_progress(folder: Path, data: dict[str, int]) -> tuple[Progress, str | None]:
    """Return how far a checkpoint is, and what to tell when its order of data cannot go on.

    Args:
        folder: the checkpoint.
        data: what decides the order of the data in the run that goes on.
    """
    entries = json.loads((folder / "training_state" / "state.json").read_text())
    progress = Progress(entries["step"], entries["position"], data)
    if entries["data"] == data:
        return progress, None
    progress.position = 0
    changed = {k: (entries["data"].get(k), v) for k, v in data.items()}
    told = ", ".join(f"{k} was {a} and is {b}" for k, (a, b) in changed.items() if a != b)
    return progress, f"The order of the data starts anew: {told}."


def load_training_state(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, folder: Path
) -> None:
    """Load the optimizer's state and the gradient scaler's.

    Parameters that the checkpoint does not know keep a fresh optimizer state. That of a router
    which the run does not have is left out.
    """
    state = folder / "training_state"
    parameters = dict(accelerator.unwrap_model(model).named_parameters())
    for entry, value in load_file(state / "optimizer.safetensors").items():
        key, _, name = entry.partition("/")
        if name not in parameters and OF_A_ROUTER.search(name):
            continue
        parameter = parameters[name]
        home = "cpu" if key == "step" else parameter.device
        optimizer.state[parameter][key] = value.to(home)
    scaler = json.loads((state / "state.json").read_text())["scaler"]
    if scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
