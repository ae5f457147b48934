"""What all adapted layers have in common: their adapters, switched, scaled and merged."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from moe_lora.alignment import align_weights, weights_by_row
from moe_lora.config import MoELoraConfig
from moe_lora.experts import MoELoraExperts
from moe_lora.families import RowLayout, TokenStream
from moe_lora.quantised import KeptWeight, keep_weight, quantization_backend, restore_weight
from moe_lora.routing.weights.context import RoutingContext
from moe_lora.routing.weights.routing import Routing


class MoELoraLayer(BaseTunerLayer):
    """Mark what belongs to this PEFT method, so that PEFT's switches reach it."""

    if TYPE_CHECKING:  # what we use of BaseTunerLayer, which has no types
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

        def get_base_layer(self) -> nn.Module: ...
        def get_base_weight(self) -> Tensor: ...
        def set_base_weight(self, weight_data: Tensor) -> None: ...
        def set_adapter(
            self, adapter_names: str | list[str], inference_mode: bool = False
        ) -> None: ...
        def merge(
            self, safe_merge: bool = False, adapter_names: list[str] | None = None
        ) -> None: ...
        def unmerge(self) -> None: ...
        def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None: ...

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength to a multiple of the configured one (diffusers calls this)."""

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters (PEFT and diffusers call this)."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; `None` restores the configured strength."""


class RoutedLayer(nn.Module, MoELoraLayer):
    """Adapt a frozen layer by a mixture of LoRA experts.

    The layer knows nothing of routers: it is handed weights through a context.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the first adapter's name.
        config: the first adapter's configuration.
        r: rank of each expert in this layer.
        lora_alpha: scaling numerator in this layer.
        context: where the routing of the current forward pass is found.
        stream: which tokens the layer sees.
        rows: what the first dimension of the layer's input counts.
    """

    adapter_layer_names = ("moe_lora_experts",)
    experts_class: type[MoELoraExperts]
    in_shape: tuple[int, ...]
    out_features: int

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoELoraConfig,
        r: int,
        lora_alpha: float,
        *,
        context: RoutingContext,
        stream: TokenStream = "image",
        rows: RowLayout = "sample",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context, self.stream, self.rows = context, stream, rows
        self.moe_lora_experts = nn.ModuleDict()
        self.places: dict[str, Tensor] = {}
        self.merged_adapters: list[str] = []
        self._merged_weights: dict[str, Tensor | None] = {}
        self._kept_weight: KeptWeight | None = None
        self.quantization_kwargs: dict[str, Any] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._read_shape(self.get_base_layer())
        self.update_layer(adapter_name, config, r, lora_alpha)

    @abstractmethod
    def _read_shape(self, base: Any) -> None:
        """Set `in_shape` and `out_features` to those of the base layer."""

    def update_layer(
        self, adapter_name: str, config: MoELoraConfig, r: int, lora_alpha: float
    ) -> None:
        """Add an adapter to the layer; arguments as in the constructor."""
        experts = self.experts_class(self.in_shape, self.out_features, r, lora_alpha, config)
        self.moe_lora_experts[adapter_name] = experts.train(self.base_layer.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def quantization_backend(self) -> QuantizationBackend | None:
        """Return what reads and writes a quantised base weight (PEFT asks), else `None`."""
        return quantization_backend(self.get_base_layer(), self.quantization_kwargs)

    def experts(self) -> Iterator[tuple[str, MoELoraExperts]]:
        """Yield name and experts of every active adapter that this layer has."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.moe_lora_experts:
                yield adapter_name, cast(MoELoraExperts, self.moe_lora_experts[adapter_name])

    def acting_experts(self) -> list[tuple[str, MoELoraExperts]]:
        """List name and experts of every adapter that acts in this forward pass."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return [] if self.disable_adapters or self.merged else list(self.experts())

    def learners_of(self, routing: Routing, x: Tensor) -> Tensor | None:
        """Return which experts each sample teaches, aligned with `x`; `None` for all."""
        if routing.expert_grad_mask is None:
            return None
        learners = weights_by_row(routing.expert_grad_mask.to(x.device), x.shape[0], self.rows)
        return align_weights(learners, x, self.stream)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str, weights: Tensor | None = None) -> Tensor:
        """Return the `(out, in)` change of the base weight under fixed weights.

        Args:
            adapter: name of the adapter.
            weights: `(E,)`; `None` means 1/E.
        """
        return cast(MoELoraExperts, self.moe_lora_experts[adapter]).delta_weight(weights)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters, mixed by their fixed weights, to the base weight.

        Args:
            safe_merge: check for NaN before the base weight changes.
            adapter_names: which adapters; the active ones by default.

        Raises:
            ValueError: when an adapter's weights depend on the input, or for NaN.
        """
        merged: Tensor | None = None
        mixed: dict[str, Tensor | None] = {}
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.moe_lora_experts:
                continue
            mixed[adapter] = self.context.fixed_weights(adapter)
            delta = self.get_delta_weight(adapter, mixed[adapter])
            merged = (self.get_base_weight() if merged is None else merged).to(delta) + delta
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"Expected finite merged weights, but adapter {adapter!r} gives NaN or inf."
                )
        if merged is None:
            return
        if self.quantization_backend is not None and self._kept_weight is None:
            self._kept_weight = keep_weight(self.get_base_layer())
        self.set_base_weight(merged.to(self.get_base_weight().dtype))
        self._merged_weights.update(mixed)
        self.merged_adapters.extend(mixed)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again.

        A quantised weight comes back to the last bit.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        if self._kept_weight is not None:
            restore_weight(self.get_base_layer(), self._kept_weight)
            self._kept_weight = None
            self._merged_weights.clear()
            self.merged_adapters.clear()
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            weights = self._merged_weights.pop(adapter)
            if adapter not in self.moe_lora_experts:
                continue  # deleted while it was merged, as diffusers allows
            delta = self.get_delta_weight(adapter, weights)
            base = self.get_base_weight()
            self.set_base_weight((base.to(delta) - delta).to(base.dtype))

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.moe_lora_experts:
            experts = cast(MoELoraExperts, self.moe_lora_experts[adapter])
            experts.scaling = scale * experts.base_scaling

    def scale_layer(self, scale: float) -> None:
        for _, experts in self.experts():
            experts.scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for _, experts in self.experts():
            experts.scaling = experts.base_scaling if scale is None else experts.scaling / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()
