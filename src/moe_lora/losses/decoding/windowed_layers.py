"""Convolution and group normalization of a window with values from the whole feature map.

Weights are frozen: only the input has a gradient, and only the tensors that it needs are saved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.grad import conv2d_input

Pair = tuple[int, int]


class Border(NamedTuple):
    """Frame around a window of a feature map, without the window itself.

    Attributes:
        top: `(1, C, p, width + 2q)`, including corners.
        bottom: `(1, C, p, width + 2q)`, including corners.
        left: `(1, C, height, q)`.
        right: `(1, C, height, q)`.
    """

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    def around(self, inside: Tensor) -> Tensor:
        """Concatenate the frame and the window, `(1, C, height, width)`.

        Example:
            >>> zero, one = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 1)
            >>> Border(zero, zero, one, one).around(torch.ones(1, 1, 1, 1))[0, 0].tolist()
            [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
        """
        left, right, top, bottom = (
            strip.to(inside.dtype) for strip in (self.left, self.right, self.top, self.bottom)
        )
        return torch.cat([top, torch.cat([left, inside, right], dim=3), bottom], dim=2)


class FramedConv(Function):
    """Convolve a window with its recorded frame in place of zero padding.

    Only the weight is saved: the backward pass of a frozen convolution does not need the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inside: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        frame: Border | None,
        dilation: Pair,
        groups: int,
    ) -> Tensor:
        """Convolve with stride 1, and without padding if there is no frame."""
        whole = inside if frame is None else frame.around(inside)
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dilation, ctx.groups = whole.shape, dilation, groups
        ctx.pad = (0, 0) if frame is None else (frame.top.shape[2], frame.left.shape[3])
        with torch.autocast(inside.device.type, enabled=False):
            return F.conv2d(whole, weight, bias, dilation=dilation, groups=groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the window; the frame is constant."""
        (weight,) = ctx.saved_tensors
        whole = conv2d_input(ctx.shape, weight, grads[0], dilation=ctx.dilation, groups=ctx.groups)
        p, q = ctx.pad
        inside = whole[:, :, p : ctx.shape[2] - p, q : ctx.shape[3] - q]
        return (inside, None, None, None, None, None)


class Moments(NamedTuple):
    """Statistics of a group normalization.

    Attributes:
        mean: `(B, groups)`, float32 or wider.
        rstd: `(B, groups)`, 1 / sqrt(variance + eps).
        size: number of elements per group.
    """

    mean: Tensor
    rstd: Tensor
    size: int


def moments(features: Tensor, num_groups: int, eps: float) -> Moments:
    """Compute the statistics of a group normalization in float32 or wider.

    Args:
        features: `(B, C, ...)`.
        num_groups: number of groups, a divisor of C.
        eps: constant added to the variance.

    Returns:
        Mean and reciprocal standard deviation per sample and group.

    Example:
        >>> moments(torch.tensor([[[1.0, 3.0]]]), 1, 0.0)
        Moments(mean=tensor([[2.]]), rstd=tensor([[1.]]), size=2)
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    grouped = wide.reshape(len(wide), num_groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    return Moments(mean, (variance + eps).rsqrt(), grouped.shape[2])


class WindowedGroupNorm(Function):
    """Normalize a window with the statistics of the whole feature map.

    y = (x - mean) * rstd * weight + bias

    The gradient equals that of the normalization of the whole map if the loss has no gradient
    outside the window: the statistics are functions of the window's elements, each with a share of
    1 / size.

    dx = rstd * (g - sum(g) / size - x̂ * sum(g * x̂) / size), with g = weight * dy
    """

    @staticmethod
    def forward(
        ctx: Any,
        inside: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        found: Moments,
    ) -> Tensor:
        """Normalize; the output has the dtype of `inside`."""
        groups = found.mean.shape[1]
        channels = inside.shape[1] // groups
        scale = found.rstd.repeat_interleave(channels, dim=1)
        if weight is not None:
            scale = scale * weight
        shift = -found.mean.repeat_interleave(channels, dim=1) * scale
        if bias is not None:
            shift = shift + bias
        ctx.save_for_backward(inside, scale, *found[:2])
        ctx.size = found.size
        return _affine(inside, scale, shift)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the window."""
        inside, scale, mean, rstd = ctx.saved_tensors
        batch, groups = mean.shape
        channels = inside.shape[1] // groups
        given = grads[0].to(scale.dtype)
        # Per channel and multiplied by rstd: the two sums of the formula.
        sums = given.flatten(2).sum(dim=2) * scale
        products = torch.linalg.vecdot(given.flatten(2), inside.to(scale.dtype).flatten(2)) * scale
        first = sums.view(batch, groups, channels).sum(dim=2)
        second = products.view(batch, groups, channels).sum(dim=2) - mean * first
        slope = -rstd.square() * second / ctx.size
        offset = -first / ctx.size - mean * slope
        per_channel = (t.repeat_interleave(channels, dim=1) for t in (slope, offset))
        result = _affine(inside.to(scale.dtype), *per_channel)
        result.addcmul_(given, _expand_like(scale, given))
        return (result.to(inside.dtype), None, None, None)


def _expand_like(per_channel: Tensor, features: Tensor) -> Tensor:
    return per_channel.view(*per_channel.shape, *(1 for _ in features.shape[2:]))


def _affine(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wide = features.to(scale.dtype)
    result = torch.addcmul(_expand_like(shift, features), wide, _expand_like(scale, features))
    return result.to(features.dtype)
