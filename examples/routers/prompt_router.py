"""Choose the experts by the prompt: a linear layer on its pooled embedding."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

import moe_lora
from moe_lora import Router, RouterInputs


@moe_lora.register_router("pooled_prompt")
class PromptRouter(Router):
    """Read `pooled_projections`, which every call of a Flux transformer has.

    Args:
        text_dim: the width of the pooled embedding; read off the model's config when left out.
        num_experts: how many logits to return.
    """

    def __init__(self, text_dim: int, num_experts: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_dim, elementwise_affine=False)
        self.head = nn.Linear(text_dim, num_experts)

    @classmethod
    def default_kwargs(cls, model: nn.Module, given: Collection[str] = ()) -> dict[str, Any]:
        """Read `text_dim` off the model."""
        config: Any = model.config
        return {} if "text_dim" in given else {"text_dim": config.pooled_projection_dim}

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return `(B, E)`."""
        pooled = inputs.model_inputs["pooled_projections"]
        return self.head(self.norm(pooled.to(self.head.weight)))
