from __future__ import annotations

import copy

import torch

from moe_lora.handover import WeightSlot


def test_the_stamp_changes_with_the_weights_only():
    slot, w = WeightSlot(), torch.rand(2, 3)
    stamps = []
    for weights in ({}, {"a": w}, {"a": w}, {"a": w.clone()}, {}, {}):
        slot.put(weights)
        stamps.append(int(slot.stamp))
    assert stamps == [0, 1, 1, 2, 3, 3]


def test_a_snapshot_is_held_inside_the_context_only():
    slot = WeightSlot()
    slot.put({"a": torch.zeros(1, 3)})
    snapshot = slot.snapshot()
    slot.put({"a": torch.ones(1, 3)})
    with slot.restored(snapshot):
        assert slot.weights["a"].sum() == 0
        assert int(slot.stamp) == 1
    assert slot.weights["a"].sum() == 3
    assert int(slot.stamp) == 2


def test_a_copy_starts_empty():
    slot = WeightSlot()
    slot.put({"a": torch.rand(1, 3, requires_grad=True).softmax(-1)})
    assert copy.deepcopy(slot).weights == {}
    assert slot.weights
