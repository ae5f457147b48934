from __future__ import annotations

import pytest
import torch

from moe_lora.routing.routers import registry
from moe_lora.routing.routers.base import Router
from moe_lora.routing.routers.registry import register_router, router_class, router_names


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_ROUTERS", dict(registry._ROUTERS))


def make(name: str = "Mine", module: str = "somewhere") -> type[Router]:
    body = {
        "logits": lambda self, inputs: torch.zeros(inputs.batch_size, 2),
        "__module__": module,
        "__qualname__": name,
    }
    return type(name, (Router,), body)


def test_a_registered_class_is_found_by_name():
    cls = make()
    assert register_router("mine")(cls) is cls
    assert router_class("mine") is cls
    assert cls.registered_name == "mine"
    assert "mine" in router_names()
    assert list(router_names()) == sorted(router_names())


def test_a_reloaded_class_takes_its_own_name_again():
    register_router("mine")(make())
    reloaded = make()
    register_router("mine")(reloaded)
    assert router_class("mine") is reloaded


@pytest.mark.parametrize("other", [("Other", "somewhere"), ("Mine", "elsewhere")])
def test_another_class_may_not_take_a_name(other):
    held = make()
    register_router("mine")(held)
    with pytest.raises(
        ValueError, match="Expected a new router name, but 'mine' is already registered for"
    ):
        register_router("mine")(make(*other))
    assert router_class("mine") is held


def test_an_unknown_name_raises_and_lists_the_known():
    register_router("mine")(make())
    with pytest.raises(ValueError, match=r"Expected `router` to be one of \[.*'mine'.*got 'yours'"):
        router_class("yours")
