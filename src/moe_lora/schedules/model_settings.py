"""Settings of a model that a schedule changes: the routing temperature, trained parameters."""

from __future__ import annotations

from typing import cast, get_args

from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from moe_lora.routing.lookup import ROUTER_ATTRIBUTE, routed_module, routing_state
from moe_lora.routing.routers.base import Router
from moe_lora.routing.routers.gating import check_gate
from moe_lora.schedules.phases import Trainable

_FROZEN: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The hook that discards the gradient, by frozen parameter."""


def set_routing_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature of a model's routers, and store it in the adapter configuration.

    Args:
        model: the adapted model, or a wrapper around it.
        temperature: divisor of the router logits, > 0.

    Raises:
        ValueError: if the temperature is not positive, or the model has no router.
    """
    check_gate("soft", temperature, None)
    configs = getattr(routed_module(model), ROUTER_ATTRIBUTE).configs
    for adapter_name, router in _routers(model, "a temperature").items():
        router.temperature = temperature
        configs[adapter_name].routing_temperature = temperature


def set_trainable(model: nn.Module, train: Trainable) -> None:
    """Train all parameters, the experts only or the router only, from the next backward pass on.

    `requires_grad` does not change, since optimizers and `DistributedDataParallel` read it only at
    construction. The gradient of a frozen parameter is computed and discarded: its `grad` is `None`
    after the backward pass, so that the optimizer skips the parameter, including weight decay and
    moments. A copy of the model has no frozen parameters.

    Args:
        model: the adapted model, or a wrapper around it.
        train: "all"; "experts" for all parameters except the routers'; "router".

    Raises:
        ValueError: if `train` is unknown, if the model has no router to train or to freeze, or if
            FSDP2 has sharded the parameters, whose gradients cannot be discarded.
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
            f"Expected a router for {purpose}, but the model has none. Choose one with "
            "MoELoraConfig(router=...) or attach one with moe_lora.attach_router."
        )
    return cast(dict[str, Router], found)


def _freeze(parameter: nn.Parameter) -> RemovableHandle:
    if isinstance(parameter, DTensor):
        raise ValueError(
            'Expected `train` to be "all" under FSDP2, since gradients of sharded parameters '
            "bypass hooks. Freeze parameters with requires_grad_(False) before sharding, or "
            "exclude them from the optimizer."
        )
    parameter.grad = None
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(_discard_gradient)
    return handle


def _discard_gradient(parameter: Tensor) -> None:
    def discard() -> None:
        parameter.grad = None

    discard()
    # DistributedDataParallel treats a missing gradient as zeros and writes the mean over the
    # processes back. A callback queued by a callback runs after that.
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(discard))
