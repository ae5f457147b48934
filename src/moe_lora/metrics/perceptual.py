"""LPIPS, a distance between images by the features of a network; its package is optional."""

from __future__ import annotations

import importlib
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moe_lora.metrics.image import region_average
from moe_lora.metrics.metric_values import Measured
from moe_lora.metrics.validation import check_pair

Network = Literal["alex", "vgg", "squeeze"]


def load_lpips(network: Network = "alex", device: torch.device | str = "cpu") -> nn.Module:
    """Load an LPIPS network that gives a map, for `lpips` and `measure`.

    The package `lpips` is no dependency of moe_lora, and fetches the weights of the network that it
    stands on when they are not at hand.

    Args:
        network: "alex", which the authors advise for measuring, "vgg" or "squeeze".
        device: where to.

    Returns:
        A frozen `lpips.LPIPS(net=network, spatial=True)`.

    Raises:
        ImportError: when the package is not installed.
        ValueError: for an unknown network.

    Source: Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features
        as a perceptual metric", 2018.
    """
    if network not in get_args(Network):
        raise ValueError(
            f"Expected `network` to be one of {list(get_args(Network))}, but got {network!r}."
        )
    try:
        package = importlib.import_module("lpips")
    except ModuleNotFoundError as error:
        raise ImportError(
            "Expected the package lpips, which measures LPIPS, but it is not installed: "
            "pip install lpips."
        ) from error
    model: nn.Module = package.LPIPS(net=network, spatial=True, verbose=False)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def lpips(
    result: Tensor, truth: Tensor, model: nn.Module, region: Tensor | None = None
) -> Measured:
    """Measure the LPIPS distance, sample by sample: the region's mean of the network's map.

    The receptive fields are large: what lies outside a region has a say in it.

    Args:
        result: `(B, 3, H, W)`, in [0, 1].
        truth: the same shape.
        model: of `load_lpips`, or anything that maps `(x, y, normalize=True)`, images in [0, 1], to
            distances `(B, 1, H, W)`.
        region: `(B, 1, H, W)`, bool; everywhere by default.

    Returns:
        >= 0, 0 where the images are equal, `(B,)`; missing where the region is empty.

    Raises:
        TypeError, ValueError: for images that are none, are outside [0, 1] or do not fit.
        ValueError: when the model gives no map of the images' size.
    """
    first, second = check_pair(result, truth, names=("result", "truth"))
    distances: Tensor = model(first.float(), second.float(), normalize=True)
    expected = (len(first), 1, *first.shape[2:])
    if tuple(distances.shape) != expected:
        raise ValueError(
            f"Expected `model` to give a map of shape {expected}, as that of load_lpips does, but "
            f"got {tuple(distances.shape)}."
        )
    return region_average(distances.double(), region)
