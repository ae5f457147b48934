from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_lora.masks import boundary_band
from moe_lora.metrics import mask_sizes, regions
from moe_lora.metrics.regions import REGIONS


def test_effects_are_where_source_and_truth_differ_outside_the_mask(images: Any) -> None:
    found = regions(images.mask, images.source, images.target)
    assert tuple(found) == REGIONS
    for sample in range(3):
        for row in range(40):
            for column in range(56):
                pixel = (sample, slice(None), row, column)
                difference = (images.source[pixel] - images.target[pixel]).abs().mean().item()
                inside = images.mask[sample, 0, row, column].item() == 1
                assert found["inside"][sample, 0, row, column] == inside
                assert found["outside"][sample, 0, row, column] == (not inside)
                expected = difference > 0.05 and not inside
                assert found["effect"][sample, 0, row, column] == expected
    counts = {name: where.flatten(1).sum(1).tolist() for name, where in found.items()}
    assert counts["whole"] == [40 * 56] * 3
    assert counts["inside"] == [15 * 28, 9 * 6, 0]
    assert counts["effect"][0] > 100
    assert counts["effect"][1:] == [0, 0]


def test_the_boundary_is_a_band_of_the_width_that_is_asked_for(images: Any) -> None:
    wide = regions(images.mask, band_width=4)["boundary"]
    assert torch.equal(wide, boundary_band(images.mask, 4) > 0)
    assert torch.equal(regions(images.mask)["boundary"], boundary_band(images.mask, 2) > 0)
    assert not wide[2].any()


def test_without_a_source_there_is_no_effect(images: Any) -> None:
    assert "effect" not in regions(images.mask)


def test_the_threshold_is_a_mean_over_the_channels() -> None:
    target = torch.zeros(1, 3, 4, 4)
    source = target.clone()
    source[:, 0] = 0.3
    mask = torch.zeros(1, 1, 4, 4)
    assert regions(mask, source, target, effect_threshold=0.09)["effect"].all()
    assert not regions(mask, source, target, effect_threshold=0.11)["effect"].any()


def test_soft_masks_are_cut_at_one_half() -> None:
    mask = torch.full((1, 1, 4, 4), 0.49)
    mask[..., :2] = 0.5
    assert int(regions(mask)["inside"].sum()) == 8


def test_bad_input_is_told(images: Any) -> None:
    with pytest.raises(ValueError, match="`target` to be given with `source`"):
        regions(images.mask, images.source)
    with pytest.raises(ValueError, match="`source` to be given with `target`"):
        regions(images.mask, target=images.target)
    with pytest.raises(ValueError, match=r"`effect_threshold` to be in \[0, 1\), but got 1"):
        regions(images.mask, images.source, images.target, effect_threshold=1)
    with pytest.raises(ValueError, match="`source` to have the batch and image size of `mask`"):
        regions(images.mask[:1], images.source, images.target)
    with pytest.raises(ValueError, match="`mask` to have shape"):
        regions(images.mask[0])
    with pytest.raises(ValueError, match="`width`"):
        regions(images.mask, band_width=0)


def test_sizes_are_shares_of_the_image() -> None:
    mask = torch.zeros(5, 1, 10, 20)
    for index, pixels in enumerate((0, 9, 10, 20, 200)):
        mask[index].flatten()[:pixels] = 1
    assert mask_sizes(mask) == ["small", "small", "medium", "large", "large"]
    assert mask_sizes(mask, [("a", 0.5), ("b", 0.9)]) == ["a", "a", "a", "a", "b"]
    with pytest.raises(ValueError, match="to increase"):
        mask_sizes(mask, [("a", 0.5), ("b", 0.5)])
    with pytest.raises(ValueError, match="to increase"):
        mask_sizes(mask, [])
