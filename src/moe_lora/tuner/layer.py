"""The adapted layers: `nn.Linear` and `nn.Conv2d` with a mixture of experts."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moe_lora.routing.weights.checkpointing import version_to_save
from moe_lora.routing.weights.fitting import fit_to_layer
from moe_lora.routing.weights.routing import Routing
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.experts import MoELoraConvExperts, MoELoraExperts
from moe_lora.tuner.mixture_product.fast_path import is_plain_linear
from moe_lora.tuner.mixture_product.plain import LinearParameters


class MoELoraLinear(RoutedLayer):
    """Frozen `nn.Linear` adapted by a mixture of LoRA experts.

    `y = W x + B · (s · w ⊙ (A x))`, in the dtype of `W x`.

    The arguments are those of `RoutedLayer`.
    """

    experts_class = MoELoraExperts

    def _read_shape(self, base: nn.Linear) -> None:
        self.in_features, self.out_features = base.in_features, base.out_features
        self.in_shape = (base.in_features,)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        contributing = self.contributing_experts()
        x, result = input, None  # type: Tensor, Tensor | LinearParameters | None
        if len(contributing) == 1 and not (args or kwargs or contributing[0][1].has_active_dropout):
            result = self._linear_parameters(x)
        if result is None:
            result = cast(Tensor, self.base_layer(x, *args, **kwargs))
            x = x.to(result.dtype)
        for adapter_name, experts in contributing:
            routing = self.context.routing_for(adapter_name)
            weights, expert_indices = self._layer_weights(routing, adapter_name, x)
            added = experts(
                x,
                result,
                weights,
                expert_indices=expert_indices,
                expert_grad_mask=self.grad_mask_for(routing, x),
                routing_version=version_to_save(routing),
            )
            result = cast(Tensor, added)
        return cast(Tensor, result)

    def _layer_weights(
        self, routing: Routing, adapter_name: str, x: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return an adapter's weights and expert indices, aligned with `x`."""
        weights, expert_indices = routing.select_layer(
            adapter_name, self.layer_index.get(adapter_name)
        )
        if weights is None:
            return None, None
        grid = routing.token_grid(adapter_name)
        weights = fit_to_layer(weights, x, rows=self.rows, stream=self.stream, grid=grid)
        if expert_indices is None or self.rows != "sample" or x.ndim == 2:
            # Without tokens, gathering each sample's experts costs more than computing all.
            return weights, None
        shape = (expert_indices.shape[0], *[1] * (x.ndim - 2), expert_indices.shape[-1])
        return weights, expert_indices.to(x.device).view(shape)

    def _linear_parameters(self, x: Tensor) -> LinearParameters | None:
        """Return weight and bias of the base layer if its call is `F.linear` alone, else `None`."""
        # torch.compile fuses the plain formula; a tracer must record the call of the layer.
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return None
        base = self.base_layer
        if not is_plain_linear(base) or torch.is_autocast_enabled(x.device.type):
            return None  # autocast caches the cast weight of the layer
        parameters = base._parameters
        return LinearParameters(cast(Tensor, parameters["weight"]), parameters["bias"])


class MoELoraConv2d(RoutedLayer):
    """Frozen `nn.Conv2d` adapted by a mixture of LoRA experts.

    `y = W ∗ x + B · (s · w ⊙ (A ∗ x))`, where `A` is a convolution like `W` to `E·r` channels, and
    `B` a 1 x 1 convolution.

    The arguments are those of `RoutedLayer`.

    Raises:
        ValueError: for a grouped convolution.
    """

    experts_class = MoELoraConvExperts

    def _read_shape(self, base: nn.Conv2d) -> None:
        if base.groups != 1:
            raise ValueError(
                f"Expected a convolution without groups, but got {base.groups} groups. Exclude the "
                "layer with `exclude_modules`."
            )
        self.in_shape = (base.in_channels, *base.kernel_size)
        self.in_features, self.out_features = base.in_channels, base.out_channels

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        contributing = self.contributing_experts()  # before the base layer: it unmerges if disabled
        result: Tensor = self.base_layer(input, *args, **kwargs)
        for adapter_name, experts in contributing:
            routing = self.context.routing_for(adapter_name)
            weights, _ = routing.select_layer(adapter_name, self.layer_index.get(adapter_name))
            if weights is not None:
                grid = routing.token_grid(adapter_name)
                weights = fit_to_layer(weights, result.movedim(1, -1), rows=self.rows, grid=grid)
                weights = weights.movedim(-1, 1) if weights.ndim > 1 else weights.view(-1, 1, 1)
            expert_grad_mask = self.grad_mask_for(routing, result.movedim(1, -1))
            if expert_grad_mask is not None:
                expert_grad_mask = expert_grad_mask.movedim(-1, 1)
            result = experts(
                input.to(result.dtype),
                result,
                self._convolve,
                weights,
                expert_grad_mask=expert_grad_mask,
                routing_version=version_to_save(routing),
            )
        return result

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        base = cast(nn.Conv2d, self.get_base_layer())
        convolved: Tensor = base._conv_forward(x, weight, None)
        return convolved


def layer_class(target: nn.Module, path: str) -> type[RoutedLayer]:
    """Return the adapted-layer class for a layer.

    Args:
        target: the layer to adapt, or another tuner's layer around it.
        path: the layer's path in the model, for the message.

    Raises:
        TypeError: for an unsupported layer.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for kind, cls in ((nn.Linear, MoELoraLinear), (nn.Conv2d, MoELoraConv2d)):
        if isinstance(base, kind):
            return cls
    raise TypeError(
        f"Expected the target {path!r} to be an nn.Linear or nn.Conv2d, but got "
        f"{type(base).__name__}. Narrow `target_modules`, or add the layer to `exclude_modules`."
    )
