"""A small routed model, and threads that meet inside its forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any

import torch
from peft import get_peft_model
from stress.reference import Mixture, Reference, mixture_of
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig

WIDTH, TOKENS, EXPERTS = 6, 5, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).tanh())


class Net(nn.Module):
    """Blocks one after the other, with `between` called after the first."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.between: Callable[[Tensor], Tensor] = lambda x: x
        self.run: Callable[..., Tensor] = lambda block, x: block(x)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            hidden_states = self.run(block, hidden_states)
            if index == 0:
                hidden_states = self.between(hidden_states)
        return hidden_states


class ByMean(moe_lora.Router):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, EXPERTS)

    def logits(self, inputs: moe_lora.RouterInputs) -> Tensor:
        return self.linear(inputs.hidden_states.mean(1))


def adapt(model: nn.Module, *, routed: bool = True, seed: int = 1) -> nn.Module:
    """Adapt a toy model in place and return it, without PEFT's wrapper around it."""
    torch.manual_seed(seed)
    config = MoELoraConfig(
        r=2, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=False
    )
    adapted = get_peft_model(model, config).base_model.model
    if routed:
        router = ByMean()
        with torch.no_grad():
            router.linear.weight.mul_(10)
        moe_lora.attach_router(adapted, router)
    return adapted


def latents(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def rows(seed: int, batch: int = 2) -> Tensor:
    """Random routing weights `(B, E)`."""
    generator = torch.Generator().manual_seed(100 + seed)
    return (3 * torch.randn(batch, EXPERTS, generator=generator)).softmax(-1)


def decided(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the toy's router says of an input, by its formula."""
    (router,) = (module for module in model.modules() if isinstance(module, ByMean))
    return (x.mean(1) @ router.linear.weight.T + router.linear.bias).softmax(-1)


class Toy:
    """A toy model, adapted, and the reference of it."""

    def __init__(self, blocks: int = 2, *, routed: bool = True, seed: int = 1) -> None:
        base = Net(blocks)
        self.reference = Reference(base)
        self.model = adapt(base, routed=routed, seed=seed)

    def expected(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the reference's output; without weights, under those of the router."""
        weights = decided(self.model, x) if weights is None else weights
        return self.reference([self.mixture(weights)], x)

    def mixture(self, weights: Tensor) -> Mixture:
        return mixture_of(self.model, weights)

    def learned(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Run functions at once, each in a thread of its own, and return what they return."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
    errors = [error for future in futures if (error := future.exception()) is not None]
    # Where one fails, the others wait for it in vain: theirs is not the error to show.
    errors.sort(key=lambda error: isinstance(error, BrokenBarrierError))
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def meet(threads: int, *modules: nn.Module) -> Barrier:
    """Hold back every thread before the modules until all threads have arrived."""
    barrier = Barrier(threads, timeout=5)
    for module in modules:
        module.register_forward_pre_hook(lambda *_: void(barrier.wait()))
    return barrier


def void(_: object) -> None:
    """Return nothing: what a hook returns would replace the input."""


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


CLEAR = r"moe_lora|routing|Reentrant|use_reentrant"


def equal_or_clear_error(run: Callable[[], Any], expected: Any, clear: str = CLEAR) -> bool:
    """Check that a function returns what is expected, or raises an error that says what to do.

    Args:
        run: the function.
        expected: what it should return.
        clear: a pattern of the messages that say it.

    Returns:
        Whether it returned.
    """
    try:
        found = run()
    except (RuntimeError, ValueError) as error:
        if not re.search(clear, str(error)):
            raise
        return False
    assert_close(found, expected)
    return True
