"""The router for any experts: routing weights from mask and latents, without rules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.features import FeatureMode, MaskAwareFeatureExtractor
from moe_lora.routing.routers.headed import HeadedRouter
from moe_lora.routing.routers.registry import register_router
from moe_lora.routing.routers.three_expert_removal import MASK_FEATURES


@register_router("mask_aware")
class MaskAwareRouter(HeadedRouter):
    """Router between any number of experts, from mask and visual tokens.

    logits_e = head_e(hidden([extractor(hidden_states, mask) ‖ mask features]))

    where `hidden` is Linear, ReLU, Dropout(0.1), and every expert has a linear head of its own. All
    logits are near 0 at first. With `time_aware=True`, `noise_features(sigma)` is an additional
    input of the network. With `num_layers`, every adapted layer adds its own learned logits, zero
    at first.

    Args:
        num_experts: the number of experts; in `router_kwargs`, that of the config by default.
        input_dim: the width of the visual tokens without mask channels; 128 for FLUX Fill.
        hidden_dim: the width of the hidden layer.
        mode: the pooling of the tokens, see `MaskAwareFeatureExtractor`.
        time_aware: whether the noise level of the call is an input.
        num_layers: the number of adapted layers, for separate weights in each; "auto" in
            `router_kwargs`.

    Raises:
        ValueError: for a `num_experts` or `num_layers` that is not an integer >= 1.

    Example:
        >>> from moe_lora import masks
        >>> inputs = RouterInputs(
        ...     torch.zeros(1, 16, 8), mask_info=masks.analyze(torch.ones(1, 1, 64, 64)),
        ...     grid_size=(4, 4),
        ... )
        >>> MaskAwareRouter(5, input_dim=8).eval()(inputs).weights.detach().round(decimals=1)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000, 0.2000]])
    """

    def __init__(
        self,
        num_experts: int,
        input_dim: int = 128,
        hidden_dim: int = 64,
        *,
        mode: FeatureMode = "mask_focused",
        time_aware: bool = False,
        num_layers: int | None = None,
    ) -> None:
        super().__init__(input_dim, time_aware, hidden_dim=hidden_dim, num_layers=num_layers)
        self.extractor = MaskAwareFeatureExtractor(input_dim, mode)
        width = self.extractor.feature_dim + MASK_FEATURES + self.noise_dim
        self.hidden = nn.Sequential(nn.Linear(width, hidden_dim), nn.ReLU(), nn.Dropout(0.1))
        self.create_heads(num_experts)

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return the logits of the experts.

        Args:
            inputs: the inputs of the call: hidden states `(B, T, input_dim)`, the analyzed mask,
                the grid size and, with `time_aware`, the timestep.

        Returns:
            `(B, E)`, or `(B, num_layers, E)`.

        Raises:
            ValueError: for tokens of another width than `input_dim`, or an unknown grid.
        """
        assert inputs.mask_info is not None
        visual = self.extractor(inputs.hidden_states, inputs.mask_info.mask, inputs.grid_size)
        parts = [visual, inputs.mask_info.features(), *self.noise_inputs(inputs)]
        dtype = next(self.hidden.parameters()).dtype
        hidden = self.hidden(torch.cat([part.to(dtype) for part in parts], dim=-1))
        return self.head_logits(hidden)
