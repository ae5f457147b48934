"""Memory and disk that a training needs, computed before any weight is loaded."""

from moe_lora.planning.base_models import example_call, model_on_meta
from moe_lora.planning.step_memory import StepMemory, step_memory
from moe_lora.planning.training_plan import (
    OPTIMIZERS,
    PRECISIONS,
    Fit,
    TrainingPlan,
    plan_training,
)

__all__ = [
    "OPTIMIZERS",
    "PRECISIONS",
    "Fit",
    "StepMemory",
    "TrainingPlan",
    "example_call",
    "model_on_meta",
    "plan_training",
    "step_memory",
]
