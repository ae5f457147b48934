"""The router for object removal: three experts, chosen by mask and latents."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_lora.routing.features import FeatureMode, MaskAwareFeatureExtractor
from moe_lora.routing.gating import RoutingStrategy
from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.readers import visual_channels
from moe_lora.routing.registry import register_router
from moe_lora.routing.router import Router

REMOVAL_EXPERTS = ("removal_expert", "background_expert", "completion_expert")
"""The three experts in the order of the router's logits."""

MASK_FEATURES = 5
"""The width of `MaskInfo.features()`."""


class SoftThreshold(nn.Module):
    """Say smoothly whether a value is above a learned threshold.

    sigmoid(exp(log_slope) · (value − threshold))

    Args:
        threshold: where the answer is 0.5, initially.
        slope: how sharp the step is, initially; > 0.
    """

    def __init__(self, threshold: float, slope: float) -> None:
        super().__init__()
        # FSDP refuses to shard parameters without a dimension.
        self.threshold = nn.Parameter(torch.tensor([threshold]))
        self.log_slope = nn.Parameter(torch.tensor([math.log(slope)]))

    def forward(self, value: Tensor) -> Tensor:
        """Return the answer in (0, 1), in the shape of `value`."""
        return torch.sigmoid(self.log_slope.exp() * (value - self.threshold))

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Version 0.1.0 saved numbers without a dimension.
        for key in (f"{prefix}threshold", f"{prefix}log_slope"):
            if key in state_dict:
                state_dict[key] = state_dict[key].view(-1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RemovalRules(nn.Module):
    """Say as logits which expert the mask calls for, by smooth rules with learned constants.

    - removal = s_0 · ragged(edge complexity) · medium(area)
    - background = s_1 · large(area) · (1 − detailed(detail complexity))
    - completion = s_2 · (1 − (1 − small(area)) · (1 − detailed(detail complexity)))

    Each term is a `SoftThreshold` with its own learned threshold and slope (small is 1 minus one);
    the strengths s are learned too. The thresholds start at edge complexity 0.30, area 0.08
    (medium), 0.30 (large) and 0.06 (small), and detail complexity 0.65. A mask of unknown detail
    counts as one without detail, as `MaskInfo.features()` has it: it calls for completion only by
    being small.

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
            features: `(B, 5)` as `MaskInfo.features()` returns them.

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
class ThreeExpertRemovalRouter(Router):
    """Choose between removal, background and completion by the mask and the visual tokens.

    logits = router([extractor(hidden_states, mask) ‖ mask features]) + rules(mask features)

    where `router` is Linear, ReLU, Dropout(0.1), Linear and `rules` the learned `RemovalRules`. The
    last Linear starts small, so that at first the rules decide: ragged masks of medium or large
    area go to removal, large smooth ones with little detail to background, small or richly
    detailed ones to completion.

    Args:
        input_dim: the width of the visual tokens, mask channels split off; 128 for FLUX Fill.
        hidden_dim: the width of the hidden layer.
        mode: how the tokens are pooled, see `MaskAwareFeatureExtractor`.
        prior_scale: the initial strength of the rules, a logit; 0 starts without them.

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

    needs_mask: ClassVar[bool] = True

    def __init__(
        self,
        input_dim: int = 128,
        hidden_dim: int = 64,
        *,
        mode: FeatureMode = "mask_focused",
        prior_scale: float = 2.0,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.extractor = MaskAwareFeatureExtractor(input_dim, mode)
        self.rules = RemovalRules(prior_scale)
        last = nn.Linear(hidden_dim, len(REMOVAL_EXPERTS))
        # Not zero: then the first layer and the extractor would get no gradient in the first step.
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        self.router = nn.Sequential(
            nn.Linear(self.extractor.feature_dim + MASK_FEATURES, hidden_dim),
            nn.ReLU(),
            nn.Dropout(0.1),
            last,
        )

    @classmethod
    def default_kwargs(cls, model: nn.Module, given: Collection[str] = ()) -> Mapping[str, Any]:
        """Read `input_dim` off the model's `config.in_channels`, less the mask's channels.

        384 channels are FLUX Fill's (256 hold the mask), 9 an inpainting UNet's (1 holds it); any
        other number is taken as it is.

        Args:
            model: the model that the router will live in.
            given: names of the arguments that the caller gives; with `input_dim` among them nothing
                is read.

        Raises:
            ValueError: when the model has no `config.in_channels`.
        """
        if "input_dim" in given:
            return {}
        channels = visual_channels(model)
        if channels is None:
            raise ValueError(
                f"Expected {type(model).__name__} to have `config.in_channels`, which tells the "
                "router how wide its tokens are; pass router_kwargs={'input_dim': ...} instead."
            )
        return {"input_dim": channels}

    def configure(
        self,
        expert_names: Sequence[str],
        *,
        strategy: RoutingStrategy = "soft",
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Router:
        """Set what turns logits into weights; see `Router.configure`.

        Raises:
            ValueError: unless there are three experts, with those of `REMOVAL_EXPERTS` that occur
                in their own places.
        """
        if len(expert_names) != len(REMOVAL_EXPERTS):
            raise ValueError(
                f"Expected exactly {len(REMOVAL_EXPERTS)} experts for ThreeExpertRemovalRouter, "
                f"but got {len(expert_names)}."
            )
        for index, name in enumerate(expert_names):
            if name in REMOVAL_EXPERTS and REMOVAL_EXPERTS[index] != name:
                raise ValueError(
                    f"Expected `expert_names` in the order of ThreeExpertRemovalRouter's logits, "
                    f"{list(REMOVAL_EXPERTS)}, but got {list(expert_names)}."
                )
        return super().configure(
            expert_names, strategy=strategy, temperature=temperature, top_k=top_k
        )

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return the logits of removal, background and completion.

        Args:
            inputs: hidden states `(B, T, input_dim)`, the analysed mask and the grid size count.

        Returns:
            `(B, 3)`.

        Raises:
            ValueError: when the tokens are not `input_dim` wide, or their grid is unknown.
        """
        assert inputs.mask_info is not None
        visual = self.extractor(inputs.hidden_states, inputs.mask_info.mask, inputs.grid_size)
        mask_features = inputs.mask_info.features()
        dtype = self.rules.strengths.dtype
        joined = torch.cat([visual.to(dtype), mask_features.to(dtype)], dim=-1)
        logits: Tensor = self.router(joined) + self.rules(mask_features.to(dtype))
        return logits
