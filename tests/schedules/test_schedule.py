from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import OneLinear
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig, RemovalLoss, Router, RouterInputs
from moe_lora.schedules import Annealing, Phase, Schedule, Setting

FULL = {"base": 1.0, "boundary": 0.3, "consistency": 0.5, "detail": 0.2}


@moe_lora.register_router("scheduled_in_a_test")
class Head(Router):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def logits(self, inputs: RouterInputs) -> Tensor:
        return self.head(inputs.hidden_states.mean(1))


def adapted(router: str | None = "scheduled_in_a_test") -> PeftModel:
    torch.manual_seed(0)
    config = MoELoraConfig(r=2, target_modules=["linear"], router=router, init_lora_weights=False)
    return get_peft_model(OneLinear(), config)


def whole() -> Schedule:
    return Schedule(
        [
            Phase(steps=3, losses={"base": 1.0}),
            Phase(steps=2, mode="routed", train="router", temperature=2.0),
            Phase(
                steps=4,
                losses=FULL,
                warmup_steps=2,
                temperature=Annealing(2.0, 1.0, 4, "linear"),
                train="experts",
            ),
            Phase(),
        ]
    )


def test_every_step_of_a_run():
    half = {"base": 1.0, "boundary": 0.15, "consistency": 0.25, "detail": 0.1}
    base = {"base": 1.0}
    expected = [
        *[Setting(0, "uniform", None, base, "all")] * 3,
        *[Setting(1, "routed", 2.0, base, "router")] * 2,
        Setting(2, "routed", 2.0, half, "experts"),
        Setting(2, "routed", 1.75, FULL, "experts"),
        Setting(2, "routed", 1.5, FULL, "experts"),
        Setting(2, "routed", 1.25, FULL, "experts"),
        *[Setting(3, "routed", 1.0, FULL, "all")] * 3,
    ]
    schedule = whole()
    assert [schedule.at(step) for step in range(12)] == expected
    assert schedule.at(10_000) == expected[-1]


def test_a_phase_that_ends_before_its_annealing_hands_over_what_it_reached():
    schedule = Schedule(
        [Phase(steps=2, temperature=Annealing(2.0, 1.0, 4, "linear")), Phase(mode="routed")]
    )
    assert [schedule.at(step).temperature for step in (0, 1, 2, 50)] == [2.0, 1.75, 1.5, 1.5]


def test_the_last_phase_goes_on_after_its_end():
    schedule = Schedule([Phase(steps=2, losses={"base": 1.0}), Phase(steps=2, losses=FULL)])
    assert schedule.at(50) == Setting(1, "routed", None, FULL, "all")


def test_apply_sets_what_holds():
    model, loss, schedule = adapted(), RemovalLoss(), whole()
    router = next(m for m in model.modules() if isinstance(m, Router))
    x = torch.randn(2, 3, 6)
    for step in range(10):
        setting = schedule.apply(model, loss, step)
        assert setting == schedule.at(step)
        assert loss.weights == setting.loss_weights
        assert loss.specialized is (step >= 5)
        assert router.temperature == (setting.temperature or 1.0)
        model.zero_grad()
        model(x).square().mean().backward()
        assert (moe_lora.current_routing(model) is None) is (setting.mode == "uniform")
        experts = model.get_base_model().linear.moe_lora_experts["default"].lora_B
        assert (experts.grad is None) is (setting.train == "router")
        frozen = setting.train == "experts" or setting.mode == "uniform"
        assert (router.head.weight.grad is None) is frozen


def test_what_the_schedule_does_not_name_is_left_alone():
    model, loss = adapted(), RemovalLoss(detail=0.9)
    moe_lora.set_routing_mode(model, "uniform")
    Schedule([Phase()]).apply(model, loss, 5)
    assert loss.weights["detail"] == 0.9
    model(torch.randn(1, 2, 6))
    assert moe_lora.current_routing(model) is None
    assert model.peft_config["default"].routing_temperature == 1.0


def test_the_loss_is_optional():
    setting = whole().apply(adapted(), None, 0)
    assert setting.loss_weights == {"base": 1.0}


def test_a_model_without_experts_has_a_loss_that_changes():
    loss = RemovalLoss()
    assert whole().apply(None, loss, 0).mode == "uniform"
    assert loss.weights == {"base": 1.0}


def test_specialized_losses_that_are_rare_are_as_much_stronger():
    loss = RemovalLoss(specialized_every=4)
    given = dict(loss.weights)
    Schedule([Phase(losses=FULL)]).apply(None, loss, 0)
    assert (
        loss.weights
        == given
        == pytest.approx({name: w * 4 ** (name != "base") for name, w in FULL.items()})
    )


def test_the_weights_of_the_schedule_are_not_those_of_the_loss():
    schedule, loss = Schedule([Phase(losses=FULL)]), RemovalLoss()
    schedule.apply(adapted(), loss, 0)
    loss.weights["base"] = 7.0
    assert schedule.at(0).loss_weights["base"] == 1.0


def test_the_current_temperature_is_saved(tmp_path):
    model = adapted()
    whole().apply(model, None, 6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(OneLinear(), tmp_path)
    router = next(m for m in loaded.modules() if isinstance(m, Router))
    assert router.temperature == 1.75


def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted():
    schedule, found = whole(), []
    inputs = torch.randn(12, 4, 3, 6)

    def build(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    def run(model, optimizer, steps):
        for step in steps:
            schedule.apply(model, None, step)
            model(inputs[step]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    for cut in (12, 4, 6):
        model = adapted()
        optimizer = build(model)
        run(model, optimizer, range(cut))
        state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        resumed = adapted()
        resumed.load_state_dict(state)
        optimizer = build(resumed)
        optimizer.load_state_dict(moments)
        run(resumed, optimizer, range(cut, 12))
        found.append(resumed.state_dict())
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ([], "at least one phase"),
        ([Phase(), Phase()], "only the last phase"),
        ([Phase(mode="uniform", train="router")], "does not use the router"),
        ([Phase(steps=1, losses={"base": 1.0}), Phase(train="router")], "in phase 1"),
    ],
)
def test_what_cannot_be_honored_raises(phases, told):
    with pytest.raises(ValueError, match=told):
        Schedule(phases)


def test_a_negative_step_raises():
    with pytest.raises(ValueError, match="`step` to be >= 0, but got -1"):
        whole().at(-1)


def test_a_model_without_what_is_needed_raises():
    bare = adapted(router=None)
    Schedule([Phase(mode="uniform", losses={"base": 1.0})]).apply(bare, None, 0)
    for phase in (Phase(mode="routed"), Phase(temperature=2.0), Phase(train="experts")):
        with pytest.raises(ValueError, match="Expected a router"):
            Schedule([phase]).apply(bare, None, 0)
    with pytest.raises(ValueError, match="moe_lora adapter"):
        Schedule([Phase()]).apply(OneLinear(), None, 0)
