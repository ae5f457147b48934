"""Record the routing weights of a pipeline's denoising steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxFillPipeline
from PIL import Image
from torch import Tensor

import moe_lora
from image_io.padding import MULTIPLE

OnStep = Callable[[int, int, int], None]
"""Called after each step: index of the pipeline's call, steps that are done, and all steps."""


@dataclass(frozen=True)
class TokenMap:
    """Routing weights by token, averaged over the steps.

    Attributes:
        weights: `(rows, columns, E)`.
        image: mode RGB, what the pipeline was called with: the padded image, or a crop of it.
        mask: mode L, of the image's size; white = remove.
    """

    weights: Tensor
    image: Image.Image
    mask: Image.Image


@dataclass(frozen=True)
class RoutingTrace:
    """Routing weights of one removal.

    Attributes:
        sigma: `(steps,)`, noise levels in [0, 1]; 1 is pure noise.
        weights: `(steps, E)`, averaged over tokens or layers where these differ.
        varies: what has weights of its own: "sample", "token" or "layer".
        tokens: the map of a router that gives weights by token; `None` for other routers.
    """

    sigma: Tensor
    weights: Tensor
    varies: str
    tokens: TokenMap | None = None

    @property
    def mean(self) -> Tensor:
        """Weights averaged over the steps, `(E,)`."""
        return self.weights.mean(0)


class ObservedPipeline:
    """Call a pipeline as it is called, and record what its router decided in every step.

    Args:
        pipe: with a mixture in its transformer, or without.
        on_step: called after every step; what it raises ends the removal.
    """

    def __init__(self, pipe: FluxFillPipeline, on_step: OnStep) -> None:
        self._pipe, self._on_step = pipe, on_step
        self._sigma: list[float] = []
        self._decided: list[Tensor] = []
        self._call: dict[str, Any] = {}
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __call__(self, **arguments: Any) -> Any:
        """Call the pipeline; of several calls the last is recorded."""
        self._sigma, self._decided, self._call = [], [], arguments
        self._calls += 1
        return self._pipe(**arguments, callback_on_step_end=self._note)

    def _note(
        self, pipe: FluxFillPipeline, step: int, timestep: Tensor, values: dict[str, Any]
    ) -> dict[str, Any]:
        if has_experts(pipe):
            self._sigma.append(float(timestep) / pipe.scheduler.config.num_train_timesteps)
            decision = moe_lora.current_routing(pipe.transformer)
            if decision is not None:
                self._decided.append(decision.weights[0].detach().float().cpu())
        self._on_step(self._calls - 1, step + 1, pipe.num_timesteps)
        return {}

    def trace(
        self, *, weights: tuple[float, ...] | None = None, without: int | None = None
    ) -> RoutingTrace | None:
        """Return the weights that acted; `None` without a mixture.

        Args:
            weights: those that were set instead of the router's.
            without: the index of an expert that was left out.
        """
        if not self._sigma:
            return None
        sigma, varies, tokens = torch.tensor(self._sigma), "sample", None
        if weights is None and self._decided:
            decided = torch.stack(self._decided)
            if decided.ndim == 3:
                varies = "token" if layers_of_router(self._pipe) is None else "layer"
        else:
            names = moe_lora.routing_stats(self._pipe.transformer).expert_names
            fixed = torch.tensor(weights) if weights else torch.full((len(names),), 1 / len(names))
            decided = fixed.expand(len(sigma), -1)
        if without is not None:
            decided = decided.clone()
            decided[..., without] = 0
        if varies == "token":
            tokens = self._token_map(decided.mean(0))
        return RoutingTrace(
            sigma, decided if varies == "sample" else decided.mean(1), varies, tokens
        )

    def _token_map(self, weights: Tensor) -> TokenMap | None:
        image, mask = self._call["image"], self._call["mask_image"]
        rows, columns = image.height // MULTIPLE, image.width // MULTIPLE
        if len(weights) != rows * columns:
            return None
        return TokenMap(weights.view(rows, columns, -1), image, mask)


def has_experts(pipe: FluxFillPipeline) -> bool:
    """Return whether the pipeline's transformer has a mixture of experts."""
    configs = getattr(pipe.transformer, "peft_config", {}).values()
    return any(isinstance(config, moe_lora.MoELoraConfig) for config in configs)


def router_of(pipe: FluxFillPipeline) -> moe_lora.Router | None:
    """Return the router of the pipeline's transformer, if it has one."""
    modules = pipe.transformer.modules()
    return next((module for module in modules if isinstance(module, moe_lora.Router)), None)


def layers_of_router(pipe: FluxFillPipeline) -> int | None:
    """Return the number of layers with weights of their own, if the router knows layers."""
    router = router_of(pipe)
    return None if router is None else router.num_layers
