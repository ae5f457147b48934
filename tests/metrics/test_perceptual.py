"""The package lpips is not needed here: a stand-in of the same interface takes its place."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lora.metrics import load_lpips, lpips, regions


class StandIn(nn.Module):
    """Give the absolute difference of images in [-1, 1], averaged over the channels."""

    def __init__(self, net: str, spatial: bool, verbose: bool) -> None:
        super().__init__()
        self.net, self.spatial = net, spatial
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, first: Tensor, second: Tensor, normalize: bool = False) -> Tensor:
        if normalize:
            first, second = 2 * first - 1, 2 * second - 1
        distances = self.weight * (first - second).abs().mean(1, keepdim=True)
        return distances if self.spatial else distances.mean((2, 3), keepdim=True)


@pytest.fixture
def _package(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("lpips")
    package.LPIPS = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)


@pytest.mark.usefixtures("_package")
def test_the_network_gives_a_map_and_is_frozen() -> None:
    model = load_lpips("vgg")
    assert isinstance(model, StandIn)
    assert (model.net, model.spatial, model.training) == ("vgg", True, False)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("_package")
def test_a_region_has_the_mean_of_the_map(images: Any) -> None:
    model = load_lpips()
    where = regions(images.mask)["inside"]
    found = lpips(images.prediction, images.target, model, where)
    difference = 2 * (images.prediction - images.target).abs().mean(1)
    expected = [difference[index][where[index, 0]].mean().item() for index in (0, 1)]
    assert found.tolist() == [*(pytest.approx(value, rel=1e-5) for value in expected), None]
    whole = lpips(images.prediction, images.target, model)
    assert whole.mean() == pytest.approx(difference.mean().item(), rel=1e-5)
    assert not whole.values.requires_grad


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips"):
        load_lpips()


@pytest.mark.usefixtures("_package")
def test_bad_input_is_told(images: Any) -> None:
    with pytest.raises(ValueError, match="`network` to be one of"):
        load_lpips("resnet")  # type: ignore[arg-type]
    flat = StandIn("alex", spatial=False, verbose=False)
    with pytest.raises(ValueError, match=r"map of shape \(3, 1, 40, 56\).*\(3, 1, 1, 1\)"):
        lpips(images.prediction, images.target, flat)
    with pytest.raises(ValueError, match=r"`prediction` to have values in \[0, 1\]"):
        lpips(images.prediction + 1, images.target, flat)
