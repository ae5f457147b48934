"""Guards against methods of diffusers that would change a mixture partially."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moe_lora.routing.lookup import ROUTER_ATTRIBUTE
from moe_lora.tuner.merging import check_mergeable
from moe_lora.tuner.router_container.model_reference import ModelReference

_SKIP_CASTING = "_skip_layerwise_casting_patterns"


def install_guards(model: nn.Module, reference: ModelReference) -> None:
    """Make `fuse_lora` atomic, and exclude routers from layerwise casting.

    Args:
        model: the adapted model; it may lack these methods.
        reference: the reference of its layers to the model.
    """
    if hasattr(model, "fuse_lora"):
        # diffusers fuses layer by layer: an error in one layer would leave others fused.
        vars(model)["fuse_lora"] = partial(_fuse_all_or_none, reference)
    if hasattr(model, "enable_layerwise_casting"):
        # diffusers would store routers in float8; they need float32.
        patterns: Any = getattr(model, _SKIP_CASTING, None)
        setattr(model, _SKIP_CASTING, (*(patterns or ()), ROUTER_ATTRIBUTE))


def remove_guards(model: nn.Module) -> None:
    """Undo `install_guards`, if it was called."""
    vars(model).pop("fuse_lora", None)
    if ROUTER_ATTRIBUTE in vars(model).get(_SKIP_CASTING, ()):
        delattr(model, _SKIP_CASTING)


def check_routers_unadapted(routers: nn.Module) -> None:
    """Raise when another tuner adapts a router, or layerwise casting changed its dtype.

    Args:
        routers: the routers of a model.

    Raises:
        ValueError: for an adapted layer, or a parameter with less precision than float32.
    """
    for module in routers.modules():  # runs at each pass, so names are computed for errors only
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"Expected routers without adapters, but a layer of {ROUTER_ATTRIBUTE!r} is "
                f"adapted by {module.active_adapters}. Delete that adapter, and inject it again "
                "with "
                f'`exclude_modules=r".*{ROUTER_ATTRIBUTE}.*"`.'
            )
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"Expected routers in float32, but {name!r} of a layer of "
                    f"{ROUTER_ATTRIBUTE!r} is in {parameter.dtype}. Load it in float32, and "
                    f"exclude {ROUTER_ATTRIBUTE!r} with `skip_modules_pattern` of diffusers' "
                    "apply_layerwise_casting."
                )


def _fuse_all_or_none(
    adapted_model: ModelReference,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """Call diffusers' `fuse_lora` after checking that every mixture can be merged."""
    model: Any = adapted_model()
    check_mergeable(model, adapter_names, safe_merge=safe_fusing)
    type(model).fuse_lora(model, lora_scale, safe_fusing, adapter_names)
