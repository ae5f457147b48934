"""Write checkpoints from which a run goes on as if it had never stopped.

A folder `checkpoint-N` holds the adapter as PEFT saves it, `experts/` as plain LoRA files, and
`training_state/`. In a run with an average of the weights, the adapter and its experts are the
average, and `training_state/weights/` holds the weights from which training continues. The folder
is written under a temporary name and renamed when it is whole. Everything is safetensors or JSON.
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
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

import moe_lora
from training_run.averaging import WeightAverage, averaged, has_average
from training_run.optimizer_state import OF_A_ROUTER, load_state, save_state
from training_run.sharding import gather_state, is_sharded

if TYPE_CHECKING:
    from training_run.parts import Run

ADAPTER, TRANSFORMER = "adapter_model.safetensors", "transformer"
STATE, TRAINED = "training_state", "weights"
BEST = "checkpoint-best"


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
    if not (folder / STATE / "state.json").is_file():
        raise FileNotFoundError(
            f"Expected a checkpoint of train.py in {folder}, but it has no "
            "training_state/state.json."
        )
    return folder


def save_checkpoint(run: Run, output_dir: Path, *, limit: int | None = None) -> Path:
    """Write `output_dir/checkpoint-N`; called by every process.

    Args:
        run: its model, adapted by PEFT or trained whole, optimizer, average and model card.
        output_dir: where the folder goes.
        limit: how many checkpoints stay, this one included.

    Returns:
        The folder.
    """
    accelerator, optimizer, average = run.parts.accelerator, run.optimizer, run.average
    model = accelerator.unwrap_model(run.parts.model)
    folder = output_dir / f"checkpoint-{run.progress.step}"
    temporary = output_dir / f".{folder.name}.part"
    state = temporary / STATE
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        state.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if has_average(optimizer, average):
        save_model(accelerator, model, state / TRAINED, experts=False)
    with averaged(optimizer, average):
        save_model(accelerator, model, temporary)
    tensors, entries = save_state(optimizer, model)
    if accelerator.is_main_process:
        run.card(temporary, run.progress.step)
        save_file(tensors, state / "optimizer.safetensors")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        others = {"scaler": scaler, "optimizer": entries}
        if average is not None:
            others["average"] = {"updates": average.updates}
        (state / "state.json").write_text(json.dumps(asdict(run.progress) | others))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in list_checkpoints(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def save_model(
    accelerator: Accelerator, model: nn.Module, folder: Path, *, experts: bool = True
) -> None:
    """Write a model, whose tensors all processes gather where it is sharded."""
    state = gather_state(model) if is_sharded(model) else None
    if not accelerator.is_main_process:
        return
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), state_dict=state)
        if experts and isinstance(model.active_peft_config, moe_lora.MoELoraConfig):
            moe_lora.save_experts(model if state is None else folder, folder / "experts")
    elif state is None:
        assert isinstance(model, FluxTransformer2DModel)
        model.save_pretrained(folder / TRANSFORMER)
    else:
        assert isinstance(model, FluxTransformer2DModel)
        model.save_config(folder / TRANSFORMER)
        save_file(state, folder / TRANSFORMER / SAFETENSORS_WEIGHTS_NAME)


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


def restore_weights(
    model: nn.Module, folder: Path, *, with_average: bool
) -> tuple[list[str], dict[str, Tensor] | None]:
    """Load the weights from which training continues; see `load_model`.

    Args:
        model: as the run built it.
        folder: the checkpoint.
        with_average: whether the run continues the average of the checkpoint.

    Returns:
        What `load_model` returns, and the average of the checkpoint, by parameter.
    """
    trained, average = folder / STATE / TRAINED, None
    if not trained.is_dir():
        return load_model(model, folder), None
    if with_average:
        load_model(model, folder)
        average = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return load_model(model, trained), average


def read_progress(folder: Path, data: dict[str, int]) -> tuple[Progress, str | None]:
    """Return how far a checkpoint is, and what to tell when its order of data cannot go on.

    Args:
        folder: the checkpoint.
        data: what decides the order of the data in the run that goes on.
    """
    entries = json.loads((folder / STATE / "state.json").read_text())
    progress = Progress(entries["step"], entries["position"], data)
    if entries["data"] == data:
        return progress, None
    progress.position = 0
    changed = {k: (entries["data"].get(k), v) for k, v in data.items()}
    told = ", ".join(f"{k} was {a} and is {b}" for k, (a, b) in changed.items() if a != b)
    return progress, f"The order of the data starts anew: {told}."


def load_training_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    folder: Path,
    average: WeightAverage | None = None,
) -> None:
    """Load the state of the optimizer, of the gradient scaler and of the average of the weights.

    Parameters that the checkpoint does not know keep a fresh optimizer state. That of a router
    which the run does not have is left out.

    Raises:
        ValueError: when the checkpoint has the state of another optimizer.
    """
    state = folder / STATE
    entries = json.loads((state / "state.json").read_text())
    tensors = load_file(state / "optimizer.safetensors")
    plain = accelerator.unwrap_model(model)
    load_state(optimizer, plain, tensors, entries.get("optimizer", {}))
    if entries["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(entries["scaler"])
    if average is not None and "average" in entries:
        average.updates = entries["average"]["updates"]
