"""The layouts of LoRA files: one reader for all of them, one writer for each."""

from typing import Literal

Format = Literal["diffusers", "peft", "kohya"]
"""The layouts that are written."""

Layout = Format | Literal["original"]
"""The layouts that are read; "original" has the dotted names of a model's own code."""

__all__ = ["Format", "Layout"]
