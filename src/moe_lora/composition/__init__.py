"""Adding experts to a mixture, removing, renaming and freezing them."""

from moe_lora.composition.experts import add_expert, remove_expert, rename_expert
from moe_lora.composition.training import train_only

__all__ = ["add_expert", "remove_expert", "rename_expert", "train_only"]
