from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe_lora.masks import from_flux_fill, from_inpainting_unet


def stock_tokens(mask: Tensor) -> Tensor:
    """Pack a mask and its masked image as the stock pipeline does: `(B, T, 64 + 64 + 256)`."""
    pipeline = pytest.importorskip("diffusers").FluxFillPipeline
    batch, _, height, width = mask.shape
    stock = SimpleNamespace(
        vae_scale_factor=8,
        vae=SimpleNamespace(config=SimpleNamespace(shift_factor=0.1, scaling_factor=0.3)),
        _pack_latents=pipeline._pack_latents,
    )
    image_latents = torch.randn(batch, 16, height // 8, width // 8)
    packed_mask, packed_image = pipeline.prepare_mask_latents(
        stock, mask, image_latents, batch, 16, 1, height, width, mask.dtype, "cpu", None
    )
    return torch.cat([torch.randn_like(packed_image), packed_image, packed_mask], dim=2)


@pytest.mark.parametrize("size", [(64, 64), (32, 80), (96, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fill_mask_comes_back_bit_for_bit(size: tuple[int, int], dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = stock_tokens(mask)
    assert tokens.shape[2] == 384
    assert torch.equal(from_flux_fill(tokens, *size), mask)
    assert torch.equal(from_flux_fill(tokens[..., 128:], *size), mask)


def test_fill_mask_carries_gradient() -> None:
    tokens = torch.rand(1, 4, 384, requires_grad=True)
    from_flux_fill(tokens, 32, 32).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.sum(dim=(0, 1)).tolist() == [0.0] * 128 + [4.0] * 256


def test_fill_sizes_must_fit_the_tokens() -> None:
    tokens = torch.zeros(1, 8, 384)
    with pytest.raises(ValueError, match=r"2 \* 2 = 4 tokens for a mask of 32 x 32 .* got 8"):
        from_flux_fill(tokens, 32, 32)
    assert from_flux_fill(tokens, 32, 64).shape == (1, 1, 32, 64)
    assert from_flux_fill(tokens, 64, 32).shape == (1, 1, 64, 32)


@pytest.mark.parametrize("height", [24, 0, -16, 32.0])
def test_fill_sizes_are_multiples_of_sixteen(height: object) -> None:
    with pytest.raises(ValueError, match="`height` to be a positive multiple of 16"):
        from_flux_fill(torch.zeros(1, 4, 384), height, 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 4, 64), (4, 384), (1, 4, 128)])
def test_fill_channels_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, T, 384\) or \(B, T, 256\), but got"):
        from_flux_fill(torch.zeros(shape), 32, 32)


def test_unet_mask_is_the_fifth_channel_clamped() -> None:
    latents, masked = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    mask = torch.rand(2, 1, 6, 8) * 1.5 - 0.25
    got = from_inpainting_unet(torch.cat([latents, mask, masked], dim=1))
    assert torch.equal(got, mask.clamp(0, 1))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (9, 8, 8)])
def test_unet_input_shape_is_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(B, 9, h, w\), but got"):
        from_inpainting_unet(torch.zeros(shape))
