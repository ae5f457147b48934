"""Decode latents into images with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moe_lora.losses.decoding.record_replay import Recorder, Recording, Replayer
from moe_lora.losses.decoding.windows import Window, check_agreement, check_windows
from moe_lora.masks.validation import check_integer


class LatentDecoder:
    """Decode latents into images with gradient to the latents.

    images = (vae.decode(latents / scaling_factor + shift_factor) + 1) / 2

    Images are not clamped, since a clamp would remove the gradient where they overshoot. The VAE is
    frozen (`requires_grad_(False)`, `eval()`) but not converted: if its dtype differs from `dtype`,
    each call decodes with a converted copy of the weights, which lives until the backward pass.
    The decoder is not a Module, so that no `state_dict` contains the VAE.

    Args:
        vae: an `AutoencoderKL`, or a Module with `decode(latents)`, which returns images in [-1, 1]
            as a tensor, a tuple or an object with `.sample`, with `config.scaling_factor` and
            optionally `config.shift_factor`.
        dtype: dtype of the decoding, with autocast disabled; `None` for the VAE's dtype and the
            current autocast mode.
        checkpoint: whether to decode sample by sample and to recompute each sample in the backward
            pass, which limits memory to the activations of one sample.

    Raises:
        ValueError: if the VAE has no `config.scaling_factor`, or normalizes latents with
            `latents_mean` and `latents_std`.

    Example:
        >>> from types import SimpleNamespace
        >>> vae = nn.Identity()
        >>> vae.config = SimpleNamespace(scaling_factor=0.5, shift_factor=0.1)
        >>> vae.decode = lambda latents: (latents,)
        >>> LatentDecoder(vae)(torch.full((1, 1, 1, 1), 0.2))
        tensor([[[[0.7500]]]])
    """

    def __init__(
        self,
        vae: nn.Module,
        *,
        dtype: torch.dtype | None = torch.float32,
        checkpoint: bool = False,
    ) -> None:
        config: Any = getattr(vae, "config", None)
        scaling_factor = getattr(config, "scaling_factor", None)
        if scaling_factor is None:
            raise ValueError("Expected `vae.config.scaling_factor` to be a number, but got none.")
        if getattr(config, "latents_mean", None) is not None:
            raise ValueError(
                "Expected `vae` to scale latents by `scaling_factor` and `shift_factor` only, but "
                "got a VAE with `latents_mean`. Use a function of your own as the decoder."
            )
        self.vae = vae.requires_grad_(False).eval()
        self.scaling_factor = float(scaling_factor)
        self.shift_factor = float(getattr(config, "shift_factor", None) or 0.0)
        self.dtype = dtype
        self.checkpoint = checkpoint
        self._forward = _DecodeModule(vae)

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents.

        Args:
            latents: `(B, C, h, w)`, scaled as the transformer's input, not packed.

        Returns:
            `(B, 3, H, W)`, images in [0, 1] up to overshoot, in the dtype of the decoding.

        Raises:
            ValueError: if the latents have another rank, or the VAE's weights need conversion while
                its own gradient checkpointing is enabled.
        """
        self._check_rank(latents)
        if not (self.checkpoint and torch.is_grad_enabled() and latents.requires_grad):
            return self._decode(latents)
        samples = [
            checkpoint(self._decode, one, use_reentrant=False) for one in torch.split(latents, 1)
        ]
        return torch.cat(cast("list[Tensor]", samples))

    def in_windows(
        self, latents: Tensor, windows: Sequence[Sequence[int]], *, context: int = 1
    ) -> Tensor:
        """Decode latents, with gradient from the pixels of one window per sample.

        Each sample is decoded without gradient, then its window is decoded with gradient. In the
        second pass, values outside the window are constants from the first pass: convolutions read
        the pixels around the window, normalizations use the statistics of the whole image, and
        attention uses the keys and values of all positions. The images therefore equal those of
        `__call__` up to rounding, which is checked, and memory holds the activations of windows
        only.

        The gradient omits paths that leave the window and return to it, through pixels outside and
        through their share in statistics, keys and values. The error is largest at the sides of the
        window, hence `context`.

        Args:
            latents: `(B, C, h, w)`, scaled as the transformer's input, not packed.
            windows: `(x0, y0, x1, y1)` per sample, in latent pixels, end exclusive, such as from
                `latent_windows`. A window of zeros means no gradient for the sample.
            context: latent pixels on each side of a window that also receive gradients, an
                integer >= 0; the pixels decoded from them pass no gradient.

        Returns:
            `(B, 3, H, W)`, images in [0, 1] up to overshoot, in the dtype of the decoding.

        Raises:
            ValueError: if the latents have another rank, a window is not inside them, the VAE uses
                tiling or gradient checkpointing of its own, or its layers depend on pixels outside
                a window in an unsupported way.

        Example:
            >>> from types import SimpleNamespace
            >>> vae = nn.Conv2d(1, 3, 3, padding=1)
            >>> vae.config, vae.decode = SimpleNamespace(scaling_factor=1.0), vae.forward
            >>> latents = torch.randn(1, 1, 4, 6, requires_grad=True)
            >>> LatentDecoder(vae).in_windows(latents, [(1, 0, 3, 2)]).sum().backward()
            >>> latents.grad.ne(0).sum(), latents.grad[..., :3, :4].ne(0).sum()
            (tensor(12), tensor(12))
        """
        self._check_rank(latents)
        checked = check_windows(windows, latents)
        check_integer(context, "context", 0)
        if getattr(self.vae, "is_gradient_checkpointing", False):
            raise ValueError(
                "Expected gradient checkpointing of the VAE to be disabled for windows, but it is "
                "enabled. Use `LatentDecoder(..., checkpoint=True)` instead."
            )
        weights = self._converted_weights()
        samples = zip(torch.split(latents, 1), checked, strict=True)
        images = [self._decode_window(one, window, context, weights) for one, window in samples]
        return torch.cat(images)

    def _decode_window(
        self, latents: Tensor, window: Window, context: int, weights: dict[str, Tensor]
    ) -> Tensor:
        size = (latents.shape[2], latents.shape[3])
        if window == (0, 0, size[1], size[0]):
            return self(latents)
        around = window.enlarged(context, size)
        recording = Recording(size, around)
        with torch.no_grad(), nullcontext() if window.empty else Recorder(recording):
            whole = self._run(latents, weights)
        if window.empty or not (torch.is_grad_enabled() and latents.requires_grad):
            return whole + latents[:0].sum().to(whole.dtype)

        def replay(inside: Tensor) -> Tensor:
            with Replayer(recording):
                return self._run(inside, weights)

        inside = around.of(latents)
        part = (
            checkpoint(replay, inside, use_reentrant=False) if self.checkpoint else replay(inside)
        )
        scale = recording.scale_of(*whole.shape[2:])
        check_agreement(cast(Tensor, part).detach(), around.times(scale).of(whole))
        # `whole` has no graph yet, so that in-place writes are allowed.
        own = window.within(around).times(scale).of(cast(Tensor, part))
        window.times(scale).of(whole).copy_(own)
        return whole

    def _check_rank(self, latents: Tensor) -> None:
        if latents.ndim != 4:
            raise ValueError(
                f"Expected `latents` to have shape (B, C, h, w), but got {tuple(latents.shape)}."
            )

    def _decode(self, latents: Tensor) -> Tensor:
        return self._run(latents, self._converted_weights())

    def _converted_weights(self) -> dict[str, Tensor]:
        """Return converted copies of the weights whose dtype differs from that of the decoding."""
        if self.dtype is None:
            return {}
        converted = {
            name: tensor.to(self.dtype)
            for name, tensor in (*self._forward.named_parameters(), *self._forward.named_buffers())
            if tensor.is_floating_point() and tensor.dtype != self.dtype
        }
        if converted and getattr(self.vae, "is_gradient_checkpointing", False):
            raise ValueError(
                "Expected gradient checkpointing of the VAE to be disabled, since its weights are "
                f"converted to {self.dtype} for the forward pass only, but it is enabled. Use "
                "`checkpoint=True`, `dtype=None`, or convert the VAE."
            )
        return converted

    def _run(self, latents: Tensor, weights: dict[str, Tensor]) -> Tensor:
        if self.dtype is None:
            own = next((p.dtype for p in self.vae.parameters()), latents.dtype)
            return self._run_vae(latents.to(own), weights)
        with torch.autocast(latents.device.type, enabled=False):
            return self._run_vae(latents.to(self.dtype), weights)

    def _run_vae(self, latents: Tensor, weights: dict[str, Tensor]) -> Tensor:
        latents = latents / self.scaling_factor + self.shift_factor
        images = functional_call(self._forward, weights, (latents,))
        return cast(Tensor, (images + 1) / 2)


class _DecodeModule(nn.Module):
    """Expose `vae.decode` as `forward`, so that `functional_call` can replace the weights."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        decoded: Any = cast(Any, self.vae).decode(latents)
        if isinstance(decoded, Tensor):
            return decoded
        return cast(Tensor, decoded.sample if hasattr(decoded, "sample") else decoded[0])
