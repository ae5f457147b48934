"""Examples are what the base is to learn, and come back from the pool as they went in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxFillPipeline
from tiny_models import tiny_vae

import latent_pool
from make_tiny_flux_fill import build_base, build_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    # Smaller than the bundled one: bfloat16 convolutions may take seconds on a CPU.
    vae = tiny_vae(latent_channels=16, block_out_channels=(8, 8, 8, 8))
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    return vae.requires_grad_(False)


def test_packed_mask_is_that_of_the_stock_pipeline(vae: AutoencoderKL) -> None:
    mask = (torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    pipe: FluxFillPipeline = build_pipeline(vae, build_base())
    theirs, _ = pipe.prepare_mask_latents(
        mask, torch.zeros(2, 16, 8, 12), 2, 16, 1, 64, 96, torch.float32, "cpu", None
    )
    torch.testing.assert_close(latent_pool.pack_mask(mask), theirs)


def test_targets_lose_the_object_and_keep_its_shadow() -> None:
    rng = np.random.default_rng(0)
    seen, wanted, mask = latent_pool.draw_examples(rng, latent_pool.Source("train"))
    assert seen.shape == wanted.shape == (5, 3, 128, 128)
    outside = (1 - mask).expand_as(seen) > 0
    torch.testing.assert_close(seen[outside], wanted[outside], atol=0.05, rtol=0)
    for i in range(2):
        assert (seen[i] - wanted[i]).abs().max() > 0.1
    torch.testing.assert_close(seen[2:], wanted[2:])


def test_pool_gives_back_what_was_encoded(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(5, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(5, 1, 128, 128)
    mask[:, :, 16:40, :] = 1
    monkeypatch.setattr(latent_pool, "draw_examples", lambda *_: (images, images, mask))
    pool = latent_pool.LatentPool(vae, 30)
    for _ in range(8):
        pool.add(np.random.default_rng(0), latent_pool.Source("train"))
    assert pool.count == 40
    target, condition = pool.draw(np.random.default_rng(0), 4)
    assert target.shape == (4, 64, 64)
    assert condition.shape == (4, 64, 64 + 256)
    latents = (vae.encode(images).latent_dist.mode() - 0.25) * 0.5
    expected = latent_pool.pack(latents)
    nearest = torch.cdist(target.flatten(1), expected.flatten(1)).min(1).values
    assert nearest.max() < 0.05 * expected.flatten(1).norm(dim=1).max()
    torch.testing.assert_close(condition[..., 64:], latent_pool.pack_mask(mask[:4]))


def test_more_photographs_are_drawn_for_crops_and_for_scenes() -> None:
    flat = np.zeros((160, 160, 3), dtype=np.uint8)
    flat[:, ::2] = (0, 255, 0)
    source = latent_pool.Source("train", [flat])
    rng = np.random.default_rng(0)
    crops = [source.crop(rng) for _ in range(40)]
    backgrounds = [source.scene(rng).result for _ in range(10)]
    for images, least in ((crops, 24), (backgrounds, 5)):
        one_channel = [(image.max((0, 1)) > 0.2).sum() == 1 for image in images]
        assert least <= sum(one_channel) < len(images)
