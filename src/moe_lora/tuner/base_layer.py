"""What all adapted layers have in common: their adapters, switched, scaled and merged."""

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
    KeptWeight,
    keep_weight,
    quantization_backend,
    restore_weight,
)
from moe_lora.tuner.router_container.adapted_model import AdaptedModel, AdapterSwitches


class RoutedLayer(nn.Module, BaseTunerLayer):
    """Adapt a frozen layer by a mixture of LoRA experts.

    The layer knows nothing of routers: it is handed weights through a context.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the first adapter's name.
        config: the first adapter's configuration.
        r: rank of each expert in this layer.
        lora_alpha: scaling numerator in this layer.
        context: where the routing of the current forward pass is found.
        model: the adapted model, whose routers follow the switches of its layers; `None` for a
            layer by itself.
        stream: which tokens the layer sees.
        rows: what the first dimension of the layer's input counts.
    """

    if TYPE_CHECKING:  # what we use of BaseTunerLayer, which has no types
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

        def get_base_layer(self) -> nn.Module: ...
        def get_base_weight(self) -> Tensor: ...
        def set_base_weight(self, weight_data: Tensor) -> None: ...
        def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None: ...

    adapter_layer_names = ("moe_lora_experts",)
    cast_input_dtype_enabled = True  # diffusers' layerwise casting sets it, without effect here
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
        model: AdaptedModel | None = None,
        stream: TokenStream = "image",
        rows: RowLayout = "sample",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context, self.stream, self.rows = context, stream, rows
        self.adapted_model = model or AdaptedModel(None)
        self.moe_lora_experts = nn.ModuleDict()
        self.layer_index: dict[str, Tensor] = {}
        self.merged_adapters: list[str] = []
        self._merged_factors: dict[str, Factors] = {}
        self._scales: list[tuple[float, dict[str, float]]] = []
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
        with self.get_base_layer().weight.device:  # type: ignore[union-attr]
            experts = self.experts_class(self.in_shape, self.out_features, r, lora_alpha, config)
        self.moe_lora_experts[adapter_name] = experts.train(self.base_layer.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def quantization_backend(self) -> QuantizationBackend | None:
        """Return what reads and writes a quantized base weight (PEFT asks), else `None`."""
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

    def grad_mask_of(self, routing: Routing, x: Tensor) -> Tensor | None:
        """Return which experts each sample trains, aligned with `x`; `None` for all."""
        if routing.expert_grad_mask is None:
            return None
        return fit_to_layer(routing.expert_grad_mask, x, rows=self.rows, stream=self.stream)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._tell(lambda routers: routers.train_only(self.active_adapters, not inference_mode))

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            self._tell(lambda routers: routers.train_only([], False))
        self._tell(lambda routers: routers.look_again())

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._tell(lambda routers: routers.set_requires_grad(names, requires_grad))

    def delete_adapter(self, adapter_name: str) -> None:
        held = adapter_name in self.moe_lora_experts
        super().delete_adapter(adapter_name)
        self.layer_index.pop(adapter_name, None)
        # As in a stock LoRA layer, an adapter that is deleted while it is merged stays merged.
        self._merged_factors.pop(adapter_name, None)
        if held:
            self._tell(lambda routers: routers.layer_lost(adapter_name))

    def _tell(self, news: Callable[[AdapterSwitches], None]) -> None:
        routers = self.adapted_model.routers()
        if routers is not None:
            news(routers)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str, weights: Tensor | None = None) -> Tensor:
        """Return the `(out, in)` change of the base weight under fixed weights.

        Args:
            adapter: name of the adapter.
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
        """Add the adapters, mixed by fixed weights, to the base weight.

        Args:
            safe_merge: check for NaN before the base weight changes.
            adapter_names: which adapters; the active ones by default.
            weights: `(E,)`; `None` takes those that the model's routing fixes.

        Raises:
            ValueError: when an adapter's weights depend on the input, or for NaN.
        """
        try:
            merged, factors = self._merged(safe_merge, adapter_names, weights)
        except Exception:
            self._undo_last_scale()
            raise
        if merged is None:
            return
        if self.quantization_backend is not None and self._kept_weight is None:
            self._kept_weight = keep_weight(self.get_base_layer())
        self.set_base_weight(merged.to(self.get_base_weight().dtype))
        self._merged_factors.update(factors)
        self.merged_adapters.extend(factors)
        self._tell(lambda routers: routers.look_again())

    def _merged(
        self, safe_merge: bool, adapter_names: list[str] | None, weights: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Factors]]:
        """Return the base weight with adapters added, and what was added; change nothing."""
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
                    f"Expected finite merged weights, but adapter {adapter!r} gives NaN or inf."
                )
        return merged, added

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again, as they were merged.

        A quantized weight comes back to the last bit.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
            return
        if self._kept_weight is not None:
            restore_weight(self.get_base_layer(), self._kept_weight)
            self._kept_weight = None
        else:
            for factors in reversed(self._merged_factors.values()):
                base = self.get_base_weight()
                delta = factors.to(base.device).product()
                self.set_base_weight((base.to(delta) - delta).to(base.dtype))
        self._merged_factors.clear()
        self.merged_adapters.clear()
        self._tell(lambda routers: routers.look_again())

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength to a multiple of the configured one (diffusers calls this)."""
        if adapter in self.moe_lora_experts:
            experts = cast(MoELoraExperts, self.moe_lora_experts[adapter])
            experts.scaling = scale * experts.base_scaling
            self._scales.clear()

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters (PEFT and diffusers call this)."""
        self._scales.append((scale, {name: experts.scaling for name, experts in self.experts()}))
        for _, experts in self.experts():
            experts.scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; `None` restores the configured strength.

        Raises:
            ValueError: for a scale of 0 that is not the last one of `scale_layer`.
        """
        if scale is not None and self._scales and self._scales[-1][0] == scale:
            self._undo_last_scale()
            return
        if scale == 0:
            raise ValueError(
                "Expected the `scale` that the layer was last scaled by, but got 0. Set a strength "
                "with set_scale or set_adapters."
            )
        for _, experts in self.experts():
            experts.scaling = experts.base_scaling if scale is None else experts.scaling / scale
        self._scales.clear()

    def _undo_last_scale(self) -> None:
        # What divides by the scale again would leave a rounding error at each forward pass.
        for name, scaling in self._scales.pop()[1].items() if self._scales else ():
            if name in self.moe_lora_experts:
                cast(MoELoraExperts, self.moe_lora_experts[name]).scaling = scaling

    @property
    def r(self) -> dict[str, int]:
        """Return every adapter's rank (diffusers counts these to name the next adapter)."""
        held = self.moe_lora_experts.items()
        return {name: cast(MoELoraExperts, experts).r for name, experts in held}

    @property
    def lora_A(self) -> nn.ModuleDict:
        """Return what diffusers' `set_lora_device` moves, by adapter name."""
        return self.moe_lora_experts

    lora_B = lora_A

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()
