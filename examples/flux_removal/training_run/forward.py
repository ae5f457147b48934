"""One call of the transformer, for training and validation alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flux_fill.models import guidance_for
from removal_data.batches import Latents
from training_run.parts import Parts


def predict_velocity(
    model: nn.Module,
    parts: Parts,
    latents: Latents,
    x_t: Tensor,
    sigma: Tensor,
    prompt: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the predicted velocity `(B, T, 4C)`.

    Args:
        model: the transformer, prepared or not.
        parts: the models of the run.
        latents: of the batch.
        x_t: noisy packed latents, `(B, T, 4C)`.
        sigma: noise levels, `(B,)`.
        prompt: prompt embeddings and pooled ones.
    """
    prompt_embeds, pooled_embeds = prompt
    scale = parts.options.guidance_scale
    velocity: Tensor = model(
        hidden_states=torch.cat([x_t, latents.condition], dim=-1),
        timestep=sigma.to(x_t.dtype),
        guidance=guidance_for(parts.pipe.transformer, scale, len(sigma)),
        pooled_projections=pooled_embeds,
        encoder_hidden_states=prompt_embeds,
        txt_ids=prompt_embeds.new_zeros(prompt_embeds.shape[1], 3),
        img_ids=latents.image_ids,
        return_dict=False,
    )[0]
    return velocity
