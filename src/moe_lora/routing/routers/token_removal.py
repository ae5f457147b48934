"""The router for object removal with weights per token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.features import TOKEN_MASK_FEATURES, token_mask_features
from moe_lora.routing.routers.registry import register_router
from moe_lora.routing.routers.removal import (
    REMOVAL_EXPERTS,
    RemovalRouter,
    SoftThreshold,
    small_mlp,
)
from moe_lora.routing.routers.three_expert_removal import MASK_FEATURES


class TokenRules(nn.Module):
    """Logits of the experts from smooth rules on a token's position, with learned constants.

    - removal = s_0 · edge(band share)
    - background = s_1 · (1 − edge(band share)) · (1 − inside(cover))
    - completion = s_2 · (1 − edge(band share)) · inside(cover)

    These are the regions of the three losses: the boundary loss acts along the mask's edge, the
    consistency loss outside of the mask, the detail loss inside. Each term is a `SoftThreshold`
    with its own learned threshold and slope. The thresholds start at 0.1 for the band share and 0.5
    for the cover, the masked share of the token; the strengths s are learned too.

    Args:
        strength: the initial s of all three rules.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.edge = SoftThreshold(0.1, 40.0)
        self.inside = SoftThreshold(0.5, 20.0)
        self.strengths = nn.Parameter(torch.full((3,), float(strength)))

    def forward(self, features: Tensor) -> Tensor:
        """Apply the rules.

        Args:
            features: `(B, T, 4)`, from `token_mask_features`.

        Returns:
            `(B, T, 3)` logits of removal, background and completion.
        """
        edge, inside = self.edge(features[..., 1]), self.inside(features[..., 0])
        away = 1 - edge
        return self.strengths * torch.stack([edge, away * (1 - inside), away * inside], dim=-1)


@register_router("token_removal")
class TokenRemovalRouter(RemovalRouter):
    """Router between removal, background and completion experts, with weights per token.

    logits_t = router([h_t ‖ token mask features_t ‖ mask features]) + rules(token mask features_t)

    where `router` is Linear, ReLU, Dropout(0.1), Linear, applied to every token h_t, and `rules`
    the learned `TokenRules`. The last Linear starts small, so that the rules dominate at first:
    tokens on the mask's edge favor removal, those outside background, those inside completion. With
    `time_aware=True`, `noise_features(sigma)` is an additional input of the network. Experts after
    the third have logits of the network alone.

    Args:
        input_dim: the width of the visual tokens without mask channels; 128 for FLUX Fill.
        hidden_dim: the width of the hidden layer.
        prior_scale: the initial strength of the rules, a logit; 0 disables them at first.
        time_aware: whether the noise level of the call is an input.
        num_experts: the number of experts, the three included; `moe_lora.add_expert` raises it.

    Raises:
        ValueError: for fewer than three experts.

    Example:
        >>> from moe_lora import masks
        >>> from moe_lora.routing.routers.removal import REMOVAL_EXPERTS
        >>> mask = torch.zeros(1, 1, 16, 96)
        >>> mask[..., 48:] = 1
        >>> inputs = RouterInputs(
        ...     torch.zeros(1, 6, 8), mask_info=masks.analyze(mask), grid_size=(1, 6)
        ... )
        >>> experts = TokenRemovalRouter(input_dim=8).eval()(inputs).weights.argmax(-1)[0]
        >>> [REMOVAL_EXPERTS[expert].removesuffix("_expert") for expert in experts]
        ['background', 'background', 'removal', 'removal', 'completion', 'completion']
    """

    def __init__(
        self,
        input_dim: int = 128,
        hidden_dim: int = 64,
        *,
        prior_scale: float = 2.0,
        time_aware: bool = False,
        num_experts: int = len(REMOVAL_EXPERTS),
    ) -> None:
        super().__init__(input_dim, time_aware, hidden_dim=hidden_dim, num_experts=num_experts)
        self.rules = TokenRules(prior_scale)
        self.router = small_mlp(
            input_dim + TOKEN_MASK_FEATURES + MASK_FEATURES + self.noise_dim, hidden_dim
        )

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return every token's logits of removal, background, completion and further experts.

        Args:
            inputs: the inputs of the call: hidden states `(B, T, input_dim)`, the analyzed mask,
                the grid size and, with `time_aware`, the timestep.

        Returns:
            `(B, T, E)`.

        Raises:
            ValueError: for tokens of another width than `input_dim`, or an unknown grid.
        """
        assert inputs.mask_info is not None
        tokens = inputs.hidden_states
        if tokens.shape[-1] != self.input_dim:
            raise ValueError(
                f"Expected `hidden_states` to have shape (B, T, input_dim={self.input_dim}), but "
                f"got {tuple(tokens.shape)}."
            )
        token_features = token_mask_features(inputs.mask_info.mask, inputs.require_grid_size())
        sample_features = torch.cat(
            [inputs.mask_info.features(), *self.noise_inputs(inputs)], dim=-1
        )
        sample_features = sample_features.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        dtype = self.rules.strengths.dtype
        parts = [tokens, token_features, sample_features]
        features = torch.cat([part.to(dtype) for part in parts], dim=-1)
        return self.network_logits(features, self.rules(token_features.to(dtype)))
