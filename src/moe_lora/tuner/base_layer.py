"""The base class of adapted layers: activating, scaling and merging their adapters."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from moe_lora.families import RowLayout, TokenStream
from moe_lora.routing.weights.context import RoutingContext
from moe_lora.routing.weights.fitting import fit_to_layer
from moe_lora.routing.weights.routing import Routing
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.experts import Factors, MoELoraExperts
from moe_lora.tuner.quantization import (
    SavedWeight,
    quantization_backend,
    restore_weight,
    save_weight,
)
from moe_lora.tuner.router_container.model_reference import AdapterListener, ModelReference


class RoutedLayer(nn.Module, BaseTunerLayer):
    """Base class of frozen layers adapted by a mixture of LoRA experts.

    The layer gets its routing weights from a context and has no reference to a router.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the first adapter's name.
        config: the first adapter's configuration.
        r: rank of each expert in this layer.
        lora_alpha: numerator of the scaling in this layer.
        context: the context with the routing of the current forward pass.
        model: the adapted model, whose routers are notified of changes to the layer's adapters;
            `None` for a layer without a model.
        stream: the token stream of the layer.
        rows: the meaning of the first dimension of the layer's input.
    """

    if TYPE_CHECKING:  # BaseTunerLayer has no type annotations
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

        def get_base_layer(self) -> nn.Module: ...
        def get_base_weight(self) -> Tensor: ...
        def set_base_weight(self, weight_data: Tensor) -> None: ...
        def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None: ...

    adapter_layer_names = ("moe_lora_experts",)
    cast_input_dtype_enabled = True  # set by diffusers' layerwise casting, without effect here
    experts_class: type[MoELoraExperts]
    in_shape: tuple[int, ...]
    in_features: int
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
        model: ModelReference | None = None,
        stream: TokenStream = "image",
        rows: RowLayout = "sample",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context, self.stream, self.rows = context, stream, rows
        self.adapted_model = model or ModelReference(None)
        self.moe_lora_experts = nn.ModuleDict()
        self.layer_index: dict[str, Tensor] = {}
        self.merged_adapters: list[str] = []
        self._merged_factors: dict[str, Factors] = {}
        self._scales: list[tuple[float, dict[str, float]]] = []
        self._saved_weight: SavedWeight | None = None
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
        """Add an adapter to the layer.

        Args:
            adapter_name: the adapter's name.
            config: the adapter's configuration.
            r: rank of each expert in this layer.
            lora_alpha: numerator of the scaling in this layer.
        """
        with cast(Tensor, self.get_base_layer().weight).device:
            experts = self.experts_class(self.in_shape, self.out_features, r, lora_alpha, config)
        self.moe_lora_experts[adapter_name] = experts.train(self.base_layer.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def quantization_backend(self) -> QuantizationBackend | None:
        """Return PEFT's backend for a quantized base weight, else `None`."""
        return quantization_backend(self.get_base_layer(), self.quantization_kwargs)

    def experts(self) -> Iterator[tuple[str, MoELoraExperts]]:
        """Yield name and experts of every active adapter of this layer."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.moe_lora_experts:
                yield adapter_name, cast(MoELoraExperts, self.moe_lora_experts[adapter_name])

    def contributing_experts(self) -> list[tuple[str, MoELoraExperts]]:
        """List name and experts of every adapter that contributes to this forward pass."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return [] if self.disable_adapters or self.merged else list(self.experts())

    def grad_mask_for(self, routing: Routing, x: Tensor) -> Tensor | None:
        """Return the gradient mask of the experts, aligned with `x`; `None` for no mask."""
        if routing.expert_grad_mask is None:
            return None
        return fit_to_layer(routing.expert_grad_mask, x, rows=self.rows, stream=self.stream)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_frozen_experts()
        self._notify_routers(
            lambda routers: routers.set_trainable_adapters(self.active_adapters, not inference_mode)
        )

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            self._notify_routers(lambda routers: routers.set_trainable_adapters([], False))
        self._notify_routers(lambda routers: routers.refresh_active_adapters())

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_frozen_experts()
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._notify_routers(lambda routers: routers.set_requires_grad(names, requires_grad))

    def _keep_frozen_experts(self) -> None:
        for experts in self.moe_lora_experts.values():
            cast(MoELoraExperts, experts).keep_frozen()

    def delete_adapter(self, adapter_name: str) -> None:
        had_adapter = adapter_name in self.moe_lora_experts
        super().delete_adapter(adapter_name)
        self.layer_index.pop(adapter_name, None)
        # As in PEFT's LoRA layer, an adapter that is deleted while merged stays merged.
        self._merged_factors.pop(adapter_name, None)
        if had_adapter:
            self._notify_routers(lambda routers: routers.on_layer_deleted(adapter_name))

    def _notify_routers(self, notify: Callable[[AdapterListener], None]) -> None:
        routers = self.adapted_model.routers()
        if routers is not None:
            notify(routers)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str, weights: Tensor | None = None) -> Tensor:
        """Return the `(out, in)` change of the base weight for fixed routing weights.

        Args:
            adapter: the adapter's name.
            weights: `(E,)`; `None` means 1/E.
        """
        return cast(MoELoraExperts, self.moe_lora_experts[adapter]).delta_weight(weights)

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        weights: Tensor | None = None,
    ) -> None:
        """Merge adapters into the base weight, with fixed routing weights.

        Args:
            safe_merge: check for NaN and inf before the base weight changes.
            adapter_names: the adapters; the active ones by default.
            weights: `(E,)`; `None` means the fixed weights of the model's routing.

        Raises:
            ValueError: when an adapter's weights depend on the input; with `safe_merge`, for NaN
                or inf.
        """
        try:
            merged, factors = self._merged_weight(safe_merge, adapter_names, weights)
        except Exception:  # of any kind: the caller scaled the layer just before
            self._undo_scale()
            raise
        if merged is None:
            return
        if self.quantization_backend is not None and self._saved_weight is None:
            self._saved_weight = save_weight(self.get_base_layer())
        self.set_base_weight(merged.to(self.get_base_weight().dtype))
        self._merged_factors.update(factors)
        self.merged_adapters.extend(factors)
        self._notify_routers(lambda routers: routers.refresh_active_adapters())

    def _merged_weight(
        self, safe_merge: bool, adapter_names: list[str] | None, weights: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Factors]]:
        """Return the base weight with merged adapters, and the factors of these; change nothing."""
        merged: Tensor | None = None
        added: dict[str, Factors] = {}
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.moe_lora_experts:
                continue
            fixed = self.context.fixed_weights(adapter) if weights is None else weights
            experts = cast(MoELoraExperts, self.moe_lora_experts[adapter])
            added[adapter] = experts.factors(fixed)
            delta = added[adapter].product()
            merged = (self.get_base_weight() if merged is None else merged).to(delta) + delta
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"Expected finite merged weights, but adapter {adapter!r} produces NaN or inf."
                )
        return merged, added

    @torch.no_grad()
    def unmerge(self) -> None:
        """Remove the merged adapters from the base weight, with the factors of the merge.

        A quantized weight is restored exactly.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
            return
        if self._saved_weight is not None:
            restore_weight(self.get_base_layer(), self._saved_weight)
            self._saved_weight = None
        else:
            for factors in reversed(self._merged_factors.values()):
                base = self.get_base_weight()
                delta = factors.to(base.device).product()
                self.set_base_weight((base.to(delta) - delta).to(base.dtype))
        self._merged_factors.clear()
        self.merged_adapters.clear()
        self._notify_routers(lambda routers: routers.refresh_active_adapters())

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to a multiple of the configured one (called by diffusers)."""
        if adapter in self.moe_lora_experts:
            experts = cast(MoELoraExperts, self.moe_lora_experts[adapter])
            experts.scaling = scale * experts.base_scaling
            self._scales.clear()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters (called by PEFT and diffusers)."""
        self._scales.append((scale, {name: experts.scaling for name, experts in self.experts()}))
        for _, experts in self.experts():
            experts.scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`.

        Args:
            scale: the scale to divide by; `None` restores the configured scaling.

        Raises:
            ValueError: for a scale of 0 that is not the last one of `scale_layer`.
        """
        if scale is not None and self._scales and self._scales[-1][0] == scale:
            self._undo_scale()
            return
        if scale == 0:
            raise ValueError(
                "Expected the last `scale` of scale_layer, but got 0. Set the scaling with "
                "set_scale or set_adapters."
            )
        for _, experts in self.experts():
            experts.scaling = experts.base_scaling if scale is None else experts.scaling / scale
        self._scales.clear()

    def _undo_scale(self) -> None:
        # Dividing by the scale would leave a rounding error at each forward pass.
        for name, scaling in self._scales.pop()[1].items() if self._scales else ():
            if name in self.moe_lora_experts:
                cast(MoELoraExperts, self.moe_lora_experts[name]).scaling = scaling

    @property
    def r(self) -> dict[str, int]:
        """Return the ranks by adapter name (diffusers counts them to name the next adapter)."""
        by_name = self.moe_lora_experts.items()
        return {name: cast(MoELoraExperts, experts).r for name, experts in by_name}

    @property
    def lora_A(self) -> nn.ModuleDict:
        """Return the experts by adapter name, for diffusers' `set_lora_device`."""
        return self.moe_lora_experts

    lora_B = lora_A

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()
