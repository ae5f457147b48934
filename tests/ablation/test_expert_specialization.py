from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.ablation import Specialization, specialization
from moe_lora.routing.lookup import routing_state

NAMES = ("boundary", "consistency", "detail")
EXPERTS = ("removal_expert", "background_expert", "completion_expert")


class Known(nn.Module):
    """Give experts known outputs: expert e adds `table[e]` to the output at weight 1."""

    def __init__(self, components: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, components, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)


def known_model(table: Tensor, **options: object) -> nn.Module:
    experts, components = table.shape
    config = MoELoraConfig(
        r=1, lora_alpha=1, target_modules=["linear"], num_experts=experts, **options
    )
    model = get_peft_model(Known(components), config)
    layer = model.base_model.model.linear.moe_lora_experts["default"]
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data = table.T.unsqueeze(-1).clone()
    return model


def distances(names: tuple[str, ...] = NAMES) -> Callable[..., dict[str, Tensor]]:
    """Return an `evaluate` that gives every output's distance from 0, sample by sample."""

    def evaluate(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        output = model(hidden_states=batch)
        return dict(zip(names, output.abs().mean(1).unbind(-1), strict=True))

    return evaluate


WEIGHTS = [0.5, 0.3, 0.2]
TABLE = -torch.tensor([[1.0, 0.2, 0.0], [0.0, 2.0, 0.4], [0.1, 0.0, 3.0]])


def test_rises_are_those_of_the_closed_form() -> None:
    model = known_model(TABLE, router="fixed", router_kwargs={"weights": WEIGHTS})
    batches = [torch.ones(2, 1, 1), torch.full((1, 1, 1), 4.0)]
    found = specialization(model, batches, distances(), higher_is_better=NAMES)
    # Without expert e, component c falls by w_e · |table_ec| · x, where x is 1, 1 and 4.
    expected = torch.tensor(WEIGHTS)[:, None] * TABLE.abs()
    torch.testing.assert_close(found.rises, (2 * expected).double())
    torch.testing.assert_close(found.spreads, (math.sqrt(2) * expected).double())
    torch.testing.assert_close(found.baseline, (2 * expected.sum(0)).double())
    assert found.counts.tolist() == [3, 3, 3]
    own = [expected[i, i] / expected[:, i].sum() for i in range(3)]
    assert list(found.shares.values()) == pytest.approx([float(share) for share in own])
    assert found.score == pytest.approx(float(sum(own) / 3))
    lower = specialization(model, batches, distances())
    assert torch.equal(lower.rises, -found.rises)
    assert lower.score == 0.0


def test_a_number_is_one_observation_of_its_batch() -> None:
    model = known_model(TABLE)

    def evaluate(model: nn.Module, batch: Tensor) -> Mapping[str, float]:
        return {"boundary": float(model(batch).abs().mean(0)[0, 0])}

    batches = [torch.ones(5, 1, 1), torch.full((1, 1, 1), 4.0)]
    found = specialization(model, batches, evaluate)
    assert found.counts.tolist() == [2]
    assert found.baseline[0] == pytest.approx(1.1 / 3 * (1 + 4) / 2)


def test_renormalized_weights_are_another_question() -> None:
    model = known_model(-torch.ones(3, 1), router="fixed", router_kwargs={"weights": WEIGHTS})
    batch, evaluate = [torch.ones(1, 1, 1)], distances(("boundary",))
    plain = specialization(model, batch, evaluate)
    shared = specialization(model, batch, evaluate, renormalize=True)
    torch.testing.assert_close(plain.rises[:, 0], -torch.tensor(WEIGHTS).double())
    torch.testing.assert_close(shared.rises[:, 0], torch.zeros(3).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_any_number_of_experts_each_for_its_own_component(experts: int) -> None:
    model = known_model(torch.eye(experts))
    names = tuple(f"c{i}" for i in range(experts))
    pairs = dict(zip(routing_state(model).expert_names["default"], names, strict=True))
    found = specialization(
        model, [torch.ones(2, 1, 1)], distances(names), pairs=pairs, higher_is_better=names
    )
    torch.testing.assert_close(found.rises, torch.eye(experts).double() / experts)
    assert found.score == 1.0
    if experts > 1:
        crossed = dict(zip(pairs, [*names[1:], names[0]], strict=True))
        found = specialization(
            model, [torch.ones(2, 1, 1)], distances(names), pairs=crossed, higher_is_better=names
        )
        assert found.score == 0.0


def test_token_weights_and_uniform_mode() -> None:
    model = known_model(torch.eye(3))
    weights = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]])
    batch = torch.ones(1, 2, 1)
    with moe_lora.route(model, weights):
        routed = specialization(model, [batch], distances(), higher_is_better=NAMES)
    expected = torch.diag(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    torch.testing.assert_close(routed.rises, expected)
    moe_lora.attach_router(model, moe_lora.routing.FixedRouter([0.8, 0.1, 0.1]))
    moe_lora.set_routing_mode(model, "uniform")
    uniform = specialization(model, [batch], distances(), higher_is_better=NAMES)
    torch.testing.assert_close(uniform.rises, torch.eye(3).double() / 3)


def test_noise_is_the_same_with_and_without_an_expert() -> None:
    model = known_model(torch.zeros(3, 3))

    def evaluate(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"noise": model(batch).sum() + torch.randn(())}

    state = torch.get_rng_state()
    found = specialization(model, [torch.ones(1, 1, 1)] * 3, evaluate)
    assert torch.equal(found.rises, torch.zeros(3, 1).double())
    assert torch.equal(torch.get_rng_state(), state)
    again = specialization(model, [torch.ones(1, 1, 1)] * 3, evaluate)
    other = specialization(model, [torch.ones(1, 1, 1)] * 3, evaluate, seed=1)
    assert torch.equal(again.baseline, found.baseline)
    assert not torch.equal(other.baseline, found.baseline)
    single = specialization(model, [torch.ones(1, 1, 1)], evaluate)
    assert not torch.equal(single.baseline, found.baseline)


def test_the_model_is_as_it_was() -> None:
    model = known_model(TABLE, router="fixed", router_kwargs={"weights": WEIGHTS}).train()
    model.base_model.model.linear.base_layer.eval()
    moe_lora.set_router_inputs(model, task_hint="removal_focus")
    whole = model(torch.ones(3, 1, 1))
    stats, decision = moe_lora.routing_stats(model), moe_lora.current_routing(model)
    state = routing_state(model)
    known = dict(vars(stats))
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []

    def evaluate(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        seen.append((model.training, torch.is_grad_enabled()))
        moe_lora.set_router_inputs(model, task_hint="background_only")
        values = distances()(model, batch)
        moe_lora.set_routing_mode(model, "uniform")
        return values

    specialization(model, [torch.ones(2, 1, 1)], evaluate)
    assert seen == [(False, False)] * 4
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert (state.mode, state.given.task_hint) == ("routed", "removal_focus")
    assert moe_lora.routing_stats(model) is stats
    assert dict(vars(stats)) == known
    assert moe_lora.current_routing(model) is decision
    assert torch.equal(model(torch.ones(3, 1, 1)), whole)
    with pytest.raises(KeyError):
        specialization(model, [0], lambda model, batch: {}["missing"])
    assert model.training
    assert torch.equal(model(torch.ones(3, 1, 1)), whole)


def test_an_empty_region_is_left_out() -> None:
    model = known_model(torch.eye(3))

    def evaluate(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        values = distances()(model, batch)
        values["detail"] = values["detail"].where(batch[:, 0, 0] > 1, math.nan)
        return values

    batch = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    found = specialization(model, [batch], evaluate, higher_is_better=NAMES)
    assert found.counts.tolist() == [3, 3, 2]
    assert found.rises[2, 2] == pytest.approx(3 / 3)
    assert found.rises[0, 0] == pytest.approx((1 + 2 + 4) / 9)
    with pytest.raises(ValueError, match="a number for 'detail' in some batch, but got NaN in all"):
        specialization(model, [batch[:1]], evaluate)


def failing(kind: str) -> Callable[[nn.Module, Tensor], dict[str, object]]:
    calls: list[int] = []

    def evaluate(model: nn.Module, batch: Tensor) -> dict[str, object]:
        value = model(batch).mean()
        calls.append(1)
        if kind == "names":
            return {f"c{len(calls)}": value}
        if kind == "length":
            return {"c": torch.ones(len(calls))}
        if kind == "nan":
            return {"c": math.nan if len(calls) == 2 else value}
        if kind == "inf":
            return {"c": math.inf}
        if kind == "batches":
            return {f"c{(len(calls) - 1) // 4}": value}
        if kind == "matrix":
            return {"c": torch.ones(2, 2)}
        return {}

    return evaluate


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("names", r"without 'removal_expert' as .*\{'c1': 1\}, but got \{'c2': 1\}"),
        ("length", r"\{'c': 1\}, but got \{'c': 2\}"),
        ("nan", "Expected 'c' to be finite, or NaN in all runs"),
        ("inf", "Expected 'c' to be finite"),
        ("batches", r"components \['c0'\] for every batch, but got \['c1'\]"),
        ("matrix", r"shape \(B,\) for 'c', but got shape \(2, 2\)"),
        ("none", "at least one component, but got none"),
    ],
)
def test_what_evaluate_must_not_return(kind: str, message: str) -> None:
    model = known_model(torch.eye(3))
    with pytest.raises(ValueError, match=message):
        specialization(model, [torch.ones(1, 1, 1)] * 2, failing(kind))


def test_evaluate_has_to_call_the_model() -> None:
    with pytest.raises(ValueError, match="to call its first argument, the model"):
        specialization(known_model(torch.eye(3)), [1], lambda model, batch: {"c": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": {"removal_expert": "edge"}}, "but got 'removal_expert': 'edge'"),
        ({"pairs": {"edge": "boundary"}}, "but got 'edge': 'boundary'"),
        ({"higher_is_better": ["psnr"]}, r"names of \['boundary', .*\], but got \['psnr'\]"),
        ({"higher_is_better": "boundary"}, "but got 'boundary'"),
        ({"adapter_name": "other"}, r"one of \['default'\], but got 'other'"),
    ],
)
def test_unknown_names_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specialization(known_model(TABLE), [torch.ones(1, 1, 1)], distances(), **options)


def test_an_adapter_that_does_not_act_raises() -> None:
    model = known_model(torch.eye(3))
    batches = [torch.ones(1, 1, 1)]
    with pytest.raises(ValueError, match="but got no batch"):
        specialization(model, [], distances())
    with model.disable_adapter(), pytest.raises(ValueError, match="'default' is disabled"):
        specialization(model, batches, distances())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base weights"):
        specialization(model, batches, distances())
    model.unmerge_adapter()
    model.add_adapter("other", MoELoraConfig(target_modules=["linear"]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"'default' is not active\. Activate it with"):
        specialization(model, batches, distances())
    with pytest.raises(ValueError, match="has none"):
        specialization(nn.Linear(1, 1), batches, distances())


def test_pairs_are_those_of_the_removal_experts() -> None:
    found = specialization(known_model(TABLE), [torch.ones(1, 1, 1)], distances())
    assert found.pairs == dict(zip(EXPERTS, NAMES, strict=True))
    other = specialization(
        known_model(torch.eye(2)), [torch.ones(1, 1, 1)], distances(("boundary", "detail"))
    )
    assert (other.pairs, other.shares, other.score) == ({}, {}, None)
    assert "diagonal" not in str(other)


def test_it_is_told_as_numbers_and_as_a_table() -> None:
    model = known_model(torch.eye(3))
    found = specialization(model, [torch.ones(1, 1, 1)], distances(), higher_is_better=NAMES)
    assert isinstance(found, Specialization)
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["rises"]["background_expert"]["consistency"] == pytest.approx(1 / 3)
    assert told["rises"]["background_expert"]["detail"] == 0.0
    assert told["spreads"]["removal_expert"] == {"boundary": 0, "consistency": 0, "detail": 0}
    assert told["baseline"]["detail"] == pytest.approx(1 / 3)
    assert told["counts"] == {"boundary": 1, "consistency": 1, "detail": 1}
    assert (told["pairs"], told["score"]) == (dict(zip(EXPERTS, NAMES, strict=True)), 1.0)
    lines = str(found).splitlines()
    assert lines[0].split() == ["rise", "without", *NAMES]
    assert lines[1].split()[-3:] == ["0.3333"] * 3
    assert lines[3].split() == ["background_expert", "+0", "*+0.333", "+0"]
    assert lines[5] == "diagonal share (*) 1.000, without specialization 0.333"
    assert len({len(line) for line in lines[:5]}) == 1
