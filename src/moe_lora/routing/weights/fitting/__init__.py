"""Fitting routing weights to a call, in three steps.

1. `samples`: one row of weights per sample of the call.
2. `tokens`: token weights for the tokens of the model.
3. `layer`: the shape of one layer's gate.

Steps 1 and 2 run once per call (`fit_to_call`), step 3 in every layer (`fit_to_layer`).
"""

from __future__ import annotations

from torch import Tensor

from moe_lora.routing.model_call.call import ModelCall
from moe_lora.routing.model_call.image_tokens import Grid
from moe_lora.routing.weights.fitting.layer import fit_to_layer
from moe_lora.routing.weights.fitting.samples import fit_to_samples
from moe_lora.routing.weights.fitting.tokens import fit_to_tokens

__all__ = ["fit_to_call", "fit_to_layer", "fit_to_samples", "fit_to_tokens"]


def fit_to_call(weights: Tensor, call: ModelCall) -> tuple[Tensor, Grid | None]:
    """Fit given weights to the samples of a call, then to its tokens.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        call: the model's call.

    Returns:
        The weights and the grid as from `fit_to_tokens`; the unchanged weights for a call without
        named latents.

    Raises:
        ValueError: as `fit_to_samples` and `fit_to_tokens`.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def forward(self, hidden_states, timestep=None): ...
        >>> call = ModelCall.read(Model(), (torch.zeros(4, 6, 8),), {"timestep": 500})
        >>> fit_to_call(torch.rand(1, 3), call)[0].shape
        torch.Size([4, 3])
    """
    latents = call.named_latents
    if weights.ndim == 1 or latents is None:
        return weights, None
    weights = fit_to_samples(weights, latents)
    has_tokens = isinstance(latents, Tensor) and latents.ndim > 2
    return fit_to_tokens(weights, call) if weights.ndim == 3 and has_tokens else (weights, None)
