"""Default layers to adapt, for `target_modules=None`."""

from __future__ import annotations

from collections import Counter

from torch import nn

from moe_lora.families.registry import FAMILIES, family_of


def default_targets(model: nn.Module) -> set[str] | str:
    """Return the default layers to adapt, for `target_modules=None`.

    Args:
        model: a model of a family with default targets.

    Returns:
        Name endings, or a regex, as for PEFT's `target_modules`.

    Raises:
        ValueError: when the model's family is unknown, or has no default targets.

    Example:
        >>> class SD3Transformer2DModel(nn.Module): ...
        >>> sorted(default_targets(SD3Transformer2DModel()))[-4:]
        ['to_k', 'to_out.0', 'to_q', 'to_v']
    """
    targets = family_of(model).targets
    if targets is None:
        known = sorted(name for family in FAMILIES if family.targets for name in family.classes)
        raise ValueError(
            f"Expected `target_modules` to name the layers to adapt in {type(model).__name__}, "
            f"which has no default (there are defaults for {', '.join(known)}). "
            f"{_format_candidates(candidate_targets(model))}"
        )
    return targets if isinstance(targets, str) else set(targets)


def candidate_targets(model: nn.Module, limit: int = 20) -> dict[str, int]:
    """Count the name endings of a model's linear layers, the most frequent first.

    Args:
        model: any model.
        limit: the maximal number of endings.

    Returns:
        The number of layers by ending; every ending is a valid entry of `target_modules`.

    Example:
        >>> candidate_targets(nn.ModuleDict({"to_q": nn.Linear(1, 1), "act": nn.ReLU()}))
        {'to_q': 1}
    """
    endings = (
        _ending(path) for path, module in model.named_modules() if isinstance(module, nn.Linear)
    )
    return dict(Counter(ending for ending in endings if ending).most_common(limit))


def _ending(path: str) -> str:
    parts = path.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])


def _format_candidates(candidates: dict[str, int]) -> str:
    if not candidates:
        return "The model has no linear layer."
    found = ", ".join(f"{ending} ({count})" for ending, count in candidates.items())
    return f"Candidates, with the number of linear layers: {found}."
