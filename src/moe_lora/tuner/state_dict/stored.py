"""What a checkpoint holds, and whether it fits a model; nothing here changes a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from moe_lora.tuner.state_dict.adapter_tensors import adapter_tensors
from moe_lora.tuner.state_dict.module_paths import bare_paths
from moe_lora.tuner.state_dict.names import EXPERTS_PART, ROUTERS_PART, bare_names

Shapes = Mapping[str, tuple[int, ...]]

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_KEY = "moe_lora_config"
"""Where the header of a weights file has the config that the weights were saved with."""


@dataclass(frozen=True)
class StoredWeights:
    """Remember names and shapes of a checkpoint's tensors.

    Args:
        path: the weights file.
        shapes: by name, as in the file.
        differing: how the config differs from the one that the weights were saved with.
    """

    path: Path
    shapes: Shapes
    differing: str | None = None

    @classmethod
    def read(cls, path: Path, meaning: Mapping[str, Any]) -> StoredWeights:
        """Read the header of a safetensors file.

        Args:
            path: the file.
            meaning: the fields of the config in the same folder that say what weights mean.

        Raises:
            ValueError: when the file is truncated, corrupt or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                names, header = list(file.keys()), file.metadata() or {}
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(
                f"Expected a whole safetensors file at {str(path)!r}, but it is truncated, corrupt "
                f"or of another format ({error}). Save it again, or take an earlier copy."
            ) from error
        return cls(path, shapes).beside(meaning, header)

    def beside(self, meaning: Mapping[str, Any], header: Mapping[str, str]) -> StoredWeights:
        """Compare the config beside the weights with the one in the header of their file.

        Args:
            meaning: the fields, as in `read`, of the config that was found beside the weights.
            header: the weights file's metadata; without a config in it, nothing is compared.
        """
        told = read_header(self.path, header, CONFIG_KEY)
        if told is None:
            return self
        meaning = json.loads(json.dumps(meaning))
        differing = [
            f"`{name}` is {value!r} and was {told[name]!r}"
            for name, value in meaning.items()
            if name in told and told[name] != value
        ]
        return replace(self, differing=_some(differing, str) if differing else None)

    def check_config(self) -> None:
        """Check that the config is the one that the weights were saved with, where that is noted.

        Raises:
            ValueError: when they differ in what the weights mean.
        """
        if self.differing is not None:
            raise ValueError(
                f"Expected beside {str(self.path)!r} the config that the weights were saved with, "
                f"but its {self.differing}. Load it with the adapter_config.json that was saved "
                "with it, or change the config after loading it."
            )

    def check_kind(self) -> None:
        """Check that there are experts in the file.

        Raises:
            ValueError: for a file of another method.
        """
        if any(EXPERTS_PART in name for name in self.shapes):
            return
        plain = any(".lora_" in name or name.startswith("lora_") for name in self.shapes)
        what = "those of a plain LoRA" if plain else "none of this method's"
        first = next(iter(self.shapes), "(no tensor at all)")
        raise ValueError(
            f"Expected the experts of a mixture in {str(self.path)!r}, but its tensors are {what}, "
            f"such as {first!r}. Load it with the library that wrote it."
        )

    def check_base(self, model: nn.Module, num_experts: int, rank_of: Callable[[str], int]) -> None:
        """Check that a model has all layers of the experts, and a config their number and ranks.

        Args:
            model: the model, before or after it is adapted.
            num_experts: the number of experts that the config has.
            rank_of: returns the rank that the config has for a layer's path.

        Raises:
            ValueError: when it lacks some, or the config is that of other experts.
        """
        self.check_kind()
        known = bare_paths(model)
        shapes = self._named_for(known)
        layers = {name.partition(EXPERTS_PART)[0] for name in shapes if EXPERTS_PART in name}
        lacking = sorted(layers - known)
        if lacking:
            raise ValueError(
                f"Expected {str(self.path)!r} to fit the model, but {type(model).__name__} has no "
                f"{_some(lacking)}: {_why_lacking(lacking, known)}"
            )
        # Before memory is taken for experts that the file does not have.
        for name, shape in shapes.items():
            layer, _, factor = name.partition(EXPERTS_PART)
            wanted = (num_experts, rank_of(layer))
            if factor == "lora_A" and shape[:2] != wanted:
                both = f"{name!r} has the shape {shape} where {(*wanted, *shape[2:])} is needed"
                raise ValueError(
                    f"Expected {str(self.path)!r} to fit the model, but {both}: rank, experts or "
                    "router of adapter_config.json are not those of the weights. Load it with the "
                    "adapter_config.json that was saved with it."
                )

    def check_fit(self, model: nn.Module, adapter_name: str) -> None:
        """Check that the tensors are exactly those of an adapter in a model, in its shapes.

        Args:
            model: the model, with the adapter already in it.
            adapter_name: the adapter's name.

        Raises:
            ValueError: for tensors that the model has no place for, of other shapes, or missing;
                or when the config is not that of the weights.
        """
        tensors = adapter_tensors(model, adapter_name)
        expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        replace(self, shapes=self._named_for(bare_paths(model))).check_shapes(expected)

    def check_shapes(self, expected: Shapes, target: str = "the model") -> None:
        """Check that the tensors are exactly the expected ones.

        Args:
            expected: the shapes by name.
            target: what the shapes are those of, for the message.

        Raises:
            ValueError: for tensors that are not expected, of other shapes, or missing; or when the
                config is not that of the weights.
        """
        problem = self._homeless(expected) or self._misshapen(expected) or self._missing(expected)
        if problem is not None:
            raise ValueError(f"Expected {str(self.path)!r} to fit {target}, but {problem}")
        self.check_config()

    def _named_for(self, known: Collection[str]) -> Shapes:
        names = bare_names(self.shapes, known)
        return {names[name]: shape for name, shape in self.shapes.items()}

    def _homeless(self, expected: Shapes) -> str | None:
        unknown = [name for name in self.shapes if name not in expected]
        if not unknown:
            return None
        some = _some(unknown)
        if ROUTERS_PART in unknown[0]:
            return (
                f"it holds router parameters that the config's router does not have ({some}). Load "
                "it with the adapter_config.json that was saved with it."
            )
        return (
            f"it holds tensors that the config does not ask for ({some}). Load it with the "
            "adapter_config.json that was saved with it."
        )

    def _misshapen(self, expected: Shapes) -> str | None:
        for name, shape in self.shapes.items():
            wanted = expected[name]
            if shape == wanted or (shape, wanted) == ((), (1,)):
                continue  # one number was stored without a dimension by 0.1.0
            both = f"{name!r} has the shape {shape} where {wanted} is needed"
            axes = (0, 1) if name.endswith(".lora_A") else (1, 2)
            same_experts = (
                EXPERTS_PART in name
                and len(shape) == len(wanted)
                and all(shape[axis] == wanted[axis] for axis in axes)
            )
            if same_experts:
                return (
                    f"{both}: it was trained on a base model with layers of other widths. Load it "
                    "into that one."
                )
            return (
                f"{both}: rank, experts or router of adapter_config.json are not those of the "
                "weights. Load it with the adapter_config.json that was saved with it."
            )
        return None

    def _missing(self, expected: Shapes) -> str | None:
        missing = [name for name in expected if name not in self.shapes]
        if not missing:
            return None
        return (
            f"{len(missing)} of the model's {len(expected)} tensors are not in it "
            f"({_some(missing)}): it is incomplete, or was trained on another base model. Take "
            "another copy, or load it into that model."
        )


def input_width(model: nn.Module) -> int | None:
    """Return the number of a model's input channels, `config.in_channels`, where it has one."""
    width: Any = getattr(getattr(model, "config", None), "in_channels", None)
    return width if isinstance(width, int) else None


def check_base_width(known: int | None, model: nn.Module) -> int | None:
    """Return the input width of a model, which must be that of the adapter's base.

    Args:
        known: the input width of the adapter's base; `None` where it is not known.
        model: the model to adapt.

    Raises:
        ValueError: when the two widths differ.
    """
    width = input_width(model)
    if known is not None and width is not None and known != width:
        raise ValueError(
            f"Expected a base model with {known} input channels, on which the adapter was "
            f"configured, but {type(model).__name__} has {width}. Load it into a base of that "
            "width (FLUX Fill has 384, plain FLUX 64), or make a new MoELoraConfig for this one."
        )
    return known if width is None else width


def read_header(path: Path, header: Mapping[str, str], key: str) -> dict[str, Any] | None:
    """Return the JSON object that a safetensors file's metadata has under a key, or `None`.

    Args:
        path: the file, for the message.
        header: its metadata.
        key: where the object is.

    Raises:
        ValueError: when there is something else under the key.
    """
    if key not in header:
        return None
    try:
        entries = json.loads(header[key])
    except ValueError as error:
        raise ValueError(
            f"Expected JSON as `{key}` in the header of {str(path)!r}, but got {error}. Save it "
            "again, or take an earlier copy."
        ) from error
    if not isinstance(entries, dict):
        raise ValueError(
            f"Expected a JSON object as `{key}` in the header of {str(path)!r}, but got a "
            f"{type(entries).__name__}."
        )
    return entries


def _why_lacking(lacking: list[str], known: Collection[str]) -> str:
    """Say whether the layers are there under another path, and what to do."""
    ends = {path[: -len(lacking[0]) - 1] for path in known if path.endswith(f".{lacking[0]}")}
    for outer in sorted(ends):
        if all(f"{outer}.{layer}" in known for layer in lacking):
            return f"it has them in {outer!r}. Load the adapter into that module."
    parts = lacking[0].split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if all(layer.startswith(prefix) and layer[len(prefix) :] in known for layer in lacking):
            return (
                f"it has them without the beginning {prefix!r}. Load the adapter into the module "
                "that has this name in the model it was saved from, or take it off the keys."
            )
    return "it was trained on another base model. Load it into that one."


def _some(names: list[str], show: Callable[[str], str] = repr) -> str:
    return show(names[0]) if len(names) == 1 else f"{show(names[0])} and {len(names) - 1} more"
