"""Training some experts: the others stay to the last bit, whatever trains and saves the model."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig, Router
from moe_lora.losses import RemovalLoss
from moe_lora.schedules import Phase, Schedule, set_trainable


def experts_of(model: nn.Module) -> dict[str, Any]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return moe_lora.export.expert_table.experts_by_layer(base, "default")


def values(model: nn.Module, index: int) -> list[Tensor]:
    return [t.clone() for e in experts_of(model).values() for t in e.expert(index)]


def router_values(model: nn.Module) -> list[Tensor]:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return [p.detach().clone() for router in routers for p in router.parameters()]


def all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def none_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def library(name: str, cls: str, **options: Any) -> Callable[[list[nn.Parameter]], Any]:
    def make(parameters: list[nn.Parameter]) -> Any:
        pytest.importorskip(name)
        return getattr(importlib.import_module(name), cls)(parameters, **options)

    return make


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.5, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, weight_decay=0.5),
    "schedulefree": library("schedulefree", "AdamWScheduleFree", lr=1e-2, weight_decay=0.5),
    "prodigy": library("prodigyopt", "Prodigy", weight_decay=0.5),
    "8-bit": library("bitsandbytes.optim", "AdamW8bit", lr=1e-2, weight_decay=0.5),
}


def fit(
    model: nn.Module, images: Tensor, make_optimizer: Callable[..., Any], steps: int = 3
) -> None:
    optimizer = make_optimizer(trained(model))
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        model(images).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    if hasattr(optimizer, "eval"):
        optimizer.eval()


@pytest.mark.parametrize("router", [True, False])
@pytest.mark.parametrize("chosen", [["b"], ["a", "c"], []])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_frozen_experts_stay_to_the_last_bit(make_model, images, name, chosen, router):
    model = make_model()
    if not chosen and not router:
        with pytest.raises(ValueError, match="got none"):
            moe_lora.train_only(model, chosen, router=router)
        return
    expected = model(images)
    moe_lora.train_only(model, chosen, router=router)
    assert torch.equal(model(images), expected)
    before = [values(model, index) for index in range(3)]
    of_router = router_values(model)
    # A phase that trained everything before leaves gradients, and so momenta, of all experts.
    fit(model, images, OPTIMIZERS[name])
    for index, expert in enumerate("abc"):
        compare = none_equal if expert in chosen else all_equal
        assert compare(values(model, index), before[index]), expert
    assert all_equal(router_values(model), of_router) != router


def test_gradients_masked_in_one_parameter_would_not_be_enough(make_model, images):
    """Weight decay changes every expert of a parameter, whose gradient is 0 or not."""
    model = make_model()
    before = values(model, 0)
    optimizer = OPTIMIZERS["AdamW"](trained(model))
    with moe_lora.routing.teach_experts(model, torch.tensor([[0.0, 1.0, 0.0]] * 2)):
        model(images).square().mean().backward()
    optimizer.step()
    assert none_equal(values(model, 0), before)


class TestUpdates:
    def test_a_trained_expert_gets_the_gradient_it_has_among_all(self, make_model, images):
        model, whole = make_model(), make_model()
        moe_lora.train_only(model, ["a", "c"])
        for each in (model, whole):
            each(images).square().mean().backward()
        for path, experts in experts_of(model).items():
            other = experts_of(whole)[path]
            assert torch.equal(experts.lora_A_trained.grad, other.lora_A.grad[[0, 2]])
            assert torch.equal(experts.lora_B_trained.grad, other.lora_B.grad[:, [0, 2]])
            assert experts.lora_A_frozen.grad is experts.lora_B_frozen.grad is None

    def test_one_step_is_that_of_training_all(self, make_model, images):
        model, whole = make_model(), make_model()
        moe_lora.train_only(model, ["b"])
        for each in (model, whole):
            fit(each, images, lambda p: torch.optim.AdamW(p, lr=1e-2), steps=1)
        for found, expected in zip(values(model, 1), values(whole, 1), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

    def test_optimizers_hold_states_for_trained_experts_only(self, make_model):
        model = make_model()
        count = sum(p.numel() for p in trained(model))
        moe_lora.train_only(model, ["b"], router=False)
        routers = sum(t.numel() for t in router_values(model))
        assert sum(p.numel() for p in trained(model)) == (count - routers) / 3

    @pytest.mark.parametrize("switch", ["set_adapter", "set_requires_grad", "enable"])
    def test_switches_of_peft_do_not_unfreeze(self, make_model, images, switch):
        model = make_model()
        moe_lora.train_only(model, ["b"], router=False)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        if switch == "set_adapter":
            model.set_adapter("default")
        elif switch == "set_requires_grad":
            model.set_requires_grad("default")
        else:
            with model.disable_adapter():
                model(images)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == names

    def test_schedules_of_phases_leave_frozen_experts_alone(self, make_model, images):
        model = make_model()
        moe_lora.train_only(model, ["b"])
        before, of_router = values(model, 0), router_values(model)
        schedule = Schedule([Phase(steps=1, mode="routed", train="experts"), Phase(mode="routed")])
        optimizer = OPTIMIZERS["AdamW"](trained(model))
        for step in range(3):
            schedule.apply(model, RemovalLoss(), step)
            model(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                assert all_equal(router_values(model), of_router)
        assert all_equal(values(model, 0), before)
        assert none_equal(router_values(model), of_router)
        set_trainable(model, "all")

    def test_a_router_attached_later_is_trained(self, make_model, images):
        model = make_model()
        moe_lora.train_only(model, ["b"], router=False)
        router = copy.deepcopy(next(m for m in model.modules() if isinstance(m, Router)))
        moe_lora.attach_router(model, router)
        assert all(p.requires_grad for p in router.parameters())

    def test_undoing_trains_everything(self, make_model, images):
        model = make_model()
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        expected = model(images)
        moe_lora.train_only(model, ["b"], router=False)
        moe_lora.train_only(model, None)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == names
        assert torch.equal(model(images), expected)
        fit(model, images, OPTIMIZERS["AdamW"])

    def test_parameters_that_need_not_change_stay(self, make_model):
        model = make_model()
        parameters = list(model.parameters())
        moe_lora.train_only(model, [])
        moe_lora.train_only(model, ["a", "b", "c"], router=False)
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))

    def test_experts_can_be_added_and_removed_in_between(self, make_model, images):
        model = make_model()
        moe_lora.train_only(model, ["b"])
        moe_lora.add_expert(model, "d", init=False)
        moe_lora.remove_expert(model, "a")
        before = [values(model, index) for index in range(3)]
        fit(model, images, OPTIMIZERS["AdamW"])
        assert [all_equal(values(model, i), old) for i, old in enumerate(before)] == [
            False,  # b
            True,  # c
            False,  # d
        ]


class TestSurroundings:
    @pytest.mark.parametrize("use_reentrant", [False])
    def test_gradient_checkpointing_in_bfloat16(self, make_flux, make_flux_inputs, use_reentrant):
        base = make_flux().bfloat16()
        base.enable_gradient_checkpointing()
        config = MoELoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
        moe_lora.attach_router(model, moe_lora.routing.MaskAwareRouter(3, 128))
        moe_lora.train_only(model, ["background_expert"])
        before = [values(model, index) for index in range(3)]
        inputs = {k: v.bfloat16() for k, v in make_flux_inputs().items()}
        optimizer = OPTIMIZERS["AdamW"](trained(model))
        for _ in range(2):
            model(**inputs)[0].float().square().mean().backward()
            optimizer.step()
        assert all_equal(values(model, 0), before[0])
        assert none_equal(values(model, 1), before[1])
        assert all_equal(values(model, 2), before[2])
        assert all(
            p.dtype == torch.bfloat16 for e in experts_of(model).values() for p in e.parameters()
        )

    def test_a_quantized_base(self, make_model, images):
        bnb = pytest.importorskip("bitsandbytes")
        base = copy.deepcopy(make_model().unload())
        base.to_q = bnb.nn.Linear8bitLt(8, 12, has_fp16_weights=False)
        config = MoELoraConfig(r=2, target_modules=["to_q", "to_out"], num_experts=2)
        model = get_peft_model(base, config)
        moe_lora.add_expert(model, "glow", init=False)
        moe_lora.train_only(model, ["glow"])
        before = [values(model, index) for index in range(3)]
        fit(model, images, OPTIMIZERS["AdamW"])
        assert all_equal(values(model, 0), before[0])
        assert none_equal(values(model, 2), before[2])

    @pytest.mark.slow
    def test_a_compiled_model(self, make_model, images):
        model, plain = make_model(), make_model()
        for each in (model, plain):
            moe_lora.train_only(each, ["b"])
        compiled = torch.compile(model)
        torch.testing.assert_close(compiled(images), plain(images))
        before = values(model, 0)
        fit(compiled, images, OPTIMIZERS["AdamW"])
        assert all_equal(values(model, 0), before)

    def test_copies_and_pickles(self, make_model, images, tmp_path):
        model = make_model()
        moe_lora.train_only(model, ["b"])
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        for other in (copy.deepcopy(model), loaded):
            assert torch.equal(other(images), model(images))
            assert [e.trained_experts for e in experts_of(other).values()] == [(1,)] * 3


class TestFiles:
    def names_and_values(self, folder) -> dict[str, Tensor]:
        return load_file(folder / "adapter_model.safetensors")

    def test_checkpoints_do_not_show_it(self, make_model, tmp_path):
        model = make_model()
        model.save_pretrained(tmp_path / "before")
        moe_lora.train_only(model, ["a", "c"])
        model.save_pretrained(tmp_path / "stock")
        moe_lora.save_adapter(model, tmp_path / "ours")
        expected = self.names_and_values(tmp_path / "before")
        for folder in ("stock", "ours"):
            found = self.names_and_values(tmp_path / folder)
            assert found.keys() == expected.keys()
            assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    def test_stock_loading_reaches_split_experts(self, make_model, images, tmp_path):
        from peft import set_peft_model_state_dict

        model = make_model(expert_names=("a", "b", "c"))
        model.save_pretrained(tmp_path)
        other = make_model()
        for parameter in trained(other):
            nn.init.normal_(parameter)
        moe_lora.train_only(other, ["b"])
        outcome = set_peft_model_state_dict(other, self.names_and_values(tmp_path))
        assert not outcome.unexpected_keys
        assert torch.equal(other(images), model(images))
        fewer = {
            name: tensor[:2] if name.endswith("lora_A") else tensor
            for name, tensor in self.names_and_values(tmp_path).items()
        }
        with pytest.raises(RuntimeError, match="size mismatch"):
            set_peft_model_state_dict(other, fewer)

    def test_a_resumed_step_is_that_of_the_uninterrupted_run(self, make_model, images, tmp_path):
        def steps(model: nn.Module, optimizer: Any, count: int) -> None:
            for _ in range(count):
                model(images).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        model = make_model()
        moe_lora.train_only(model, ["b"])
        frozen = values(model, 0)
        optimizer = OPTIMIZERS["AdamW"](trained(model))
        steps(model, optimizer, 2)
        model.save_pretrained(tmp_path)
        state = copy.deepcopy(optimizer.state_dict())
        steps(model, optimizer, 2)

        base = copy.deepcopy(model).unload()
        resumed = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
        moe_lora.train_only(resumed, ["b"])
        again = OPTIMIZERS["AdamW"](trained(resumed))
        again.load_state_dict(state)
        steps(resumed, again, 2)
        for index in range(3):
            assert all_equal(values(resumed, index), values(model, index))
        assert all_equal(router_values(resumed), router_values(model))
        assert all_equal(values(resumed, 0), frozen)

    def test_exports_and_loaded_experts(self, make_model, images, tmp_path):
        model, whole = make_model(), make_model()
        moe_lora.save_experts(whole, tmp_path / "whole")
        moe_lora.train_only(model, ["b"])
        moe_lora.save_experts(model, tmp_path / "split")
        for name in "abc":
            one, other = (
                self.names_and_values(tmp_path / kind / name) for kind in ("whole", "split")
            )
            assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
        moe_lora.load_experts(model, {"a": tmp_path / "whole" / "c", "b": tmp_path / "whole" / "c"})
        for index in range(3):
            assert all_equal(values(model, index), values(whole, 2))
        with moe_lora.route(model, torch.eye(3)[0]), torch.no_grad():
            expected = model(images)
        moe_lora.merge(model, [1.0, 0.0, 0.0])
        torch.testing.assert_close(model(images), expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("experts", "error", "message"),
        [
            ("b", TypeError, "a list of names"),
            (["d"], ValueError, "one of the experts"),
        ],
    )
    def test_wrong_names(self, make_model, experts, error, message):
        with pytest.raises(error, match=message):
            moe_lora.train_only(make_model(), experts)

    def test_no_router_to_train(self, make_model):
        with pytest.raises(ValueError, match="got none"):
            moe_lora.train_only(make_model(router=None), [])

    def test_inside_of_a_context(self, make_model):
        model = make_model()
        with moe_lora.route(model, torch.ones(3) / 3), pytest.raises(ValueError, match="open"):
            moe_lora.train_only(model, ["a"])
