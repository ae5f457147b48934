"""Module paths of the bare model, whatever was wrapped around its layers."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# What torch.compile, FSDP and torch's activation checkpointing and offloading call the module
# inside. No model has such a name for itself.
_WRAPPER_STEPS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Names that a model may have for itself: they count only below the class that gives them.
_STEPS_OF_CLASSES: tuple[tuple[type, str], ...] = (
    (BaseTunerLayer, "base_layer"),
    (AuxiliaryTrainingWrapper, "original_module"),
    (nn.DataParallel, "module"),
    (DistributedDataParallel, "module"),
    (AveragedModel, "module"),
)


def bare_path(path: str, model: nn.Module) -> str:
    """Return where a module was before wrappers and adapters were put around it and its parents.

    Args:
        path: of a module, a parameter or a state dict's entry, from `model` on.
        model: the module that the path starts at.

    Returns:
        The path without the steps into `torch.compile`, FSDP, DDP, `DataParallel` and activation
        checkpointing, and without those into the base layer of an adapted one.

    Example:
        >>> bare_path("0.module.weight", nn.Sequential(nn.DataParallel(nn.Linear(1, 1))))
        '0.weight'
    """
    kept: list[str] = []
    module: nn.Module | None = model
    for step in path.split("."):
        if not _leads_inside(module, step):
            kept.append(step)
        module = None if module is None else module._modules.get(step)
    return ".".join(kept)


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the bare model by their paths in it, each in its outermost form.

    A layer that is adapted comes as the adapted layer, a compiled one as the compiled one; what an
    adapter has inside does not come.

    Args:
        model: the model, with or without wrappers and adapters.

    Example:
        >>> [path for path, _ in bare_modules(nn.Sequential(nn.DataParallel(nn.Linear(1, 1))))]
        ['', '0']
    """
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        while (inside := inner_module(module)) is not None:
            module = inside
        for step, child in module._modules.items():
            if child is not None:
                yield from walk(f"{path}.{step}" if path else step, child)

    return walk("", model)


def inner_module(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper or an adapted layer has inside; `None` for any other module."""
    steps = (step for step in module._modules if _leads_inside(module, step))
    return next((module._modules[step] for step in steps), None)


def _leads_inside(module: nn.Module | None, step: str) -> bool:
    if step in _WRAPPER_STEPS:
        return True
    return any(isinstance(module, cls) and step == name for cls, name in _STEPS_OF_CLASSES)
