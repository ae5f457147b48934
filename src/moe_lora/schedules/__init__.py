"""What changes in the course of a training run: phases, warm-up, annealing, frozen parts."""

from moe_lora.schedules.annealing import Annealing
from moe_lora.schedules.model_settings import set_routing_temperature, set_trainable
from moe_lora.schedules.phases import Phase, Setting
from moe_lora.schedules.presets import STRATEGIES, strategy
from moe_lora.schedules.schedule import Schedule

__all__ = [
    "STRATEGIES",
    "Annealing",
    "Phase",
    "Schedule",
    "Setting",
    "set_routing_temperature",
    "set_trainable",
    "strategy",
]
