"""The adapter whose experts change, and the checks before a change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_lora.export.expert_table import experts_by_layer
from moe_lora.routing.lookup import ROUTER_ATTRIBUTE, routed_module
from moe_lora.routing.offloading import offload_groups
from moe_lora.routing.routers.base import Router
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.experts import MoELoraExperts
from moe_lora.tuner.router_container.container import AdapterRouters
from moe_lora.tuner.state_dict.adapter_tensors import adapter_tensors, check_in_memory


@dataclass(frozen=True)
class Target:
    """One adapter of a model.

    Attributes:
        base: the module with the injected adapter.
        adapter_name: the adapter.
        routers: the routers of the model.
        layers: the experts of every layer, by the layer's path in the bare model.
    """

    base: nn.Module
    adapter_name: str
    routers: AdapterRouters
    layers: dict[str, MoELoraExperts]

    @property
    def config(self) -> MoELoraConfig:
        """Return the adapter's configuration."""
        return self.routers.configs[self.adapter_name]

    @property
    def router(self) -> Router | None:
        """Return the adapter's router; `None` without one."""
        if self.adapter_name not in self.routers.moe_lora_routers:
            return None
        return cast(Router, self.routers.moe_lora_routers[self.adapter_name])

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the adapter's experts and router."""
        parts = [*self.layers.values(), *([] if self.router is None else [self.router])]
        return [parameter for part in parts for parameter in part.parameters()]

    def index_of(self, name: str, argument: str) -> int:
        """Return the index of an expert, or raise.

        Args:
            name: the expert.
            argument: the name of the argument, for the message.

        Raises:
            ValueError: for an unknown expert.
        """
        if name not in self.config.experts:
            raise ValueError(
                f"Expected `{argument}` to be one of the experts {list(self.config.experts)}, but "
                f"got {name!r}."
            )
        return self.config.experts.index(name)


def find_target(model: nn.Module, adapter_name: str) -> Target:
    """Find an adapter of a model.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: the adapter.

    Raises:
        ValueError: when the model or the adapter does not exist.
    """
    base = routed_module(model)
    routers = cast(AdapterRouters, getattr(base, ROUTER_ATTRIBUTE))
    if adapter_name not in routers.state.expert_names:
        raise ValueError(
            f"Expected `adapter_name` to be one of {sorted(routers.state.expert_names)}, but got "
            f"{adapter_name!r}."
        )
    return Target(base, adapter_name, routers, experts_by_layer(base, adapter_name))


def check_replaceable(model: nn.Module, target: Target, function: str) -> None:
    """Check that the parameters of an adapter can be replaced.

    Args:
        model: the adapted model, or a wrapper around it.
        target: the adapter.
        function: the name of the function that replaces them, for the message.

    Raises:
        ValueError: when they are sharded or offloaded, when `DistributedDataParallel` holds them,
            or inside of a context of the routing.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"Expected a model without DistributedDataParallel, which would synchronize the "
            f"parameters that {function} replaces. Call {function} before wrapping the model."
        )
    check_in_memory(model, adapter_tensors(target.base, target.adapter_name, joined=False))
    if next(iter(offload_groups(target.base.modules())), None) is not None:
        raise ValueError(
            f"Expected a model without group offloading, which holds the parameters that "
            f"{function} replaces. Call {function} before `enable_group_offload`."
        )
    if target.routers.state.has_open_contexts:
        raise ValueError(
            f"Expected no open moe_lora.route, teach_experts, router_inputs or ablate_expert, but "
            f"there is one. Call {function} outside of it."
        )


def check_not_merged(target: Target) -> None:
    """Check that the experts are not merged into the base weights.

    Raises:
        ValueError: when an adapter is merged.
    """
    if any(isinstance(module, RoutedLayer) and module.merged for module in target.base.modules()):
        raise ValueError(
            "Expected experts apart from the base weights, but they are merged. Call "
            "moe_lora.unmerge(model) first."
        )
