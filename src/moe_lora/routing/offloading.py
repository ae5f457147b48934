"""Routers whose weights are kept elsewhere until their modules are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moe_lora.routing.weights.context import tensors_in


@contextmanager
def onloaded(router: nn.Module, model: nn.Module) -> Iterator[None]:
    """Have a router's weights in memory inside the context.

    Offloading hooks of diffusers and accelerate bring weights in when a module is called. For a
    router this may be the model, which it is asked before, or a module that it does not call, or
    has called already, and reads the weights of.

    Args:
        router: the router.
        model: the adapted model.
    """
    with _groups_onloaded(router, model), _modules_onloaded(router):
        yield


@contextmanager
def _groups_onloaded(router: nn.Module, model: nn.Module) -> Iterator[None]:
    """Bring in what diffusers' group offloading keeps away, and leave it in meanwhile."""
    around = (model, *model.children(), *router.modules())
    groups = [group for group in offload_groups(around) if _has(group, router)]
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
            if offload_leader is not model:  # which is called next, and puts it out
                group.offload_()


@contextmanager
def _modules_onloaded(router: nn.Module) -> Iterator[None]:
    """Bring in what accelerate keeps away, module by module, and leave it in meanwhile."""
    held: list[tuple[nn.Module, Any]] = []
    try:
        for module in router.modules():
            hook: Any = module.__dict__.get("_hf_hook")
            hooks: Sequence[Any] = getattr(hook, "hooks", (hook,))
            for one in hooks:
                if getattr(one, "offload", False) is True:
                    one.pre_forward(module)
                    one.offload = False
                    held.append((module, one))
        yield
    finally:
        for module, hook in held:
            hook.offload = True
            hook.post_forward(module, None)


def offload_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """List diffusers' groups of weights that come and go with any of the modules."""
    groups: dict[int, Any] = {}
    for module in modules:
        registry: Any = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            group = getattr(hook, "group", None)
            if group is not None:
                groups[id(group)] = group
    return list(groups.values())


def refuse_backward_from_disk(model: nn.Module, output: Any) -> None:
    """Raise in a backward pass that would read weights which are on disk again.

    diffusers leaves uninitialized memory in their place, without an error.

    Args:
        model: the adapted model.
        output: what a pass of it returned.
    """
    if not _is_on_disk(model):
        return

    def refuse(grad: Tensor) -> None:
        raise RuntimeError(
            "Expected no backward pass of a model that is offloaded to disk, where its weights are "
            "by then. Call enable_group_offload without `offload_to_disk_path` to train it."
        )

    for tensor in tensors_in(output):
        if tensor.requires_grad:
            tensor.register_hook(refuse)


def _is_on_disk(model: nn.Module) -> bool:
    # Every parameter belongs to some group: it is enough to look around the first one.
    name = next((name for name, _ in model.named_parameters()), "")
    around = [model]
    for step in name.split(".")[:-1]:
        around.append(around[-1].get_submodule(step))
    return any(group.offload_to_disk_path is not None for group in offload_groups(around))


def _has(group: Any, module: nn.Module) -> bool:
    wanted = {id(tensor) for tensor in _tensors(module)}
    held = [*group.parameters, *group.buffers]
    held += [tensor for member in group.modules for tensor in _tensors(member)]
    return any(id(tensor) in wanted for tensor in held)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
