"""What a schedule sets besides the routing mode: the temperature, and what is trained."""

from __future__ import annotations

from typing import cast, get_args

from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from moe_lora.routing.control import ROUTER_ATTRIBUTE, routed_module, routing_state
from moe_lora.routing.gating import check_gate
from moe_lora.routing.router import Router
from moe_lora.schedules.phases import Trainable

_FROZEN: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The hook that drops the gradient of each frozen parameter."""


def set_routing_temperature(model: nn.Module, temperature: float) -> None:
    """Set what divides the logits of a model's routers, now and in checkpoints saved from now on.

    Args:
        model: the adapted model, or a wrapper around it.
        temperature: > 0.

    Raises:
        ValueError: for a temperature that is not positive, or a model without a router.
    """
    check_gate("soft", temperature, None)
    configs = getattr(routed_module(model), ROUTER_ATTRIBUTE).configs
    for adapter_name, router in _routers(model, "a temperature").items():
        router.temperature = temperature
        configs[adapter_name].routing_temperature = temperature


def set_trainable(model: nn.Module, train: Trainable) -> None:
    """Train all, the experts alone or the router alone, from the next backward pass on.

    `requires_grad` stays as it is: optimizers and `DistributedDataParallel`, which look at it once,
    may be built before or after. The gradient of a frozen parameter is computed and dropped: its
    `grad` is `None` after the backward pass, so that an optimizer passes it by, weight decay and
    moments included. A copy of the model starts with nothing frozen.

    Args:
        model: the adapted model, or a wrapper around it.
        train: "all"; "experts" for everything but the routers; or "router".

    Raises:
        ValueError: for another `train`, a model without a router to train or freeze, or parameters
            that FSDP2 has sharded, whose gradients cannot be dropped.
    """
    if train not in get_args(Trainable):
        raise ValueError(
            f"Expected `train` to be one of {list(get_args(Trainable))}, but got {train!r}."
        )
    if train == "all":
        of_router = set()
        routing_state(model)
    else:
        routers = _routers(model, f'training "{train}"').values()
        of_router = {id(parameter) for router in routers for parameter in router.parameters()}
    for parameter in model.parameters():
        frozen = train != "all" and (id(parameter) in of_router) == (train == "experts")
        if frozen and parameter.requires_grad and parameter not in _FROZEN:
            _FROZEN[parameter] = _freeze(parameter)
        elif not frozen and parameter in _FROZEN:
            _FROZEN.pop(parameter).remove()


def _routers(model: nn.Module, purpose: str) -> dict[str, Router]:
    found = dict(routing_state(model).routers.items())
    if not found:
        raise ValueError(
            f"Expected a router for {purpose}, but the model has none. Name one with "
            "MoELoraConfig(router=...) or attach one with moe_lora.attach_router."
        )
    return cast(dict[str, Router], found)


def _freeze(parameter: nn.Parameter) -> RemovableHandle:
    if isinstance(parameter, DTensor):
        raise ValueError(
            "Expected all parts to be trained under FSDP2, whose gradients reach sharded "
            "parameters past every hook; freeze before sharding with requires_grad_(False), or "
            "leave frozen parts out of the optimizer."
        )
    parameter.grad = None
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(_drop_gradient)
    return handle


def _drop_gradient(parameter: Tensor) -> None:
    def drop() -> None:
        parameter.grad = None

    drop()
    # DistributedDataParallel takes a gradient that is missing for zeros, and puts the mean over the
    # processes back. What is queued by a queued function runs after that.
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(drop))
