"""The router for object removal: routing weights of three experts from mask and latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.features import FeatureMode, MaskAwareFeatureExtractor
from moe_lora.routing.routers.registry import register_router
from moe_lora.routing.routers.removal import (
    REMOVAL_EXPERTS,
    RemovalRouter,
    SoftThreshold,
    small_mlp,
)

MASK_FEATURES = 5
"""The width of `MaskInfo.features()`."""


class RemovalRules(nn.Module):
    """Logits of the experts from smooth rules on the mask, with learned constants.

    - removal = s_0 · ragged(edge complexity) · medium(area)
    - background = s_1 · large(area) · (1 − detailed(detail complexity))
    - completion = s_2 · (1 − (1 − small(area)) · (1 − detailed(detail complexity)))

    Each term is a `SoftThreshold` with its own learned threshold and slope (small is 1 minus one);
    the strengths s are learned too. The thresholds start at edge complexity 0.30, area 0.08
    (medium), 0.30 (large) and 0.06 (small), and detail complexity 0.65. An unknown detail
    complexity counts as 0, see `MaskInfo.features()`: the completion logit then depends on the area
    only.

    Args:
        strength: the initial s of all three rules.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        # Measured with `analyze`: the edge complexity of disks, squares and 3:1 boxes is at most
        # 0.23, that of stars, strokes and noisy blobs at least 0.36; the detail complexity of
        # photographs is 0.2 to 0.6, and that of gravel and grass 0.7 to 0.8.
        self.ragged = SoftThreshold(0.30, 20.0)
        self.medium = SoftThreshold(0.08, 40.0)
        self.large = SoftThreshold(0.30, 20.0)
        self.above_small = SoftThreshold(0.06, 60.0)
        self.detailed = SoftThreshold(0.65, 15.0)
        self.strengths = nn.Parameter(torch.full((3,), float(strength)))

    def forward(self, features: Tensor) -> Tensor:
        """Apply the rules.

        Args:
            features: `(B, 5)`, from `MaskInfo.features()`.

        Returns:
            `(B, 3)` logits of removal, background and completion.
        """
        area, edge, _, _, detail = features.unbind(-1)
        plain = 1 - self.detailed(detail)
        removal = self.ragged(edge) * self.medium(area)
        background = self.large(area) * plain
        completion = 1 - self.above_small(area) * plain
        return self.strengths * torch.stack([removal, background, completion], dim=-1)


@register_router("three_expert_removal")
class ThreeExpertRemovalRouter(RemovalRouter):
    """Router between removal, background and completion experts, from mask and visual tokens.

    logits = router([extractor(hidden_states, mask) ‖ mask features]) + rules(mask features)

    where `router` is Linear, ReLU, Dropout(0.1), Linear and `rules` the learned `RemovalRules`. The
    last Linear starts small, so that the rules dominate at first: ragged masks of medium or large
    area favor removal, large smooth ones with little detail background, small or richly detailed
    ones completion.

    With `time_aware=True`, `noise_features(sigma)` is an additional input of the network. With
    `num_layers`, every adapted layer adds its own learned logits, zero at first; the network still
    runs once. Experts after the third have logits of the network alone.

    Args:
        input_dim: the width of the visual tokens without mask channels; 128 for FLUX Fill.
        hidden_dim: the width of the hidden layer.
        mode: the pooling of the tokens, see `MaskAwareFeatureExtractor`.
        prior_scale: the initial strength of the rules, a logit; 0 disables them at first.
        time_aware: whether the noise level of the call is an input.
        num_layers: the number of adapted layers, for separate weights in each; "auto" in
            `router_kwargs`.
        num_experts: the number of experts, the three included; `moe_lora.add_expert` raises it.

    Raises:
        ValueError: for a `num_layers` that is not an integer >= 1, or fewer than three experts.

    Example:
        >>> from moe_lora import masks
        >>> mask = torch.zeros(1, 1, 64, 64)
        >>> mask[..., 8:60, 4:60] = 1
        >>> inputs = RouterInputs(
        ...     torch.zeros(1, 16, 8), mask_info=masks.analyze(mask), grid_size=(4, 4)
        ... )
        >>> router = ThreeExpertRemovalRouter(input_dim=8).eval()
        >>> REMOVAL_EXPERTS[router(inputs).weights.argmax()]
        'background_expert'
    """

    def __init__(
        self,
        input_dim: int = 128,
        hidden_dim: int = 64,
        *,
        mode: FeatureMode = "mask_focused",
        prior_scale: float = 2.0,
        time_aware: bool = False,
        num_layers: int | None = None,
        num_experts: int = len(REMOVAL_EXPERTS),
    ) -> None:
        super().__init__(
            input_dim,
            time_aware,
            hidden_dim=hidden_dim,
            num_experts=num_experts,
            num_layers=num_layers,
        )
        self.extractor = MaskAwareFeatureExtractor(input_dim, mode)
        self.rules = RemovalRules(prior_scale)
        self.router = small_mlp(
            self.extractor.feature_dim + MASK_FEATURES + self.noise_dim, hidden_dim
        )
        if num_layers is not None:
            self.layer_offsets = nn.Parameter(torch.zeros(num_layers, len(REMOVAL_EXPERTS)))

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return the logits of removal, background, completion and further experts.

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
        mask_features = inputs.mask_info.features()
        dtype = self.rules.strengths.dtype
        parts = [visual, mask_features, *self.noise_inputs(inputs)]
        features = torch.cat([part.to(dtype) for part in parts], dim=-1)
        return self.network_logits(features, self.rules(mask_features.to(dtype)))
