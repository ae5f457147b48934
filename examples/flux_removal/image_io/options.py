"""The options of reading images and masks, for training and removal alike."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from PIL import ImageColor

from options.routing_options import option


@dataclass(kw_only=True)
class ReadingOptions:
    """Say how images and masks are read."""

    background: str | None = option(
        None, "Color behind transparent pixels, as a name or #rrggbb; white by default."
    )
    mask_label: int | None = option(
        None, "Label of the object in the mask: palette index, pixel value, or COCO category."
    )
    invert_mask: bool = option(False, "Invert masks, for files in which black means remove.")
    grow_mask: int = option(0, "Pixels by which masks are extended.")
    resize_mask: bool = option(False, "Scale masks to the size of their images.")
    threshold_mask: bool = option(False, "Threshold masks with gray areas at half.")

    def check_reading(self) -> None:
        """Raise for values that cannot be honored."""
        try:
            ImageColor.getrgb(self.background or "white")
        except ValueError as error:
            raise ValueError(
                f"Expected `background` to be a color such as black or #808080, but got "
                f"{self.background!r}."
            ) from error
        if self.grow_mask < 0:
            raise ValueError(f"Expected `grow_mask` to be >= 0, but got {self.grow_mask}.")
        if self.mask_label is not None and self.mask_label < 0:
            raise ValueError(f"Expected `mask_label` to be >= 0, but got {self.mask_label}.")
        if self.mask_label is not None and self.threshold_mask:
            raise ValueError(
                "Expected either `mask_label` or `threshold_mask`: a label needs no threshold."
            )


def add_reading_flags(
    parser: argparse.ArgumentParser, options: type[ReadingOptions] = ReadingOptions
) -> None:
    """Add a flag for each of the options."""
    hints = get_type_hints(options)
    for field in fields(options):
        hint, default = hints[field.name], field.default
        kind: dict[str, Any] = {"default": default, "type": (get_args(hint) or (hint,))[0]}
        if hint is bool:
            kind = {"action": "store_true"}
        elif get_origin(hint) is Literal:
            kind = {"default": default, "choices": get_args(hint)}
        parser.add_argument(f"--{field.name}", help=field.metadata["help"], **kind)


Kind = TypeVar("Kind", bound=ReadingOptions)


def options_from(args: argparse.Namespace, kind: type[Kind]) -> Kind:
    """Return the options that the flags name.

    Raises:
        ValueError: when they cannot be honored.
    """
    options = kind(**{field.name: getattr(args, field.name) for field in fields(kind)})
    options.check_reading()
    return options


def reading_options(args: argparse.Namespace) -> ReadingOptions:
    """Return the options of reading that the flags name.

    Raises:
        ValueError: when they cannot be honored.
    """
    return options_from(args, ReadingOptions)
