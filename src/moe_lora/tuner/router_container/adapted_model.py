"""From an adapted layer to the model that it belongs to."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import nn

from moe_lora.routing.lookup import ROUTER_ATTRIBUTE


class AdapterSwitches(Protocol):
    """Describe what hears of the switches of PEFT and diffusers, which reach the layers only."""

    def look_again(self) -> None:
        """Read anew which adapters act in the layers before the next forward pass."""

    def train_only(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """Set `requires_grad` for these adapters, and freeze the others."""

    def set_requires_grad(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """Set `requires_grad` for these adapters."""

    def layer_lost(self, adapter_name: str) -> None:
        """Count a layer that an adapter was deleted from."""


class AdaptedModel:
    """Refer to the model that a layer belongs to, without keeping it alive.

    The layers of a copied model refer to the copy; a copied block stays part of its model.

    Args:
        model: the model that adapters were injected into.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        """Return the model, `None` when it is gone."""
        return None if self._model is None else self._model()

    def routers(self) -> AdapterSwitches | None:
        """Return the model's routers; `None` before they are placed and after they are removed."""
        model = self()
        held = None if model is None else model._modules.get(ROUTER_ATTRIBUTE)
        return cast(AdapterSwitches, held) if hasattr(held, "layer_lost") else None

    def refer_to(self, model: nn.Module) -> None:
        """Refer to another model from now on."""
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModel:
        copied = memo.get(id(self()))
        return self if copied is None else AdaptedModel(copied)

    def __reduce__(self) -> tuple[type[AdaptedModel], tuple[None]]:
        return AdaptedModel, (None,)  # a pickled block takes no model along; see `Anchor`


class Anchor:
    """Let the layers of a pickled model, which share one `AdaptedModel`, refer to the new one.

    Args:
        model: what the layers share; the model itself holds the anchor.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> Anchor:
        return Anchor(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, tuple[AdaptedModel, nn.Module | None]]:
        return _anchored, (self.model, self.model())


def _anchored(shared: AdaptedModel, model: nn.Module | None) -> Anchor:
    if model is not None:
        shared.refer_to(model)
    return Anchor(shared)
