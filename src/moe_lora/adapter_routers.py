"""Where the routers of an adapted model live, and the hooks that ask them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from moe_lora.config import MoELoraConfig
from moe_lora.routed_layer import MoELoraLayer, RoutedLayer
from moe_lora.routing.control import ROUTER_ATTRIBUTE
from moe_lora.routing.router import Router
from moe_lora.routing.state import RoutingState


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

    @property
    def base_layer(self) -> None:
        """Stand for what is left when the adapters are unloaded: nothing.

        diffusers' `unload_lora` puts the base layer in the place of every tuner layer.
        """
        return None

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
        layers = len(self.state.layer_names.get(adapter_name, ()))
        if router.num_layers not in (None, layers):
            raise ValueError(
                f"Expected `num_layers` of {type(router).__name__} to be the number of layers that "
                f"adapter {adapter_name!r} adapts, {layers}, but got {router.num_layers}."
            )
        config = self.configs[adapter_name]
        router.configure(
            config.experts,
            strategy=config.routing_strategy,
            temperature=config.routing_temperature,
            top_k=config.top_k,
        )
        router.expert_dropout = config.expert_dropout
        router.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        config.router = router.registered_name or type(router).__qualname__
        config.router_kwargs = dict(router.init_kwargs)
        self.moe_lora_routers[adapter_name] = router
        self.state.require_routing()

    def delete_adapter(self, adapter_name: str) -> None:
        self.state.remove_adapter(adapter_name)
        super().delete_adapter(adapter_name)

    def _all_available_adapter_names(self) -> list[str]:
        # The next active adapter is chosen from these, and need not have a router.
        return sorted(self.state.expert_names)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note which adapters are merged: a router has no base weight to merge into."""
        names = check_adapters_to_merge(self, adapter_names)
        self.merged_adapters.extend(name for name in names if name in self.state.expert_names)

    def unmerge(self) -> None:
        """Forget which adapters were merged."""
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Do nothing: there is no base layer."""

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()


def begin_pass(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Decide the routing of a forward pass (a forward pre-hook of adapted models).

    Like `end_pass` it is a plain function that finds everything through `model`, so that a copy of
    the model routes by its own router.
    """
    routers = model._modules.get(ROUTER_ATTRIBUTE)
    if not isinstance(routers, AdapterRouters):
        remove_routers(model)
        return
    state = routers.state
    state.enter(None)
    if routers.disable_adapters:
        # The layers take merged adapters out of their base weights now, too.
        routers.unmerge()
    elif not (routers.merged and set(routers.active_adapters) <= set(routers.merged_adapters)):
        own = routers.moe_lora_routers  # of a replica: not those of its state
        state.decide(state.route(model, args, kwargs, routers.active_adapters, own))


def end_pass(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forget the routing of a forward pass (a forward hook that is called after errors, too)."""
    routers = model._modules.get(ROUTER_ATTRIBUTE)
    if not isinstance(routers, AdapterRouters):
        return
    routing = routers.state.leave()
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if routing is not None and not routing.is_plain:
        routers.state.restore_in_backward(output, routing)


def number_layers(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """Tell every layer of an adapter its place in weights per layer, and list their paths.

    Args:
        model: the adapted model.
        adapter_name: whose layers; they are counted in the order of the model's modules.
    """
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, RoutedLayer) and adapter_name in module.moe_lora_experts
    ]
    for place, (_, layer) in enumerate(layers):
        layer.places[adapter_name] = torch.tensor([place], device="cpu")
    return tuple(path for path, _ in layers)


def place_routers(model: nn.Module, routers: AdapterRouters) -> None:
    """Make routers a submodule of a model, and have them asked before its forward passes."""
    if model._modules.get(ROUTER_ATTRIBUTE) is routers:
        return
    remove_routers(model)
    model.add_module(ROUTER_ATTRIBUTE, routers)
    model.register_forward_pre_hook(begin_pass, with_kwargs=True)
    model.register_forward_hook(end_pass, with_kwargs=True, always_call=True)


def remove_routers(model: nn.Module) -> None:
    """Take the routers of a model away, and the hooks that ask them."""
    model._modules.pop(ROUTER_ATTRIBUTE, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is begin_pass:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(model._forward_hooks.items()):
        if hook is end_pass:
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)
