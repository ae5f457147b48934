"""What changes in the course of a training run: phases, warm-up, annealing, frozen parts."""

from moe_lora.schedules.annealing import Annealing
from moe_lora.schedules.phases import Phase, Setting
from moe_lora.schedules.schedule import Schedule
from moe_lora.schedules.steering import set_routing_temperature, set_trainable
from moe_lora.schedules.strategies import STRATEGIES, strategy

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
