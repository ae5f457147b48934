from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_lora.masks import boundary_band
from moe_lora.routing.routers.features import (
    MaskAwareFeatureExtractor,
    noise_features,
    token_mask_features,
)

MODES = ["mask_focused", "boundary_aware", "content_adaptive"]
GRID = (3, 5)
TOKEN = 8


def tokens(batch: int = 2, width: int = 6, grid: tuple[int, int] = GRID) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, grid[0] * grid[1], width, generator=generator)


def masks() -> torch.Tensor:
    mask = torch.zeros(4, 1, GRID[0] * TOKEN, GRID[1] * TOKEN)
    mask[0, :, 3:13, 6:30] = 1
    mask[1] = 1
    mask[2, :, 20, 33] = 1
    return mask


def covered_shares(mask: np.ndarray) -> np.ndarray:
    """Average `(H, W)` over each token, by a loop."""
    rows, columns = GRID
    return np.array(
        [
            mask[r * TOKEN : (r + 1) * TOKEN, c * TOKEN : (c + 1) * TOKEN].mean()
            for r in range(rows)
            for c in range(columns)
        ]
    )


def band(mask: np.ndarray, width: int) -> np.ndarray:
    """Mark pixels with both a masked and an unmasked pixel at most `width` rows and columns off."""
    height, columns = mask.shape
    marked = np.zeros_like(mask)
    for y in range(height):
        for x in range(columns):
            near = mask[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
            marked[y, x] = near.min() != near.max()
    return marked


def slow_mean(hidden: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if weights.sum() == 0:
        weights = np.ones_like(weights)
    return (weights[:, None] * hidden).sum(0) / weights.sum()


@pytest.mark.parametrize("mode", ["mask_focused", "boundary_aware"])
def test_means_equal_the_loop(mode):
    hidden, mask = tokens(4), masks()
    pooled = MaskAwareFeatureExtractor(6, mode)(hidden, mask, GRID)
    for i in range(4):
        region = mask[i, 0].double().numpy()
        if mode == "boundary_aware":
            region = band(region, TOKEN // 2)
        expected = slow_mean(hidden[i].double().numpy(), covered_shares(region))
        np.testing.assert_allclose(pooled[i].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_attention_equals_the_loop():
    hidden, mask = tokens(4), masks()
    extractor = MaskAwareFeatureExtractor(6, "content_adaptive")
    torch.nn.init.normal_(extractor.query)
    pooled = extractor(hidden, mask, GRID).detach()
    query, bias = extractor.query.tolist(), extractor.mask_bias.item()
    for i in range(4):
        shares = covered_shares(mask[i, 0].double().numpy())
        terms = [
            math.exp(sum(a * b for a, b in zip(h, query, strict=True)) / math.sqrt(6) + bias * m)
            for h, m in zip(hidden[i].tolist(), shares, strict=True)
        ]
        expected = slow_mean(hidden[i].double().numpy(), np.array(terms))
        np.testing.assert_allclose(pooled[i].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_masked_tokens_alone_count_when_focused():
    hidden = tokens(1)
    mask = torch.zeros(1, 1, 24, 40)
    mask[..., :8, 8:16] = 1
    pooled = MaskAwareFeatureExtractor(6)(hidden, mask, GRID)
    torch.testing.assert_close(pooled, hidden[:, 1])


def test_a_faint_pixel_still_chooses_its_token():
    hidden = tokens(1, grid=(2, 2))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 40, 3] = 0.1
    pooled = MaskAwareFeatureExtractor(6)(hidden, mask, (2, 2))
    torch.testing.assert_close(pooled, hidden[:, 2])


def test_tokens_far_from_the_boundary_do_not_count():
    hidden = tokens(1, grid=(1, 6))
    mask = torch.zeros(1, 1, 8, 48)
    mask[..., 24:] = 1
    pooled = MaskAwareFeatureExtractor(6, "boundary_aware")(hidden, mask, (1, 6))
    torch.testing.assert_close(pooled, hidden[:, 2:4].mean(1))


def test_a_mask_at_token_resolution_has_a_boundary():
    hidden = tokens(1, grid=(1, 6))
    mask = torch.tensor([[[[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]]])
    pooled = MaskAwareFeatureExtractor(6, "boundary_aware")(hidden, mask, (1, 6))
    torch.testing.assert_close(pooled, hidden[:, 2:4].mean(1))


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_mask_pools_over_all_tokens(mode):
    extractor = MaskAwareFeatureExtractor(6, mode)
    if mode == "content_adaptive":
        torch.nn.init.zeros_(extractor.query)
    hidden = tokens(2)
    pooled = extractor(hidden, torch.zeros(2, 1, 24, 40), GRID)
    torch.testing.assert_close(pooled, hidden.mean(1))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_equals_its_samples(mode):
    extractor = MaskAwareFeatureExtractor(6, mode)
    hidden, mask = tokens(4), masks()
    together = extractor(hidden, mask, GRID)
    alone = [extractor(hidden[[i]], mask[[i]], GRID) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_are_finite_for_every_mask(mode, soft):
    extractor = MaskAwareFeatureExtractor(6, mode)
    hidden = tokens(4).requires_grad_()
    mask = masks() * (0.3 if soft else 1.0)
    mask.requires_grad_()
    pooled = extractor(hidden, mask, GRID)
    pooled.square().sum().backward()
    assert pooled.isfinite().all()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert (hidden.grad.abs().sum((1, 2)) > 0).all()
    assert mask.grad is None or mask.grad.isfinite().all()
    for parameter in extractor.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_modes_differ():
    hidden, mask = tokens(1), masks()[:1]
    pooled = [MaskAwareFeatureExtractor(6, mode)(hidden, mask, GRID) for mode in MODES]
    assert not torch.allclose(pooled[0], pooled[1])
    assert not torch.allclose(pooled[0], pooled[2])


def test_dtype_follows_the_tokens():
    for mode in MODES:
        extractor = MaskAwareFeatureExtractor(6, mode)
        assert extractor(tokens().double(), masks()[:2], GRID).dtype == torch.float64
        assert extractor.feature_dim == 6


def test_an_unknown_mode_raises():
    with pytest.raises(ValueError, match=r"Expected `mode` to be one of .* but got 'mean'"):
        MaskAwareFeatureExtractor(6, "mean")


@pytest.mark.parametrize(
    ("hidden", "mask", "grid", "message"),
    [
        (torch.zeros(2, 15, 7), torch.zeros(2, 1, 24, 40), GRID, r"\(B, T, input_dim=6\)"),
        (torch.zeros(2, 15, 6), torch.zeros(3, 1, 24, 40), GRID, r"`mask` to have shape \(2, 1"),
        (torch.zeros(2, 15, 6), torch.zeros(2, 24, 40), GRID, r"`mask` to have shape \(2, 1"),
        (torch.zeros(2, 15, 6), torch.zeros(2, 1, 24, 40), None, "Expected `grid_size`, the"),
        (torch.zeros(2, 15, 6), torch.zeros(2, 1, 24, 40), (4, 4), "to have 15 tokens, but got"),
    ],
)
def test_shapes_that_disagree_raise(hidden, mask, grid, message):
    with pytest.raises(ValueError, match=message):
        MaskAwareFeatureExtractor(6)(hidden, mask, grid)


def test_token_mask_features_equal_their_definition():
    grid, shape = (6, 8), torch.zeros(2, 1, 96, 128)
    shape[0, :, 16:80, 32:112] = 1
    shape[1, :, :32, :16] = 1
    mask = (torch.rand(2, 1, 96, 128) > 0.5).float() * shape
    found = token_mask_features(mask, grid).view(2, *grid, 4)
    band = boundary_band(mask, 8)
    cover = torch.zeros(2, *grid)
    for r in range(grid[0]):
        for c in range(grid[1]):
            token = (..., slice(r * 16, r * 16 + 16), slice(c * 16, c * 16 + 16))
            cover[:, r, c] = mask[token].mean((1, 2, 3))
            torch.testing.assert_close(found[:, r, c, 1], band[token].mean((1, 2, 3)))
    torch.testing.assert_close(found[..., 0], cover)
    for place, reach in ((2, 1), (3, 3)):
        for r in range(grid[0]):
            for c in range(grid[1]):
                around = cover[
                    :, max(r - reach, 0) : r + reach + 1, max(c - reach, 0) : c + reach + 1
                ]
                torch.testing.assert_close(found[:, r, c, place], around.mean((1, 2)))


def test_noise_features_tell_levels_apart_and_keep_their_dtype():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = noise_features(sigma)
    assert found.dtype == torch.float64
    expected = [
        [s, *(f(k * torch.pi * s) for k in (1, 2) for f in (torch.sin, torch.cos))] for s in sigma
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert torch.cdist(found, found).add(torch.eye(11)).min() > 0.1
