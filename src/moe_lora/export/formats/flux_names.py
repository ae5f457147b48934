"""Names of Flux's layers in its original code, and LoRAs of its fused projections, both ways."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from moe_lora.export.lora_factors import Factors, PlainLora

_FLUX_DOUBLE = {
    "img_attn_proj": ("attn.to_out.0",),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_FLUX_ROOT = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
    "final_layer_linear": "proj_out",
}
# The halves of this layer's output, shift and scale, are in the other order.
_SWAPPED = "final_layer_adaLN_modulation_1"
# proj_mlp is four times as wide as each of q, k and v in every Flux model.
_MLP_RATIO = 4

_BLOCK_PATH = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)$")
_BLOCK_NAME = re.compile(r"(double|single)_blocks_(\d+)_(.+)$")


def flux_name(path: str) -> tuple[str, int, int] | None:
    """Return the fused name of a layer, the layer's index in it, and the number of layers in it.

    Example:
        >>> flux_name("single_transformer_blocks.7.proj_mlp")
        ('single_blocks_7_linear1', 3, 4)
    """
    match = _BLOCK_PATH.match(path)
    if match is None:
        return None
    kind, table = ("single", _FLUX_SINGLE) if match[1] else ("double", _FLUX_DOUBLE)
    for name, parts in table.items():
        if match[3] in parts:
            return f"{kind}_blocks_{match[2]}_{name}", parts.index(match[3]), len(parts)
    return None


def flux_paths(name: str) -> tuple[str, ...]:
    """Return the layers that a name of Flux's original code covers; none for any other name.

    Example:
        >>> flux_paths("double_blocks_0_img_mod_lin")
        ('transformer_blocks.0.norm1.linear',)
    """
    if name in _FLUX_ROOT:
        return (_FLUX_ROOT[name],)
    match = _BLOCK_NAME.match(name)
    if match is None:
        return ()
    single = match[1] == "single"
    block = f"{'single_' if single else ''}transformer_blocks.{match[2]}"
    parts = (_FLUX_SINGLE if single else _FLUX_DOUBLE).get(match[3], ())
    return tuple(f"{block}.{part}" for part in parts)


def flux_norm(key: str) -> str:
    """Return the path of the norm that a key of the original code names.

    Example:
        >>> flux_norm("double_blocks.3.txt_attn.norm.key_norm.scale")
        'transformer_blocks.3.attn.norm_added_k'
    """
    kind, index, *middle, name, _ = key.removeprefix("diffusion_model.").split(".")
    block = "transformer_blocks" if kind == "double_blocks" else "single_transformer_blocks"
    added = "added_" if middle[0] == "txt_attn" else ""
    return f"{block}.{index}.attn.norm_{added}{name[0]}"


def is_flux(paths: Collection[str], base_class: str | None) -> bool:
    """Return whether the layers belong to a FLUX.1 transformer.

    Args:
        paths: of the adapted layers.
        base_class: class name of the base model, if it is known.
    """
    if base_class is not None:
        return base_class == "FluxTransformer2DModel"
    # Other families share the names of the double blocks.
    return any(path.startswith("single_transformer_blocks.") and flux_name(path) for path in paths)


def fuse_flux(lora: PlainLora) -> tuple[dict[str, Factors], list[str]]:
    """Rename a Flux LoRA to kohya's names; fused projections become block-diagonal.

    `A = cat(A_q, A_k, A_v)`, `B = diag(B_q, B_k, B_v)`; a part without a LoRA has no columns.

    Args:
        lora: by the layers' paths in the diffusers model.

    Returns:
        The factors by name, and the paths that diffusers' loader would silently drop.
    """
    fused: dict[str, Factors] = {}
    parts: dict[str, dict[int, Factors]] = {}
    dropped = []
    for path, factors in lora.items():
        place = flux_name(path)
        if place is None:
            dropped.append(path)
        elif place[2] == 1:
            fused[place[0]] = factors
        else:
            parts.setdefault(place[0], {})[place[1]] = factors
    for name, held in parts.items():
        fused[name] = _block_diagonal(held, 4 if name.endswith("linear1") else 3)
    return fused, dropped


def split_flux(name: str, factors: Factors, widths: Mapping[str, int]) -> PlainLora:
    """Split a LoRA under one of kohya's Flux names into the layers that the name covers.

    Columns of `up` that are zero throughout a part are left out of it, with their rows of `down`:
    a block-diagonal LoRA returns to its parts, and a part without a LoRA vanishes. One that is zero
    throughout, as before its training, is one of every part.

    Args:
        name: without the prefix `lora_unet_`.
        factors: under that name.
        widths: the output width of every layer of the model.

    Raises:
        ValueError: when the widths do not add up.
    """
    paths = flux_paths(name)
    if name == _SWAPPED:
        return {paths[0]: Factors(factors.down, torch.cat(factors.up.chunk(2)[::-1]))}
    if len(paths) == 1:
        return {paths[0]: factors}
    sizes = [widths[path] for path in paths]
    if sum(sizes) != factors.up.shape[0]:
        raise ValueError(
            f"Expected {name!r} to have {sum(sizes)} outputs, those of {list(paths)} together, but "
            f"got {factors.up.shape[0]}."
        )
    split: PlainLora = {}
    for path, up in zip(paths, factors.up.split(sizes), strict=True):
        used = up.any(dim=0) if factors.up.any() else torch.ones(factors.rank, dtype=torch.bool)
        if used.any():
            split[path] = Factors(factors.down[used], up[:, used])
    return split


def _block_diagonal(held: Mapping[int, Factors], count: int) -> Factors:
    some_part = min(held)
    width = held[some_part].up.shape[0] // (_MLP_RATIO if some_part == 3 else 1)
    blocks: list[Tensor] = []
    for part in range(count):
        rows = width * (_MLP_RATIO if part == 3 else 1)
        blocks.append(held[part].up if part in held else held[some_part].up.new_zeros(rows, 0))
    down = torch.cat([held[part].down for part in sorted(held)])
    return Factors(down, torch.block_diag(*blocks))
