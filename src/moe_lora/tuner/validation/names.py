"""Names that become folders and parts of checkpoint keys."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from torch import nn

MAX_BYTES = 200
"""File systems take 255; temporary names are longer than the name that they stand for."""

_FORBIDDEN = frozenset('/\\:*?"<>|')
_DEVICES = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)))
)
_KEY_PARTS = frozenset(
    ("base_layer", "lora_A", "lora_B", "moe_router", "moe_lora_experts", "moe_lora_routers")
)


def file_name_problem(name: object) -> str | None:
    """Say why a name cannot be that of a folder on every system, or return `None`.

    Args:
        name: anything, as a config read from a file may hold it.

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
    """Check that every expert can have a folder of its own.

    Args:
        names: the experts in order.

    Raises:
        ValueError: for a name that is no file name, or two that differ at most in case.
    """
    folders: dict[str, str] = {}
    for name in names:
        problem = file_name_problem(name)
        if problem is not None:
            raise ValueError(
                f"Expected each of `expert_names` to be the name of a folder, {problem}, but got "
                f"{_shown(name)}."
            )
        assert isinstance(name, str)
        folder = unicodedata.normalize("NFKC", name).casefold()
        if folder in folders:
            raise ValueError(
                f"Expected distinct `expert_names`, apart from case too, but got "
                f"{folders[folder]!r} and {name!r}."
            )
        folders[folder] = name


def check_adapter_name(name: object) -> None:
    """Check that an adapter's name can be a part of a module's path, and of a file's.

    PEFT makes a folder of the name in `save_pretrained`, and a submodule of it in every layer.

    Args:
        name: the adapter's name.

    Raises:
        ValueError: for a name that is no file name, has a dot, or is taken in the layers.
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
            f"Expected `adapter_name` to be a name {problem}, but got {_shown(name)}. Choose "
            "another `adapter_name`."
        )


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:80]}…"
