"""The names that kohya's trainer gives the layers of SDXL, after the model's original code."""

from __future__ import annotations

import re

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


def _renamed(rest: str) -> str:
    return _IN_RESNET.get(rest, rest)
