"""Reader of the checkpoint format, for loading, inspecting and exporting."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from peft.utils import WEIGHTS_NAME as PICKLE_NAME
from torch import Tensor

from moe_lora.safetensors_io import read_header, read_json, read_tensors, widened
from moe_lora.tuner.config import PEFT_TYPE, MoELoraConfig
from moe_lora.tuner.state_dict.names import EXPERTS_PART
from moe_lora.tuner.state_dict.stored import CONFIG_KEY, WEIGHTS_NAME, StoredWeights
from moe_lora.tuner.state_dict.stored import read_header as json_of_header

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
DIFFUSERS_KEY = "lora_adapter_metadata"
"""Key of the config that diffusers writes into the header of a weights file."""


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint.

    Attributes:
        config: the adapter's configuration; its `stored` has the weights file's path and shapes.
        tensors: the tensors by name in the file, without a pipeline component's prefix; on the CPU.
    """

    config: MoELoraConfig
    tensors: dict[str, Tensor]

    @property
    def stored(self) -> StoredWeights:
        """Return the shapes of the tensors."""
        assert self.config.stored is not None
        return self.config.stored


def read_checkpoint(
    directory: str | os.PathLike[str], config: MoELoraConfig | None = None
) -> Checkpoint:
    """Read a checkpoint without a model.

    Args:
        directory: the folder of the checkpoint.
        config: the adapter's configuration, for weights without one; by default that of the
            folder or else of the weights file's header.

    Returns:
        The config and the tensors, with finite values and floating-point experts. They are not
        checked against each other; see `StoredWeights.check_fit` and `StoredWeights.check_shapes`.

    Raises:
        FileNotFoundError: when the folder or one of its two files is missing.
        ValueError: when a file is corrupt, of another method or of a newer version; for NaN or inf.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a checkpoint's folder at {str(folder)!r}, but got none.")
    given, config = config, copy.deepcopy(config)
    if config is None and (folder / CONFIG_NAME).is_file():
        file = folder / CONFIG_NAME
        remedy = "Load it with `peft.PeftModel.from_pretrained`."
        config = _to_config(file, read_json(file), remedy)
    file = weights_file(folder)
    tensors, header = read_tensors(file)
    if config is None:
        config, component = _config_of_header(file, header)
        tensors = {
            name.removeprefix(component): tensor
            for name, tensor in tensors.items()
            if name.startswith(component)
        }
    stored = StoredWeights(file, {name: tuple(t.shape) for name, t in tensors.items()})
    config.stored = (
        stored if given is not None else stored.compare_config(config.weight_fields(), header)
    )
    stored.check_has_experts()
    return Checkpoint(config, _check_tensors(file, tensors))


def is_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Return whether a folder has the config or weights of a mixture (not of a plain LoRA).

    Args:
        directory: the folder.

    Raises:
        ValueError: when the file is corrupt.
    """
    folder = Path(directory)
    file = folder / CONFIG_NAME
    if file.is_file() and read_json(file).get("peft_type") == PEFT_TYPE.value:
        return True
    try:
        names, _ = read_header(weights_file(folder))
    except FileNotFoundError:
        return False
    return any(EXPERTS_PART in name for name in names)


def weights_file(folder: Path) -> Path:
    """Return the weights file of a checkpoint.

    Args:
        folder: the folder of the checkpoint.

    Raises:
        FileNotFoundError: when there is none.
    """
    for name in (WEIGHTS_NAME, DIFFUSERS_NAME):
        if (folder / name).is_file():
            return folder / name
    hint = "Save the adapter again, or use another copy of the folder."
    if (folder / PICKLE_NAME).is_file():
        hint = f"{PICKLE_NAME!r} is a pickle, which is never loaded: save as safetensors."
    raise FileNotFoundError(
        f"Expected {WEIGHTS_NAME!r} in {str(folder)!r}, but there is none. {hint}"
    )


def _config_of_header(file: Path, header: dict[str, str]) -> tuple[MoELoraConfig, str]:
    """Return the config in a weights file, and the prefix of its tensors' keys."""
    own = json_of_header(file, header, CONFIG_KEY)
    if own is not None:
        return _to_config(file, own, "Load it with the library that wrote it."), ""
    entries = json_of_header(file, header, DIFFUSERS_KEY)
    if entries is None:
        raise FileNotFoundError(
            f"Expected {CONFIG_NAME!r} beside {str(file)!r}, but there is none, and the file's "
            "header has no config. Save the adapter again, use another copy of the folder, or "
            "pass `config`; load a plain LoRA with diffusers' `load_lora_weights`."
        )
    # In a pipeline's file, every field and every key has the component's name as a prefix.
    kinds = {
        name[: -len("peft_type")]: kind for name, kind in entries.items() if _is_peft_type(name)
    }
    mixtures = [component for component, kind in kinds.items() if kind == PEFT_TYPE.value]
    if len(mixtures) > 1:
        raise ValueError(
            f"Expected one mixture in {str(file)!r}, but got those of {sorted(mixtures)}. Save "
            "each of them with moe_lora.save_adapter."
        )
    component = mixtures[0] if mixtures else ""
    own = {k.removeprefix(component): v for k, v in entries.items() if k.startswith(component)}
    remedy = "It is a plain LoRA of diffusers. Load it with `load_lora_weights`."
    return _to_config(file, own, remedy), component


def _is_peft_type(name: str) -> bool:
    return name == "peft_type" or name.endswith(".peft_type")


def _to_config(file: Path, entries: dict[str, Any], remedy: str) -> MoELoraConfig:
    kind = entries.get("peft_type")
    if kind != PEFT_TYPE.value:
        raise ValueError(
            f"Expected a {PEFT_TYPE.value} checkpoint in {str(file)!r}, but its `peft_type` is "
            f"{kind!r}. {remedy}"
        )
    try:
        config = MoELoraConfig.from_peft_type(**MoELoraConfig.check_kwargs(**entries))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"Cannot read {str(file)!r}: {error}") from error
    assert isinstance(config, MoELoraConfig)
    return config


def _check_tensors(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: widened(tensor) for name, tensor in tensors.items()}
    odd = [n for n, t in tensors.items() if EXPERTS_PART in n and not t.is_floating_point()]
    if odd:
        raise ValueError(
            f"Expected floating-point experts in {str(file)!r}, but {odd[0]!r} is "
            f"{tensors[odd[0]].dtype}. Save the adapter again, or use an earlier copy."
        )
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"Expected finite weights in {str(file)!r}, but {len(broken)} of {len(tensors)} "
            f"tensors have NaN or inf, such as {broken[0]!r}. Use an earlier checkpoint."
        )
    return tensors
