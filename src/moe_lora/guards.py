"""What an adapted model puts before methods of diffusers that would change it by halves."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from moe_lora.adapted_model import AdaptedModel
from moe_lora.merging import check_mergeable
from moe_lora.routing.control import ROUTER_ATTRIBUTE

_KEPT_WHOLE = "_skip_layerwise_casting_patterns"


def guard(model: nn.Module, reference: AdaptedModel) -> None:
    """Fuse all layers of a model or none, and leave its routers out of layerwise casting.

    Args:
        model: the adapted model; one without these methods is left as it is.
        reference: the same, as its layers refer to it.
    """
    if hasattr(model, "fuse_lora"):
        # What diffusers calls layer by layer would refuse after other layers were changed.
        vars(model)["fuse_lora"] = partial(_fuse_all_or_none, reference)
    if hasattr(model, "enable_layerwise_casting"):
        # What diffusers would store in float8; a router's arithmetic is that of float32.
        kept: Any = getattr(model, _KEPT_WHOLE, None)
        setattr(model, _KEPT_WHOLE, (*(kept or ()), ROUTER_ATTRIBUTE))


def remove_guards(model: nn.Module) -> None:
    """Undo `guard`, where it was done."""
    vars(model).pop("fuse_lora", None)
    if ROUTER_ATTRIBUTE in vars(model).get(_KEPT_WHOLE, ()):
        delattr(model, _KEPT_WHOLE)


def _fuse_all_or_none(
    adapted_model: AdaptedModel,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """Fuse as diffusers' `fuse_lora` does, once every mixture is known to be mergeable."""
    model: Any = adapted_model()
    check_mergeable(model, adapter_names, safe_merge=safe_fusing)
    type(model).fuse_lora(model, lora_scale, safe_fusing, adapter_names)
