"""What is known of model families by their class names: what to adapt, and what layers see.

Nothing here imports a model library. A subclass of a known class counts as that class.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container

from torch import nn

from moe_lora.alignment import RowLayout, TokenStream

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    "FluxTransformer2DModel": (
        *_ATTENTION,
        *_TEXT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    # A regex: `attn.to_out` is a list of modules in the blocks with two streams.
    "Flux2Transformer2DModel": (
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    ),
    "Flux3Transformer2DModel": _ATTENTION,
    "SD3Transformer2DModel": (*_ATTENTION, *_TEXT_ATTENTION),
    "QwenImageTransformer2DModel": _ATTENTION,
    "ZImageTransformer2DModel": _ATTENTION,
    "UNet2DConditionModel": _ATTENTION,
}
"""Layers that `target_modules=None` adapts, by the model's class: name endings, or a regex."""

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

# "image" for layers whose order of tokens "joint" does not describe: token weights then raise
# there, since the layer has more tokens than the image.
_STREAMS: dict[str, tuple[tuple[str, TokenStream], ...]] = {
    "AceStepTransformer1DModel": ((r"condition_embedder", "text"),),
    "Flux3Transformer2DModel": (
        # Tokens of reference images are no image tokens of the call; like text, they use the mean.
        (r"txt_mode_blocks\..*|.*_modulations\.(txt|image_cond)\..*", "text"),
        (r"mode_blocks\.image_cond\..*|x_embedders\.image_cond", "text"),
        # Text, image, references.
        (r"single_transformer_blocks\..*", "image"),
    ),
    "GlmImageTransformer2DModel": ((r"glyph_projector\..*", "text"),),
    "MochiTransformer3DModel": ((r"time_embed\.pooler\..*", "text"),),
    # A second self-attention of the image, where other families have cross-attention.
    "SD3Transformer2DModel": ((r".*\.attn2\..*", "image"),),
    "ZImageTransformer2DModel": ((r"siglip_(refiner|embedder)\..*", "text"),),
    # Image first, then text.
    **dict.fromkeys(
        (
            "HunyuanImageTransformer2DModel",
            "HunyuanVideoTransformer3DModel",
            "MotifVideoTransformer3DModel",
        ),
        ((r"single_transformer_blocks\..*", "joint_image_first"),),
    ),
    # Earlier frames, image, text.
    "HunyuanVideoFramepackTransformer3DModel": ((r"single_transformer_blocks\..*", "image"),),
}

_FOLDED: dict[str, str] = {
    "AnyFlowTransformer3DModel": r"condition_embedder\.(time_embedder|delta_embedder|time_proj).*",
    "HunyuanDiT2DModel": r"text_embedder\..*",
    "I2VGenXLUNet": r"(image_latents_temporal_encoder|transformer_in|down|mid|up)\S*",
    "Krea2Transformer2DModel": r"text_fusion\.layerwise_blocks\..*",
    "LatteTransformer3DModel": r"(temporal_)?transformer_blocks\..*|proj_out",
    "UNet3DConditionModel": r"(transformer_in|down|mid|up)\S*",
    "UNetMotionModel": r"(down|mid|up)\S*",
    "UNetSpatioTemporalConditionModel": r"(down|mid|up)\S*",
}
_PACKED: dict[str, str] = {
    "ErnieImageTransformer2DModel": r"layers\.\d+\.mlp\..*|final_linear",
    "HiDreamImageTransformer2DModel": r".*\.experts\..*",
    "ZImageTransformer2DModel": r"all_x_embedder\..*|(cap|siglip)_embedder\..*",
}


_TIMESTEPS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "AuraFlowTransformer2DModel",
            "BriaFibo2Transformer2DModel",
            "ChromaTransformer2DModel",
            "Flux2Transformer2DModel",
            "Flux3Transformer2DModel",
            "FluxTransformer2DModel",
            "LongCatImageTransformer2DModel",
            "NucleusMoEImageTransformer2DModel",
            "OvisImageTransformer2DModel",
            "QwenImage21Transformer2DModel",
            "QwenImageTransformer2DModel",
        ),
        (0.0, 1.0),
    ),
    **dict.fromkeys(
        ("Lumina2Transformer2DModel", "LuminaNextDiT2DModel", "ZImageTransformer2DModel"),
        (1.0, 0.0),
    ),
    **dict.fromkeys(
        (
            "CogVideoXTransformer3DModel",
            "CogView4Transformer2DModel",
            "HunyuanDiT2DModel",
            "HunyuanImageTransformer2DModel",
            "HunyuanVideoTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "MochiTransformer3DModel",
            "MotifVideoTransformer3DModel",
            "PixArtTransformer2DModel",
            "SD3Transformer2DModel",
            "UNet2DConditionModel",
            "UNet2DModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
        ),
        (0.0, 1000.0),
    ),
}


def default_targets(model: nn.Module) -> set[str] | str:
    """Return the layers that are adapted when nobody says which.

    Args:
        model: a model of a known family; see `DEFAULT_TARGETS`.

    Returns:
        Name endings, or a regex: what PEFT takes as `target_modules`.

    Raises:
        ValueError: for a model of an unknown family.

    Example:
        >>> class SD3Transformer2DModel(nn.Module): ...
        >>> sorted(default_targets(SD3Transformer2DModel()))[-4:]
        ['to_k', 'to_out.0', 'to_q', 'to_v']
    """
    name = _known_class(model, DEFAULT_TARGETS)
    if name is None:
        raise ValueError(
            f"Expected `target_modules` to name the layers to adapt in {type(model).__name__}, "
            f"which has no default (there are defaults for {', '.join(sorted(DEFAULT_TARGETS))}). "
            f"{_listed(candidate_targets(model))}"
        )
    targets = DEFAULT_TARGETS[name]
    return targets if isinstance(targets, str) else set(targets)


def candidate_targets(model: nn.Module, limit: int = 20) -> dict[str, int]:
    """Count the name endings of a model's linear layers, the most frequent first.

    Args:
        model: any model.
        limit: how many endings to return at most.

    Returns:
        How many layers have each ending; an ending is a usable entry of `target_modules`.

    Example:
        >>> candidate_targets(nn.ModuleDict({"to_q": nn.Linear(1, 1), "act": nn.ReLU()}))
        {'to_q': 1}
    """
    endings = (
        _ending(path) for path, module in model.named_modules() if isinstance(module, nn.Linear)
    )
    return dict(Counter(ending for ending in endings if ending).most_common(limit))


def token_stream(path: str, model: nn.Module | None = None) -> TokenStream:
    """Tell from a layer's place in a model which tokens it sees.

    Args:
        path: the module path inside the model.
        model: the model; without it, only what most families have in common is known.

    Returns:
        "text" for the text stream of double-stream blocks and the keys and values of
        cross-attention, "joint" for single-stream blocks that put the text first,
        "joint_image_first" for those that put it last, else "image".

    Example:
        >>> token_stream("transformer_blocks.3.attn.add_q_proj")
        'text'
    """
    name = None if model is None else _known_class(model, _STREAMS)
    for pattern, stream in _STREAMS.get(name or "", ()):
        if re.fullmatch(pattern, path):
            return stream
    if _TEXT_LAYERS.fullmatch(path):
        return "text"
    return "joint" if _JOINT_LAYERS.fullmatch(path) else "image"


def timestep_range(model: nn.Module) -> tuple[float, float] | None:
    """Return the timesteps of clean data and of pure noise, as a model's pipelines count them.

    Args:
        model: any model.

    Returns:
        `(clean, noise)`, or `None` for a model of a family of which it is not known.

    Example:
        >>> class ZImageTransformer2DModel(nn.Module): ...
        >>> timestep_range(ZImageTransformer2DModel())
        (1.0, 0.0)
    """
    name = _known_class(model, _TIMESTEPS)
    return None if name is None else _TIMESTEPS[name]


def row_layout(path: str, model: nn.Module) -> RowLayout:
    """Tell from a layer's place in a model what the first dimension of its input counts.

    Args:
        path: the module path inside the model.
        model: the model.

    Example:
        >>> class LatteTransformer3DModel(nn.Module): ...
        >>> row_layout("transformer_blocks.0.attn1.to_q", LatteTransformer3DModel())
        'folded'
    """
    if _matches(_FOLDED, path, model):
        return "folded"
    return "packed" if _matches(_PACKED, path, model) else "sample"


def _known_class(model: nn.Module, known: Container[str]) -> str | None:
    return next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in known), None)


def _matches(table: dict[str, str], path: str, model: nn.Module) -> bool:
    name = _known_class(model, table)
    return name is not None and re.fullmatch(table[name], path) is not None


def _ending(path: str) -> str:
    parts = path.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])


def _listed(candidates: dict[str, int]) -> str:
    if not candidates:
        return "The model has no linear layer."
    found = ", ".join(f"{ending} ({count})" for ending, count in candidates.items())
    return f"Candidates, with the number of linear layers: {found}."
