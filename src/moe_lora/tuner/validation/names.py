"""Validation of names that are used for folders and in checkpoint keys."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from torch import nn

MAX_BYTES = 200
"""Limit for names: file systems allow 255 bytes, and temporary names are longer."""

_FORBIDDEN = frozenset('/\\:*?"<>|')
_DEVICES = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)))
)
_KEY_PARTS = frozenset(
    ("base_layer", "lora_A", "lora_B", "moe_router", "moe_lora_experts", "moe_lora_routers")
)


def file_name_problem(name: object) -> str | None:
    """Return the requirement for folder names on every system that a name does not meet, if any.

    Args:
        name: any value, for example from a config file.

    Returns:
        The requirement in words; `None` for a valid name.

    Example:
        >>> file_name_problem("removal_expert") is None, file_name_problem("")
        (True, 'a non-empty string')
    """
    if not isinstance(name, str) or not name:
        return "a non-empty string"
    if not name.isprintable():
        return "of printable characters"
    if _FORBIDDEN.intersection(name):
        return 'without any of /\\:*?"<>|'
    if name != name.strip() or name.startswith(".") or name.endswith("."):
        return "without a space or dot at either end"
    if name.split(".")[0].rstrip().casefold() in _DEVICES:
        return "other than a device of Windows"
    if len(name.encode()) > MAX_BYTES:
        return f"of at most {MAX_BYTES} bytes"
    return None


def check_expert_names(names: Sequence[object]) -> None:
    """Check that the names of experts are valid, distinct folder names.

    Args:
        names: the experts in order.

    Raises:
        ValueError: for an invalid folder name, or two names that differ at most in case.
    """
    folders: dict[str, str] = {}
    for name in names:
        problem = file_name_problem(name)
        if problem is not None:
            raise ValueError(
                f"Expected each of `expert_names` to be the name of a folder, {problem}, but got "
                f"{_abbreviated(name)}."
            )
        assert isinstance(name, str)
        folder = unicodedata.normalize("NFKC", name).casefold()
        if folder in folders:
            raise ValueError(
                f"Expected distinct `expert_names`, ignoring case, but got {folders[folder]!r} and "
                f"{name!r}."
            )
        folders[folder] = name


def check_adapter_name(name: object) -> None:
    """Check that an adapter's name is valid in module paths and as a folder.

    PEFT creates a folder with this name in `save_pretrained`, and a submodule in every layer.

    Args:
        name: the adapter's name.

    Raises:
        ValueError: for an invalid folder name, a name with a dot, or an attribute of the layers.
    """
    problem = file_name_problem(name)
    if problem is None:
        assert isinstance(name, str)
        if "." in name:
            problem = "without a dot"
        elif name in _KEY_PARTS or hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
            problem = "other than an attribute of the adapted layers"
    if problem is not None:
        raise ValueError(
            f"Expected `adapter_name` to be a name {problem}, but got {_abbreviated(name)}. Choose "
            "another `adapter_name`."
        )


def _abbreviated(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:80]}…"
