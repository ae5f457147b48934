"""Routers under the offloading hooks of diffusers and accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moe_lora.routing.weights.context import iter_output_tensors


@contextmanager
def onloaded(router: nn.Module, model: nn.Module) -> Iterator[None]:
    """Onload a router's weights inside the context.

    Offloading hooks of diffusers and accelerate onload weights when a module is called. For a
    router, this call may come too late (the model's own call), or never (a router may read the
    weights of a submodule without calling it), and the weights may be offloaded too early.

    Args:
        router: the router.
        model: the adapted model.
    """
    with _groups_onloaded(router, model), _modules_onloaded(router):
        yield


@contextmanager
def _groups_onloaded(router: nn.Module, model: nn.Module) -> Iterator[None]:
    """Onload the groups of diffusers' group offloading, and keep them until the context ends."""
    around = (model, *model.children(), *router.modules())
    groups = [group for group in offload_groups(around) if _group_contains(group, router)]
    leaders = [(group, group.onload_leader, group.offload_leader) for group in groups]
    try:
        for group in groups:
            group.onload_()
            if group.stream is not None:
                group.stream.synchronize()
            group.onload_leader = group.offload_leader = router
        yield
    finally:
        for group, onload_leader, offload_leader in leaders:
            group.onload_leader, group.offload_leader = onload_leader, offload_leader
            if offload_leader is not model:  # the model's call comes next and offloads its groups
                group.offload_()


@contextmanager
def _modules_onloaded(router: nn.Module) -> Iterator[None]:
    """Onload the modules of accelerate's offloading, and keep them until the context ends."""
    onloaded_hooks: list[tuple[nn.Module, Any]] = []
    try:
        for module in router.modules():
            hook: Any = module.__dict__.get("_hf_hook")
            hooks: Sequence[Any] = getattr(hook, "hooks", (hook,))
            for one in hooks:
                if getattr(one, "offload", False) is True:
                    one.pre_forward(module)
                    one.offload = False
                    onloaded_hooks.append((module, one))
        yield
    finally:
        for module, hook in onloaded_hooks:
            hook.offload = True
            hook.post_forward(module, None)


def offload_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """List diffusers' offloading groups of the modules.

    Args:
        modules: the modules whose own hooks are read.
    """
    groups: dict[int, Any] = {}
    for module in modules:
        registry: Any = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            group = getattr(hook, "group", None)
            if group is not None:
                groups[id(group)] = group
    return list(groups.values())


def forbid_backward_from_disk(model: nn.Module, output: Any) -> None:
    """Make the backward pass raise when the model's weights are offloaded to disk.

    diffusers would compute it with uninitialized memory, without an error.

    Args:
        model: the adapted model.
        output: the output of a pass of the model.
    """
    if not _is_on_disk(model):
        return

    def refuse(grad: Tensor) -> None:
        raise RuntimeError(
            "Cannot run the backward pass of a model that is offloaded to disk: its weights are no "
            "longer in memory. Call enable_group_offload without `offload_to_disk_path` to train."
        )

    for tensor in iter_output_tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(refuse)


def _is_on_disk(model: nn.Module) -> bool:
    # Every parameter belongs to a group, so the modules around the first parameter are enough.
    name = next((name for name, _ in model.named_parameters()), "")
    around = [model]
    for step in name.split(".")[:-1]:
        around.append(around[-1].get_submodule(step))
    return any(group.offload_to_disk_path is not None for group in offload_groups(around))


def _group_contains(group: Any, module: nn.Module) -> bool:
    wanted = {id(tensor) for tensor in _tensors(module)}
    tensors = [*group.parameters, *group.buffers]
    tensors += [tensor for member in group.modules for tensor in _tensors(member)]
    return any(id(tensor) in wanted for tensor in tensors)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
