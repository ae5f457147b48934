"""The command `moe-lora`."""

from moe_lora.cli.main import main

__all__ = ["main"]
