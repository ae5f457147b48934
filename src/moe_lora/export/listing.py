"""Lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(names: Sequence[str], count: int = 5) -> str:
    """Return the first few names of a list, and how many more there are.

    Args:
        names: the list.
        count: how many are shown.

    Example:
        >>> first_few(["a", "b", "c"], 2)
        "'a', 'b' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
