"""Write the layout of PEFT: keys with `base_model.model.` and an adapter_config.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor

from moe_lora.export.lora_factors import PlainLora


def exact_targets(paths: Collection[str]) -> list[str] | str:
    """Return `target_modules` that match these layers and no other.

    Whole paths, or a regex when one of them has no block index and so could be the ending of
    another layer's path: `proj_out` is one of `single_transformer_blocks.0.proj_out`.

    Example:
        >>> exact_targets(["blocks.0.to_q"]), exact_targets(["proj_out"])
        (['blocks.0.to_q'], '(?:proj_out)')
    """
    ordered = sorted(paths)
    if all(re.search(r"\.\d+\.", path) for path in ordered):
        return ordered
    return f"(?:{'|'.join(re.escape(path) for path in ordered)})"


def anchored(path: str) -> str:
    """Return a key of `rank_pattern` that matches this layer and no other.

    Example:
        >>> print(anchored("proj_out"))
        ^proj_out
    """
    return f"^{re.escape(path)}"


def ranks_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of a config that give every layer its rank, and alpha equal to it.

    Args:
        ranks: the rank of every layer.

    Example:
        >>> ranks_config({"a.0.q": 4, "a.1.q": 4, "a.2.q": 2})["rank_pattern"]
        {'^a\\\\.2\\\\.q': 2}
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {anchored(path): rank for path, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
    }


def plain_config(lora: PlainLora, base_model: str | None = None) -> LoraConfig:
    """Return the PEFT config of a plain LoRA whose strength is in its factors."""
    return LoraConfig(
        **ranks_config({path: factors.rank for path, factors in lora.items()}),
        target_modules=exact_targets(lora),
        base_model_name_or_path=base_model,
        inference_mode=True,
    )


def peft_tensors(lora: PlainLora, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """Return the tensors of a plain LoRA under PEFT's keys.

    Args:
        lora: the plain LoRA.
        prefix: before the layers' paths.
    """
    tensors = {}
    for path, factors in lora.items():
        tensors[f"{prefix}{path}.lora_A.weight"] = factors.down
        tensors[f"{prefix}{path}.lora_B.weight"] = up_in_shape_of(factors.down, factors.up)
    return tensors


def up_in_shape_of(down: Tensor, up: Tensor) -> Tensor:
    """Return the up factor as a file has it: a 1 x 1 convolution beside a convolution.

    Args:
        down: `(r, in)` or `(r, in, kh, kw)`.
        up: `(out, r)`.
    """
    return up if down.ndim == 2 else up.view(*up.shape, *[1] * (down.ndim - 2))
