"""Module paths of the bare model, without wrappers and adapters around its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_CHECKPOINTED = "_checkpoint_wrapped_module"
# The path step from a wrapper to the wrapped module, by class of the wrapper. Steps with the class
# `nn.Module` are unique names, recognized in any module; the others only in the given class.
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
# Steps that wrappers remove from their state dicts.
_HIDDEN_STEPS = frozenset({"_fsdp_wrapped_module", _CHECKPOINTED})


def bare_path(path: str, model: nn.Module | None = None, *, known: Collection[str] = ()) -> str:
    """Return the path of a module in the bare model, before it was wrapped or adapted.

    Args:
        path: the path of a module, a parameter or a state dict's entry, relative to `model`.
        model: the root of the path. Without it, only unambiguous steps are removed: those of
            `torch.compile`, FSDP and activation checkpointing.
        known: without a model, the paths of the bare model; ambiguous steps are removed, too, if
            the result is one of these paths.

    Returns:
        The path without the steps into `torch.compile`, FSDP, DDP, `DataParallel` and activation
        checkpointing, and without the steps from adapted layers to their base layers.

    Example:
        >>> bare_path("0.module.weight", nn.Sequential(nn.DataParallel(nn.Linear(1, 1))))
        '0.weight'
        >>> bare_path("blocks.0._orig_mod.to_q")
        'blocks.0.to_q'
    """
    if model is None:
        return _shorten_to_known(_drop_steps(path, _WRAPPER_STEPS), known)
    steps: list[str] = []
    module: nn.Module | None = model
    for step in path.split("."):
        while module is not None and step not in module._modules:
            inside = inner_module(module)  # a wrapper that hides its step in state dicts
            if inside is None:
                break
            module = inside
        if not _leads_inside(module, step):
            steps.append(step)
        module = None if module is None else module._modules.get(step)
    return ".".join(steps)


def state_dict_path(path: str) -> str:
    """Return the path of a module in the model's state dict, without the steps that wrappers hide.

    Args:
        path: the path of the module in the model.
    """
    return _drop_steps(path, _HIDDEN_STEPS)


def bare_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the modules of the bare model and their wrappers, outermost first.

    A compiled and adapted layer yields the compiled, the adapted and the base layer, in this order,
    with the same bare path. Submodules of adapters are excluded.

    Args:
        model: the model, with or without wrappers and adapters.

    Yields:
        The path, the path in the bare model (as in checkpoints), and the module.

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
                deeper = bare if step == inside else join_path(bare, step)
                yield from walk(join_path(path, step), deeper, child)

    return walk("", "", model)


def bare_paths(model: nn.Module) -> set[str]:
    """Return the paths of all modules of the bare model; see `bare_modules`.

    Args:
        model: the model, with or without wrappers and adapters.
    """
    return {bare for _, bare, _ in bare_modules(model)}


def inner_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper or an adapted layer; `None` for any other module."""
    step = _step_inside(module)
    return None if step is None else module._modules[step]


def is_checkpoint_wrapper(module: nn.Module) -> bool:
    """Return whether a module is torch's wrapper for activation checkpointing."""
    return _CHECKPOINTED in module._modules


def join_path(path: str, step: str) -> str:
    """Return the path of a module's child."""
    return f"{path}.{step}" if path else step


def _step_inside(module: nn.Module) -> str | None:
    return next((step for step in module._modules if _leads_inside(module, step)), None)


def _leads_inside(module: nn.Module | None, step: str) -> bool:
    if step in _WRAPPER_STEPS:
        return True
    return any(isinstance(module, cls) and step == name for cls, name in _STEPS_INSIDE)


def _shorten_to_known(path: str, known: Collection[str]) -> str:
    shorter = path
    for step in _OTHER_STEPS:
        if shorter in known:
            return shorter
        shorter = _drop_steps(shorter, (step,))
    return shorter if shorter in known else path


def _drop_steps(path: str, steps: Collection[str]) -> str:
    return ".".join(step for step in path.split(".") if step not in steps)
