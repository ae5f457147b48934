"""Building blocks of the routers for object removal."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_lora.families import visual_channels
from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.base import Router
from moe_lora.routing.routers.features import NOISE_FEATURES, noise_features
from moe_lora.routing.routers.gating import RoutingStrategy

REMOVAL_EXPERTS = ("removal_expert", "background_expert", "completion_expert")
"""The three experts in the order of the router's logits."""


class SoftThreshold(nn.Module):
    """Smooth step function with a learned threshold and slope.

    sigmoid(exp(log_slope) · (value − threshold))

    Args:
        threshold: the initial threshold.
        slope: the initial slope; > 0.
    """

    def __init__(self, threshold: float, slope: float) -> None:
        super().__init__()
        # FSDP refuses to shard parameters without a dimension.
        self.threshold = nn.Parameter(torch.tensor([threshold]))
        self.log_slope = nn.Parameter(torch.tensor([math.log(slope)]))

    def forward(self, value: Tensor) -> Tensor:
        """Apply the step function, with a result in (0, 1) in the shape of `value`."""
        return torch.sigmoid(self.log_slope.exp() * (value - self.threshold))

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Version 0.1.0 saved 0-dimensional tensors.
        for key in (f"{prefix}threshold", f"{prefix}log_slope"):
            if key in state_dict:
                state_dict[key] = state_dict[key].view(-1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ExpertHead(nn.Linear):
    """Logit of one expert on a hidden layer.

    Args:
        hidden_dim: the width of the hidden layer.
        num_layers: the number of adapted layers with separate weights; `None` for shared weights.
    """

    layer_offsets: nn.Parameter | None

    def __init__(self, hidden_dim: int, num_layers: int | None = None) -> None:
        super().__init__(hidden_dim, 1)
        # With zero weights, the hidden layer would get no gradient in the first step.
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)
        offsets = None if num_layers is None else nn.Parameter(torch.zeros(num_layers, 1))
        self.register_parameter("layer_offsets", offsets)

    def set_constant(self, logit: float) -> None:
        """Set the logit of every input to a constant.

        Args:
            logit: the logit.

        Raises:
            ValueError: for NaN or inf.
        """
        if not math.isfinite(logit):
            raise ValueError(f"Expected `router_logit` to be finite, but got {logit}.")
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, logit)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `(..., 1)`, or with `num_layers` `(..., num_layers, 1)`.

        Args:
            hidden: `(..., hidden_dim)`.
        """
        logit = super().forward(hidden)
        if self.layer_offsets is None:
            return logit
        return logit.unsqueeze(-2) + self.layer_offsets


def small_mlp(inputs: int, hidden_dim: int) -> nn.Sequential:
    """Return Linear, ReLU, Dropout(0.1), Linear with one logit per removal expert, near 0 at first.

    Args:
        inputs: the input width.
        hidden_dim: the width of the hidden layer.
    """
    last = nn.Linear(hidden_dim, len(REMOVAL_EXPERTS))
    # With zero weights, the first layer would get no gradient in the first step.
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden_dim), nn.ReLU(), nn.Dropout(0.1), last)


def check_num_layers(num_layers: int) -> int:
    """Return the number of adapted layers, or raise.

    Args:
        num_layers: the number.

    Raises:
        ValueError: for anything but an integer >= 1.
    """
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(
            f"Expected `num_layers` to be an integer >= 1, but got {num_layers!r}. "
            'Use "auto" in router_kwargs, or len(moe_lora.routing.adapted_layers(model)) for an '
            "instance."
        )
    return num_layers


class MaskedRouter(Router):
    """Base class of the routers that read the mask and the visual tokens.

    Args:
        input_dim: the width of the visual tokens without mask channels.
        time_aware: whether the noise level of the call is an input.
    """

    needs_mask: ClassVar[bool] = True

    def __init__(self, input_dim: int, time_aware: bool = False) -> None:
        super().__init__()
        self.input_dim, self.time_aware = input_dim, time_aware

    @property
    def noise_dim(self) -> int:
        """Return the width of `noise_inputs(inputs)`."""
        return NOISE_FEATURES if self.time_aware else 0

    def noise_inputs(self, inputs: RouterInputs) -> list[Tensor]:
        """Return `[noise_features(sigma)]`, `(B, NOISE_FEATURES)`, or an empty list.

        Args:
            inputs: the inputs of the call, with a timestep.
        """
        if not self.time_aware:
            return []
        return [noise_features(inputs.sigma.to(inputs.hidden_states.device))]

    @classmethod
    def default_kwargs(cls, model: nn.Module, given: Collection[str] = ()) -> Mapping[str, Any]:
        """Return `input_dim`: the model's `config.in_channels` without mask channels.

        FLUX Fill has 384 channels, 256 of them for the mask; an inpainting UNet has 9, 1 of them
        for the mask. For other models, `input_dim` is the number of channels.

        Args:
            model: the model to adapt.
            given: names of the arguments from the caller; with `input_dim` the result is empty.

        Raises:
            ValueError: when the model has no `config.in_channels`.
        """
        if "input_dim" in given:
            return {}
        channels = visual_channels(model)
        if channels is None:
            raise ValueError(
                f"Expected {type(model).__name__} to have `config.in_channels`, the width of its "
                "tokens, but got none. Pass router_kwargs={'input_dim': ...} instead."
            )
        return {"input_dim": channels}


class RemovalRouter(MaskedRouter):
    """Base class of the routers for removal, background and completion experts, and further ones.

    The three have rules; a further expert has an `ExpertHead` on the hidden layer of the network
    `router`, which the subclass creates.

    Args:
        input_dim: the width of the visual tokens without mask channels.
        time_aware: whether the noise level of the call is an input.
        hidden_dim: the width of the hidden layer.
        num_experts: the number of experts, the three included.
        num_layers: the number of adapted layers with separate weights; `None` for shared weights.

    Raises:
        ValueError: for a `num_layers` that is not an integer >= 1, or fewer than three experts.
    """

    router: nn.Sequential
    layer_offsets: nn.Parameter  # with `num_layers`

    def __init__(
        self,
        input_dim: int,
        time_aware: bool = False,
        *,
        hidden_dim: int,
        num_experts: int = len(REMOVAL_EXPERTS),
        num_layers: int | None = None,
    ) -> None:
        super().__init__(input_dim, time_aware)
        self.hidden_dim = hidden_dim
        self.num_layers = None if num_layers is None else check_num_layers(num_layers)
        further = num_experts - len(REMOVAL_EXPERTS)
        if further < 0:
            raise ValueError(
                f"Expected `num_experts` to be at least {len(REMOVAL_EXPERTS)} for "
                f"{type(self).__name__}, but got {num_experts}."
            )
        self.further_experts = nn.ModuleList(
            ExpertHead(hidden_dim, num_layers) for _ in range(further)
        )

    def network_logits(self, features: Tensor, rules: Tensor) -> Tensor:
        """Return the logits of the network and the rules.

        Args:
            features: `(..., inputs)`, the network's input.
            rules: `(..., 3)`, logits of the three experts.

        Returns:
            `(..., E)`, or with `num_layers` `(..., num_layers, E)`.
        """
        *layers, last = self.router
        hidden = features
        for layer in layers:
            hidden = layer(hidden)
        logits: Tensor = last(hidden) + rules
        if self.num_layers is not None:
            logits = logits.unsqueeze(1) + self.layer_offsets
        if not self.further_experts:
            return logits
        # Heads of their own, so that the sums of the three do not depend on their number.
        return torch.cat([logits, *(head(hidden) for head in self.further_experts)], dim=-1)

    def add_expert(self, logit: float) -> None:
        """Add an expert with a logit that does not depend on the input at first.

        Args:
            logit: the logit; finite.
        """
        head = ExpertHead(self.hidden_dim, self.num_layers)
        head.set_constant(logit)
        strengths = next(self.router.parameters())
        self.further_experts.append(head.to(strengths.device, strengths.dtype))
        self._record_num_experts()

    def remove_expert(self, index: int) -> None:
        """Remove an expert other than the three with rules.

        Args:
            index: the index of the expert.

        Raises:
            ValueError: for an expert with rules.
        """
        if index < len(REMOVAL_EXPERTS):
            raise ValueError(
                f"Expected an expert after the first {len(REMOVAL_EXPERTS)}, for which "
                f"{type(self).__name__} has rules, but got number {index}. Attach another router "
                "with moe_lora.attach_router first."
            )
        del self.further_experts[index - len(REMOVAL_EXPERTS)]
        self._record_num_experts()

    def _record_num_experts(self) -> None:
        self.init_kwargs["num_experts"] = len(REMOVAL_EXPERTS) + len(self.further_experts)

    def configure(
        self,
        expert_names: Sequence[str],
        *,
        strategy: RoutingStrategy = "soft",
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Router:
        """Set experts, strategy and temperature; see `Router.configure`.

        Raises:
            ValueError: for another number of experts, or for names of `REMOVAL_EXPERTS` in a
                different order.
        """
        cls, count = type(self).__name__, len(REMOVAL_EXPERTS) + len(self.further_experts)
        if len(expert_names) != count:
            raise ValueError(
                f"Expected exactly {count} experts for {cls}, but got {len(expert_names)}. Choose "
                'router="mask_aware" for any number of experts.'
            )
        for index, name in enumerate(expert_names):
            if name in REMOVAL_EXPERTS and REMOVAL_EXPERTS[index : index + 1] != (name,):
                raise ValueError(
                    f"Expected `expert_names` in the order of {cls}'s logits, "
                    f"{list(REMOVAL_EXPERTS)}, but got {list(expert_names)}."
                )
        return super().configure(
            expert_names, strategy=strategy, temperature=temperature, top_k=top_k
        )
