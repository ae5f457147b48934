"""Every public switch of PEFT and diffusers, with a mixture and two plain LoRAs in the model."""

from __future__ import annotations

from compatibility import diffusers_models, diffusers_pipelines, peft_switches
from compatibility.case import Case

CASES = [
    value
    for module in (diffusers_models, diffusers_pipelines, peft_switches)
    for value in vars(module).values()
    if isinstance(value, Case)
]
