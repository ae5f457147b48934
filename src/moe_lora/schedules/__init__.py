"""Training schedules: phases, loss warm-up, temperature annealing, frozen routers or experts.

A `Schedule` is a sequence of phases, each a `Phase`; `preset` builds the common ones by name.
"""

from moe_lora.schedules.annealing import Annealing
from moe_lora.schedules.model_settings import set_routing_temperature, set_trainable
from moe_lora.schedules.phases import Phase, Setting
from moe_lora.schedules.presets import PRESETS, preset
from moe_lora.schedules.schedule import Schedule

__all__ = [
    "PRESETS",
    "Annealing",
    "Phase",
    "Schedule",
    "Setting",
    "preset",
    "set_routing_temperature",
    "set_trainable",
]
