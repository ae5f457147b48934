from __future__ import annotations

import pytest
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import moe_lora


def test_registering_twice_changes_nothing():
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    moe_lora.tuner.register()
    assert before == PEFT_TYPE_TO_TUNER_MAPPING
    assert PEFT_TYPE_TO_TUNER_MAPPING["MOE_LORA"] is moe_lora.MoELoraModel


def test_a_name_that_is_taken_raises(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, "MOE_LORA", "other_")
    with pytest.raises(RuntimeError, match="MOE_LORA"):
        moe_lora.tuner.register()
