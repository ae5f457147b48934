"""Choose the experts by a table that is written by hand, and trains nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import moe_lora
from moe_lora import Router, RouterInputs

Tables = Sequence[Sequence[Sequence[float]]]
AREAS, RAGGED_FROM = (0.06, 0.3), 0.3  # edges of disks and boxes are below, of stars above
SMOOTH = ((0.1, 0.1, 0.8), (0.5, 0.2, 0.3), (0.1, 0.8, 0.1))
RAGGED = ((0.2, 0.0, 0.8), (0.8, 0.1, 0.1), (0.6, 0.4, 0.0))


@moe_lora.register_router("rule_table")
class RuleTableRouter(Router):
    """Look the weights up by the mask's area, in one table for smooth edges and one for ragged.

    Args:
        areas: shares of the image between one row and the next, ascending.
        tables: smooth and ragged: a row of weights, one per expert, for every range of areas.
    """

    needs_mask = True

    def __init__(self, areas: Sequence[float] = AREAS, tables: Tables = (SMOOTH, RAGGED)) -> None:
        super().__init__()
        self.areas, self.tables = areas, tables

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return log(weights), `(B, E)`; an expert of weight 0 is never used."""
        mask, tables = inputs.mask_info, inputs.hidden_states.new_tensor(self.tables)
        assert mask is not None  # needs_mask
        row = torch.bucketize(mask.area_ratio, mask.area_ratio.new_tensor(self.areas), right=True)
        return tables.log()[(mask.edge_complexity >= RAGGED_FROM).long(), row]
