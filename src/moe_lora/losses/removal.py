"""Removal loss: the weighted sum of base, boundary, consistency and detail loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

from torch import Tensor, nn

from moe_lora.flow import check_sigma, unpack_latents, velocity_to_x0
from moe_lora.losses.boundary import boundary_loss
from moe_lora.losses.consistency import consistency_loss
from moe_lora.losses.decoding.windows import latent_windows
from moe_lora.losses.detail import detail_loss
from moe_lora.losses.flow_matching import Weighting, base_loss, check_weighting
from moe_lora.losses.reduction import at_least_float32
from moe_lora.masks.validation import check_integer

Decoder = Callable[[Tensor], Tensor]


class WindowDecoder(Protocol):
    """Decoder with gradient inside windows only, such as `LatentDecoder`."""

    def in_windows(self, latents: Tensor, windows: Sequence[Sequence[int]]) -> Tensor:
        """Decode `(B, C, h, w)` with gradient inside `(x0, y0, x1, y1)`, in latent pixels, only."""


DEFAULT_MAX_SIGMA = 0.7

IMAGE_TOLERANCE = 1e-3
"""Allowed overshoot of [0, 1], for rounding in half precision or by a resize."""


class RemovalLossOutput(NamedTuple):
    """Total and components of a removal loss.

    Attributes:
        total: scalar, the weighted sum of the components.
        components: scalars by name, before weighting; enabled components only.
    """

    total: Tensor
    components: dict[str, Tensor]


class RemovalLoss(nn.Module):
    """Combine the four losses of object removal.

    total = base * L_base + boundary * L_boundary + consistency * L_consistency + detail * L_detail

    `L_base` compares velocities in latent space. The other, specialized losses compare pixels:
    x0 = x_t - sigma * velocity is decoded with gradient. Since x0 is unreliable at high noise
    levels, samples with sigma > `max_sigma` are not decoded and are excluded from the mean of the
    specialized losses, which are 0 if all samples are excluded.

    Two options reduce the cost of decoding. With `window_margin`, only a window around the mask is
    decoded with gradient, see `LatentDecoder.in_windows`; the values of the losses do not change,
    but the consistency loss has a gradient in the window only. With `specialized_every=n`, the
    specialized losses are computed every n-th step, with n times their weight, so that the mean
    gradient over the steps does not change; its variance increases.

    Args:
        base: weight, >= 0; 0 or `None` disables the component, which is then not computed.
        boundary: weight, >= 0, or `None`.
        consistency: weight, >= 0, or `None`.
        detail: weight, >= 0, or `None`.
        decoder: function from latents `(B, C, h, w)` to images `(B, 3, H, W)` in [0, 1], such as a
            `LatentDecoder`; required by the specialized losses.
        weighting: weighting of noise levels in the base loss; see `sigma_weight`.
        max_sigma: highest noise level of the specialized losses, in (0, 1].
        boundary_width: width of the boundary band on each side of the edge in pixels; `None` for
            `default_band_width(H, W)`.
        effect_band: width in pixels of the band around the mask with reduced consistency loss; see
            `effect_weight`; 0 for none.
        window_margin: margin in latent pixels around the mask's bounding box within which latents
            are decoded with gradient; `None` for all latents. Requires a decoder with a method
            `in_windows`.
        specialized_every: n, an integer >= 1; above 1, `forward` requires `step`.

    Raises:
        ValueError: if a weight is negative or not finite, all components are disabled, the
            weighting is unknown, `max_sigma` is outside (0, 1], `effect_band` or `window_margin` is
            not an integer >= 0, or `specialized_every` is not an integer >= 1.

    Example:
        >>> import torch
        >>> loss = RemovalLoss(boundary=0, detail=0, decoder=lambda latents: latents)
        >>> loss.enabled
        ('base', 'consistency')
        >>> noisy = torch.full((1, 3, 8, 8), 0.5)
        >>> total, components = loss(
        ...     torch.ones_like(noisy),
        ...     torch.zeros_like(noisy),
        ...     x_t=noisy,
        ...     sigma=torch.tensor([0.2]),
        ...     mask=torch.zeros(1, 1, 8, 8),
        ...     target=noisy,
        ... )
        >>> {name: round(value.item(), 3) for name, value in components.items()}
        {'base': 1.0, 'consistency': 0.199}
        >>> round(total.item(), 3)
        1.1
    """

    def __init__(
        self,
        base: float | None = 1.0,
        boundary: float | None = 0.3,
        consistency: float | None = 0.5,
        detail: float | None = 0.2,
        *,
        decoder: Decoder | None = None,
        weighting: Weighting = "none",
        max_sigma: float = DEFAULT_MAX_SIGMA,
        boundary_width: int | None = None,
        effect_band: int = 0,
        window_margin: int | None = None,
        specialized_every: int = 1,
    ) -> None:
        super().__init__()
        given = {"base": base, "boundary": boundary, "consistency": consistency, "detail": detail}
        for name, weight in given.items():
            if weight is not None and not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"Expected `{name}` to be finite and >= 0, but got {weight}.")
        self.weights = {name: float(weight) for name, weight in given.items() if weight}
        if not self.weights:
            raise ValueError("Expected at least one loss weight to be > 0, but got none.")
        if not 0 < max_sigma <= 1:
            raise ValueError(f"Expected `max_sigma` to be in (0, 1], but got {max_sigma}.")
        check_weighting(weighting)
        check_integer(effect_band, "effect_band", 0)
        if window_margin is not None:
            check_integer(window_margin, "window_margin", 0)
        check_integer(specialized_every, "specialized_every", 1)
        for name in self.weights:
            self.weights[name] *= 1 if name == "base" else specialized_every
        self.decoder = decoder
        self.weighting = weighting
        self.max_sigma = max_sigma
        self.boundary_width = boundary_width
        self.effect_band = effect_band
        self.window_margin = window_margin
        self.specialized_every = specialized_every

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the enabled components, in the order of the arguments."""
        return tuple(self.weights)

    @property
    def specialized(self) -> bool:
        """Whether a specialized loss, any except the base loss, is enabled."""
        return any(name != "base" for name in self.weights)

    def forward(
        self,
        velocity: Tensor,
        target_velocity: Tensor,
        *,
        x_t: Tensor | None = None,
        sigma: Tensor | None = None,
        mask: Tensor | None = None,
        target: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        step: int | None = None,
    ) -> RemovalLossOutput:
        """Compute the enabled components and their weighted sum.

        Args:
            velocity: `(B, C, h, w)` or packed `(B, (h/2)*(w/2), 4C)`, predicted velocity.
            target_velocity: same shape as `velocity`; noise - x0.
            x_t: same shape as `velocity`, noisy latents, the input of the transformer.
            sigma: `(B,)`, noise levels in [0, 1].
            mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
            target: `(B, 3, H, W)`, image in [0, 1].
            height: height h of the latents, not of the image; required for packed latents.
            width: width w of the latents, not of the image; required for packed latents.
            step: optimizer step, an integer >= 0. The specialized losses are computed, and their
                inputs required, if `specialized_every` divides it.

        Returns:
            The total and the components, scalars in float32 or wider, all with a graph.

        Raises:
            ValueError: if an input that an enabled component requires is missing, shapes do not
                match, or a sigma, mask or target is outside [0, 1].
        """
        components: dict[str, Tensor] = {}
        if "base" in self.weights:
            components["base"] = base_loss(
                velocity, target_velocity, sigma=sigma, weighting=self.weighting
            )
        if self.specialized and self._is_specialized_step(step):
            inputs = self._check_complete(
                velocity=velocity, x_t=x_t, sigma=sigma, mask=mask, target=target
            )
            components |= self._specialized_losses(inputs, height, width)
        total = at_least_float32(velocity[:0]).sum()
        for name, value in components.items():
            total = total + self.weights[name] * value
        return RemovalLossOutput(total, components)

    def _is_specialized_step(self, step: int | None) -> bool:
        if self.specialized_every == 1:
            return True
        if step is None:
            raise ValueError(
                "Expected `step` to be an integer for "
                f"`specialized_every={self.specialized_every}`, but got None."
            )
        check_integer(step, "step", 0)
        return step % self.specialized_every == 0

    def _check_complete(self, **inputs: Tensor | None) -> _PixelInputs:
        missing = [name for name, value in inputs.items() if value is None]
        if self.decoder is None:
            missing.insert(0, "decoder")
        if missing:
            names = ", ".join(f"`{name}`" for name in missing)
            enabled = [name for name in self.weights if name != "base"]
            raise ValueError(f"Expected {names} for the losses {enabled}, but got None.")
        if self.window_margin is not None and not hasattr(self.decoder, "in_windows"):
            raise ValueError(
                "Expected `decoder` to have a method `in_windows(latents, windows)`, like "
                f"`LatentDecoder`, for `window_margin={self.window_margin}`, but got "
                f"{type(self.decoder).__name__}."
            )
        given = _PixelInputs(**{name: value for name, value in inputs.items() if value is not None})
        _check_inputs(given)
        return given

    def _specialized_losses(
        self, inputs: _PixelInputs, height: int | None, width: int | None
    ) -> dict[str, Tensor]:
        passed = (inputs.sigma <= self.max_sigma).nonzero().flatten()
        if len(passed) == 0:
            zero = at_least_float32(inputs.velocity[:0]).sum()
            return {name: zero for name in self.weights if name != "base"}
        velocity, x_t, sigma, mask, target = (tensor[passed] for tensor in inputs)
        x0 = velocity_to_x0(at_least_float32(x_t), at_least_float32(velocity), sigma)
        prediction = self._decode(_unpack_if_packed(x0, height, width), mask)
        losses: dict[str, Tensor] = {}
        if "boundary" in self.weights:
            losses["boundary"] = boundary_loss(prediction, target, mask, width=self.boundary_width)
        if "consistency" in self.weights:
            losses["consistency"] = consistency_loss(
                prediction, target, mask, effect_band=self.effect_band
            )
        if "detail" in self.weights:
            losses["detail"] = detail_loss(prediction, target, mask)
        return losses

    def _decode(self, latents: Tensor, mask: Tensor) -> Tensor:
        assert self.decoder is not None
        if self.window_margin is None:
            return self.decoder(latents)
        size = (latents.shape[2], latents.shape[3])
        windows = latent_windows(mask, size, self.window_margin)
        return cast(WindowDecoder, self.decoder).in_windows(latents, windows)


class _PixelInputs(NamedTuple):
    velocity: Tensor
    x_t: Tensor
    sigma: Tensor
    mask: Tensor
    target: Tensor


def _unpack_if_packed(x0: Tensor, height: int | None, width: int | None) -> Tensor:
    if x0.ndim == 3:
        if height is None or width is None:
            raise ValueError(
                "Expected latent `height` and `width` to be integers for packed latents, "
                f"but got {height} and {width}."
            )
        return unpack_latents(x0, height, width)
    given = (height or x0.shape[-2], width or x0.shape[-1])
    if given != tuple(x0.shape[-2:]):
        raise ValueError(
            f"Expected `height` and `width` to be the size of the latents, {tuple(x0.shape[-2:])}, "
            f"but got {height} and {width}."
        )
    return x0


def _check_inputs(inputs: _PixelInputs) -> None:
    batch = inputs.velocity.shape[0]
    for name, tensor in inputs._asdict().items():
        if tensor.shape[:1] != (batch,) or (name == "sigma" and tensor.ndim != 1):
            shape = "(B,)" if name == "sigma" else "(B, ...)"
            raise ValueError(
                f"Expected `{name}` to have shape {shape} with B = {batch}, the batch size of "
                f"`velocity`, but got {tuple(tensor.shape)}."
            )
    check_sigma(inputs.sigma)
    low, high = inputs.target.min().item(), inputs.target.max().item()
    if not (low >= -IMAGE_TOLERANCE and high <= 1 + IMAGE_TOLERANCE):
        raise ValueError(
            f"Expected `target` to be an image in [0, 1], but got values from {low:g} to "
            f"{high:g}. Convert images in [-1, 1] with (x + 1) / 2."
        )
