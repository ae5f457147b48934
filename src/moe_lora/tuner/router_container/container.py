"""Where the routers of an adapted model live, and the hooks that ask them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lora.routing.lookup import ROUTER_ATTRIBUTE
from moe_lora.routing.offloading import forbid_backward_from_disk
from moe_lora.routing.routers.base import Router
from moe_lora.routing.state import RoutingState
from moe_lora.routing.weights.context import call_id
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.router_container.adapted_model import AdaptedModel, Anchor
from moe_lora.tuner.router_container.guards import check_untouched, guard, remove_guards
from moe_lora.tuner.state_dict.module_paths import bare_path
from moe_lora.tuner.state_dict.names import find_by_base_name


class Switched(NamedTuple):
    """Remember what the layers of a model were switched to.

    Attributes:
        active: the adapters that are active in any layer.
        merged: the adapters that are merged into any base weight.
        acting: the adapters that add to the output of any layer.
        disabled: whether adapters are disabled in every layer.
    """

    active: list[str]
    merged: list[str]
    acting: list[str]
    disabled: bool


class AdapterRouters(nn.Module):
    """Hold the routers of a model, one per adapter, and follow the switches of its layers.

    It is no tuner layer, since loops over these ask for what a router cannot have: a base layer, a
    width, a place in a block. The layers tell it what they were switched to instead.

    Args:
        configs: the adapters' configurations by name, shared with the tuner.
        model: the adapted model.
    """

    def __init__(self, configs: dict[str, MoELoraConfig], model: AdaptedModel) -> None:
        super().__init__()
        self.moe_lora_routers = nn.ModuleDict()
        self.state = RoutingState(self.moe_lora_routers)
        self.configs = configs
        self.adapted_model = model
        self._anchor = Anchor(model)
        self._layers_left: dict[str, int] = {}
        self._switched: Switched | None = None

    @property
    def base_layer(self) -> None:
        """Stand for what is left when the adapters are unloaded: nothing.

        diffusers' `unload_lora` puts it in the place of everything that has one.
        """
        return None

    def get_base_layer(self) -> None:
        """Return `base_layer`."""
        return None

    def unload_and_optionally_merge_module(self, **kwargs: Any) -> nn.Module:
        """Return what is left when another tuner unloads all layers (PEFT calls this)."""
        return _NoRouters()

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`: an adapted `nn.Sequential` calls this, its last child, like the others."""
        return x

    @property
    def switched(self) -> Switched:
        """Return what the layers are switched to."""
        if self._switched is None:
            self._switched = self._look()
        return self._switched

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self) -> Switched:
        model = self.adapted_model()
        modules = model.modules() if model is not None else ()
        layers = [module for module in modules if isinstance(module, RoutedLayer)]
        # Dictionaries stand for sets in order: it decides in which order routers are asked.
        active = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
        merged = dict.fromkeys(name for layer in layers for name in layer.merged_adapters)
        acting = dict.fromkeys(
            name
            for layer in layers
            if not layer.disable_adapters and not layer.merged
            for name, _ in layer.experts()
        )
        disabled = bool(layers) and all(layer.disable_adapters for layer in layers)
        return Switched(list(active), list(merged), list(acting), disabled)

    @property
    def active_adapters(self) -> list[str]:
        """Return the adapters that are active in any layer."""
        return self.switched.active

    @property
    def merged_adapters(self) -> list[str]:
        """Return the adapters that are merged into any base weight."""
        return self.switched.merged

    @property
    def disable_adapters(self) -> bool:
        """Tell whether adapters are disabled in every layer."""
        return self.switched.disabled

    def look_again(self) -> None:
        """Read anew which adapters act in the layers before the next forward pass."""
        self._switched = None

    def train_only(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """Set `requires_grad` of these adapters' routers, and freeze the others."""
        for name, router in self.moe_lora_routers.items():
            _train(router, requires_grad and name in adapter_names)
        self.look_again()

    def set_requires_grad(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """Set `requires_grad` of these adapters' routers."""
        for name in adapter_names:
            if name in self.moe_lora_routers:
                _train(self.moe_lora_routers[name], requires_grad)

    def add_adapter(self, adapter_name: str, layers: Sequence[str]) -> None:
        """Make room for an adapter, whose layers have these paths."""
        names = self.configs[adapter_name].experts
        self.state.add_adapter(adapter_name, names, tuple(layers))
        self._layers_left[adapter_name] = len(layers)
        self.look_again()

    def layer_lost(self, adapter_name: str) -> None:
        """Delete an adapter's router with the last of its layers."""
        self._layers_left[adapter_name] -= 1
        if not self._layers_left[adapter_name]:
            del self._layers_left[adapter_name]
            self.state.remove_adapter(adapter_name)
            if adapter_name in self.moe_lora_routers:
                del self.moe_lora_routers[adapter_name]
        self.look_again()

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
        _note_frozen(router)
        _train(router, adapter_name in self.active_adapters and not config.inference_mode)
        config.router = router.registered_name or type(router).__qualname__
        config.router_kwargs = dict(router.init_kwargs)
        self.moe_lora_routers[adapter_name] = router
        self.state.update_routed_adapters()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_switched": None}

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()


class _NoRouters(nn.Module):
    """Take the routers' place until the next forward pass notices that there are none."""

    base_layer = None


def _note_frozen(router: Router) -> None:
    """Remember which parameters the router's author froze, before any switch does."""
    if "frozen_parameters" not in vars(router):
        frozen = [name for name, p in router.named_parameters() if not p.requires_grad]
        router.frozen_parameters = frozenset(frozen)


def _train(router: nn.Module, requires_grad: bool) -> None:
    assert isinstance(router, Router)
    for name, parameter in router.named_parameters():
        parameter.requires_grad_(requires_grad and name not in router.frozen_parameters)


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
    before = state.backward_routing()
    state.enter(None, call_id())
    if not torch.compiler.is_compiling():
        check_untouched(routers.moe_lora_routers)
    acting = routers.switched.acting
    if acting:
        own = routers.moe_lora_routers  # of a replica: not those of its state
        state.set_routing(state.decide_routing(model, args, kwargs, acting, own, before))


def end_pass(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forget the routing of a forward pass (a forward hook that is called after errors, too)."""
    routers = model._modules.get(ROUTER_ATTRIBUTE)
    if not isinstance(routers, AdapterRouters):
        return
    routing = routers.state.exit(call_id())
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    forbid_backward_from_disk(model, output)
    if routing is not None:
        routers.state.restore_in_backward(output, routing)


def number_layers(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """Tell every layer of an adapter its place in weights per layer, and list their paths.

    Args:
        model: the adapted model.
        adapter_name: whose layers; they are counted in the order of the model's modules.

    Returns:
        The paths as they are in the base model.
    """
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, RoutedLayer) and adapter_name in module.moe_lora_experts
    ]
    for place, (_, layer) in enumerate(layers):
        layer.layer_index[adapter_name] = torch.tensor([place], device="cpu")
    return tuple(bare_path(path, model) for path, _ in layers)


def place_routers(model: nn.Module, routers: AdapterRouters) -> None:
    """Make routers a submodule of a model, and have them asked before its forward passes."""
    remove_routers(model)
    model.add_module(ROUTER_ATTRIBUTE, routers)
    model.register_forward_pre_hook(begin_pass, with_kwargs=True)
    model.register_forward_hook(end_pass, with_kwargs=True, always_call=True)
    model._register_state_dict_hook(find_by_base_name)
    guard(model, routers.adapted_model)


def remove_routers(model: nn.Module) -> None:
    """Take the routers of a model away, and the hooks that ask them."""
    model._modules.pop(ROUTER_ATTRIBUTE, None)
    remove_guards(model)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is begin_pass:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(model._forward_hooks.items()):
        if hook is end_pass:
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)
    for key, hook in list(model._state_dict_hooks.items()):
        if hook is find_by_base_name:
            del model._state_dict_hooks[key]
