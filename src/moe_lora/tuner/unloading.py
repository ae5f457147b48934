"""Unloading mixtures from a model with adapters of other tuners."""

from __future__ import annotations

from typing import cast

from peft import PeftConfig
from peft.tuners.tuners_utils import onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.config import PEFT_TYPE
from moe_lora.tuner.router_container.container import remove_routers


def unload_beside_others(
    model: nn.Module,
    *,
    merge: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """Remove this method's layers, routers and configurations, and keep those of other tuners.

    Args:
        model: the adapted model.
        merge: merge the adapters into the base weights first.
        safe_merge: check for NaN and inf when merging.
        adapter_names: the adapters to merge; the active ones by default.
    """
    configs = cast(dict[str, PeftConfig], model.peft_config)
    ours = [name for name, config in configs.items() if config.peft_type == PEFT_TYPE]
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, RoutedLayer):
            continue
        if merge:
            with onload_layer(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base_layer)
    for path, wrapper in list(model.named_modules()):
        if not isinstance(wrapper, AuxiliaryTrainingWrapper):
            continue
        if not set(wrapper._adapters) <= set(ours):
            for adapter_name in set(wrapper._adapters) & set(ours):
                wrapper.delete_adapter(adapter_name, new_active_adapters=None)
            continue
        parent, _, name = path.rpartition(".")
        plain = wrapper.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        setattr(model.get_submodule(parent), name, plain)
    remove_routers(model)
    for adapter_name in ours:
        del configs[adapter_name]
