from __future__ import annotations

import inspect

from moe_lora import MoELoraConfig
from moe_lora.losses import RemovalLoss
from moe_lora.losses.expert_table import EXPERT_OF_LOSS, LOSS_COMPONENTS, SPECIALIZED_LOSSES


def test_the_experts_are_those_of_a_configuration_in_its_order() -> None:
    config = MoELoraConfig(target_modules=["linear"])
    assert tuple(EXPERT_OF_LOSS.values()) == tuple(config.expert_names)


def test_the_components_are_the_weights_of_the_removal_loss() -> None:
    assert tuple(RemovalLoss().weights) == LOSS_COMPONENTS
    assert tuple(inspect.signature(RemovalLoss).parameters)[:4] == LOSS_COMPONENTS
    assert ("base", *SPECIALIZED_LOSSES) == LOSS_COMPONENTS
