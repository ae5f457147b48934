"""LPIPS, a perceptual distance of images; its package is optional."""

from __future__ import annotations

import importlib
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moe_lora.metrics.image import region_average
from moe_lora.metrics.metric_values import MetricValues
from moe_lora.metrics.validation import check_pair

Network = Literal["alex", "vgg", "squeeze"]


def load_lpips(network: Network = "alex", device: torch.device | str = "cpu") -> nn.Module:
    """Load an LPIPS network with spatial output, for `lpips` and `measure`.

    Requires the package `lpips`, which downloads the weights of the backbone on first use.

    Args:
        network: "alex", which the authors recommend for evaluation, "vgg" or "squeeze".
        device: device of the network.

    Returns:
        A frozen `lpips.LPIPS(net=network, spatial=True)`.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if the network is unknown.

    Source: Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features
        as a perceptual metric", 2018, arXiv:1801.03924.
    """
    if network not in get_args(Network):
        raise ValueError(
            f"Expected `network` to be one of {list(get_args(Network))}, but got {network!r}."
        )
    try:
        package = importlib.import_module("lpips")
    except ModuleNotFoundError as error:
        raise ImportError(
            "LPIPS requires the package lpips, which is not installed. Install it with "
            "`pip install lpips`."
        ) from error
    model: nn.Module = package.LPIPS(net=network, spatial=True, verbose=False)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def lpips(
    prediction: Tensor, target: Tensor, model: nn.Module, region: Tensor | None = None
) -> MetricValues:
    """Compute the LPIPS distance per sample, the mean of the network's map over a region.

    Receptive fields are large, so that pixels outside a region influence its mean.

    Args:
        prediction: `(B, 3, H, W)`, image in [0, 1].
        target: `(B, 3, H, W)`, image in [0, 1].
        model: network of `load_lpips`, or a Module that maps `(x, y, normalize=True)`, images in
            [0, 1], to distances `(B, 1, H, W)`.
        region: `(B, 1, H, W)`, bool; all pixels by default.

    Returns:
        `(B,)`, >= 0, 0 for equal images; samples with an empty region are absent.

    Raises:
        TypeError, ValueError: if an image is invalid, outside [0, 1], or of another shape.
        ValueError: if the output of the model does not have the size of the images.
    """
    first, second = check_pair(prediction, target, names=("prediction", "target"))
    distances: Tensor = model(first.float(), second.float(), normalize=True)
    expected = (len(first), 1, *first.shape[2:])
    if tuple(distances.shape) != expected:
        raise ValueError(
            f"Expected `model` to return a map of shape {expected}, like that of load_lpips, but "
            f"got {tuple(distances.shape)}."
        )
    return region_average(distances.double(), region)
