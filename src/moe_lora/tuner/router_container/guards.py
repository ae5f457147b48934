"""What keeps methods that are meant for a model's layers from changing a mixture by halves."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moe_lora.routing.lookup import ROUTER_ATTRIBUTE
from moe_lora.tuner.merging import check_mergeable
from moe_lora.tuner.router_container.adapted_model import AdaptedModel

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


def check_untouched(routers: nn.Module) -> None:
    """Raise when something meant for the model's layers was done to those of a router.

    Args:
        routers: the routers of a model.

    Raises:
        ValueError: when another tuner adapts them, or they are stored in less than float32.
    """
    for module in routers.modules():  # at each pass: names only for an error
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"Expected routers without adapters, but a layer of {ROUTER_ATTRIBUTE!r} is "
                f"adapted by {module.active_adapters}. Delete that adapter, and inject it with "
                f'`exclude_modules=r".*{ROUTER_ATTRIBUTE}.*"`.'
            )
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"Expected routers in float32, but {name!r} of a layer of "
                    f"{ROUTER_ATTRIBUTE!r} is in {parameter.dtype}. Load it in float32, and "
                    f"leave {ROUTER_ATTRIBUTE!r} out with `skip_modules_pattern` of diffusers' "
                    "apply_layerwise_casting."
                )


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
