"""What a training needs: parameters, memory by part, disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import inject_adapter_in_model
from torch import nn

from moe_lora.planning.sharding import check_shards, gathered_bytes
from moe_lora.planning.step_memory import step_memory
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.config import MoELoraConfig

GIB = 2**30
RANKS = (256, 128, 64, 32, 16, 8, 4)
HEADROOM = GIB  # the CUDA context, and what allocators leave unused


class Optimizer(NamedTuple):
    """Bytes that an optimizer needs per trained parameter in float32.

    Attributes:
        state: what it keeps between steps.
        temporary: what it allocates beside the gradients during a step.
    """

    state: float
    temporary: float


OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(
    {
        # exp_avg and exp_avg_sq; the default of CUDA takes a list of square roots at once.
        "adamw": Optimizer(8, 4),
        "adamw_fused": Optimizer(8, 0),
        # 8-bit moments in blocks of 256 with one float32 each (bitsandbytes).
        "adamw_8bit": Optimizer(2 + 2 * 4 / 256, 0),
        "prodigy": Optimizer(16, 4),  # two moments, the sum s and the first weights
        "schedule_free": Optimizer(8, 4),  # z and exp_avg_sq
        "sgd": Optimizer(0, 0),
    }
)
"""Optimizers by name."""

PRECISIONS: Mapping[str, float] = MappingProxyType(
    {
        "fp32": 4.0,
        "bf16": 2.0,
        "fp8": 1.0,
        "int8": 1.0,
        "nf4": 0.5 + 4 / 64,  # one float32 for every 64 weights
    }
)
"""Bytes per weight of a base model's linear layers, by name; others stay in the model's dtype."""


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes and parameters of a training, by part; see `plan_training`.

    Args:
        trained_parameters: experts and router.
        layers: the adapted layers.
        base: weights of the base model, and the largest of those that a layer makes anew or copies
            to compute with.
        adapter: weights of experts and router.
        optimizer: the optimizer's state.
        gradients: of the trained parameters.
        activations: what lives beside the other parts at the peak of forward and backward pass;
            `None` where no call of the model is known.
        optimizer_temporaries: what a step of the optimizer allocates, after the backward pass.
        gathered: weights and gradients that a process holds beside its shard; 0 without sharding.
        adapter_file: the saved adapter.
        checkpoint: the saved adapter and optimizer state, to resume from.
        fits: what fits a card, by its memory in GiB; see `Fit`.
    """

    trained_parameters: int
    layers: int
    base: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int | None
    optimizer_temporaries: int
    gathered: int
    adapter_file: int
    checkpoint: int
    fits: Mapping[int, Fit | None]

    @property
    def total(self) -> int:
        """Return the peak of memory, without the activations where these are unknown."""
        constant = self.base + self.adapter + self.optimizer + self.gradients
        return constant + max((self.activations or 0) + self.gathered, self.optimizer_temporaries)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers by name, for JSON."""
        return {**asdict(self), "total": self.total, "fits": _plain(self.fits)}

    def __str__(self) -> str:
        rows = {
            "base model": _gib(self.base),
            "experts and router": _gib(self.adapter),
            "optimizer state": _gib(self.optimizer),
            "gradients": _gib(self.gradients),
            "activations": "unknown" if self.activations is None else _gib(self.activations),
            "optimizer step": _gib(self.optimizer_temporaries),
            **({"gathered shards": _gib(self.gathered)} if self.gathered else {}),
            "memory at the peak": _gib(self.total),
            "adapter file": _gib(self.adapter_file),
            "checkpoint": _gib(self.checkpoint),
        }
        lines = [f"{self.trained_parameters:,} trained parameters in {self.layers} layers"]
        lines += [f"{name:<20}{value:>14}" for name, value in rows.items()]
        for card, fit in self.fits.items():
            lines.append(f"{f'fits {card} GiB':<20}  {fit or 'nothing with these layers'}")
        return "\n".join(lines)


class Fit(NamedTuple):
    """A setting that fits a card.

    Attributes:
        base_precision: of the base model.
        r: rank of each expert.
        optimizer: name of the optimizer.
        memory: bytes.
        offload: whether linear layers of the base model's blocks are in CPU memory.
        checkpointing: whether the blocks' activations are computed again.
    """

    base_precision: str
    r: int
    optimizer: str
    memory: int
    offload: bool = False
    checkpointing: bool = True

    def __str__(self) -> str:
        settings = [f"{self.base_precision} base", f"r={self.r}", self.optimizer]
        settings += ["offload"] * self.offload + ["checkpointing"] * self.checkpointing
        return f"{', '.join(settings)}: {_gib(self.memory)}"


def plan_training(
    model: nn.Module,
    config: MoELoraConfig,
    call: Mapping[str, Any] | None = None,
    *,
    base_precision: str = "bf16",
    optimizer: str = "adamw",
    checkpointing: bool = True,
    offload: bool = False,
    shards: int = 1,
    cards: tuple[int, ...] = (24, 48, 80),
) -> TrainingPlan:
    """Compute what a training needs, without memory for any weight.

    Experts, router, gradients and optimizer state are float32, as `cast_training_params` of
    diffusers makes them. Counted is one process. Autoencoder, text encoders and losses in pixel
    space are not counted.

    Args:
        model: the base model, on any device (`model_on_meta`); it stays as it is.
        config: the adapter's configuration.
        call: arguments of a training call by name (`example_call`); without them activations are
            unknown.
        base_precision: a name of `PRECISIONS`.
        optimizer: a name of `OPTIMIZERS`.
        checkpointing: whether the blocks' activations are computed again in the backward pass.
        offload: whether the linear layers of the base model's blocks, the modules in an
            `nn.ModuleList`, are in CPU memory, and copied one at a time.
        shards: number of processes over which FSDP2 shards weights, gradients and optimizer state.
            Each of the blocks and the rest of the model are gathered as one; at the peak these are
            the rest and two blocks, with the gradients of two blocks.
        cards: memory of cards in GiB. For each, the best base precision and the highest rank that
            fit are named, with the activations of the given rank and 1 GiB left free. Offloading
            is tried after all precisions.

    Raises:
        ValueError: for an unknown precision or optimizer, for shards of a quantized or offloaded
            base model or of 8-bit optimizers, and as injection and `step_memory` raise.
    """
    for name, known in ((base_precision, PRECISIONS), (optimizer, OPTIMIZERS)):
        if name not in known:
            raise ValueError(f"Expected one of {list(known)}, but got {name!r}.")
    check_shards(shards, base_precision, optimizer, offload)
    adapted = _adapted_on_meta(model, config, checkpointing)
    step = None if call is None else step_memory(adapted, call, autocast=_autocast(model))
    layers = [module for module in adapted.modules() if isinstance(module, RoutedLayer)]
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)

    def plan(parameters: int, precision: str, name: str, away: bool) -> TrainingPlan:
        uses = OPTIMIZERS[name]
        return TrainingPlan(
            trained_parameters=parameters,
            layers=len(layers),
            base=base_bytes(model, precision, offload=away) // shards,
            adapter=4 * parameters // shards,
            optimizer=int(uses.state * parameters / shards),
            gradients=4 * parameters // shards,
            activations=None if step is None else max(step.peak - step.gradients, 0),
            optimizer_temporaries=int(uses.temporary * parameters / shards),
            gathered=gathered_bytes(adapted, parameters / trained) if shards > 1 else 0,
            adapter_file=4 * parameters,
            checkpoint=4 * parameters + int(uses.state * parameters),
            fits={},
        )

    per_rank = sum(len(config.experts) * (_width(m) + m.out_features) for m in layers)
    router = trained - sum(p.numel() for m in layers for p in m.moe_lora_experts.parameters())
    fits: dict[int, Fit | None] = dict.fromkeys(cards)
    settings = _settings(config.r, optimizer) if shards == 1 else _shardable(config.r, optimizer)
    for r, (precision, away), name in settings:
        memory = plan(per_rank * r + router, precision, name, away).total
        for card in cards:
            if fits[card] is None and memory + HEADROOM <= card * GIB:
                fits[card] = Fit(precision, r, name, memory, away, checkpointing)
    return replace(plan(trained, base_precision, optimizer, offload), fits=fits)


def _settings(r: int, optimizer: str) -> list[tuple[int, tuple[str, bool], str]]:
    """List ranks, precisions with or without offloading, and optimizers, best first."""
    ranks = [rank for rank in RANKS if rank <= r] or [r]
    bases = [("bf16", False), ("int8", False), ("nf4", False), ("bf16", True)]
    optimizers = dict.fromkeys((optimizer, "adamw_8bit"))
    return [(k, base, o) for k in ranks for base in bases for o in optimizers]


def _shardable(r: int, optimizer: str) -> list[tuple[int, tuple[str, bool], str]]:
    return [
        (rank, base, name)
        for rank, base, name in _settings(r, optimizer)
        if base == ("bf16", False) and name == optimizer
    ]


def _adapted_on_meta(model: nn.Module, config: MoELoraConfig, checkpointing: bool) -> nn.Module:
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    adapted = copy.deepcopy(model, memo)
    config = copy.deepcopy(config)
    config.inference_mode = False
    with torch.device("meta"):
        inject_adapter_in_model(config, adapted, "default")
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    switch = getattr(adapted, "enable_gradient_checkpointing", None)
    if (
        checkpointing
        and switch is not None
        and getattr(adapted, "_supports_gradient_checkpointing", True)
    ):
        adapted.train()
        switch()
    return adapted


def base_bytes(model: nn.Module, precision: str, *, offload: bool = False) -> int:
    """Return the bytes of a base model's weights on a device.

    Args:
        model: the base model, on any device.
        precision: of the linear layers; a name of `PRECISIONS`.
        offload: whether those of blocks are in CPU memory.

    Returns:
        All weights on the device, with the largest one that a layer makes in the model's dtype.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    away = {
        id(parameter)
        for block in blocks
        for layer in block.modules()
        if offload and isinstance(layer, nn.Linear)
        for parameter in layer.parameters(recurse=False)
    }
    stays, made = 0.0, 0.0
    for p in model.parameters():
        stored = PRECISIONS[precision] if id(p) in linear else p.element_size()
        stays += 0 if id(p) in away else stored * p.numel()
        if id(p) in away or (id(p) in linear and stored != p.element_size()):
            copied = stored if id(p) in away and stored != p.element_size() else 0
            made = max(made, (p.element_size() + copied) * p.numel())
    return int(stays + made)


def _autocast(model: nn.Module) -> torch.dtype | None:
    dtype = next(model.parameters()).dtype
    return None if dtype == torch.float32 else dtype


def _width(layer: RoutedLayer) -> int:
    return int(torch.Size(layer.in_shape).numel())


def _gib(value: int) -> str:
    return f"{value / GIB:.3f} GiB"


def _plain(fits: Mapping[int, Fit | None]) -> dict[int, dict[str, Any] | None]:
    return {card: None if fit is None else fit._asdict() for card, fit in fits.items()}
