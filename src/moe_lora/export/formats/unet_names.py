"""Names of a UNet's layers in flat layouts and in the original code of Stable Diffusion."""

from __future__ import annotations

import re
from collections.abc import Collection

from moe_lora.export.lora_factors import Factors, PlainLora

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)_(?:(\d+)_)?(.+)$")
_ROOT = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_IN_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")


_UNET_ROOTS = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)(\.|$)"
)
_UNET_PATH = re.compile(
    r"(conv_in|conv_out|time_embedding\.linear_[12]"
    r"|((down|up)_blocks\.\d+|mid_block)\."
    r"(attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
    r"|resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|(down|up)samplers\.0\.conv))$"
)


def diffusers_name(name: str, layers_per_block: int) -> str | None:
    """Return what diffusers calls a layer, dots as underscores; `None` for a foreign name.

    Args:
        name: without the prefix `lora_unet_`.
        layers_per_block: that of the UNet's config; 2 in all of Stable Diffusion.

    Example:
        >>> diffusers_name("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 2)
        'down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q'
    """
    if name in _ROOT:
        return _ROOT[name]
    match = _BLOCK.match(name)
    if match is None:
        return None
    side, index, inner, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        # Here the only number is that of the layer.
        rest = rest if inner is None else f"{inner}_{rest}"
        return f"mid_block_{_MIDDLE[index]}_{_renamed(rest)}" if index < len(_MIDDLE) else None
    if inner is None:
        return None
    down = side == "input_blocks"
    block, layer = divmod(index - 1 if down else index, layers_per_block + 1)
    blocks = f"{'down' if down else 'up'}_blocks_{block}"
    if rest == ("op" if down else "conv"):
        return f"{blocks}_{'down' if down else 'up'}samplers_0_conv"
    kind = "resnets" if inner == "0" else "attentions"
    return f"{blocks}_{kind}_{layer}_{_renamed(rest)}"


def is_unet(paths: Collection[str], base_class: str | None) -> bool:
    """Tell whether layers belong to a UNet, by the model's class or else by their paths."""
    if base_class is not None:
        return "UNet" in base_class
    return all(_UNET_ROOTS.match(path) for path in paths)


def flatten_unet(lora: PlainLora) -> tuple[dict[str, Factors], list[str]]:
    """Rename a UNet LoRA to kohya's names.

    Args:
        lora: by the layers' paths in the diffusers model.

    Returns:
        The factors by name, and the paths that diffusers' loader would not find again.
    """
    known = {path: factors for path, factors in lora.items() if _UNET_PATH.match(path)}
    flat = {path.replace(".", "_"): factors for path, factors in known.items()}
    return flat, [path for path in lora if path not in known]


def _renamed(rest: str) -> str:
    return _IN_RESNET.get(rest, rest)
