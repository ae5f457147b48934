"""Which layouts of a FLUX.1 LoRA other tools load, and with which layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from moe_lora.export.formats import Format
from moe_lora.export.formats.flux_names import flux_name, is_flux
from moe_lora.export.listing import first_few

Tool = Literal["diffusers", "peft", "comfyui", "sd-scripts", "invokeai"]
"""The tools whose loaders are known."""

KOHYA = "Use format='kohya'."

Limit = Callable[[Collection[str]], str | None]


@dataclass(frozen=True)
class Support:
    """What a tool loads.

    Attributes:
        title: name and, where the loader changed over time, version of the tool.
        layouts: a description of the layers that it loads, by layout.
        limits: by layout, a function that returns why some layers are not loaded, and what to do
            instead; or None.
    """

    title: str
    layouts: Mapping[Format, str]
    limits: Mapping[Format, Limit]


def _blocks_only(layers: Collection[str]) -> str | None:
    outside = [layer for layer in layers if flux_name(layer) is None]
    return (
        f"It drops the layers outside the blocks: {first_few(outside)}. Do not adapt these layers."
        if outside
        else None
    )


def _invokeai(layers: Collection[str]) -> str | None:
    found = set(layers)
    lacking = {
        "transformer_blocks.0.attn.add_q_proj",
        "single_transformer_blocks.0.attn.to_q",
    } - found
    if lacking:
        return f"It recognizes it by {first_few(sorted(lacking))}, which are not adapted. {KOHYA}"
    for layer in found:
        block, _, name = layer.rpartition(".attn.")
        if not block.startswith("transformer_blocks."):
            continue
        for group in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")):
            others = [f"{block}.attn.{part}" for part in group if name in group]
            absent = [other for other in others if other not in found]
            if absent:
                return f"It requires {first_few(absent)} beside {layer!r}. {KOHYA}"
    unknown = sorted(
        layer for layer in found if layer == "norm_out.linear" or "guidance_embedder" in layer
    )
    if unknown:
        return f"Its converter rejects {first_few(unknown)}. Do not adapt these layers."
    return None


TOOLS: Mapping[Tool, Support] = {
    "diffusers": Support(
        "diffusers",
        {"diffusers": "all layers", "kohya": "layers of the blocks"},
        {},
    ),
    "peft": Support("PEFT", {"peft": "all layers"}, {}),
    "comfyui": Support("ComfyUI", {"diffusers": "all layers", "kohya": "layers of the blocks"}, {}),
    "sd-scripts": Support(
        "kohya's sd-scripts",
        {
            "diffusers": "layers of the blocks, with `networks/flux_merge_lora.py --diffusers`",
            "kohya": "layers of the blocks",
        },
        {"diffusers": _blocks_only},
    ),
    "invokeai": Support(
        "InvokeAI 6.14",
        {
            "diffusers": "attention of both streams in the first blocks and q, k and v together; "
            "not `norm_out` or `guidance_embedder`",
            "kohya": "layers of the blocks",
        },
        {"diffusers": _invokeai},
    ),
}


def refusal(
    tool: Tool, format: Format, layers: Collection[str], base_class: str | None
) -> str | None:
    """Return why a tool would refuse a file or a part of it; None if it loads it completely.

    Args:
        tool: the tool.
        format: layout of the file.
        layers: paths of the adapted layers in the diffusers model.
        base_class: class name of the base model, if it is known.

    Example:
        >>> refusal("comfyui", "peft", ["transformer_blocks.0.attn.to_q"], "FluxTransformer2DModel")
        "ComfyUI does not load the layout 'peft'. Choose `format` from ['diffusers', 'kohya']."
    """
    support = TOOLS[tool]
    if format not in support.layouts:
        loaded = sorted(support.layouts)
        return (
            f"{support.title} does not load the layout {format!r}. Choose `format` from {loaded}."
        )
    if tool in ("diffusers", "peft"):
        return None
    if not is_flux(layers, base_class):
        model = base_class or "an unknown model"
        return f"{support.title} was tried with LoRAs of FLUX.1 only, but this one is of {model}."
    limit = support.limits.get(format)
    reason = limit(layers) if limit else None
    return f"{support.title} does not load this file completely. {reason}" if reason else None


def tool_table() -> list[tuple[str, ...]]:
    """Return a row for each tool: its argument, title, and the layers that it loads by layout."""
    formats: tuple[Format, ...] = ("diffusers", "kohya", "peft")
    return [
        (tool, support.title, *(support.layouts.get(format, "no") for format in formats))
        for tool, support in TOOLS.items()
    ]
