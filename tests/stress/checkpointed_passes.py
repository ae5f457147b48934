"""Guises of activation checkpointing, and passes of a toy that run in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch._dynamo
from stress.toys import (
    EXPERTS,
    Block,
    Toy,
    latents,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import moe_lora

Call = Callable[[Tensor], Tensor]
kept = functools.partial(checkpoint, use_reentrant=False)
MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]


def without(model: nn.Module) -> Call:
    return model


def blocks(model: nn.Module) -> Call:
    model.run = kept
    return model


def reentrant(model: nn.Module) -> Call:
    model.run = functools.partial(checkpoint, use_reentrant=True)
    return model


def nested(model: nn.Module) -> Call:
    model.run = lambda block, x: kept(lambda h: kept(block, h), x)
    return model


def whole(model: nn.Module) -> Call:
    return lambda x: kept(model, x)


def whole_and_blocks(model: nn.Module) -> Call:
    return whole(blocks(model))


def selective(model: nn.Module) -> Call:
    contexts = functools.partial(create_selective_checkpoint_contexts, MATMULS)
    model.run = functools.partial(kept, context_fn=contexts)
    return model


def wrapper(model: nn.Module) -> Call:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torch_wrapper

    torch_wrapper.apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, Block)
    )
    return model


def routed(model: nn.Module) -> Call:
    function = moe_lora.routing.routed_checkpoint(model)
    model.run = functools.partial(function, use_reentrant=False)
    return model


def compiled(model: nn.Module) -> Call:
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return blocks(model)


GUISES = [blocks, nested, whole, whole_and_blocks, selective, wrapper, routed, reentrant, compiled]


class Passes:
    """Run passes of a toy, each with its own input, and its own weights or gradient mask."""

    def __init__(self, guise: Callable[[nn.Module], Call], kind: str) -> None:
        self.toy, self.kind = Toy(), kind
        self.model = self.toy.model
        self.call = guise(self.model)
        self.inputs = [latents(seed, batch=2).requires_grad_() for seed in range(3)]
        self.given = [
            w.requires_grad_()
            for w in torch.rand(3, 2, EXPERTS, generator=torch.Generator().manual_seed(7)).unbind()
        ]
        self.inner: list[Tensor] = []
        self.model.between = lambda h: self.inner.append(h) or h

    def __call__(self, index: int, x: Tensor | None = None) -> Tensor:
        with self._context(index):
            return self.call(self.inputs[index] if x is None else x)

    def loss(self, index: int) -> Tensor:
        return (1 + index) * self(index).square().mean()

    def gradients(self) -> list[Tensor]:
        leaves = [*self.toy.learned().values(), *self.inputs, *self.given]
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    @contextmanager
    def _context(self, index: int) -> Iterator[None]:
        kind, model = self.kind, self.model
        if kind == "switched":
            kind = ("router", "given", "uniform")[index]
        moe_lora.set_routing_mode(model, "uniform" if kind == "uniform" else "routed")
        if kind == "given":
            context = moe_lora.route(model, self.given[index].softmax(-1))
        elif kind == "hard":
            context = moe_lora.route(model, torch.eye(EXPERTS).roll(index, 0)[:2], top_k=1)
        elif kind == "masked":
            context = moe_lora.routing.teach_experts(model, torch.eye(EXPERTS).roll(index, 0)[:2])
        elif kind == "left out":
            names = model.peft_config["default"].expert_names
            context = moe_lora.ablation.ablate_expert(model, names[index])
        else:
            context = nullcontext()
        with context:
            yield
        moe_lora.set_routing_mode(model, "routed")


KINDS = ["router", "given", "hard", "masked", "left out", "switched"]
