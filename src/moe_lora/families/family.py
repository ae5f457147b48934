"""The record of a model family."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

TokenStream = Literal["image", "text", "joint", "joint_image_first"]
"""The tokens of a layer's input.

- "image": image tokens.
- "text": text tokens.
- "joint": text tokens, then image tokens.
- "joint_image_first": image tokens, then text tokens.
"""

RowLayout = Literal["sample", "folded", "packed"]
"""The meaning of the first dimension of a layer's input.

- "sample": samples.
- "folded": samples times frames (or other parts), grouped by sample.
- "packed": tokens of all samples, in an unknown order.
"""

VideoAxes = Literal["channels_first", "frames_first", "channels_last"]
"""The order of dimensions in the latents of a video.

- "channels_first": `(B, C, F, h, w)`.
- "frames_first": `(B, F, C, h, w)`.
- "channels_last": `(B, F, h, w, C)`.
"""

ReferencePosition = Literal["last", "first"]
"""The position of packed reference tokens, after or before the tokens of the image."""

# Module paths with the same meaning in most families.
_TEXT_LAYERS = re.compile(
    r"(.*\.)?("
    r"(ff_context|norm1_context|txt_mlp|context_embedder|context_refiner|token_refiner|text_\w+"
    r"|(video|audio)_text_\w+|cap_embedder|caption_\w+|txt_in|txt_attn_qkv|txt_kv_proj"
    r"|llm_cond_proj|encoder_hidden_states_proj|encoder_proj|to_cond_embed|cross_attention_proj)"
    r"(\..*)?"
    r"|(attn2|cross_attn|cross_attention)\.to_(k|v|kv|key|value)"
    r"|attn1?\.(add_[qkv]_proj|to_add_out|to_[qkv]_t)"
    r")"
)
_JOINT_LAYERS = re.compile(r"(.*\.)?single_transformer_blocks\..*")


@dataclass(frozen=True)
class CarriedMask:
    """Mask channels of a model's input.

    Args:
        channels: the number of all input channels of models with a mask in their input.
        first: the first mask channel.
        stop: the channel after the last mask channel.
        encoding: "flux_fill" for packed full-resolution pixels, see
            `moe_lora.masks.from_flux_fill`; "latent" for one channel at latent size.
    """

    channels: int
    first: int
    stop: int
    encoding: Literal["flux_fill", "latent"]

    @property
    def other_channels(self) -> int:
        """Return the number of channels without a mask."""
        return self.channels - (self.stop - self.first)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Record of a model family, a group of model classes with the same conventions.

    Regexes match full module paths inside the model.

    Args:
        classes: names of the classes; a subclass belongs to the family of its base.
        targets: default layers for `target_modules=None`: name endings, or a regex; `None` makes
            `target_modules` mandatory.
        streams: `(regex, stream)` of layers that are exceptions from the rules of most families;
            the first match applies. Use "image" for layers with another token order than "joint":
            token weights then raise, since the layer has more tokens than the image.
        folded: regex of the layers with row layout "folded".
        packed: regex of the layers with row layout "packed".
        timestep_range: the timesteps `(clean, noise)` of clean data and of pure noise in the
            family's pipelines; `None` if it is unknown.
        video_axes: order of the dimensions of a video's latents.
        references: position of the packed tokens of reference images.
        carried_mask: mask channels of the model's input; `None` for an input without a mask.

    Example:
        >>> family = Family(classes=("MyModel",), folded=r"temporal\\..*")
        >>> family.layout("temporal.to_q"), family.stream("transformer_blocks.0.attn.add_q_proj")
        ('folded', 'text')
    """

    classes: tuple[str, ...]
    targets: tuple[str, ...] | str | None = None
    streams: tuple[tuple[str, TokenStream], ...] = ()
    folded: str | None = None
    packed: str | None = None
    timestep_range: tuple[float, float] | None = None
    video_axes: VideoAxes = "channels_first"
    references: ReferencePosition = "last"
    carried_mask: CarriedMask | None = None

    def stream(self, path: str) -> TokenStream:
        """Return the token stream of a layer.

        Args:
            path: the layer's module path inside the model.

        Returns:
            "text" for the text stream of double-stream blocks and the keys and values of
            cross-attention, "joint" for single-stream blocks with the text first,
            "joint_image_first" for those with the text last, else "image".
        """
        for pattern, stream in self.streams:
            if re.fullmatch(pattern, path):
                return stream
        if _TEXT_LAYERS.fullmatch(path):
            return "text"
        return "joint" if _JOINT_LAYERS.fullmatch(path) else "image"

    def layout(self, path: str) -> RowLayout:
        """Return the meaning of the first dimension of a layer's input.

        Args:
            path: the layer's module path inside the model.
        """
        if self.folded is not None and re.fullmatch(self.folded, path):
            return "folded"
        packed = self.packed is not None and re.fullmatch(self.packed, path)
        return "packed" if packed else "sample"


UNKNOWN = Family(classes=())
"""The record of models that belong to no family.

It assumes only the module paths that have the same meaning in most families.
"""
