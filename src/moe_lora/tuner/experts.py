"""The experts of one adapter in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lora.routing.weights.checkpointing import check_version_in_backward
from moe_lora.tracing import is_transformed
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.expert_parameters import ExpertParameters
from moe_lora.tuner.mixture_product.fused import add_mixture
from moe_lora.tuner.mixture_product.plain import LinearParameters, apply_gate, mixture_operands


class Factors(NamedTuple):
    """Factors of a mixture with fixed routing weights, which are folded into `B`.

    Attributes:
        A: `(E, r, *in_shape)`.
        B: `(out, E, r)`.
    """

    A: Tensor
    B: Tensor

    def to(self, device: torch.device) -> Factors:
        """Return the factors on another device."""
        return Factors(self.A.to(device), self.B.to(device))

    def product(self) -> Tensor:
        """Return the change of the base weight, `(out, *in_shape)`."""
        delta: Tensor = self.B.flatten(1) @ self.A.flatten(0, 1).flatten(1)
        return delta.view(self.B.shape[0], *self.A.shape[2:])


class MoELoraExperts(ExpertParameters):
    """Experts of one adapter in one linear layer.

    Args:
        in_shape: `(in,)`, the shape of one row of `lora_A`.
        out_features: width of the layer's output.
        r: rank of each expert.
        lora_alpha: numerator of the scaling.
        config: the adapter's configuration.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_features: int,
        r: int,
        lora_alpha: float,
        config: MoELoraConfig,
    ) -> None:
        experts = len(config.experts)
        super().__init__(torch.empty(experts, r, *in_shape), torch.empty(out_features, experts, r))
        self.r, self.lora_alpha = r, lora_alpha
        self.base_scaling = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.scaling = self.base_scaling
        self.dropout = nn.Dropout(config.lora_dropout)
        self.reset_parameters(config.init_lora_weights)

    @torch.no_grad()
    def reset_parameters(self, init: bool | str = True) -> None:
        """Initialize `lora_A` randomly and `lora_B` with zeros.

        Args:
            init: "gaussian", or `True` or "kaiming" for a Kaiming uniform `lora_A`; `False`
                initializes `lora_B` randomly, too.
        """
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A.flatten(0, 1), a=math.sqrt(5))
        if init:
            nn.init.zeros_(self.lora_B)
        else:
            # The bound of nn.Linear(r, out) for each expert, independent of the number of experts.
            nn.init.uniform_(self.lora_B, -1 / math.sqrt(self.r), 1 / math.sqrt(self.r))

    @property
    def has_active_dropout(self) -> bool:
        """Return whether dropout is active."""
        return self.dropout.training and self.dropout.p > 0

    def forward(
        self,
        x: Tensor,
        base: Tensor | LinearParameters,
        weights: Tensor | None = None,
        *,
        expert_indices: Tensor | None = None,
        expert_grad_mask: Tensor | None = None,
        routing_version: Tensor | None = None,
    ) -> Tensor:
        """Add the mixture's output for `x` to that of the base layer; see `add_mixture`.

        Args:
            x: `(..., in)`.
            base: the base layer's output, or the parameters of a frozen linear layer to apply.
            weights: aligned with `x`; `None` means 1/E.
            expert_indices: aligned with `x`, the experts with non-zero weights.
            expert_grad_mask: aligned with `x`, 1 for the experts that a sample trains;
                `None` for all.
            routing_version: the version of the routing.
        """
        mix = mixture_operands(
            self.lora_A, self.lora_B, weights, self.scaling, expert_indices, expert_grad_mask
        )
        return add_mixture(self.dropout(x), mix, base, routing_version)

    @torch.no_grad()
    def factors(self, weights: Tensor | None = None) -> Factors:
        """Return the factors of the mixture with fixed routing weights.

        Args:
            weights: `(E,)`; `None` means 1/E.

        Returns:
            Copies in float32 (float64 for float64 experts).
        """
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.to(dtype, copy=True), self.lora_B.to(dtype)
        gate = B.new_full((B.shape[1],), 1 / B.shape[1]) if weights is None else weights.to(B)
        return Factors(A, B * (gate * self.scaling).view(1, -1, 1))

    def delta_weight(self, weights: Tensor | None = None) -> Tensor:
        """Return the `(out, *in_shape)` change of the base weight for fixed routing weights.

        Args:
            weights: `(E,)`; `None` means 1/E.
        """
        return self.factors(weights).product()


class MoELoraConvExperts(MoELoraExperts):
    """Experts of one adapter in one convolution.

    `lora_A` is `(E, r, in, kh, kw)`, a convolution with the base's stride and padding to `E·r`
    channels; `lora_B` is a 1 x 1 convolution of these channels.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        # `model.to(memory_format=torch.channels_last)` supports tensors of 4 dimensions only.
        def apply_to_4d(tensor: Tensor) -> Tensor:
            if tensor.ndim != 5:
                return fn(tensor)
            applied = fn(tensor.flatten(0, 1))
            return applied.view(*tensor.shape[:2], *applied.shape[1:])

        super()._apply(apply_to_4d, *args, **kwargs)  # type: ignore[no-untyped-call]  # untyped in torch
        return self

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        base: Tensor,
        convolve: Callable[[Tensor, Tensor], Tensor],
        weights: Tensor | None = None,
        *,
        expert_grad_mask: Tensor | None = None,
        routing_version: Tensor | None = None,
    ) -> Tensor:
        """Add the mixture's output for `x` to that of the base layer.

        Args:
            x: `(B, in, H, W)`.
            base: `(B, out, H', W')`, the base layer's output.
            convolve: the base's convolution, as a function of input and weight.
            weights: `(E, 1, 1)` or `(B, E, 1 or H', 1 or W')`; `None` means 1/E.
            expert_grad_mask: `(B, E, 1, 1)`, 1 for the experts that a sample trains;
                `None` for all.
            routing_version: the version of the routing.
        """
        x = self.dropout(x)
        A = self.lora_A.flatten(0, 1).to(x.dtype)
        B = self.lora_B.flatten(1).to(x.dtype)[..., None, None]
        hidden = convolve(x, A)
        if expert_grad_mask is not None:
            detached = convolve(x, A.detach())
            hidden = detached + _gate_channels(hidden - detached, expert_grad_mask)
        if weights is None:
            hidden = hidden * (self.scaling / self.lora_A.shape[0])
        else:
            hidden = _gate_channels(hidden, weights * self.scaling)
        if expert_grad_mask is None:
            delta = F.conv2d(hidden, B)
        else:
            trained = _gate_channels(hidden, expert_grad_mask)
            delta = F.conv2d(trained, B) + F.conv2d(hidden - trained, B.detach())
        return base + check_version_in_backward(
            delta, None if is_transformed() else routing_version
        )


def _gate_channels(hidden: Tensor, gate: Tensor) -> Tensor:
    return apply_gate(hidden.movedim(-3, -1), gate.movedim(-3, -1)).movedim(-1, -3)
