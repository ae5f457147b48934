"""What the routers for object removal have in common."""

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


def small_network(inputs: int, hidden_dim: int) -> nn.Sequential:
    """Return Linear, ReLU, Dropout(0.1), Linear to one logit per removal expert, near 0 at first.

    Args:
        inputs: the width of what it reads.
        hidden_dim: the width of the hidden layer.
    """
    last = nn.Linear(hidden_dim, len(REMOVAL_EXPERTS))
    # Not zero: then the first layer would get no gradient in the first step.
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden_dim), nn.ReLU(), nn.Dropout(0.1), last)


def check_num_layers(num_layers: int) -> int:
    """Return a number of adapted layers.

    Raises:
        ValueError: unless it is an integer >= 1.
    """
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(
            f"Expected `num_layers` to be an integer >= 1, but got {num_layers!r}. "
            '"auto" stands for the number of adapted layers in router_kwargs; for an instance it '
            "is len(moe_lora.routing.adapted_layers(model))."
        )
    return num_layers


class RemovalRouter(Router):
    """Choose between removal, background and completion by the mask and the visual tokens.

    Args:
        input_dim: the width of the visual tokens, mask channels split off.
        time_aware: whether the router reads the noise level of the call.
    """

    needs_mask: ClassVar[bool] = True

    def __init__(self, input_dim: int, time_aware: bool = False) -> None:
        super().__init__()
        self.input_dim, self.time_aware = input_dim, time_aware

    @property
    def noise_width(self) -> int:
        """Return the width of what `noise` adds."""
        return NOISE_FEATURES if self.time_aware else 0

    def noise(self, inputs: RouterInputs) -> list[Tensor]:
        """Return `[noise_features(sigma)]`, `(B, NOISE_FEATURES)`, or nothing.

        Args:
            inputs: their timestep counts.
        """
        if not self.time_aware:
            return []
        return [noise_features(inputs.sigma.to(inputs.hidden_states.device))]

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
        cls = type(self).__name__
        if len(expert_names) != len(REMOVAL_EXPERTS):
            raise ValueError(
                f"Expected exactly {len(REMOVAL_EXPERTS)} experts for {cls}, "
                f"but got {len(expert_names)}."
            )
        for index, name in enumerate(expert_names):
            if name in REMOVAL_EXPERTS and REMOVAL_EXPERTS[index] != name:
                raise ValueError(
                    f"Expected `expert_names` in the order of {cls}'s logits, "
                    f"{list(REMOVAL_EXPERTS)}, but got {list(expert_names)}."
                )
        return super().configure(
            expert_names, strategy=strategy, temperature=temperature, top_k=top_k
        )
