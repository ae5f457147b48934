"""Base models without weights, and calls of them, from what their configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

KNOWN_CONFIGS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        # https://huggingface.co/black-forest-labs/FLUX.1-Fill-dev, transformer/config.json
        "FLUX.1-Fill-dev": {
            "_class_name": "FluxTransformer2DModel",
            "in_channels": 384,
            "out_channels": 64,
            "guidance_embeds": True,
        },
        "FLUX.1-dev": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        # The defaults of their classes in diffusers 0.42.
        "FLUX.2-dev": {"_class_name": "Flux2Transformer2DModel"},
        "Qwen-Image": {"_class_name": "QwenImageTransformer2DModel"},
    }
)
"""Configurations that need no download, by the last part of the model's name."""


def model_on_meta(name_or_path: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Build a diffusion model from its configuration, without memory for its weights.

    Args:
        name_or_path: a name of `KNOWN_CONFIGS`, a folder of a model or a pipeline, or the name of
            a repository on the Hub.
        dtype: of the weights.

    Returns:
        The model on the meta device, frozen.

    Raises:
        OSError: when there is no configuration under the name.
        ValueError: when the configuration is of no model of diffusers.
    """
    diffusers: Any = import_module("diffusers")
    known = None if Path(name_or_path).is_dir() else KNOWN_CONFIGS.get(Path(name_or_path).name)
    config = known or _config(name_or_path)
    cls: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not _is_model_class(cls):
        raise ValueError(
            f"Expected the configuration of a model of diffusers in {name_or_path!r}, but it is "
            f"one of {config.get('_class_name')!r}."
        )
    with torch.device("meta"):
        model: nn.Module = cls.from_config(dict(config))
    # Without diffusers' own `to`, which warns of modules in float32 even where there are none.
    return nn.Module.to(model, dtype).requires_grad_(False)


def _is_model_class(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def _config(name_or_path: str) -> dict[str, Any]:
    mixin: Any = import_module("diffusers").ConfigMixin
    mixin.config_name = "config.json"
    problem: OSError | None = None
    for subfolder in (None, "transformer", "unet"):
        try:
            config: dict[str, Any] = mixin.load_config(name_or_path, subfolder=subfolder)
            return config
        except OSError as error:
            problem = problem or error
    raise OSError(
        f"Expected config.json of a model or a pipeline in {name_or_path!r}, but found none. "
        f"Known without a download: {', '.join(KNOWN_CONFIGS)}."
    ) from problem


def example_call(
    model: nn.Module, height: int, width: int, batch_size: int = 1, text_tokens: int = 512
) -> dict[str, Any] | None:
    """Return arguments of a training call, in the sizes of an image.

    Args:
        model: a `FluxTransformer2DModel`, `Flux2Transformer2DModel`,
            `QwenImageTransformer2DModel`, `SD3Transformer2DModel` or `UNet2DConditionModel`.
        height: of the image, in pixels.
        width: of the image, in pixels.
        batch_size: number of samples.
        text_tokens: number of text tokens.

    Returns:
        The arguments by name, on the meta device; `None` for a model of another class.

    Example:
        >>> call = example_call(model_on_meta("FLUX.1-Fill-dev"), 1024, 768)
        >>> call["hidden_states"].shape
        torch.Size([1, 3072, 384])
    """
    build = _CALLS.get(type(model).__name__)
    if build is None:
        return None
    dtype = next(model.parameters()).dtype

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch_size, *shape, dtype=dtype, device="meta")

    return build(model, empty, height // 8, width // 8, text_tokens)


def _flux_call(model: Any, empty: Any, rows: int, columns: int, text: int) -> dict[str, Any]:
    config, tokens = model.config, (rows // 2) * (columns // 2)
    call = {
        "hidden_states": empty(tokens, config.in_channels),
        "encoder_hidden_states": empty(text, config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
        "timestep": empty(),
        "img_ids": torch.empty(tokens, 3, device="meta"),
        "txt_ids": torch.empty(text, 3, device="meta"),
    }
    return {**call, "guidance": empty()} if config.guidance_embeds else call


def _flux2_call(model: Any, empty: Any, rows: int, columns: int, text: int) -> dict[str, Any]:
    config, tokens = model.config, (rows // 2) * (columns // 2)
    axes = len(config.axes_dims_rope)
    call = {
        "hidden_states": empty(tokens, config.in_channels),
        "encoder_hidden_states": empty(text, config.joint_attention_dim),
        "timestep": empty(),
        "img_ids": torch.empty(tokens, axes, device="meta"),
        "txt_ids": torch.empty(text, axes, device="meta"),
    }
    return {**call, "guidance": empty()} if config.guidance_embeds else call


def _qwen_call(model: Any, empty: Any, rows: int, columns: int, text: int) -> dict[str, Any]:
    config, grid = model.config, (rows // 2, columns // 2)
    hidden = empty(grid[0] * grid[1], config.in_channels)
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": empty(text, config.joint_attention_dim),
        "timestep": empty(),
        "img_shapes": [[(1, *grid)]] * len(hidden),
    }


def _sd3_call(model: Any, empty: Any, rows: int, columns: int, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": empty(config.in_channels, rows, columns),
        "encoder_hidden_states": empty(text, config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
        "timestep": empty(),
    }


def _unet_call(model: Any, empty: Any, rows: int, columns: int, text: int) -> dict[str, Any]:
    config = model.config
    call = {
        "sample": empty(config.in_channels, rows, columns),
        "timestep": empty(),
        "encoder_hidden_states": empty(text, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        call["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(6)}
    return call


_CALLS = {
    "FluxTransformer2DModel": _flux_call,
    "Flux2Transformer2DModel": _flux2_call,
    "QwenImageTransformer2DModel": _qwen_call,
    "SD3Transformer2DModel": _sd3_call,
    "UNet2DConditionModel": _unet_call,
}
