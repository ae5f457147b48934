"""From the inputs of routers to the routing of a pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.model_call import ModelCall
from moe_lora.routing.offloading import onloaded
from moe_lora.routing.routers.base import Router, RoutingDecision
from moe_lora.routing.weights.fitting import fit_to_tokens
from moe_lora.routing.weights.routing import Dimension, Routing


def decide(router: Router, inputs: RouterInputs, model: nn.Module) -> RoutingDecision:
    """Ask a router on its own device, and return its decision on that of the inputs.

    Args:
        router: the router.
        inputs: what it reads.
        model: the adapted model, whose offloading may keep the router's weights elsewhere.

    Raises:
        ValueError: for a router on the meta device.
    """
    here = inputs.hidden_states.device
    with onloaded(router, model):
        # Weights that a whole-model offload has left elsewhere are used where they are.
        home = next((p.device for p in router.parameters()), here)
        if home.type == "meta" and here.type != "meta":
            raise ValueError(
                f"Expected the weights of {type(router).__name__} in memory, but they are on the "
                "meta device. Load them, or attach another router, before calling the model."
            )
        decision: RoutingDecision = router(inputs if home == here else inputs.to(home))
    return RoutingDecision(decision.weights.to(here), decision.logits.to(here))


def routing_of_decisions(
    decisions: Mapping[str, RoutingDecision],
    routers: Mapping[str, Router],
    call: ModelCall,
    task_hint: str | None,
) -> Routing:
    """Make the routing of a pass, whose token weights fit the tokens of the call.

    Args:
        decisions: by adapter name.
        routers: the routers that made them, by adapter name.
        call: the model's call.
        task_hint: the hint that the routers were given.
    """
    weights: dict[str, Tensor | None] = {}
    dimension: dict[str, Dimension] = {}
    for name, decision in decisions.items():
        router = routers[name]
        used = router.weights_to_use(decision, task_hint)
        if router.num_layers is not None:
            dimension[name] = "layers"
        elif decision.weights.ndim == 3:
            used, grid = fit_to_tokens(used, call)
            dimension.update({} if grid is None else {name: grid})
        weights[name] = used
    nonzero = {name: 1 if r.strategy == "hard" else r.top_k for name, r in routers.items()}
    return Routing.of(weights, nonzero, dimension)
