"""Weak reference from an adapted layer to its model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import nn

from moe_lora.routing.lookup import ROUTER_ATTRIBUTE


class AdapterListener(Protocol):
    """Protocol for callbacks on changes to a layer's adapters.

    PEFT and diffusers activate, train and delete adapters in the layers only.
    """

    def refresh_active_adapters(self) -> None:
        """Update the contributing adapters before the next forward pass."""

    def set_trainable_adapters(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """Set `requires_grad` for these adapters, and freeze the others."""

    def set_requires_grad(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """Set `requires_grad` for these adapters."""

    def on_layer_deleted(self, adapter_name: str) -> None:
        """Update the number of an adapter's layers after its deletion in one layer."""


class ModelReference:
    """Weak reference to the model of an adapted layer.

    The layers of a copied model refer to the copy; the layers of a copied block refer to the
    original model.

    Args:
        model: the model with the injected adapters.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        """Return the model, or `None` after its deletion."""
        return None if self._model is None else self._model()

    def routers(self) -> AdapterListener | None:
        """Return the model's routers, or `None` before installation and after removal."""
        model = self()
        routers = None if model is None else model._modules.get(ROUTER_ATTRIBUTE)
        return cast(AdapterListener, routers) if hasattr(routers, "on_layer_deleted") else None

    def set_model(self, model: nn.Module) -> None:
        """Change the model."""
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelReference:
        copied = memo.get(id(self()))
        return self if copied is None else ModelReference(copied)

    def __reduce__(self) -> tuple[type[ModelReference], tuple[None]]:
        return ModelReference, (
            None,
        )  # a pickled block must not contain its model; see `PickleAnchor`


class PickleAnchor:
    """Attribute of an adapted model that restores the reference of its layers after unpickling.

    Args:
        model: the reference that the layers share.
    """

    def __init__(self, model: ModelReference) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> PickleAnchor:
        return PickleAnchor(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, tuple[ModelReference, nn.Module | None]]:
        return _unpickle_anchor, (self.model, self.model())


def _unpickle_anchor(shared: ModelReference, model: nn.Module | None) -> PickleAnchor:
    if model is not None:
        shared.set_model(model)
    return PickleAnchor(shared)
