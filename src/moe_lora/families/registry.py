"""Registry of model families, and properties of a model from its family and config."""

from __future__ import annotations

from torch import nn

from moe_lora.families import flux, images, unets, videos
from moe_lora.families.family import UNKNOWN, Family

FAMILIES = (*flux.FAMILIES, *images.FAMILIES, *unets.FAMILIES, *videos.FAMILIES)
"""All known families."""

_BY_CLASS = {name: family for family in FAMILIES for name in family.classes}
_CHANNEL_NAMES = ("in_channels", "in_visual_dim", "in_dim", "io_channels")


def family_of(model: nn.Module) -> Family:
    """Look up the family of a model by the names of its class and base classes.

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
    """Return the number of channels of a model's latents, from its config.

    Args:
        model: a diffusers-style model.

    Returns:
        The number, or `None` if the config has none.
    """
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _CHANNEL_NAMES)
    return next((value for value in found if value is not None), None)


def visual_channels(model: nn.Module) -> int | None:
    """Return the width of a router's input tokens: the channels of the latents without a mask.

    Args:
        model: a diffusers-style model.

    Returns:
        The width, or `None` if the config has no number of channels.
    """
    channels, mask = input_channels(model), family_of(model).carried_mask
    return mask.other_channels if mask is not None and mask.channels == channels else channels
