"""Which module becomes which layer, and where the router lives."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import init_empty_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from moe_lora.checkpointing import wrap_checkpointing
from moe_lora.config import MoELoraConfig
from moe_lora.layer import MoELoraLayer, RoutedLayer, layer_class
from moe_lora.mixing import TokenStream
from moe_lora.routing.control import ROUTER_ATTRIBUTE
from moe_lora.routing.registry import router_class
from moe_lora.routing.router import Router
from moe_lora.routing.state import RoutingState

_TEXT_LAYERS = re.compile(
    r"(^|.*\.)(context_embedder|ff_context\..*|norm1_context\..*|attn2\.to_[kv]"
    r"|attn\.(add_[qkv]_proj|to_add_out))$"
)
_JOINT_LAYERS = re.compile(r"(^|.*\.)single_transformer_blocks\..*$")


def token_stream(path: str) -> TokenStream:
    """Tell from a layer's place in a model which tokens it sees.

    Args:
        path: the module path inside the model.

    Returns:
        "text" for the text stream of double-stream blocks and the keys and values of
        cross-attention, "joint" for single-stream blocks (text first), else "image".

    Example:
        >>> token_stream("transformer_blocks.3.attn.add_q_proj")
        'text'
    """
    if _TEXT_LAYERS.match(path):
        return "text"
    return "joint" if _JOINT_LAYERS.match(path) else "image"


class AdapterRouters(nn.Module, MoELoraLayer):
    """Hold the routers of a model, one per adapter, as PEFT holds a layer's adapter weights.

    Being a tuner layer, it is saved, loaded, switched, frozen and deleted by PEFT with the experts.

    Args:
        configs: the adapters' configurations by name, shared with the tuner.
    """

    adapter_layer_names = ("moe_lora_routers",)

    def __init__(self, configs: dict[str, MoELoraConfig]) -> None:
        super().__init__()
        self.moe_lora_routers = nn.ModuleDict()
        self.state = RoutingState(self.moe_lora_routers)
        self.configs = configs
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`: an adapted `nn.Sequential` calls this, its last child, like the others."""
        return x

    def attach(self, adapter_name: str, router: Router) -> None:
        """Make `router` the router of an adapter, and note it in the adapter's configuration."""
        if adapter_name not in self.configs:
            raise ValueError(
                f"Expected `adapter_name` to be one of {sorted(self.configs)}, but got "
                f"{adapter_name!r}."
            )
        config = self.configs[adapter_name]
        router.configure(
            config.experts,
            strategy=config.routing_strategy,
            temperature=config.routing_temperature,
            top_k=config.top_k,
        )
        router.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        config.router = router.registered_name or type(router).__qualname__
        config.router_kwargs = dict(router.init_kwargs)
        self.moe_lora_routers[adapter_name] = router

    def delete_adapter(self, adapter_name: str) -> None:
        self.state.remove_adapter(adapter_name)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: a router has no weight of the base model to merge into."""

    def unmerge(self) -> None:
        """Do nothing, as `merge` does."""

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Do nothing: there is no base layer."""


def route_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Decide the routing weights before a forward pass (a forward pre-hook of adapted models).

    It is a plain function that finds everything through `model`, so that a copy of the model
    routes by its own router.
    """
    routers = getattr(model, ROUTER_ATTRIBUTE)
    if routers.disable_adapters:
        return
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        wrap_checkpointing(model, routers.state)
    routers.state.route(model, args, kwargs, routers.active_adapters)


class MoELoraModel(BaseTuner):
    """Adapt a model by mixtures of LoRA experts and the router that mixes them.

    Args:
        model: the model to adapt, in place.
        config: a `MoELoraConfig`, or several by adapter name.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded later.
    """

    prefix: str = "moe_lora_"
    tuner_layer_cls = MoELoraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Replace the target layers and place the router; called by PEFT and diffusers."""
        config = self.peft_config[adapter_name]
        router = self._build_router(config, model, low_cpu_mem_usage)
        routers = model._modules.get(ROUTER_ATTRIBUTE) or AdapterRouters(self.peft_config)
        assert isinstance(routers, AdapterRouters)
        self._slot = routers.state
        if state_dict is not None:
            state_dict = {k: v for k, v in state_dict.items() if ROUTER_ATTRIBUTE not in k}
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        if ROUTER_ATTRIBUTE not in model._modules:
            model.add_module(ROUTER_ATTRIBUTE, routers)
            model.register_forward_pre_hook(route_call, with_kwargs=True)
        routers.configs = self.peft_config
        routers.state.add_adapter(adapter_name, config.experts)
        routers.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if router is not None:
            routers.attach(adapter_name, router.train(model.training))

    def _build_router(
        self, config: MoELoraConfig, model: nn.Module, low_cpu_mem_usage: bool
    ) -> Router | None:
        if config.router is None:
            return None
        cls = router_class(config.router)
        kwargs = {**cls.default_kwargs(model, config.router_kwargs), **config.router_kwargs}
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            router = cls(**kwargs)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if device.type == "meta" or any(p.is_meta for p in router.parameters()):
            return router
        return router.to(device)

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        if peft_config.target_modules is None:
            raise ValueError(
                "Expected `target_modules` to name the layers to adapt (endings, a regex, or "
                '"all-linear"), but got None.'
            )
        return peft_config

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
        r = peft_config.rank_pattern.get(
            get_pattern_key(list(peft_config.rank_pattern), current_key), peft_config.r
        )
        alpha = peft_config.alpha_pattern.get(
            get_pattern_key(list(peft_config.alpha_pattern), current_key), peft_config.lora_alpha
        )
        if isinstance(target, RoutedLayer):
            target.update_layer(adapter_name, peft_config, r, alpha)
            return
        new_module = layer_class(target, current_key)(
            target,
            adapter_name,
            peft_config,
            r,
            alpha,
            slot=self._slot,
            stream=token_stream(current_key),
        )
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        if ROUTER_ATTRIBUTE in model._modules:
            delattr(model, ROUTER_ATTRIBUTE)
        for key, hook in list(model._forward_pre_hooks.items()):
            if hook is route_call:
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # A router is deeper than PEFT's own layers, which have the name in the last place but one.
        head, found, tail = key.partition(f".moe_lora_routers.{adapter_name}.")
        if found:
            return f"{head}.moe_lora_routers.{tail}"
        return str(super()._remove_adapter_name_from_key(key, adapter_name))
