"""Choose the experts token by token, by the shape of the mask around each of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moe_lora
from moe_lora import Router, RouterInputs, masks


@moe_lora.register_router("mask_convolution")
class MaskConvolutionRouter(Router):
    """Slide a small convolution over the mask, as seen by the image's tokens.

    Args:
        hidden: channels between the two convolutions.
        num_experts: how many logits to return.
    """

    needs_mask = True

    def __init__(self, hidden: int = 16, num_experts: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, hidden, kernel_size=5, padding=2, padding_mode="replicate"),
            nn.SiLU(),
            nn.Conv2d(hidden, num_experts, kernel_size=1),
        )

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return `(B, T, E)`."""
        assert inputs.mask_info is not None  # needs_mask
        rows, columns = inputs.require_grid_size()
        covered = masks.to_tokens(inputs.mask_info.mask, (rows, columns))
        found = self.net(covered.unflatten(1, (1, rows, columns)).to(self.net[0].weight))
        return torch.movedim(found, 1, -1).flatten(1, 2)
