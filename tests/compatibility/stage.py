"""A FLUX with a mixture and two plain LoRAs in it, and a slow reference for what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft import set_peft_model_state_dict as put
from peft.functional import set_adapter
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig

TARGETS = {
    "mix": ["to_q", "to_v", "norm1.linear", "proj_mlp"],
    "turbo": ["to_q", "proj_mlp", "ff.net.2"],
    "style": ["to_q", "to_v", "norm.linear"],
}
RANKS = {"mix": 2, "turbo": 3, "style": 4}
ORDERS = [("mix", "turbo", "style"), ("turbo", "mix", "style"), ("turbo", "style", "mix")]


def config_of(name: str, **kwargs: Any) -> LoraConfig | MoELoraConfig:
    rank = RANKS[name]
    given = {"r": rank, "lora_alpha": rank, "target_modules": list(TARGETS[name]), **kwargs}
    if name == "mix":
        return MoELoraConfig(router="three_expert_removal", **given)
    return LoraConfig(**given)


class Stage:
    """Build adapted models of one base, and say what they must compute.

    Args:
        build: makes the base model, always the same.
        inputs: of a call of it.
        order: the adapters in the order in which they are added.
    """

    def __init__(
        self, build: Callable[[], nn.Module], inputs: dict[str, Tensor], order: tuple[str, ...]
    ) -> None:
        self.build, self.inputs, self.order = lambda: build().eval(), inputs, order
        alone = self.build()
        alone.add_adapter(config_of("mix"), adapter_name="mix")
        self.paths = {
            "mix": moe_lora.routing.adapted_layers(alone, "mix"),
            **{name: self._paths(name) for name in ("turbo", "style")},
        }
        self.tensors = {name: self._draw(name, seed) for seed, name in enumerate(TARGETS)}
        with torch.no_grad():
            for parameter in alone.moe_router.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        self.router = {
            key: tensor.clone()
            for key, tensor in get_peft_model_state_dict(alone, adapter_name="mix").items()
            if "moe_router" in key
        }
        self.put(alone, "mix")
        self(alone)
        routing = moe_lora.current_routing(alone, "mix")
        assert routing is not None
        self.weights = routing.weights.detach()

    def _paths(self, name: str) -> tuple[str, ...]:
        model = self.build()
        model.add_adapter(config_of(name), adapter_name=name)
        return tuple(p for p, m in model.named_modules() if hasattr(m, "lora_A"))

    def _draw(self, name: str, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        generator, base, rank = torch.Generator().manual_seed(seed), self.build(), RANKS[name]
        drawn = {}
        for path in self.paths[name]:
            out, width = base.get_submodule(path).weight.shape
            first = (3, rank, width) if name == "mix" else (rank, width)
            second = (out, 3, rank) if name == "mix" else (out, rank)
            drawn[path] = tuple(
                torch.randn(shape, generator=generator) * 0.3 for shape in (first, second)
            )
        return drawn

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's tensors as a file has them."""
        ends = ("moe_lora_experts.lora_A", "moe_lora_experts.lora_B")
        if name != "mix":
            ends = ("lora_A.weight", "lora_B.weight")
        found = dict(self.router) if name == "mix" else {}
        for path, tensors in self.tensors[name].items():
            found |= {f"{path}.{end}": t for end, t in zip(ends, tensors, strict=True)}
        return {key: tensor.clone() for key, tensor in found.items()}

    def put(self, model: nn.Module, name: str) -> None:
        """Give an adapter of a model its weights."""
        prefix = "base_model.model." if isinstance(model, PeftModel) else ""
        tensors = {prefix + key: tensor for key, tensor in self.state_dict(name).items()}
        assert not put(model, tensors, name).unexpected_keys

    def model(self, without: str | None = None) -> nn.Module:
        """Return the model, adapted by diffusers' `add_adapter`, with all adapters active."""
        model = self.build()
        added = [name for name in self.order if name != without]
        for name in added:
            model.add_adapter(config_of(name), adapter_name=name)
            self.put(model, name)
        model.set_adapters(added)
        return model

    def peft_model(self) -> PeftModel:
        """Return a `PeftModel` of the mixture, whose base already has the LoRAs."""
        model = self.build()
        for name in ("turbo", "style"):
            inject_adapter_in_model(config_of(name), model, name)
            self.put(model, name)
        wrapped = get_peft_model(model, config_of("mix"), "mix").eval()
        self.put(wrapped, "mix")
        set_adapter(wrapped, ["mix", "turbo", "style"])
        return wrapped

    @torch.no_grad()
    def __call__(self, model: nn.Module, **kwargs: Any) -> Tensor:
        return model(**self.inputs, **kwargs)[0]

    @torch.no_grad()
    def expected(
        self,
        strengths: Mapping[str, float | Callable[[str], float]],
        weights: Tensor | None = None,
    ) -> Tensor:
        """Compute every sample with a plain model whose weights hold its mixture.

        Args:
            strengths: of the adapters that act, a number or a function of the layer's path.
            weights: `(B, E)` of the mixture; the router's by default.
        """
        weights = self.weights if weights is None else weights
        outputs = []
        for i in range(len(weights)):
            model = self.build()
            for name, strength in strengths.items():
                for path, (A, B) in self.tensors[name].items():
                    scale = strength(path) if callable(strength) else strength
                    if name == "mix":
                        delta = torch.einsum("oer,e,eri->oi", B, weights[i], A)
                    else:
                        delta = B @ A
                    model.get_submodule(path).weight += scale * delta
            one = {k: v if k.endswith("ids") else v[i : i + 1] for k, v in self.inputs.items()}
            outputs.append(model(**one)[0])
        return torch.cat(outputs)

    def check(
        self,
        model: nn.Module,
        strengths: Mapping[str, float | Callable[[str], float]],
        weights: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Check that a model computes what adapters of these strengths do."""
        expected = self.expected(strengths, weights)
        torch.testing.assert_close(self(model, **kwargs), expected, rtol=1e-4, atol=1e-4)
