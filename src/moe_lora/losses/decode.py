"""From latents to pixels, with gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


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
        if latents.ndim != 4:
            raise ValueError(
                f"Expected `latents` to have shape (B, C, h, w), but got {tuple(latents.shape)}."
            )
        if not (self.checkpoint and torch.is_grad_enabled() and latents.requires_grad):
            return self._decode(latents)
        samples = [
            checkpoint(self._decode, one, use_reentrant=False) for one in torch.split(latents, 1)
        ]
        return torch.cat(cast("list[Tensor]", samples))

    def _decode(self, latents: Tensor) -> Tensor:
        if self.dtype is None:
            own = next((p.dtype for p in self.vae.parameters()), latents.dtype)
            return self._scaled(latents.to(own), {})
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
        with torch.autocast(latents.device.type, enabled=False):
            return self._scaled(latents.to(self.dtype), converted)

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
