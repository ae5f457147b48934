"""Building the router of a configuration."""

from __future__ import annotations

import inspect

import torch
from peft.utils.integrations import init_empty_weights
from torch import nn

from moe_lora.routing.routers.base import Router
from moe_lora.routing.routers.registry import router_class
from moe_lora.tuner.config import MoELoraConfig


def build_router(
    config: MoELoraConfig,
    model: nn.Module,
    low_cpu_mem_usage: bool,
    num_layers: int | None = None,
) -> Router | None:
    """Build the router of an adapter's configuration, on the device of the model.

    A constructor's parameter `num_experts` without a default gets the config's number of experts.

    Args:
        config: the adapter's configuration.
        model: the model to adapt, for the default arguments of the router.
        low_cpu_mem_usage: create the parameters on the meta device, to be loaded later.
        num_layers: the number of the adapter's layers, for a router with weights per layer.

    Returns:
        The router; `None` for a configuration without one.

    Raises:
        TypeError: when `router_kwargs` are not arguments of the router.
        ValueError: when the router cannot be built from their values.
    """
    if config.router is None:
        return None
    cls = router_class(config.router)
    kwargs = {**cls.default_kwargs(model, config.router_kwargs), **config.router_kwargs}
    if num_layers is not None:
        kwargs["num_layers"] = num_layers
    signature = inspect.signature(cls)
    count = signature.parameters.get("num_experts")
    if count is not None and count.default is inspect.Parameter.empty:
        kwargs.setdefault("num_experts", len(config.experts))
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise TypeError(
            f"Expected `router_kwargs` to be arguments of {cls.__name__}, but got {kwargs} "
            f"({error})."
        ) from error
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with init_empty_weights() if low_cpu_mem_usage else device:
            router = cls(**kwargs)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"Expected `router_kwargs` to be valid arguments of {cls.__name__}, but got {kwargs} "
            f"({error})."
        ) from error
    if device.type == "meta" or any(p.is_meta for p in router.parameters()):
        return router
    return router.to(device)
