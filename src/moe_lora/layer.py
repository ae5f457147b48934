"""The mixture of experts as a function, and the layer around it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from moe_lora.checkpointing import guard_recomputation
from moe_lora.config import MoELoraConfig
from moe_lora.handover import WeightSlot

TokenStream = Literal["image", "text", "joint"]
"""Which tokens a layer sees: the image's, the text's, or the text's followed by the image's."""


def mixture(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """Apply a mixture of LoRA experts in two matrix products.

    `B · (s · w ⊙ (A x))`, where `A` counts as `(E·r, in)` and `B` as `(out, E·r)`.

    Args:
        x: `(..., in)`.
        lora_A: `(E, r, in)`.
        lora_B: `(out, E, r)`.
        weights: broadcasts against `(..., E)`, where the dots are those of `x`; `None` means 1/E.
        scaling: `s`, usually lora_alpha / r.

    Returns:
        `(..., out)`.

    Example:
        >>> A, B = torch.ones(2, 1, 3), torch.tensor([[[1.0], [10.0]]])
        >>> mixture(torch.ones(1, 3), A, B, torch.tensor([[0.25, 0.75]]))
        tensor([[23.2500]])
    """
    experts, r = lora_A.shape[:2]
    hidden = F.linear(x, lora_A.flatten(0, 1))
    if weights is None:
        gated = hidden * (scaling / experts)
    else:
        gate = (weights * scaling).to(hidden.dtype).unsqueeze(-1)
        gated = (hidden.unflatten(-1, (experts, r)) * gate).flatten(-2)
    return F.linear(gated, lora_B.flatten(1))


def align_weights(weights: Tensor, x: Tensor, stream: TokenStream = "image") -> Tensor:
    """Shape routing weights so that they broadcast against the tokens of a layer's input.

    Sample weights serve every token. Token weights serve the image's tokens; text tokens, and
    inputs without tokens such as those of modulation layers, use the sample's mean over tokens.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        x: `(B, D)`, `(B, T', D)` or `(B, H, W, D)`, the layer's input.
        stream: which tokens `x` holds; it follows from the layer's place in the model.

    Returns:
        `(E,)`, `(B, E)`, `(B, 1 or T', E)` or `(B, 1 or H, 1 or W, E)`.

    Raises:
        ValueError: when the batch or the tokens do not fit.
    """
    if weights.ndim == 1:
        return weights
    if weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"Expected routing weights for the {x.shape[0]} samples of the layer's input, but got "
            f"weights of shape {tuple(weights.shape)}."
        )
    if weights.ndim == 3:
        tokens = weights.shape[1]
        mean = weights.mean(dim=1)
        if x.ndim == 2 or (stream == "text" and x.ndim == 3):
            weights = mean
        elif stream == "joint" and x.ndim == 3 and x.shape[1] > tokens:
            text = mean.unsqueeze(1).expand(-1, x.shape[1] - tokens, -1)
            return torch.cat([text, weights], dim=1)
        elif math.prod(x.shape[1:-1]) == tokens:
            return weights.view(weights.shape[0], *x.shape[1:-1], weights.shape[-1])
        else:
            raise ValueError(
                f"Expected routing weights for the {math.prod(x.shape[1:-1])} tokens of the "
                f"layer's input of shape {tuple(x.shape)}, but got weights for {tokens} tokens."
            )
    return weights.view(weights.shape[0], *[1] * (x.ndim - 2), weights.shape[-1])


class MoELoraExperts(nn.Module):
    """Hold the experts of one adapter in one layer.

    Args:
        in_features: width of the layer's input.
        out_features: width of the layer's output.
        r: rank of each expert.
        lora_alpha: numerator of the scaling.
        config: the adapter's configuration, for what is the same in all layers.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, lora_alpha: float, config: MoELoraConfig
    ) -> None:
        super().__init__()
        self.r, self.lora_alpha = r, lora_alpha
        self.base_scaling = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.scaling = self.base_scaling
        self.dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Parameter(torch.empty(len(config.experts), r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, len(config.experts), r))
        self.reset_parameters(config.init_lora_weights)

    @torch.no_grad()
    def reset_parameters(self, init: bool | str = True) -> None:
        """Draw `lora_A` and set `lora_B` to zero (with `init=False`, draw both)."""
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A.flatten(0, 1), a=math.sqrt(5))
        if init:
            nn.init.zeros_(self.lora_B)
        else:
            # The bound of an expert's own nn.Linear(r, out), whatever the number of experts.
            nn.init.uniform_(self.lora_B, -1 / math.sqrt(self.r), 1 / math.sqrt(self.r))

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mixture's output for `x`; see `mixture`."""
        return mixture(self.dropout(x), self.lora_A, self.lora_B, weights, self.scaling)

    def delta_weight(self, weights: Tensor | None = None) -> Tensor:
        """Return the `(out, in)` matrix that a mixture of `(E,)` fixed weights amounts to."""
        precise = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.to(precise), self.lora_B.to(precise)
        gate = torch.full((B.shape[1],), 1 / B.shape[1]) if weights is None else weights
        B = B * (gate.to(B) * self.scaling).view(1, -1, 1)
        return B.flatten(1) @ A.flatten(0, 1)


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
        def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...
        def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None: ...

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters (PEFT and diffusers call this)."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; `None` restores the configured strength."""


class MoELoraLinear(nn.Module, MoELoraLayer):
    """Adapt a frozen `nn.Linear` by a mixture of LoRA experts.

    `y = W x + B · (s · w ⊙ (A x))`

    The layer knows nothing of routers: it is handed weights through a slot.

    Args:
        base_layer: the linear layer to adapt.
        adapter_name: the first adapter's name.
        config: the first adapter's configuration.
        r: rank of each expert in this layer.
        lora_alpha: scaling numerator in this layer.
        slot: where the routing weights of the current forward pass are found.
        stream: which tokens the layer sees.
    """

    adapter_layer_names = ("moe_lora_experts",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoELoraConfig,
        r: int,
        lora_alpha: float,
        *,
        slot: WeightSlot,
        stream: TokenStream = "image",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = _linear_shape(self.get_base_layer())
        self.slot, self.stream = slot, stream
        self.moe_lora_experts = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._merged_weights: dict[str, Tensor | None] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha)

    def update_layer(
        self, adapter_name: str, config: MoELoraConfig, r: int, lora_alpha: float
    ) -> None:
        """Add an adapter to the layer; arguments as in the constructor."""
        experts = MoELoraExperts(self.in_features, self.out_features, r, lora_alpha, config)
        self.moe_lora_experts[adapter_name] = experts.train(self.base_layer.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def experts(self) -> Iterator[tuple[str, MoELoraExperts]]:
        """Yield name and experts of every active adapter that this layer has."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.moe_lora_experts:
                yield adapter_name, cast(MoELoraExperts, self.moe_lora_experts[adapter_name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter_name, experts in self.experts():
            weights = self.slot.weights.get(adapter_name)
            if weights is not None:
                weights = align_weights(weights.to(x.device), x, self.stream)
            delta = experts(self._cast_input_dtype(x, experts.lora_A.dtype), weights)
            result = result + guard_recomputation(delta, self.slot).to(dtype)
        return result

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
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.moe_lora_experts:
                continue
            weights = self.slot.fixed_weights(adapter)
            delta = self.get_delta_weight(adapter, weights)
            base = self.get_base_weight()
            merged = (base.to(delta) + delta).to(base.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"Expected finite merged weights, but adapter {adapter!r} gives NaN or inf."
                )
            self.set_base_weight(merged)
            self._merged_weights[adapter] = weights
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            delta = self.get_delta_weight(adapter, self._merged_weights.pop(adapter))
            base = self.get_base_weight()
            self.set_base_weight((base.to(delta) - delta).to(base.dtype))

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


def _linear_shape(linear: nn.Module) -> tuple[int, int]:
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features
