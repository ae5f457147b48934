"""Inspecting and exporting refuse what `load_adapter` refuses, in the same words."""

from __future__ import annotations

import re

import pytest
from corrupt_checkpoints import FAULTS, config, edit_config, edit_weights
from peft import get_peft_model

from moe_lora import save_adapter
from moe_lora.cli import main

# The base model alone knows the parameters of the modules that are trained whole.
NEED_THE_BASE_MODEL = {"missing head", "unexpected key"}
OTHER_WORDS = {
    ("no folder", "inspect"): "Expected a checkpoint or a plain LoRA at",
    ("unknown router", "inspect"): "its `router` is 'nobody' and was 'faults'",
    ("unknown router", "export"): "its `router` is 'nobody' and was 'faults'",
}


@pytest.fixture
def checkpoint(make_mlp, tmp_path):
    return save_adapter(get_peft_model(make_mlp(), config()), tmp_path / "good")


@pytest.mark.parametrize("command", [["inspect"], ["export", "--weights", "uniform"]])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in NEED_THE_BASE_MODEL])
def test_a_corrupt_checkpoint_is_refused(checkpoint, tmp_path, capsys, fault, command):
    spoil, message = FAULTS[fault]
    message = OTHER_WORDS.get((fault, command[0]), message)
    spoil(checkpoint)
    out = [str(tmp_path / "out")] if command[0] == "export" else []
    assert main([command[0], str(checkpoint), *out, *command[1:]]) == 1
    told = capsys.readouterr()
    assert re.search(message, told.err)
    assert told.err.count("\n") == 1
    assert not told.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", sorted(NEED_THE_BASE_MODEL))
def test_what_the_files_alone_cannot_tell_is_inspected(checkpoint, fault):
    FAULTS[fault][0](checkpoint)
    assert main(["inspect", str(checkpoint)]) == 0


def test_experts_are_exported_where_their_router_is_not_registered(make_mlp, tmp_path):
    model = get_peft_model(make_mlp(), config(modules_to_save=None))
    folder = save_adapter(model, tmp_path / "saved")
    edit_weights(folder, lambda tensors: None)  # without the config in the header
    edit_config(folder, router="nobody")
    assert main(["inspect", str(folder)]) == 0
    assert main(["export", str(folder), str(tmp_path / "out"), "--weights", "uniform"]) == 0
