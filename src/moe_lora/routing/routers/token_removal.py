"""The router for object removal that decides for every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.features import TOKEN_MASK_FEATURES, token_mask_features
from moe_lora.routing.routers.registry import register_router
from moe_lora.routing.routers.removal import RemovalRouter, SoftThreshold, small_network
from moe_lora.routing.routers.three_expert_removal import MASK_FEATURES


class TokenRules(nn.Module):
    """Say as logits which expert a token calls for by its place, by smooth rules.

    - removal = s_0 · edge(band share)
    - background = s_1 · (1 − edge(band share)) · (1 − inside(cover))
    - completion = s_2 · (1 − edge(band share)) · inside(cover)

    These are the regions of the three losses: the boundary loss acts along the mask's edge, the
    consistency loss outside of the mask, the detail loss inside. Each term is a `SoftThreshold`
    with its own learned threshold and slope, at first 0.1 for the band's share of the token and
    0.5 for the mask's cover; the strengths s are learned too.

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
            features: `(B, T, 4)` as `token_mask_features` returns them.

        Returns:
            `(B, T, 3)` logits of removal, background and completion.
        """
        edge, inside = self.edge(features[..., 1]), self.inside(features[..., 0])
        away = 1 - edge
        return self.strengths * torch.stack([edge, away * (1 - inside), away * inside], dim=-1)


@register_router("token_removal")
class TokenRemovalRouter(RemovalRouter):
    """Choose between removal, background and completion for every token, by the mask around it.

    logits_t = router([h_t ‖ token mask features_t ‖ mask features]) + rules(token mask features_t)

    where `router` is Linear, ReLU, Dropout(0.1), Linear, applied to every token h_t, and `rules`
    the learned `TokenRules`. The last Linear starts small, so that at first the rules decide:
    tokens on the mask's edge go to removal, those outside to background, those inside to
    completion. With `time_aware=True` the network reads `noise_features(sigma)`, too.

    Args:
        input_dim: the width of the visual tokens, mask channels split off; 128 for FLUX Fill.
        hidden_dim: the width of the hidden layer.
        prior_scale: the initial strength of the rules, a logit; 0 starts without them.
        time_aware: read the noise level of the call.

    Example:
        >>> from moe_lora import masks
        >>> from moe_lora.routing.routers.removal import REMOVAL_EXPERTS
        >>> mask = torch.zeros(1, 1, 16, 96)
        >>> mask[..., 48:] = 1
        >>> inputs = RouterInputs(
        ...     torch.zeros(1, 6, 8), mask_info=masks.analyze(mask), grid_size=(1, 6)
        ... )
        >>> chosen = TokenRemovalRouter(input_dim=8).eval()(inputs).weights.argmax(-1)[0]
        >>> [REMOVAL_EXPERTS[expert].removesuffix("_expert") for expert in chosen]
        ['background', 'background', 'removal', 'removal', 'completion', 'completion']
    """

    def __init__(
        self,
        input_dim: int = 128,
        hidden_dim: int = 64,
        *,
        prior_scale: float = 2.0,
        time_aware: bool = False,
    ) -> None:
        super().__init__(input_dim, time_aware)
        self.rules = TokenRules(prior_scale)
        self.router = small_network(
            input_dim + TOKEN_MASK_FEATURES + MASK_FEATURES + self.noise_width, hidden_dim
        )

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return every token's logits of removal, background and completion.

        Args:
            inputs: hidden states `(B, T, input_dim)`, the analyzed mask, the grid size and, when
                it is time-aware, the timestep count.

        Returns:
            `(B, T, 3)`.

        Raises:
            ValueError: when the tokens are not `input_dim` wide, or their grid is unknown.
        """
        assert inputs.mask_info is not None
        tokens = inputs.hidden_states
        if tokens.shape[-1] != self.input_dim:
            raise ValueError(
                f"Expected `hidden_states` to have shape (B, T, input_dim={self.input_dim}), but "
                f"got {tuple(tokens.shape)}."
            )
        places = token_mask_features(inputs.mask_info.mask, inputs.known_grid())
        of_sample = torch.cat([inputs.mask_info.features(), *self.noise(inputs)], dim=-1)
        dtype = self.rules.strengths.dtype
        parts = [tokens, places, of_sample.unsqueeze(1).expand(-1, tokens.shape[1], -1)]
        joined = torch.cat([part.to(dtype) for part in parts], dim=-1)
        logits: Tensor = self.router(joined) + self.rules(places.to(dtype))
        return logits
