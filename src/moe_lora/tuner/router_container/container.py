"""Container module for the routers of an adapted model, and the hooks that run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from moe_lora.routing.lookup import ROUTER_ATTRIBUTE
from moe_lora.routing.offloading import forbid_backward_from_disk
from moe_lora.routing.routers.base import Router
from moe_lora.routing.state import RoutingState
from moe_lora.routing.weights.context import call_id
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.router_container.guards import (
    check_routers_unadapted,
    install_guards,
    remove_guards,
)
from moe_lora.tuner.router_container.model_reference import ModelReference, PickleAnchor
from moe_lora.tuner.state_dict.module_paths import bare_path
from moe_lora.tuner.state_dict.names import adapted_state_dict_hook


class AdapterStatus(NamedTuple):
    """Status of the adapters in the layers of a model.

    Attributes:
        active: the adapters that are active in any layer.
        merged: the adapters that are merged into any base weight.
        contributing: the adapters that contribute to the output of any layer.
        disabled: whether adapters are disabled in every layer.
    """

    active: list[str]
    merged: list[str]
    contributing: list[str]
    disabled: bool


class AdapterRouters(nn.Module):
    """Routers of a model, one per adapter, with the same adapter status as the layers.

    The class is not a `BaseTunerLayer`: PEFT and diffusers would expect a base layer, a width and a
    block of it. The layers notify it of changes instead.

    Args:
        configs: the adapters' configurations by name, shared with the tuner.
        model: the adapted model.
    """

    def __init__(self, configs: dict[str, MoELoraConfig], model: ModelReference) -> None:
        super().__init__()
        self.moe_lora_routers = nn.ModuleDict()
        self.state = RoutingState(self.moe_lora_routers)
        self.configs = configs
        self.adapted_model = model
        self._anchor = PickleAnchor(model)
        self.frozen_routers: set[str] = set()
        self._layer_counts: dict[str, int] = {}
        self._status: AdapterStatus | None = None

    @property
    def base_layer(self) -> None:
        """Return `None`, which diffusers' `unload_lora` sets in the place of this module."""
        return None

    def get_base_layer(self) -> None:
        """Return `base_layer`."""
        return None

    def unload_and_optionally_merge_module(self, **kwargs: Any) -> nn.Module:
        """Return an empty module, when another tuner unloads all layers (called by PEFT)."""
        return _RemovedRouters()

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`; an adapted `nn.Sequential` calls this module as its last child."""
        return x

    @property
    def status(self) -> AdapterStatus:
        """Return the status of the adapters in the layers."""
        if self._status is None:
            self._status = self._read_status()
        return self._status

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _read_status(self) -> AdapterStatus:
        model = self.adapted_model()
        modules = model.modules() if model is not None else ()
        layers = [module for module in modules if isinstance(module, RoutedLayer)]
        # Dictionaries as ordered sets, which determine the order of the routers.
        active = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
        merged = dict.fromkeys(name for layer in layers for name in layer.merged_adapters)
        contributing = dict.fromkeys(
            name
            for layer in layers
            if not layer.disable_adapters and not layer.merged
            for name, _ in layer.experts()
        )
        disabled = bool(layers) and all(layer.disable_adapters for layer in layers)
        return AdapterStatus(list(active), list(merged), list(contributing), disabled)

    @property
    def active_adapters(self) -> list[str]:
        """Return the adapters that are active in any layer."""
        return self.status.active

    @property
    def merged_adapters(self) -> list[str]:
        """Return the adapters that are merged into any base weight."""
        return self.status.merged

    @property
    def disable_adapters(self) -> bool:
        """Return whether adapters are disabled in every layer."""
        return self.status.disabled

    def refresh_active_adapters(self) -> None:
        """Update the status of the adapters before the next forward pass."""
        self._status = None

    def set_trainable_adapters(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """Set `requires_grad` of these adapters' routers, and freeze the others."""
        for name in self.moe_lora_routers:
            self._set_router_requires_grad(name, requires_grad and name in adapter_names)
        self.refresh_active_adapters()

    def set_requires_grad(self, adapter_names: Sequence[str], requires_grad: bool) -> None:
        """Set `requires_grad` of these adapters' routers."""
        for name in adapter_names:
            if name in self.moe_lora_routers:
                self._set_router_requires_grad(name, requires_grad)

    def freeze_router(self, adapter_name: str, frozen: bool) -> None:
        """Freeze an adapter's router whatever its adapter does, or train it."""
        if frozen:
            self.frozen_routers.add(adapter_name)
        else:
            self.frozen_routers.discard(adapter_name)
        self.set_requires_grad([adapter_name], True)

    def _set_router_requires_grad(self, adapter_name: str, requires_grad: bool) -> None:
        router = cast(Router, self.moe_lora_routers[adapter_name])
        trained = requires_grad and adapter_name not in self.frozen_routers
        for name, parameter in router.named_parameters():
            parameter.requires_grad_(trained and name not in router.frozen_parameters)

    def add_adapter(self, adapter_name: str, layers: Sequence[str]) -> None:
        """Add an adapter.

        Args:
            adapter_name: the adapter's name.
            layers: the paths of its layers.
        """
        names = self.configs[adapter_name].experts
        self.state.add_adapter(adapter_name, names, tuple(layers))
        self._layer_counts[adapter_name] = len(layers)
        self.refresh_active_adapters()

    def on_layer_deleted(self, adapter_name: str) -> None:
        """Update the number of an adapter's layers, and delete its router with the last one."""
        self._layer_counts[adapter_name] -= 1
        if not self._layer_counts[adapter_name]:
            del self._layer_counts[adapter_name]
            self.frozen_routers.discard(adapter_name)
            self.state.remove_adapter(adapter_name)
            if adapter_name in self.moe_lora_routers:
                del self.moe_lora_routers[adapter_name]
        self.refresh_active_adapters()

    def attach(self, adapter_name: str, router: Router) -> None:
        """Attach a router to an adapter, and update the adapter's configuration.

        Args:
            adapter_name: the adapter.
            router: the router.

        Raises:
            ValueError: for an unknown adapter, a router for another number of layers, or
                incompatible settings of the configuration.
        """
        if adapter_name not in self.configs:
            raise ValueError(
                f"Expected `adapter_name` to be one of {sorted(self.configs)}, but got "
                f"{adapter_name!r}."
            )
        layers = len(self.state.layer_names.get(adapter_name, ()))
        if router.num_layers not in (None, layers):
            raise ValueError(
                f"Expected `num_layers` of {type(router).__name__} to be the number of layers of "
                f"adapter {adapter_name!r}, {layers}, but got {router.num_layers}."
            )
        config = self.configs[adapter_name]
        _configure(router, config)
        router.expert_dropout = config.expert_dropout
        _record_frozen_parameters(router)
        config.router = router.registered_name or type(router).__qualname__
        self.moe_lora_routers[adapter_name] = router
        self.frozen_routers.discard(adapter_name)
        self._set_router_requires_grad(
            adapter_name, adapter_name in self.active_adapters and not config.inference_mode
        )
        self.state.update_routed_adapters()

    def update_experts(self, adapter_name: str, config: MoELoraConfig) -> None:
        """Replace the configuration of an adapter whose experts were added, removed or renamed.

        Args:
            adapter_name: the adapter.
            config: the new configuration; it gets the arguments of the router.

        Raises:
            ValueError: when the router does not support these experts.
        """
        if adapter_name in self.moe_lora_routers:
            _configure(cast(Router, self.moe_lora_routers[adapter_name]), config)
        self.configs[adapter_name] = config
        self.state.update_experts(adapter_name, config.experts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_status": None}

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()


class _RemovedRouters(nn.Module):
    """Placeholder for removed routers until the next forward pass."""

    base_layer = None


def _record_frozen_parameters(router: Router) -> None:
    """Record the parameters that were frozen before the router was attached."""
    if "frozen_parameters" not in vars(router):
        frozen = [name for name, p in router.named_parameters() if not p.requires_grad]
        router.frozen_parameters = frozenset(frozen)


def _configure(router: Router, config: MoELoraConfig) -> None:
    router.configure(
        config.experts,
        strategy=config.routing_strategy,
        temperature=config.routing_temperature,
        top_k=config.top_k,
    )
    config.router_kwargs = dict(router.init_kwargs)


def begin_pass(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Decide the routing of a forward pass (forward pre-hook of adapted models).

    `begin_pass` and `end_pass` are functions without bound state, so that a copied model uses its
    own routers.
    """
    routers = model._modules.get(ROUTER_ATTRIBUTE)
    if not isinstance(routers, AdapterRouters):
        remove_routers(model)
        return
    state = routers.state
    original = state.backward_routing()
    state.enter(None, call_id())
    if not torch.compiler.is_compiling():
        check_routers_unadapted(routers.moe_lora_routers)
    contributing = routers.status.contributing
    if contributing:
        own = routers.moe_lora_routers  # a replica has its own, but shares the state
        state.set_routing(state.decide_routing(model, args, kwargs, contributing, own, original))


def end_pass(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Remove the routing of a forward pass (forward hook, also called after errors)."""
    routers = model._modules.get(ROUTER_ATTRIBUTE)
    if not isinstance(routers, AdapterRouters):
        return
    routing = routers.state.exit(call_id())
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    forbid_backward_from_disk(model, output)
    if routing is not None:
        routers.state.restore_in_backward(output, routing)


def index_layers(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """Set the index of every layer of an adapter for weights per layer.

    Args:
        model: the adapted model.
        adapter_name: the adapter.

    Returns:
        The paths of the layers in the base model, in the order of the indices, which is the order
        of the model's modules.
    """
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, RoutedLayer) and adapter_name in module.moe_lora_experts
    ]
    for index, (_, layer) in enumerate(layers):
        layer.layer_index[adapter_name] = torch.tensor([index], device="cpu")
    return tuple(bare_path(path, model) for path, _ in layers)


def install_routers(model: nn.Module, routers: AdapterRouters) -> None:
    """Install routers as a submodule of a model, with the hooks that run them.

    Args:
        model: the adapted model.
        routers: the routers.
    """
    remove_routers(model)
    model.add_module(ROUTER_ATTRIBUTE, routers)
    model.register_forward_pre_hook(begin_pass, with_kwargs=True)
    model.register_forward_hook(end_pass, with_kwargs=True, always_call=True)
    model._register_state_dict_hook(adapted_state_dict_hook)
    install_guards(model, routers.adapted_model)


def remove_routers(model: nn.Module) -> None:
    """Remove the routers of a model and their hooks.

    Args:
        model: the adapted model.
    """
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
        if hook is adapted_state_dict_hook:
            del model._state_dict_hooks[key]
