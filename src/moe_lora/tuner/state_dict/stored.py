"""Names and shapes of the weights in a checkpoint, and checks against a model."""

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
"""Key of the config in the header of a weights file."""


@dataclass(frozen=True)
class StoredWeights:
    """Names and shapes of a checkpoint's tensors.

    Args:
        path: the weights file.
        shapes: the shapes by name in the file.
        differing: the differences between the config and the one in the file's header, for a
            message; `None` for no difference.
    """

    path: Path
    shapes: Shapes
    differing: str | None = None

    @classmethod
    def read(cls, path: Path, weight_fields: Mapping[str, Any]) -> StoredWeights:
        """Read the header of a safetensors file.

        Args:
            path: the file.
            weight_fields: `MoELoraConfig.weight_fields()` of the config in the same folder.

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
                f"or of another format ({error}). Save it again, or use an earlier copy."
            ) from error
        return cls(path, shapes).compare_config(weight_fields, header)

    def compare_config(
        self, weight_fields: Mapping[str, Any], header: Mapping[str, str]
    ) -> StoredWeights:
        """Compare a config with the one in the header of the weights file.

        Args:
            weight_fields: `MoELoraConfig.weight_fields()` of the config.
            header: the weights file's metadata; without a config, nothing is compared.

        Returns:
            The same names and shapes, with the differences in `differing`.
        """
        saved = read_header(self.path, header, CONFIG_KEY)
        if saved is None:
            return self
        weight_fields = json.loads(json.dumps(weight_fields))
        differing = [
            f"`{name}` is {value!r} and was {saved[name]!r}"
            for name, value in weight_fields.items()
            if name in saved and saved[name] != value
        ]
        return replace(self, differing=_summarize(differing, str) if differing else None)

    def check_config(self) -> None:
        """Check that the config matches the one in the header of the weights file.

        Raises:
            ValueError: when they differ in a field of `MoELoraConfig.weight_fields()`.
        """
        if self.differing is not None:
            raise ValueError(
                f"Expected {str(self.path)!r} with the config that the weights were saved with, "
                f"but its {self.differing}. Load it with its own adapter_config.json, or change "
                "the config after loading it."
            )

    def check_has_experts(self) -> None:
        """Check that the file has experts.

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
        """Check the layers of the experts against a model, and their number and ranks.

        Args:
            model: the model, before or after the injection.
            num_experts: the config's number of experts.
            rank_of: the config's rank, as a function of a layer's path.

        Raises:
            ValueError: when the model lacks layers, or the experts' number or ranks differ.
        """
        self.check_has_experts()
        known = bare_paths(model)
        shapes = self._with_bare_names(known)
        layers = {name.partition(EXPERTS_PART)[0] for name in shapes if EXPERTS_PART in name}
        lacking = sorted(layers - known)
        if lacking:
            raise ValueError(
                f"Expected {str(self.path)!r} to fit the model, but {type(model).__name__} has no "
                f"{_summarize(lacking)}: {_explain_missing_layers(lacking, known)}"
            )
        # Before any memory is allocated for experts of other sizes.
        for name, shape in shapes.items():
            layer, _, factor = name.partition(EXPERTS_PART)
            wanted = (num_experts, rank_of(layer))
            if factor == "lora_A" and shape[:2] != wanted:
                both = f"{name!r} has the shape {shape} where {(*wanted, *shape[2:])} is needed"
                raise ValueError(
                    f"Expected {str(self.path)!r} to fit the model, but {both}: rank, experts or "
                    "router of adapter_config.json are not those of the weights. Load it with its "
                    "own adapter_config.json."
                )

    def check_fit(self, model: nn.Module, adapter_name: str) -> None:
        """Check that names and shapes are exactly those of an adapter in a model.

        Args:
            model: the model, after the injection.
            adapter_name: the adapter's name.

        Raises:
            ValueError: for unexpected or missing tensors, other shapes, or a different config.
        """
        tensors = adapter_tensors(model, adapter_name)
        expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        replace(self, shapes=self._with_bare_names(bare_paths(model))).check_shapes(expected)

    def check_shapes(self, expected: Shapes, target: str = "the model") -> None:
        """Check that names and shapes are exactly the expected ones.

        Args:
            expected: the shapes by name.
            target: the owner of the shapes, for the message.

        Raises:
            ValueError: for unexpected or missing tensors, other shapes, or a different config.
        """
        problem = (
            self._find_unexpected(expected)
            or self._find_wrong_shape(expected)
            or self._find_missing(expected)
        )
        if problem is not None:
            raise ValueError(f"Expected {str(self.path)!r} to fit {target}, but {problem}")
        self.check_config()

    def _with_bare_names(self, known: Collection[str]) -> Shapes:
        names = bare_names(self.shapes, known)
        return {names[name]: shape for name, shape in self.shapes.items()}

    def _find_unexpected(self, expected: Shapes) -> str | None:
        unknown = [name for name in self.shapes if name not in expected]
        if not unknown:
            return None
        some = _summarize(unknown)
        if ROUTERS_PART in unknown[0]:
            return (
                f"it has router parameters that the config's router does not have ({some}). Load "
                "it with its own adapter_config.json."
            )
        return (
            f"it has tensors that do not belong to the config ({some}). Load it with its own "
            "adapter_config.json."
        )

    def _find_wrong_shape(self, expected: Shapes) -> str | None:
        for name, shape in self.shapes.items():
            wanted = expected[name]
            if shape == wanted or (shape, wanted) == ((), (1,)):
                continue  # version 0.1.0 stored 0-dimensional tensors
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
                    "into that model."
                )
            return (
                f"{both}: rank, experts or router of adapter_config.json are not those of the "
                "weights. Load it with its own adapter_config.json."
            )
        return None

    def _find_missing(self, expected: Shapes) -> str | None:
        missing = [name for name in expected if name not in self.shapes]
        if not missing:
            return None
        return (
            f"{len(missing)} of the model's {len(expected)} tensors are missing "
            f"({_summarize(missing)}): it is incomplete, or was trained on another base model. Use "
            "another copy, or load it into that model."
        )


def input_width(model: nn.Module) -> int | None:
    """Return `config.in_channels` of a model, or `None`.

    Args:
        model: any model.
    """
    width: Any = getattr(getattr(model, "config", None), "in_channels", None)
    return width if isinstance(width, int) else None


def check_base_width(expected: int | None, model: nn.Module) -> int | None:
    """Return the input width of a model, or raise when it is not that of the adapter's base.

    Args:
        expected: the input width of the adapter's base; `None` if it is unknown.
        model: the model to adapt.

    Raises:
        ValueError: when the two widths differ.
    """
    width = input_width(model)
    if expected is not None and width is not None and expected != width:
        raise ValueError(
            f"Expected a base model with {expected} input channels, as in the adapter's config, "
            f"but {type(model).__name__} has {width}. Load it into a base of that width (FLUX Fill "
            "has 384, plain FLUX 64), or create a new MoELoraConfig for this model."
        )
    return expected if width is None else width


def read_header(path: Path, header: Mapping[str, str], key: str) -> dict[str, Any] | None:
    """Return the JSON object under a key of a safetensors file's metadata.

    Args:
        path: the file, for the message.
        header: the file's metadata.
        key: the key.

    Returns:
        The object; `None` without the key.

    Raises:
        ValueError: when the value is not a JSON object.
    """
    if key not in header:
        return None
    try:
        entries = json.loads(header[key])
    except ValueError as error:
        raise ValueError(
            f"Expected JSON as `{key}` in the header of {str(path)!r}, but got {error}. Save it "
            "again, or use an earlier copy."
        ) from error
    if not isinstance(entries, dict):
        raise ValueError(
            f"Expected a JSON object as `{key}` in the header of {str(path)!r}, but got a "
            f"{type(entries).__name__}."
        )
    return entries


def _explain_missing_layers(lacking: list[str], known: Collection[str]) -> str:
    """Return a reason for missing layers, such as another path prefix, and a remedy."""
    ends = {path[: -len(lacking[0]) - 1] for path in known if path.endswith(f".{lacking[0]}")}
    for outer in sorted(ends):
        if all(f"{outer}.{layer}" in known for layer in lacking):
            return f"it has them in {outer!r}. Load the adapter into that module."
    parts = lacking[0].split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if all(layer.startswith(prefix) and layer[len(prefix) :] in known for layer in lacking):
            return (
                f"it has them without the prefix {prefix!r}. Load the adapter into the module of "
                "that name in the original model, or remove the prefix from the keys."
            )
    return "it was trained on another base model. Load it into that model."


def _summarize(names: list[str], show: Callable[[str], str] = repr) -> str:
    return show(names[0]) if len(names) == 1 else f"{show(names[0])} and {len(names) - 1} more"
