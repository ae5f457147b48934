from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lora.masks import analyze, extract_mask_info_from_batch

DOCUMENTED = {"mask_latent", "area_ratio", "edge_complexity", "boundary_smoothness"}


def triplet() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("ref", "src", "result")
    batch = {name: torch.rand(2, 3, 64, 96, generator=generator) for name in names}
    batch["result"] = batch["result"] * 0.1
    batch["mask"] = torch.zeros(2, 1, 64, 96)
    batch["mask"][0, :, 10:40, 20:60] = 1
    return batch


def test_has_the_documented_keys_with_the_values_of_analyze() -> None:
    batch = triplet()
    got = extract_mask_info_from_batch(batch)
    info = analyze(batch["mask"], batch["src"])
    extra = {"mask", "has_occlusion", "bbox", "detail_complexity"}
    assert set(got) == DOCUMENTED | extra
    for name, value in got.items():
        assert torch.equal(value, getattr(info, name)), name


def test_detail_comes_from_src_then_result_then_not_at_all() -> None:
    batch = triplet()
    from_src = extract_mask_info_from_batch(batch)["detail_complexity"]
    del batch["src"]
    from_result = extract_mask_info_from_batch(batch)["detail_complexity"]
    assert from_result[0] < from_src[0]
    del batch["result"]
    assert "detail_complexity" not in extract_mask_info_from_batch(batch)


def test_latent_size_is_passed_on() -> None:
    assert extract_mask_info_from_batch(triplet())["mask_latent"].shape == (2, 1, 8, 12)
    got = extract_mask_info_from_batch(triplet(), latent_size=(4, 6))
    assert got["mask_latent"].shape == (2, 1, 4, 6)


def test_missing_mask_names_the_layout() -> None:
    batch = triplet()
    del batch["mask"]
    with pytest.raises(ValueError, match=r"`mask` \(B, 1, H, W\) .* \['ref', 'result', 'src'\]"):
        extract_mask_info_from_batch(batch)


def test_batch_is_a_mapping() -> None:
    with pytest.raises(TypeError, match="to be a mapping, but got tuple"):
        extract_mask_info_from_batch((torch.ones(1, 1, 8, 8),))  # type: ignore[arg-type]


def test_image_of_another_size_is_refused() -> None:
    batch = triplet() | {"src": torch.rand(2, 3, 32, 96)}
    with pytest.raises(ValueError, match=r"`image` to have shape \(2, 3, 64, 96\)"):
        extract_mask_info_from_batch(batch)
