"""What moe_lora notes in the header of a LoRA file."""

from __future__ import annotations

import json
from typing import Any

from moe_lora._version import __version__

METADATA_KEY = "moe_lora"


def header(**entries: Any) -> dict[str, str]:
    """Return what moe_lora notes in a file's metadata: JSON, with the library's version."""
    return {METADATA_KEY: json.dumps({"version": __version__, **entries})}
