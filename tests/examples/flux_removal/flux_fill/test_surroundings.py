from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flux_fill.models import load_pipeline
from flux_fill.surroundings import apply_surroundings, reconstruct
from moe_lora.masks import composite, correct_seam, keep_source


@pytest.fixture(scope="module")
def vae(random_flux_fill: Path) -> nn.Module:
    return load_pipeline(str(random_flux_fill)).vae


def images(height: int = 24, width: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, source = torch.rand(2, 2, 3, height, width, generator=generator)
    mask = torch.zeros(2, 1, height, width)
    mask[..., 5:15, 8:20] = 1
    return prediction, source, mask


@torch.no_grad()
def test_a_reconstruction_is_what_the_autoencoder_makes_of_the_padded_image(vae: nn.Module) -> None:
    _, source, _ = images(21, 37)
    padded = source[:, :, [min(i, 20) for i in range(32)]][..., [min(i, 36) for i in range(48)]]
    latents = vae.encode(2 * padded - 1).latent_dist.mode()
    expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)[..., :21, :37]
    torch.testing.assert_close(reconstruct(vae, source), expected)
    in_half = reconstruct(vae.to(torch.bfloat16), source)
    vae.to(torch.float32)
    assert in_half.dtype == torch.float32
    torch.testing.assert_close(in_half, expected, atol=0.1, rtol=0)


@torch.no_grad()
def test_the_choices_are_the_functions_of_the_library(vae: nn.Module) -> None:
    prediction, source, mask = images()
    kept = keep_source(prediction, source, mask, lambda image: reconstruct(vae, image))
    given = (vae, prediction, source, mask)
    assert torch.equal(apply_surroundings(*given, outside="prediction"), prediction)
    assert torch.equal(apply_surroundings(*given, seam=0.0), kept)
    expected = correct_seam(kept, prediction, mask, strength=0.5)
    assert torch.equal(apply_surroundings(*given), expected)
    assert not torch.equal(expected, kept)
    pasted = apply_surroundings(*given, outside="paste", seam=0.0, feather=3)
    assert torch.equal(pasted, composite(prediction, source, mask, 3))
    hard = composite(prediction, source, mask)
    corrected = apply_surroundings(*given, outside="paste", seam=1.0)
    assert torch.equal(corrected, correct_seam(hard, prediction, mask, strength=1.0))
