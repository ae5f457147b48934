"""The base class of learned routers for any number of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lora.routing.routers.removal import ExpertHead, MaskedRouter, check_num_layers


class HeadedRouter(MaskedRouter):
    """Base class of the routers with a linear head for each expert on a common hidden layer.

    A subclass creates its network and then calls `create_heads`.

    Args:
        input_dim: the width of the visual tokens without mask channels.
        time_aware: whether the noise level of the call is an input.
        hidden_dim: the width of the hidden layer.
        num_layers: the number of adapted layers with separate weights; `None` for shared weights.

    Raises:
        ValueError: for a `num_layers` that is not an integer >= 1.
    """

    heads: nn.ModuleList

    def __init__(
        self, input_dim: int, time_aware: bool = False, *, hidden_dim: int, num_layers: int | None
    ) -> None:
        super().__init__(input_dim, time_aware)
        self.hidden_dim = hidden_dim
        self.num_layers = None if num_layers is None else check_num_layers(num_layers)

    def create_heads(self, num_experts: int) -> None:
        """Create the heads.

        Args:
            num_experts: the number of experts.

        Raises:
            ValueError: for a `num_experts` that is not an integer >= 1.
        """
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(
                f"Expected `num_experts` to be an integer >= 1, but got {num_experts}."
            )
        self.heads = nn.ModuleList(
            ExpertHead(self.hidden_dim, self.num_layers) for _ in range(num_experts)
        )

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the experts, `(B, E)`, or with `num_layers` `(B, num_layers, E)`.

        Args:
            hidden: `(B, hidden_dim)`.
        """
        # Heads of their own, so that the sums of one do not depend on the number of experts.
        return torch.cat([head(hidden) for head in self.heads], dim=-1)

    def add_expert(self, logit: float) -> None:
        """Add an expert with a logit that does not depend on the input at first.

        Args:
            logit: the logit; finite.
        """
        first = next(self.parameters())
        head = ExpertHead(self.hidden_dim, self.num_layers)
        head.set_constant(logit)
        self.heads.append(head.to(first.device, first.dtype))
        self.init_kwargs["num_experts"] = len(self.heads)

    def remove_expert(self, index: int) -> None:
        """Remove an expert.

        Args:
            index: the index of the expert.
        """
        del self.heads[index]
        self.init_kwargs["num_experts"] = len(self.heads)
