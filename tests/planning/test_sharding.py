from __future__ import annotations

import pytest
from tiny_models import tiny_flux
from torch import nn

from moe_lora import MoELoraConfig
from moe_lora.cli import main
from moe_lora.planning import plan_training
from moe_lora.planning.sharding import gathered_bytes

CONFIG = MoELoraConfig(r=4, target_modules=["to_q"])


def test_the_rest_and_two_blocks_are_gathered_with_their_gradients():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, 3)  # 9 numbers
            self.blocks = nn.ModuleList(
                nn.Linear(3, width) for width in (5, 10)
            )  # 40 in the larger

    model = Model().requires_grad_(False)
    assert gathered_bytes(model) == 4 * (9 + 2 * 40)
    model.blocks[1].weight.requires_grad_()  # 30 of the 40, and as many gradients
    assert gathered_bytes(model) == 4 * (9 + 2 * 70)
    assert gathered_bytes(model, 0.5) == 4 * (9 + 2 * 40)


def test_shards_divide_all_but_activations():
    whole = plan_training(tiny_flux(), CONFIG, base_precision="fp32")
    found = plan_training(tiny_flux(), CONFIG, base_precision="fp32", shards=4)
    for part in ("base", "adapter", "optimizer", "gradients", "optimizer_temporaries"):
        assert getattr(found, part) == getattr(whole, part) // 4
    assert found.trained_parameters == whole.trained_parameters
    assert found.checkpoint == whole.checkpoint
    assert whole.gathered == 0 < found.gathered
    constant = found.base + found.adapter + found.optimizer + found.gradients
    assert found.total == constant + max(found.gathered, found.optimizer_temporaries)
    assert "gathered shards" in str(found)
    assert "gathered shards" not in str(whole)


def test_cards_are_planned_with_settings_that_fsdp2_shards():
    found = plan_training(tiny_flux(), CONFIG, shards=2, cards=(24,))
    assert found.fits[24].base_precision == "bf16"
    assert found.fits[24].optimizer == "adamw"
    assert found.fits[24].memory == found.total


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_precision": "nf4"}, "in fp32 or bf16 .* but got 'nf4'"),
        ({"offload": True}, "with offloading"),
        ({"optimizer": "adamw_8bit"}, "without 8-bit states"),
        ({"shards": 0}, "at least 1, but got 0"),
    ],
)
def test_settings_that_cannot_be_sharded_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_training(tiny_flux(), CONFIG, **{"shards": 2, **settings})


def test_the_command_takes_shards(tmp_path, capsys):
    tiny_flux().save_config(tmp_path)
    assert main(["plan", str(tmp_path), "--shards", "2", "--target_modules", "to_q"]) == 0
    assert "gathered shards" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--shards", "2", "--base_precision", "nf4"]) == 1
    assert "Expected a base model in fp32 or bf16" in capsys.readouterr().err
