"""Model families by class name, one record each: nothing here imports a model library.

`family_of(model)` looks up the record of a model, or returns `UNKNOWN`. To support a family, add
its record to one of `flux`, `images`, `unets` and `videos`, and its tiny model to
`tests/family_cases`.
"""

from __future__ import annotations

from moe_lora.families.family import (
    UNKNOWN,
    CarriedMask,
    Family,
    ReferencePosition,
    RowLayout,
    TokenStream,
    VideoAxes,
)
from moe_lora.families.registry import FAMILIES, family_of, input_channels, visual_channels
from moe_lora.families.targets import candidate_targets, default_targets

__all__ = [
    "FAMILIES",
    "UNKNOWN",
    "CarriedMask",
    "Family",
    "ReferencePosition",
    "RowLayout",
    "TokenStream",
    "VideoAxes",
    "candidate_targets",
    "default_targets",
    "family_of",
    "input_channels",
    "visual_channels",
]
