"""The layers that a mixture of experts adapts."""

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
    """Adapt a frozen `nn.Linear` by a mixture of LoRA experts.

    `y = W x + B · (s · w ⊙ (A x))`, in the dtype of `W x`.

    Args: those of `RoutedLayer`.
    """

    experts_class = MoELoraExperts

    def _read_shape(self, base: nn.Linear) -> None:
        self.in_features, self.out_features = base.in_features, base.out_features
        self.in_shape = (base.in_features,)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.acting_experts()
        x, result = input, None  # type: Tensor, Tensor | LinearParameters | None
        if len(acting) == 1 and not (args or kwargs or acting[0][1].drops):
            result = self._plain_linear(x)
        if result is None:
            result = cast(Tensor, self.base_layer(x, *args, **kwargs))
            x = x.to(result.dtype)
        for adapter_name, experts in acting:
            routing = self.context.routing_for(adapter_name)
            weights, expert_indices = self._weights(routing, adapter_name, x)
            added = experts(
                x,
                result,
                weights,
                expert_indices=expert_indices,
                expert_grad_mask=self.grad_mask_of(routing, x),
                routing_version=version_to_save(routing),
            )
            result = cast(Tensor, added)
        return cast(Tensor, result)

    def _weights(
        self, routing: Routing, adapter_name: str, x: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return an adapter's weights and the experts that count, aligned with `x`."""
        weights, expert_indices = routing.select_layer(
            adapter_name, self.layer_index.get(adapter_name)
        )
        if weights is None:
            return None, None
        grid = routing.token_grid(adapter_name)
        weights = fit_to_layer(weights, x, rows=self.rows, stream=self.stream, grid=grid)
        if expert_indices is None or self.rows != "sample" or x.ndim == 2:
            # Without tokens, gathering every sample's experts costs more than multiplying with all.
            return weights, None
        shape = (expert_indices.shape[0], *[1] * (x.ndim - 2), expert_indices.shape[-1])
        return weights, expert_indices.to(x.device).view(shape)

    def _plain_linear(self, x: Tensor) -> LinearParameters | None:
        """Return weight and bias of the base layer, when these two are all that there is to it."""
        # A compiler fuses by itself; a tracer takes the layer as a whole.
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return None
        base = self.base_layer
        if not is_plain_linear(base) or torch.is_autocast_enabled(x.device.type):
            return None  # autocast keeps a cast weight for the layer
        parameters = base._parameters
        return LinearParameters(cast(Tensor, parameters["weight"]), parameters["bias"])


class MoELoraConv2d(RoutedLayer):
    """Adapt a frozen `nn.Conv2d` by a mixture of LoRA experts.

    `y = W ∗ x + B · (s · w ⊙ (A ∗ x))`, where `A` convolves like `W`, to rank instead of output
    channels, and `B` mixes these at every place.

    Args: those of `RoutedLayer`.

    Raises:
        ValueError: for a convolution in groups.
    """

    experts_class = MoELoraConvExperts

    def _read_shape(self, base: nn.Conv2d) -> None:
        if base.groups != 1:
            raise ValueError(
                f"Expected a convolution without groups to adapt, but got {base.groups} groups. "
                "Leave the layer out with `exclude_modules`."
            )
        self.in_shape = (base.in_channels, *base.kernel_size)
        self.in_features, self.out_features = base.in_channels, base.out_channels

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.acting_experts()  # first: it takes disabled adapters out of the base weight
        result: Tensor = self.base_layer(input, *args, **kwargs)
        for adapter_name, experts in acting:
            routing = self.context.routing_for(adapter_name)
            weights, _ = routing.select_layer(adapter_name, self.layer_index.get(adapter_name))
            if weights is not None:
                grid = routing.token_grid(adapter_name)
                weights = fit_to_layer(weights, result.movedim(1, -1), rows=self.rows, grid=grid)
                weights = weights.movedim(-1, 1) if weights.ndim > 1 else weights.view(-1, 1, 1)
            expert_grad_mask = self.grad_mask_of(routing, result.movedim(1, -1))
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
    """Return the class that adapts a layer.

    Args:
        target: the layer to adapt, or another tuner's layer around it.
        path: its place in the model.

    Raises:
        TypeError: for a layer that no class adapts.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for kind, cls in ((nn.Linear, MoELoraLinear), (nn.Conv2d, MoELoraConv2d)):
        if isinstance(base, kind):
            return cls
    raise TypeError(
        f"Expected the target {path!r} to be an nn.Linear or nn.Conv2d, but got "
        f"{type(base).__name__}. Narrow `target_modules`, or name it in `exclude_modules`."
    )
