"""From latents to pixels, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moe_lora.losses.decoding.record_replay import Notes, Recording, Replaying
from moe_lora.losses.decoding.windows import Window, check_agreement, check_windows
from moe_lora.masks.validation import check_integer


class LatentDecoder:
    """Decode latents into images with gradient to the latents.

    images = (vae.decode(latents / scaling_factor + shift_factor) + 1) / 2

    Nothing is clamped: a clamp would give no gradient where the image overshoots, which is where it
    must be pulled back. The VAE is frozen (`requires_grad_(False)`, `eval()`) but otherwise left as
    it is: where its dtype is not `dtype`, each call decodes with a converted copy of the weights
    that lives until the backward pass, and the VAE itself keeps its own. This object is not a
    Module, so that the VAE's weights are in nobody's `state_dict`.

    Args:
        vae: an `AutoencoderKL` or anything like it: a Module with `decode(latents)`, which returns
            a tensor, a tuple or an object with `.sample`, images in [-1, 1], and with
            `config.scaling_factor` and, where there is one, `config.shift_factor`.
        dtype: what to decode in, autocast switched off; `None` for the VAE's own dtype under
            whatever autocast there is.
        checkpoint: decode sample by sample and compute each again in the backward pass, so that the
            activations of one sample are the most that is held.

    Raises:
        ValueError: for a VAE with no `config.scaling_factor`, or one that normalises by
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
            raise ValueError(
                "Expected `vae.config.scaling_factor` to be a number, but got None or no such name."
            )
        if getattr(config, "latents_mean", None) is not None:
            raise ValueError(
                "Expected a VAE that scales latents by `scaling_factor` and `shift_factor` alone, "
                "but got one with `latents_mean`. Hand over your own callable instead."
            )
        self.vae = vae.requires_grad_(False).eval()
        self.scaling_factor = float(scaling_factor)
        self.shift_factor = float(getattr(config, "shift_factor", None) or 0.0)
        self.dtype = dtype
        self.checkpoint = checkpoint
        self._forward = _Decode(vae)

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode.

        Args:
            latents: `(B, C, h, w)`, scaled as the transformer sees them, not packed.

        Returns:
            `(B, 3, H, W)`, images around [0, 1], in the dtype of the decoding.

        Raises:
            ValueError: for latents of another rank, or where the VAE's weights need conversion
                while its own gradient checkpointing is on.
        """
        self._check(latents)
        if not (self.checkpoint and torch.is_grad_enabled() and latents.requires_grad):
            return self._decode(latents)
        samples = [
            checkpoint(self._decode, one, use_reentrant=False) for one in torch.split(latents, 1)
        ]
        return torch.cat(cast("list[Tensor]", samples))

    def in_windows(
        self, latents: Tensor, windows: Sequence[Sequence[int]], *, context: int = 1
    ) -> Tensor:
        """Decode, with gradient from the pixels of a window of each sample only.

        All is decoded without gradient, one sample after the other. Then each window is decoded
        with gradient, while its surroundings stand still: convolutions see the pixels around the
        window, normalisations the statistics of the whole picture, and attention the keys and
        values of all positions. So the values are those of the whole picture up to rounding, which
        is checked, and only the activations of the windows are held.

        The gradient is that of the whole picture without what leaves the window and comes back:
        paths through pixels outside, and through the share that these have in statistics, keys and
        values. Pixels at a window's side would lose most, hence the context.

        Args:
            latents: `(B, C, h, w)`, scaled as the transformer sees them, not packed.
            windows: for each sample `(x0, y0, x1, y1)` in latent pixels, the ends exclusive, as
                `latent_windows` finds them. All zeros: no gradient for this sample.
            context: latent pixels on each side of a window that are decoded with gradient, too, an
                integer >= 0. They get gradients; their own pixels give none.

        Returns:
            `(B, 3, H, W)`, images around [0, 1], in the dtype of the decoding.

        Raises:
            ValueError: for latents of another rank, windows that are not inside them, a VAE that
                tiles or checkpoints by itself, or one whose layers see beyond a window in another
                way than told above.

        Example:
            >>> from types import SimpleNamespace
            >>> vae = nn.Conv2d(1, 3, 3, padding=1)
            >>> vae.config, vae.decode = SimpleNamespace(scaling_factor=1.0), vae.forward
            >>> latents = torch.randn(1, 1, 4, 6, requires_grad=True)
            >>> LatentDecoder(vae).in_windows(latents, [(1, 0, 3, 2)]).sum().backward()
            >>> latents.grad.ne(0).sum(), latents.grad[..., :3, :4].ne(0).sum()
            (tensor(12), tensor(12))
        """
        self._check(latents)
        places = check_windows(windows, latents)
        check_integer(context, "context", 0)
        if getattr(self.vae, "is_gradient_checkpointing", False):
            raise ValueError(
                "Expected a VAE without gradient checkpointing of its own with windows, but it is "
                "on. Use `LatentDecoder(..., checkpoint=True)`."
            )
        weights = self._converted()
        samples = zip(torch.split(latents, 1), places, strict=True)
        return torch.cat([self._in_window(one, place, context, weights) for one, place in samples])

    def _in_window(
        self, latents: Tensor, window: Window, context: int, weights: dict[str, Tensor]
    ) -> Tensor:
        size = (latents.shape[2], latents.shape[3])
        if window == (0, 0, size[1], size[0]):
            return self(latents)
        around = window.enlarged(context, size)
        notes = Notes(size, around)
        with torch.no_grad(), nullcontext() if window.empty else Recording(notes):
            whole = self._run(latents, weights)
        if window.empty or not (torch.is_grad_enabled() and latents.requires_grad):
            return whole + latents[:0].sum().to(whole.dtype)

        def replay(inside: Tensor) -> Tensor:
            with Replaying(notes):
                return self._run(inside, weights)

        inside = around.of(latents)
        part = (
            checkpoint(replay, inside, use_reentrant=False) if self.checkpoint else replay(inside)
        )
        scale = notes.scale_of(*whole.shape[2:])
        check_agreement(cast(Tensor, part).detach(), around.times(scale).of(whole))
        # Nothing of `whole` is in a graph yet, so that it may be written to.
        own = window.within(around).times(scale).of(cast(Tensor, part))
        window.times(scale).of(whole).copy_(own)
        return whole

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 4:
            raise ValueError(
                f"Expected `latents` to have shape (B, C, h, w), but got {tuple(latents.shape)}."
            )

    def _decode(self, latents: Tensor) -> Tensor:
        return self._run(latents, self._converted())

    def _converted(self) -> dict[str, Tensor]:
        """Return the weights that are not in the dtype of the decoding, in that dtype."""
        if self.dtype is None:
            return {}
        converted = {
            name: tensor.to(self.dtype)
            for name, tensor in (*self._forward.named_parameters(), *self._forward.named_buffers())
            if tensor.is_floating_point() and tensor.dtype != self.dtype
        }
        if converted and getattr(self.vae, "is_gradient_checkpointing", False):
            raise ValueError(
                "Expected a VAE without gradient checkpointing of its own where its weights are "
                f"converted to {self.dtype} for the call, since its backward pass would meet the "
                "unconverted ones. Use `checkpoint=True`, `dtype=None`, or convert the VAE."
            )
        return converted

    def _run(self, latents: Tensor, weights: dict[str, Tensor]) -> Tensor:
        if self.dtype is None:
            own = next((p.dtype for p in self.vae.parameters()), latents.dtype)
            return self._scaled(latents.to(own), weights)
        with torch.autocast(latents.device.type, enabled=False):
            return self._scaled(latents.to(self.dtype), weights)

    def _scaled(self, latents: Tensor, weights: dict[str, Tensor]) -> Tensor:
        latents = latents / self.scaling_factor + self.shift_factor
        images = functional_call(self._forward, weights, (latents,))
        return cast(Tensor, (images + 1) / 2)


class _Decode(nn.Module):
    """Make `vae.decode` a `forward`, which `functional_call` can run with other weights."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        decoded: Any = cast(Any, self.vae).decode(latents)
        if isinstance(decoded, Tensor):
            return decoded
        return cast(Tensor, decoded.sample if hasattr(decoded, "sample") else decoded[0])
