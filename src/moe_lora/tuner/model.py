"""The PEFT model: injection of adapted layers and the router, merging and unloading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from moe_lora.families import default_targets, family_of
from moe_lora.routing.lookup import ROUTER_ATTRIBUTE
from moe_lora.routing.routers.registry import needs_num_layers
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.config import PEFT_TYPE, MoELoraConfig
from moe_lora.tuner.layer import layer_class
from moe_lora.tuner.merging import check_mergeable
from moe_lora.tuner.rollback import all_or_nothing
from moe_lora.tuner.router_container.building import build_router
from moe_lora.tuner.router_container.container import (
    AdapterRouters,
    index_layers,
    install_routers,
    remove_routers,
)
from moe_lora.tuner.router_container.guards import check_routers_unadapted
from moe_lora.tuner.router_container.model_reference import ModelReference
from moe_lora.tuner.state_dict.module_paths import bare_path, is_checkpoint_wrapper
from moe_lora.tuner.state_dict.names import tensors_to_load, tensors_to_save, without_adapter_name
from moe_lora.tuner.state_dict.stored import check_base_width
from moe_lora.tuner.unloading import unload_beside_others
from moe_lora.tuner.validation.names import check_adapter_name


class MoELoraModel(BaseTuner):
    """PEFT model with mixtures of LoRA experts and their routers.

    Args:
        model: the model to adapt, in place.
        peft_config: a `MoELoraConfig`, or several by adapter name.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded later.
        state_dict: names of the layers to adapt, as in PEFT.
    """

    prefix: str = "moe_lora_"
    tuner_layer_cls = RoutedLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        _check_adapter_name(model, adapter_name)
        try:
            with all_or_nothing(model):
                super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except BaseException:
            if "peft_config" not in vars(model) and vars(model).get("_hf_peft_config_loaded"):
                # diffusers sets it before the injection, and later reads it as a sign of success.
                vars(model)["_hf_peft_config_loaded"] = False
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Replace the target layers and install the router (called by PEFT and diffusers).

        When an error is raised, the model stays unchanged.
        """
        if state_dict is not None:
            state_dict = {k: v for k, v in state_dict.items() if ROUTER_ATTRIBUTE not in k}
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        width = check_base_width(config.base_in_channels, model)
        if config.stored is not None:
            config.stored.check_base(model, len(config.experts), config.rank_of)
        by_layer = needs_num_layers(config.router, config.router_kwargs)
        router = None if by_layer else build_router(config, model, low_cpu_mem_usage)
        with all_or_nothing(model):
            # Removed during the injection, which must not adapt, freeze or match routers.
            existing = model._modules.pop(ROUTER_ATTRIBUTE, None)
            if isinstance(existing, AdapterRouters):
                routers, self._model = existing, existing.adapted_model
            else:
                self._model = ModelReference(model)
                routers = AdapterRouters(self.peft_config, self._model)
                routers.state.mode = config.routing_mode  # the first adapter decides it
            self._context = routers.state
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            install_routers(model, routers)
            routers.configs = self.peft_config
            layers = index_layers(model, adapter_name)
            routers.add_adapter(adapter_name, layers)
            if by_layer:
                router = build_router(config, model, low_cpu_mem_usage, len(layers))
            if router is not None:
                routers.attach(adapter_name, router.train(model.training))
            _cast_float8_experts(model, adapter_name)
            if config.stored is not None:
                config.stored.check_fit(model, adapter_name)
        config.base_in_channels, config.stored = width, None

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(self.model)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        # Targets name the layers of the bare model, inside compiled or checkpointed blocks, too.
        return BaseTuner._check_target_module_exists(peft_config, bare_path(key))

    def _create_and_replace(
        self,
        peft_config: MoELoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if is_checkpoint_wrapper(target):
            return  # the wrapped layer has its own key
        current_key = bare_path(current_key)
        r, alpha = peft_config.rank_of(current_key), peft_config.alpha_of(current_key)
        # The adapted layer directly wraps the base layer, inside other tuners' layers, so that
        # these find their own layers in any order of injection.
        while isinstance(target, BaseTunerLayer) and not isinstance(target, RoutedLayer):
            parent, target_name, target = target, "base_layer", target.base_layer
        if isinstance(target, RoutedLayer):
            target.update_layer(adapter_name, peft_config, r, alpha)
            return
        family = family_of(self.model)
        new_module = layer_class(target, current_key)(
            target,
            adapter_name,
            peft_config,
            r,
            alpha,
            context=self._context,
            model=self._model,
            stream=family.stream(current_key),
            rows=family.layout(current_key),
        )
        new_module.quantization_kwargs = get_quantization_kwargs(self.model)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the base weights of all layers; when it raises, of none."""
        check_mergeable(self.model, adapter_names, safe_merge=safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            check_mergeable(self.model, adapter_names, safe_merge=safe_merge)
        if any(config.peft_type != PEFT_TYPE for config in self.peft_config.values()):
            unload_beside_others(
                self.model, merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
            )
            unloaded: nn.Module = self.model
            return unloaded
        remove_routers(self.model)
        model: nn.Module = super()._unload_and_optionally_merge(
            merge=merge,
            progressbar=progressbar,
            safe_merge=safe_merge,
            adapter_names=adapter_names,
        )
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Raise for `adapter_names`, which only PEFT's LoRA supports (called by PEFT)."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Expected no `adapter_names`, since all samples of a batch use the same adapter. "
                "Call model.set_adapter and run the samples of each adapter separately, or set the "
                "weights of the experts per sample with moe_lora.route."
            )
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        routers = self.model._modules.get(ROUTER_ATTRIBUTE)
        if autocast_adapter_dtype and isinstance(routers, AdapterRouters):
            own = [r for name, r in routers.moe_lora_routers.items() if name == adapter_name]
            for parameter in (p for router in own for p in router.parameters()):
                if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
                    parameter.data = parameter.data.float()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        _check_routers(model)
        return tensors_to_save(model, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        return tensors_to_load(model, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        short = without_adapter_name(key, adapter_name)
        return (
            str(super()._remove_adapter_name_from_key(key, adapter_name))
            if short is None
            else short
        )


def _check_routers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, AdapterRouters):
            check_routers_unadapted(module.moe_lora_routers)


def _cast_float8_experts(model: nn.Module, adapter_name: str) -> None:
    """Cast experts to float32 where PEFT created them in the 8-bit floats of their base layer."""
    for module in model.modules():
        if isinstance(module, RoutedLayer) and adapter_name in module.moe_lora_experts:
            experts = module.moe_lora_experts[adapter_name]
            if any(parameter.element_size() == 1 for parameter in experts.parameters()):
                experts.float()


def _check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    check_adapter_name(adapter_name)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None and config.peft_type != PEFT_TYPE:
        raise ValueError(
            f"Expected an unused adapter name, but {adapter_name!r} is a {config.peft_type} "
            "adapter of the model. Choose another `adapter_name`, or merge that adapter first."
        )
