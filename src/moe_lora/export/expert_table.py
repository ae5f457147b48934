"""The experts of an adapter by layer, read from a model or from a checkpoint without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lora.checkpoint_reader import read_checkpoint
from moe_lora.export.lora_factors import Factors, PlainLora
from moe_lora.routing.lookup import routed_module
from moe_lora.routing.routers.registry import needs_num_layers, router_names
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.experts import MoELoraExperts
from moe_lora.tuner.router_container.building import build_router
from moe_lora.tuner.state_dict.adapter_tensors import check_in_memory
from moe_lora.tuner.state_dict.module_paths import bare_modules, bare_path
from moe_lora.tuner.state_dict.names import EXPERTS_PART, PREFIX, ROUTERS_PART
from moe_lora.tuner.state_dict.stored import Shapes, input_width


class LayerExperts(NamedTuple):
    """Experts of one layer.

    Attributes:
        lora_A: `(E, r, in)`, or `(E, r, in, kh, kw)` of a convolution.
        lora_B: `(out, E, r)`.
        scaling: the factor of the product `B A`.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


@dataclass(frozen=True)
class ExpertTable:
    """All experts of one adapter, independent of any model.

    Attributes:
        config: the adapter's configuration.
        layers: the experts of every adapted layer, by the layer's path in the base model.
        base_class: class name of the base model, if it is known.
        in_channels: the base model's input width, if it is known.
    """

    config: MoELoraConfig
    layers: Mapping[str, LayerExperts]
    base_class: str | None = None
    in_channels: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the expert names in order."""
        return self.config.experts

    def check_plain(self) -> None:
        """Check that the adapter trains experts only.

        Raises:
            ValueError: when it also trains whole modules, which no plain LoRA holds.
        """
        if self.config.modules_to_save:
            raise ValueError(
                f"Expected experts only, but the adapter trains "
                f"{sorted(self.config.modules_to_save)} whole (`modules_to_save`), which no plain "
                "LoRA holds."
            )

    def mixed(self, weights: Tensor) -> PlainLora:
        """Return the plain LoRA that the mixture is under fixed weights.

        `A = cat(A_e), B = cat(w_e · s · B_e)` over the experts whose weight is not 0.

        Args:
            weights: `(E,)`.

        Raises:
            ValueError: when the adapter trains whole modules, which no plain LoRA holds.
        """
        self.check_plain()
        return {path: mix(experts, weights) for path, experts in self.layers.items()}

    def expert(self, index: int) -> PlainLora:
        """Return one expert as a plain LoRA.

        Args:
            index: its place among `names`.
        """
        return self.mixed(torch.eye(len(self.names))[index])


def mix(experts: LayerExperts, weights: Tensor) -> Factors:
    """Put the experts of one layer side by side; see `ExpertTable.mixed`.

    Args:
        experts: the layer's experts.
        weights: `(E,)`.

    Returns:
        Factors of rank `r` times the number of experts whose weight is not 0.
    """
    lora_A, lora_B, scaling = experts
    chosen = weights.nonzero().flatten().tolist()
    precise = torch.promote_types(lora_B.dtype, torch.float32)
    gate = weights[chosen].to(lora_B.device, precise) * scaling
    up = lora_B[:, chosen].to(precise) * gate.view(1, -1, 1)
    return Factors(lora_A[chosen].flatten(0, 1), up.flatten(1).to(lora_B.dtype))


def experts_by_layer(base: nn.Module, adapter_name: str) -> dict[str, MoELoraExperts]:
    """Return the experts of every layer that an adapter has, by the layer's path in the bare model.

    Args:
        base: the module that the adapter was injected into.
        adapter_name: the adapter's name.
    """
    layers: dict[str, MoELoraExperts] = {}
    for _, bare, module in bare_modules(base):
        if isinstance(module, RoutedLayer) and adapter_name in module.moe_lora_experts:
            experts = module.moe_lora_experts[adapter_name]
            assert isinstance(experts, MoELoraExperts)
            layers[bare] = experts
    return layers


def table_of_model(model: nn.Module, adapter_name: str = "default") -> ExpertTable:
    """Read the experts of an adapter from a model; the tensors are the model's own, detached.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: the adapter's name.

    Raises:
        ValueError: when the model or the adapter does not exist, or when weights are offloaded or
            spread over processes.
    """
    base = routed_module(model)
    layers = experts_by_layer(base, adapter_name)
    if not layers:
        raise ValueError(f"Expected an adapter named {adapter_name!r}, but the model has none.")
    check_in_memory(
        model, {f"{path}.{n}": p for path, e in layers.items() for n, p in e.named_parameters()}
    )
    configs = base.peft_config
    assert isinstance(configs, dict)
    return ExpertTable(
        configs[adapter_name],
        {
            path: LayerExperts(e.lora_A.detach(), e.lora_B.detach(), e.scaling)
            for path, e in layers.items()
        },
        base_class=type(base).__name__,
        in_channels=input_width(base),
    )


def table_of_checkpoint(
    directory: str | os.PathLike[str],
) -> tuple[ExpertTable, dict[str, Tensor]]:
    """Read the experts from a checkpoint, without a base model.

    Args:
        directory: the folder of the checkpoint, in any form that `load_adapter` reads.

    Returns:
        The experts, and the router's tensors by name.

    Raises:
        FileNotFoundError: when a file is missing.
        TypeError: when `router_kwargs` are not arguments of the router.
        ValueError: when a file is corrupt, or the tensors are not those that the config asks for.
            The tensors of a router that is not registered here, and of whole modules, whose shapes
            the base model alone has, are not compared.
    """
    checkpoint = read_checkpoint(directory)
    config, stored = checkpoint.config, checkpoint.stored
    names = {name: bare_path(name).rpartition(PREFIX)[2] for name in checkpoint.tensors}
    tensors = {names[name]: tensor for name, tensor in checkpoint.tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = _expected_shapes(config, shapes)
    replace(stored, shapes=shapes).check_shapes(expected, "its config")
    layers = {
        path: LayerExperts(
            tensors[f"{path}{EXPERTS_PART}lora_A"],
            tensors[f"{path}{EXPERTS_PART}lora_B"],
            _scaling(config, path),
        )
        for path in _layers(shapes)
    }
    router = {
        name.partition(ROUTERS_PART)[2]: tensor
        for name, tensor in tensors.items()
        if ROUTERS_PART in name
    }
    base_class = (config.auto_mapping or {}).get("base_model_class")
    # Checkpoints of 0.1.0 tell the width only by the layer that the model's input meets first.
    width = config.base_in_channels or _width_of(layers)
    return ExpertTable(config, layers, base_class, width), router


def _layers(shapes: Shapes) -> list[str]:
    found = (name.partition(EXPERTS_PART)[0] for name in shapes if EXPERTS_PART in name)
    return list(dict.fromkeys(found))


def _expected_shapes(config: MoELoraConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a config asks for, the sizes of the base layers taken as they are."""
    count, paths = len(config.experts), _layers(shapes)
    expected: dict[str, tuple[int, ...]] = {}
    for path in paths:
        r = config.rank_of(path)
        for factor in ("lora_A", "lora_B"):
            name = f"{path}{EXPERTS_PART}{factor}"
            shape = shapes.get(name, ())
            if factor == "lora_A":
                sizes = shape[2:] if len(shape) in (3, 5) else (1,)
                expected[name] = (count, r, *sizes)
            else:
                expected[name] = (shape[0] if shape else 1, count, r)
    return {
        **expected,
        **_router_shapes(config, shapes, len(paths)),
        **_whole_modules(config, shapes),
    }


class _BareBase(nn.Module):
    """A base model of which the input width alone is known, for routers that depend on it."""

    def __init__(self, in_channels: int | None) -> None:
        super().__init__()
        if in_channels is not None:
            self.config = SimpleNamespace(in_channels=in_channels)


def _router_shapes(
    config: MoELoraConfig, shapes: Shapes, num_layers: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the config's router; those of the file where it is not registered."""
    stored = {name: shape for name, shape in shapes.items() if ROUTERS_PART in name}
    if config.router is None:
        return {}
    if config.router not in router_names():
        return stored
    model = _BareBase(config.base_in_channels)
    by_layer = needs_num_layers(config.router, config.router_kwargs)
    with torch.random.fork_rng(devices=[]):  # its parameters are drawn in vain
        router = build_router(config, model, False, num_layers if by_layer else None)
    assert router is not None
    prefix = next(iter(stored), f"moe_router.{ROUTERS_PART}").partition(ROUTERS_PART)[0]
    return {
        f"{prefix}{ROUTERS_PART}{name}": tuple(tensor.shape)
        for name, tensor in router.state_dict().items()
    }


def _whole_modules(config: MoELoraConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the tensors of `modules_to_save`, which the base model alone could check."""
    found: dict[str, tuple[int, ...]] = {}
    for module in config.modules_to_save or ():
        part = f".{module}."
        parameters = {
            name: shape
            for name, shape in shapes.items()
            if part in f".{name}" and EXPERTS_PART not in name and ROUTERS_PART not in name
        }
        found |= parameters or {f"{module}.weight": ()}
    return found


def _scaling(config: MoELoraConfig, path: str) -> float:
    r = config.rank_of(path)
    return config.alpha_of(path) / (r**0.5 if config.use_rslora else r)


def _width_of(layers: Mapping[str, LayerExperts]) -> int | None:
    # The layers that a model's input meets first, of transformers and of UNets.
    for path in ("x_embedder", "conv_in"):
        if path in layers:
            return layers[path].lora_A.shape[2]
    return None
