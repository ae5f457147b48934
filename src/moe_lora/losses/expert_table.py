"""The expert that each specialized loss trains."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

EXPERT_OF_LOSS: Mapping[str, str] = MappingProxyType(
    {
        "boundary": "removal_expert",
        "consistency": "background_expert",
        "detail": "completion_expert",
    }
)
"""The expert that each specialized loss trains, in the default order of the experts."""

SPECIALIZED_LOSSES = tuple(EXPERT_OF_LOSS)
"""The components of `RemovalLoss` that act on pixels: all but `"base"`."""

LOSS_COMPONENTS = ("base", *SPECIALIZED_LOSSES)
"""The components of `RemovalLoss`, in the order of its arguments."""
