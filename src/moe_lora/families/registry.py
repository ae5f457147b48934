"""From a model to the record of its family."""

from __future__ import annotations

from torch import nn

from moe_lora.families import flux, images, unets, videos
from moe_lora.families.family import UNKNOWN, Family

FAMILIES = (*flux.FAMILIES, *images.FAMILIES, *unets.FAMILIES, *videos.FAMILIES)
"""All known families."""

_BY_CLASS = {name: family for family in FAMILIES for name in family.classes}
_CHANNEL_NAMES = ("in_channels", "in_visual_dim", "in_dim", "io_channels")


def family_of(model: nn.Module) -> Family:
    """Look up the family of a model by the names of its class and of its bases.

    Args:
        model: any model.

    Returns:
        The family's record, or `UNKNOWN`.

    Example:
        >>> class ZImageTransformer2DModel(nn.Module): ...
        >>> family_of(ZImageTransformer2DModel()).timestep_range
        (1.0, 0.0)
        >>> family_of(nn.Linear(1, 1)) is UNKNOWN
        True
    """
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), UNKNOWN)


def input_channels(model: nn.Module) -> int | None:
    """Return the number of channels of a model's latents, if its config says it.

    Args:
        model: a diffusers-style model.
    """
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _CHANNEL_NAMES)
    return next((value for value in found if value is not None), None)


def visual_channels(model: nn.Module) -> int | None:
    """Return the width of the tokens that a router reads of a model's calls, if it is known.

    Args:
        model: a diffusers-style model whose config says its input channels.
    """
    channels, mask = input_channels(model), family_of(model).carried_mask
    return mask.other_channels if mask is not None and mask.channels == channels else channels
