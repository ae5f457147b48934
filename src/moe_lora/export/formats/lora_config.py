"""What a plain LoRA's config says: how strong it is, and whether it is one at all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from moe_lora.export.listing import first_few

HONORED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")
"""Fields that decide what the factors mean."""

TOLD_BY_KEYS = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices")
"""Fields that only add tensors to a file, where they are an error if they change anything."""

WITHOUT_EFFECT = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    # Which layers are adapted, the file's keys tell.
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
    # The factors are stored in one orientation, whatever that of the weight is.
    "fan_in_fan_out",
    # Training only.
    "lora_dropout",
    "velora_config",
    "runtime_config",
    # Options of an initialization or a variant, which is judged by its own field.
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "megatron_core",
)
"""Fields that leave the output of the stored factors as it is."""

REFUSED = {
    "use_dora": "normalizes the adapted weight (DoRA)",
    "alora_invocation_tokens": "acts after certain tokens only (aLoRA)",
    "use_qalora": "pools the layer's input (QALoRA)",
    "monteclora_config": "draws its weights at random (MonteCLoRA)",
    "layer_replication": "repeats layers of the base model",
    "target_parameters": "adapts parameters instead of layers",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "arrow_config": "mixes several LoRAs (Arrow)",
    "kasa_config": "changed the base weights and has a third factor (KaSA)",
    "megatron_config": "adapts parallel layers of Megatron",
}
"""Fields that make more of a LoRA than `s · B A`, and what they do."""

# All others subtract the first B A from the base weights, or quantize these.
_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


def check_plain_lora(fields: Mapping[str, Any], where: str) -> None:
    """Check that a config describes factors whose change of a weight is `s · B A`.

    Args:
        fields: those of PEFT's `LoraConfig`, as JSON values.
        where: names the config in errors.

    Raises:
        ValueError: for a variant that is more than that, for an initialization that changed the
            base weights, or for a field that is unknown and set.
    """
    for name, value in fields.items():
        if name in REFUSED and value:
            raise ValueError(
                f"Expected a plain LoRA in {where}, but by `{name}` it {REFUSED[name]}, which an "
                "expert cannot. Merge it into the base model instead."
            )
    known = {*HONORED, *TOLD_BY_KEYS, *WITHOUT_EFFECT, *REFUSED}
    unknown = sorted(name for name, value in fields.items() if name not in known and value)
    if unknown:
        raise ValueError(
            f"Expected the fields of a LoRA that moe_lora knows in {where}, but got "
            f"{first_few(unknown)}. Remove what does not change the LoRA's output."
        )
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _KEEP_THE_BASE:
        raise ValueError(
            f"Expected a LoRA of the unchanged base model in {where}, but its initialization "
            f"{init!r} changed the base weights. Convert it with PEFT: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...)."
        )


class Strength:
    """Know the scale of every layer of a file, from the config or from alphas in the file.

    Args:
        fields: those of PEFT's `LoraConfig`, as JSON values; `None` when nothing is said, and alpha
            is then the rank.
        where: names the config in errors.

    Raises:
        ValueError: for a config that is not of a plain LoRA, or has no usable numbers.
    """

    def __init__(self, fields: Mapping[str, Any] | None, where: str) -> None:
        self.fields, self.where = fields, where
        if fields is None:
            return
        check_plain_lora(fields, where)
        self._number("lora_alpha", fields.get("lora_alpha"))
        self.patterns = {name: self._pattern(name) for name in ("rank_pattern", "alpha_pattern")}

    def of(self, name: str, rank: int, alpha: Tensor | None) -> float:
        """Return what `up @ down` of a layer is multiplied with.

        Args:
            name: the layer's path.
            rank: of its factors.
            alpha: that of the file itself, which wins.

        Raises:
            ValueError: for an alpha that is no finite number, or a rank that is not the config's.
        """
        if alpha is not None:
            if alpha.numel() != 1:
                raise ValueError(
                    f"Expected one number as alpha of {name!r} in {self.where}, but got the shape "
                    f"{tuple(alpha.shape)}."
                )
            return self._number(f"alpha of {name}", float(alpha)) / rank
        if self.fields is None:
            return 1.0
        expected = self._of_layer("rank_pattern", name, self.fields.get("r", rank))
        if expected != rank:
            raise ValueError(
                f"Expected {name!r} to have rank {expected}, as {self.where} says, but got {rank}: "
                "its strength is unknown."
            )
        value = float(self._of_layer("alpha_pattern", name, self.fields["lora_alpha"]))
        return value / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _of_layer(self, pattern: str, name: str, default: Any) -> Any:
        known = self.patterns[pattern]
        return known.get(get_pattern_key(list(known), name), default)

    def _pattern(self, name: str) -> dict[str, float]:
        assert self.fields is not None
        pattern = self.fields.get(name) or {}
        if not isinstance(pattern, dict):
            raise ValueError(
                f"Expected `{name}` in {self.where} to be numbers by layer, but got {pattern!r}."
            )
        for key, value in pattern.items():
            self._number(f"{name}[{key!r}]", value)
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(
                    f"Expected regular expressions in `{name}` of {self.where}, but got {key!r} "
                    f"({error})."
                ) from error
        return pattern

    def _number(self, name: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(
                f"Expected a finite number as `{name}` in {self.where}, but got {value!r}."
            )
        return float(value)
