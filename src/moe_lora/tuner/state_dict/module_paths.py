"""Module paths of the bare model, whatever was wrapped around its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_CHECKPOINTED = "_checkpoint_wrapped_module"
# The step that leads inside a module of a class. Names with a class of `nn.Module` are those that
# no model has for itself; the others count only below the class that gives them.
_STEPS_INSIDE: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Module, "_orig_mod"),
    (nn.Module, "_fsdp_wrapped_module"),
    (nn.Module, _CHECKPOINTED),
    (BaseTunerLayer, "base_layer"),
    (AuxiliaryTrainingWrapper, "original_module"),
    (nn.DataParallel, "module"),
    (DistributedDataParallel, "module"),
    (AveragedModel, "module"),
)
_WRAPPER_STEPS = frozenset(step for cls, step in _STEPS_INSIDE if cls is nn.Module)
_OTHER_STEPS = tuple(dict.fromkeys(step for cls, step in _STEPS_INSIDE if cls is not nn.Module))
# Those that the state dicts of their wrappers are without.
_HIDDEN_STEPS = frozenset({"_fsdp_wrapped_module", _CHECKPOINTED})


def bare_path(path: str, model: nn.Module | None = None, *, known: Collection[str] = ()) -> str:
    """Return where a module was before wrappers and adapters were put around it and its parents.

    Args:
        path: of a module, a parameter or a state dict's entry, from `model` on.
        model: the module that the path starts at. Without it, the steps are left out that no model
            has a name for: those of `torch.compile`, FSDP and activation checkpointing.
        known: without a model, the bare paths of one; the steps that a model may have for itself
            are left out, too, where that makes the path one of these.

    Returns:
        The path without the steps into `torch.compile`, FSDP, DDP, `DataParallel` and activation
        checkpointing, and without those into the base layer of an adapted one.

    Example:
        >>> bare_path("0.module.weight", nn.Sequential(nn.DataParallel(nn.Linear(1, 1))))
        '0.weight'
        >>> bare_path("blocks.0._orig_mod.to_q")
        'blocks.0.to_q'
    """
    if model is None:
        return _known_path(_without(path, _WRAPPER_STEPS), known)
    kept: list[str] = []
    module: nn.Module | None = model
    for step in path.split("."):
        while module is not None and step not in module._modules:
            inside = inner_module(module)  # of a wrapper that its state dict does not show
            if inside is None:
                break
            module = inside
        if not _leads_inside(module, step):
            kept.append(step)
        module = None if module is None else module._modules.get(step)
    return ".".join(kept)


def state_dict_path(path: str) -> str:
    """Return where the state dict of a model has a module, without what wrappers hide in it.

    Args:
        path: of the module, from the model on.
    """
    return _without(path, _HIDDEN_STEPS)


def bare_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the modules of the bare model in all their forms, the outermost one first.

    A layer that is compiled and adapted comes as the compiled, the adapted and the base layer, one
    right after the other, under one bare path. What an adapter has inside does not come.

    Args:
        model: the model, with or without wrappers and adapters.

    Yields:
        The path, that in the bare model, under which checkpoints name a layer, and the module.

    Example:
        >>> model = nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))
        >>> [(path, bare) for path, bare, _ in bare_modules(model)]
        [('', ''), ('0', '0'), ('0.module', '0')]
    """
    seen: set[nn.Module] = set()

    def walk(path: str, bare: str, module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield path, bare, module
        inside = _step_inside(module)
        for step in module._modules if inside is None else (inside,):
            child = module._modules[step]
            if child is not None:
                deeper = bare if step == inside else joined(bare, step)
                yield from walk(joined(path, step), deeper, child)

    return walk("", "", model)


def bare_paths(model: nn.Module) -> set[str]:
    """Return the paths of all modules of the bare model; see `bare_modules`."""
    return {bare for _, bare, _ in bare_modules(model)}


def inner_module(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper or an adapted layer has inside; `None` for any other module."""
    step = _step_inside(module)
    return None if step is None else module._modules[step]


def is_checkpoint_wrapper(module: nn.Module) -> bool:
    """Tell whether a module is torch's wrapper that checkpoints another module's activations."""
    return _CHECKPOINTED in module._modules


def joined(path: str, step: str) -> str:
    """Return the path of a module's child."""
    return f"{path}.{step}" if path else step


def _step_inside(module: nn.Module) -> str | None:
    return next((step for step in module._modules if _leads_inside(module, step)), None)


def _leads_inside(module: nn.Module | None, step: str) -> bool:
    if step in _WRAPPER_STEPS:
        return True
    return any(isinstance(module, cls) and step == name for cls, name in _STEPS_INSIDE)


def _known_path(path: str, known: Collection[str]) -> str:
    shorter = path
    for step in _OTHER_STEPS:
        if shorter in known:
            return shorter
        shorter = _without(shorter, (step,))
    return shorter if shorter in known else path


def _without(path: str, steps: Collection[str]) -> str:
    return ".".join(step for step in path.split(".") if step not in steps)
