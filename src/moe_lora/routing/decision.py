"""Running routers, and from their decisions to the routing of a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.model_call import ModelCall
from moe_lora.routing.offloading import onloaded
from moe_lora.routing.routers.base import Router, RoutingDecision
from moe_lora.routing.weights.fitting import fit_to_tokens
from moe_lora.routing.weights.routing import Dimension, Routing


def run_router(router: Router, inputs: RouterInputs, model: nn.Module) -> RoutingDecision:
    """Run a router on its own device, and return its decision on the device of the inputs.

    Args:
        router: the router.
        inputs: its inputs.
        model: the adapted model, whose offloading hooks may cover the router.

    Raises:
        ValueError: for a router on the meta device.
    """
    device = inputs.hidden_states.device
    with onloaded(router, model):
        # A whole-model offload may keep the router on another device than the inputs.
        router_device = next((p.device for p in router.parameters()), device)
        if router_device.type == "meta" and device.type != "meta":
            raise ValueError(
                f"Expected the weights of {type(router).__name__} in memory, but they are on the "
                "meta device. Load them, or attach another router, before calling the model."
            )
        decision: RoutingDecision = router(
            inputs if router_device == device else inputs.to(router_device)
        )
    return RoutingDecision(decision.weights.to(device), decision.logits.to(device))


def routing_from_decisions(
    decisions: Mapping[str, RoutingDecision],
    routers: Mapping[str, Router],
    call: ModelCall,
    task_hint: str | Sequence[str | None] | None,
) -> Routing:
    """Create the routing of a pass, with token weights fitted to the tokens of the call.

    Args:
        decisions: the routers' decisions, by adapter name.
        routers: the routers, by adapter name.
        call: the model's call.
        task_hint: the task hint of the call, or one per sample.
    """
    weights: dict[str, Tensor | None] = {}
    dimension: dict[str, Dimension] = {}
    for name, decision in decisions.items():
        router = routers[name]
        layer_weights = router.apply_expert_dropout(decision, task_hint)
        if router.num_layers is not None:
            dimension[name] = "layers"
        elif decision.weights.ndim == 3:
            layer_weights, grid = fit_to_tokens(layer_weights, call)
            dimension.update({} if grid is None else {name: grid})
        weights[name] = layer_weights
    nonzero = {name: 1 if r.strategy == "hard" else r.top_k for name, r in routers.items()}
    return Routing.from_weights(weights, nonzero, dimension)
