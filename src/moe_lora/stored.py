"""What a checkpoint holds, and whether it fits a model; nothing here changes a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

if TYPE_CHECKING:
    from moe_lora.config import MoELoraConfig

Shapes = Mapping[str, tuple[int, ...]]

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
EXPERTS, ROUTERS = ".moe_lora_experts.", "moe_lora_routers."


@dataclass(frozen=True)
class StoredWeights:
    """Remember names and shapes of a checkpoint's tensors.

    Args:
        path: the weights file.
        shapes: by name, as in the file but without `base_model.model.`.
    """

    path: Path
    shapes: Shapes

    @classmethod
    def read(cls, path: Path) -> StoredWeights:
        """Read the header of a safetensors file.

        Raises:
            ValueError: when the file is truncated, corrupt or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(
                f"Expected a whole safetensors file at {str(path)!r}, but it is truncated, corrupt "
                f"or of another format ({error}). Save it again, or take an earlier copy."
            ) from error
        return cls(path, {name.removeprefix(PREFIX): shape for name, shape in shapes.items()})

    def check_kind(self) -> None:
        """Check that there are experts in the file.

        Raises:
            ValueError: for a file of another method.
        """
        if any(EXPERTS in name for name in self.shapes):
            return
        plain = any(".lora_" in name or name.startswith("lora_") for name in self.shapes)
        what = "those of a plain LoRA" if plain else "none of this method's"
        first = next(iter(self.shapes), "(no tensor at all)")
        raise ValueError(
            f"Expected the experts of a mixture in {str(self.path)!r}, but its tensors are {what}, "
            f"such as {first!r}. Load it with the library that wrote it."
        )

    def check_base(self, model: nn.Module) -> None:
        """Check that a model has all the layers that the experts were made for.

        Args:
            model: the model, before or after it is adapted.

        Raises:
            ValueError: when it lacks some.
        """
        self.check_kind()
        layers = {name.partition(EXPERTS)[0] for name in self.shapes if EXPERTS in name}
        lacking = sorted(layers - {path for path, _ in model.named_modules()})
        if lacking:
            raise ValueError(
                f"Expected {str(self.path)!r} to fit the model, but {type(model).__name__} has no "
                f"{_some(lacking)}: it was trained on another base model. Load it into that one."
            )

    def check_fit(self, model: nn.Module, adapter_name: str) -> None:
        """Check that the tensors are exactly those of an adapter in a model, in its shapes.

        Args:
            model: the model, with the adapter already in it.
            adapter_name: the adapter's name.

        Raises:
            ValueError: for tensors that the model has no place for, of other shapes, or missing.
        """
        expected = dict(_adapter_shapes(model, adapter_name))
        problem = self._homeless(expected) or self._misshapen(expected) or self._missing(expected)
        if problem is not None:
            raise ValueError(f"Expected {str(self.path)!r} to fit the model, but {problem}")

    def _homeless(self, expected: Shapes) -> str | None:
        unknown = [name for name in self.shapes if name not in expected]
        if not unknown:
            return None
        some = _some(unknown)
        if ROUTERS in unknown[0]:
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
                EXPERTS in name
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


def check_base_width(config: MoELoraConfig, model: nn.Module) -> int | None:
    """Return the input width of a model, which must be that of the adapter's base.

    Args:
        config: the adapter's configuration; `base_in_channels` is the width of its base, if known.
        model: the model to adapt.

    Raises:
        ValueError: when the two widths differ.
    """
    known, width = config.base_in_channels, input_width(model)
    if known is not None and width is not None and known != width:
        raise ValueError(
            f"Expected a base model with {known} input channels, on which the adapter was "
            f"configured, but {type(model).__name__} has {width}. Load it into a base of that "
            "width (FLUX Fill has 384, plain FLUX 64), or make a new MoELoraConfig for this one."
        )
    return known if width is None else width


def base_path(model: nn.Module, path: str) -> str:
    """Return a layer's path in the base model, without the other tuners' layers around it.

    Args:
        model: the adapted model.
        path: the layer's path in it.
    """
    head, _, tail = path.rpartition(".")
    while tail == "base_layer" and isinstance(model.get_submodule(head), BaseTunerLayer):
        path, (head, _, tail) = head, head.rpartition(".")
    return path


def _adapter_shapes(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            tensors = module.state_dict()
            for name, inner in module.adapter_state_dict_load_map(adapter_name).items():
                yield f"{path}.{name}", tuple(tensors[inner].shape)
        elif path.endswith((EXPERTS.strip("."), ROUTERS.rstrip("."))):
            held = module._modules.get(adapter_name)
            layer, _, name = path.rpartition(".")
            path = f"{base_path(model, layer)}.{name}"
            for name, tensor in held.state_dict().items() if held is not None else ():
                yield f"{path}.{name}", tuple(tensor.shape)


def _some(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"
