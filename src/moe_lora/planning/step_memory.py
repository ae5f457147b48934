"""The memory of one training step, followed operation by operation on tensors without values."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moe_lora.routing.control import route
from moe_lora.routing.lookup import routing_state


class StepMemory(NamedTuple):
    """Bytes that a training step allocates beside weights and optimizer state.

    Attributes:
        saved: the activations that the forward pass keeps for the backward pass.
        peak: the most that lives at any time of forward and backward pass, gradients included.
        gradients: the gradients at the end of the backward pass.
    """

    saved: int
    peak: int
    gradients: int


def step_memory(
    model: nn.Module, inputs: Mapping[str, Any], *, autocast: torch.dtype | None = None
) -> StepMemory:
    """Follow forward and backward pass of an adapted model, and sum what lives at every time.

    Nothing is computed: the passes run on fake tensors, so that a model on the meta device will do.
    Routing weights are uniform, of one row per sample, and require gradients where the model has a
    router; the router's own activations, some kilobytes, are not counted. The loss is the mean
    square of the output. Losses in pixel space, autoencoder and text encoders are not counted.

    Args:
        model: the adapted model, on any device; it is copied without its values. Activation
            checkpointing counts as it is switched.
        inputs: the arguments of the call by name; tensors of any device, whose values are not read.
        autocast: the dtype of mixed precision, if any.

    Raises:
        ValueError: for a model without an adapter, or one whose call needs values of its inputs.
    """
    state = routing_state(model)
    experts = len(next(iter(state.expert_names.values())))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = _without_values(model, mode)
    with mode:
        arguments = tree_map_only(Tensor, _empty_like, dict(inputs))
        batch = next(v.shape[0] for v in arguments.values() if isinstance(v, Tensor) and v.ndim > 1)
        weights = torch.full((batch, experts), 1 / experts, requires_grad=bool(state.routers))
        live = LiveMemory([*fake.parameters(), *fake.buffers(), *tree_leaves(arguments), weights])
        precision: AbstractContextManager[object] = nullcontext()
        if autocast is not None:
            precision = torch.autocast("cpu", dtype=autocast)
        try:
            with route(fake, weights), live:
                with precision:
                    output = _first_tensor(fake(**arguments))
                saved = live.bytes
                output.float().square().mean().backward()
                del output
        except torch._subclasses.fake_tensor.DataDependentOutputException as error:
            raise ValueError(
                f"Expected a call of {type(model).__name__} that reads no value of its inputs, "
                f"which have none here, but {error.func} does."
            ) from error
        gradients = sum(_bytes(p.grad) for p in fake.parameters() if p.grad is not None)
    return StepMemory(saved, live.peak, gradients)


class LiveMemory(TorchDispatchMode):
    """Count the bytes of all tensors that operations made and that are still alive.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.bytes = self.peak = 0
        self._sizes = {t.untyped_storage()._cdata: 0 for t in known if isinstance(t, Tensor)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count the memory of its results."""
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key, 0)


def _without_values(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy a model with fake tensors in the place of its parameters and buffers."""
    with mode:
        memo: dict[int, Any] = {id(buffer): _empty_like(buffer) for buffer in model.buffers()}
        for parameter in model.parameters():
            empty = nn.Parameter(_empty_like(parameter), requires_grad=parameter.requires_grad)
            memo[id(parameter)] = empty
    # Outside of the mode, which would copy the other tensors of a model as fake ones.
    return copy.deepcopy(model, memo)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _first_tensor(output: Any) -> Tensor:
    first: Tensor = next(leaf for leaf in _leaves(output) if isinstance(leaf, Tensor))
    return first


def _leaves(output: Any) -> list[Any]:
    # Outputs of diffusers and transformers are ordered dictionaries, unknown to pytree by default.
    return tree_leaves(tuple(output.values()) if isinstance(output, dict) else output)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
