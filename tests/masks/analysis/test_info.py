from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_lora.masks import analyze

Draw = Callable[..., Tensor]


def test_features_are_the_documented_columns(comb: Draw) -> None:
    masks = torch.stack([comb(64, 4), 1 - comb(64, 4)])[:, None]
    images = torch.rand(2, 3, 64, 64)
    with_image, without = analyze(masks, images), analyze(masks)
    features = with_image.features()
    assert features.dtype == torch.float32
    assert torch.equal(features[:, 0], with_image.area_ratio)
    assert torch.equal(features[:, 1], with_image.edge_complexity)
    assert torch.equal(features[:, 2], with_image.boundary_smoothness)
    assert features[:, 3].tolist() == [0.0, 1.0]
    assert with_image.detail_complexity is not None
    assert torch.equal(features[:, 4], with_image.detail_complexity)
    assert without.features()[:, 4].tolist() == [0.0, 0.0]


def test_features_carry_gradient(comb: Draw) -> None:
    mask = comb(64, 4)[None, None].requires_grad_()
    analyze(mask).features().sum().backward()
    assert mask.grad is not None
    assert mask.grad.abs().sum() > 0


def test_to_moves_every_tensor() -> None:
    info = analyze(torch.ones(1, 1, 16, 16), torch.rand(1, 3, 16, 16))
    moved = info.to("meta")
    tensors = [value for value in vars(moved).values() if value is not None]
    assert len(tensors) == 8
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert analyze(torch.ones(1, 1, 16, 16)).to("meta").detail_complexity is None


def test_samples_are_selected_in_any_order() -> None:
    info = analyze(torch.rand(3, 1, 16, 16), torch.rand(3, 3, 16, 16))
    index = torch.tensor([2, 0, 2, 1])
    for name, value in vars(info.select(index)).items():
        assert torch.equal(value, getattr(info, name)[index]), name


def test_a_copy_shares_nothing_and_carries_gradient() -> None:
    mask = torch.rand(1, 1, 16, 16, requires_grad=True)
    info = analyze(mask)
    copied = info.copy()
    assert copied.mask.data_ptr() != info.mask.data_ptr()
    copied.area_ratio.sum().backward()
    assert mask.grad is not None
