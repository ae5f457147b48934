from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.ablation import ablate_expert
from moe_lora.routing.lookup import routing_state
from moe_lora.routing.weights.routing import zero_expert_weight

EXPERTS = ("removal_expert", "background_expert", "completion_expert")


@moe_lora.register_router("by_first_token")
class ByFirstToken(moe_lora.Router):
    """Give each sample, or each of its tokens, logits from its first three channels."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        self.gain = nn.Parameter(torch.ones(()))

    def logits(self, inputs: moe_lora.RouterInputs) -> Tensor:
        states = inputs.hidden_states if self.tokens else inputs.hidden_states[:, 0]
        return self.gain * states[..., :3]


class OneLayer(nn.Module):
    """A base layer of zeros, so that an output is the sum of what the experts add."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)


def make_model(**options: object) -> nn.Module:
    config = MoELoraConfig(
        r=2, lora_alpha=2, target_modules=["linear"], init_lora_weights=False, **options
    )
    return get_peft_model(OneLayer(), config)


def parts(model: nn.Module, x: Tensor) -> Tensor:
    """Return what each expert adds at weight 1, `(E, B, T, out)`, by a loop over the formula."""
    experts = model.base_model.model.linear.moe_lora_experts["default"]
    return torch.stack(
        [x @ experts.lora_A[e].T @ experts.lora_B[:, e].T for e in range(len(experts.lora_A))]
    )


X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("expert", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"routing_strategy": "soft"},
        {"routing_strategy": "topk", "top_k": 2},
        {"routing_strategy": "hard"},
        {"router_kwargs": {"tokens": True}},
        {"router_kwargs": {"tokens": True}, "routing_strategy": "topk", "top_k": 1},
    ],
)
def test_the_others_weights_are_as_the_router_decides(
    options: dict[str, object], expert: int, renormalize: bool
) -> None:
    model = make_model(router="by_first_token", **options)
    whole = model(X)
    weights = moe_lora.current_routing(model).weights
    weights = weights if weights.ndim == 3 else weights[:, None].expand(2, 6, 3)
    expected = torch.zeros_like(whole)
    for sample in range(2):
        for token in range(6):
            row = weights[sample, token].tolist()
            row[expert] = 0.0
            total = sum(row) if renormalize and sum(row) > 0 else 1.0
            for e, weight in enumerate(row):
                added = parts(model, X)[e, sample, token]
                expected[sample, token] += weight / total * added
    with ablate_expert(model, EXPERTS[expert], renormalize=renormalize):
        found = model(X)
        assert torch.equal(found, model(X))
    torch.testing.assert_close(found, expected)
    used = bool(weights[..., expert].any())
    assert torch.allclose(found, whole) is not used
    assert torch.equal(model(X), whole)


def test_uniform_weights_are_a_third_each() -> None:
    model = make_model()
    with ablate_expert(model, "background_expert"):
        found = model(X)
    with ablate_expert(model, "background_expert", renormalize=True):
        renormalized = model(X)
    added = parts(model, X)
    torch.testing.assert_close(found, (added[0] + added[2]) / 3)
    torch.testing.assert_close(renormalized, (added[0] + added[2]) / 2)


def test_given_weights_are_ablated_too() -> None:
    model = make_model()
    added = parts(model, X)
    with moe_lora.route(model, torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])):
        with ablate_expert(model, "removal_expert"):
            inner = model.base_model.model.linear(X)
        assert not torch.allclose(model.base_model.model.linear(X), inner)
    with (
        ablate_expert(model, "removal_expert"),
        moe_lora.route(model, torch.tensor([0.5, 0.3, 0.2])),
    ):
        outer = model(X)
    torch.testing.assert_close(inner[0], 0.3 * added[1, 0] + 0.2 * added[2, 0])
    torch.testing.assert_close(inner[1], 0.2 * added[1, 1] + 0.7 * added[2, 1])
    torch.testing.assert_close(outer, 0.3 * added[1] + 0.2 * added[2])


def test_contexts_nest_and_end_with_an_error_too() -> None:
    model = make_model()
    whole, added = model(X), parts(model, X)
    with ablate_expert(model, "removal_expert"):
        with ablate_expert(model, "background_expert"):
            torch.testing.assert_close(model(X), added[2] / 3)
        torch.testing.assert_close(model(X), (added[1] + added[2]) / 3)
    with pytest.raises(KeyError), ablate_expert(model, "removal_expert"):
        raise KeyError
    assert torch.equal(model(X), whole)


def test_only_the_named_adapter_loses_an_expert() -> None:
    model = make_model()
    other = MoELoraConfig(
        r=1, target_modules=["linear"], num_experts=2, init_lora_weights=False, lora_alpha=1
    )
    model.add_adapter("other", other)
    model.set_adapter("other")
    whole = model(X)
    with ablate_expert(model, "removal_expert"):
        assert torch.equal(model(X), whole)
    with ablate_expert(model, "expert_1", adapter_name="other"):
        assert not torch.allclose(model(X), whole)


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients_reach_the_others_only(renormalize: bool) -> None:
    model = make_model(router="by_first_token")
    with ablate_expert(model, "completion_expert", renormalize=renormalize):
        model(X).square().sum().backward()
    experts = model.base_model.model.linear.moe_lora_experts["default"]
    reached = [bool(experts.lora_A.grad[e].any()) for e in range(3)]
    assert reached == [True, True, False]
    assert torch.isfinite(model.base_model.model.moe_router.moe_lora_routers.default.gain.grad)


def test_a_copy_made_inside_is_whole() -> None:
    import copy

    model = make_model()
    whole = model(X)
    with ablate_expert(model, "removal_expert"):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(X), whole)


def test_every_layer_of_flux_loses_the_expert(make_flux, make_flux_inputs, flux_targets) -> None:
    model = make_flux()
    config = MoELoraConfig(
        r=2, target_modules=flux_targets, router="three_expert_removal", init_lora_weights=False
    )
    model.add_adapter(config)
    model.eval()
    inputs = make_flux_inputs()
    with torch.no_grad():
        whole = model(**inputs)[0]
        weights = moe_lora.current_routing(model).weights
        with ablate_expert(model, "background_expert"):
            found = model(**inputs)[0]
        with moe_lora.route(model, weights * torch.tensor([1.0, 0.0, 1.0])):
            by_hand = model(**inputs)[0]
    torch.testing.assert_close(found, by_hand)
    assert not torch.allclose(found, whole, atol=1e-4)


@pytest.mark.parametrize(
    ("expert", "adapter", "message"),
    [
        ("removal", "default", r"one of \['removal_expert', .*\], but got 'removal'"),
        ("removal_expert", "none", r"`adapter_name` to be one of \['default'\], but got 'none'"),
    ],
)
def test_unknown_names_raise(expert: str, adapter: str, message: str) -> None:
    model = make_model()
    with (
        pytest.raises(ValueError, match=message),
        ablate_expert(model, expert, adapter_name=adapter),
    ):
        pass
    assert routing_state(model).steering.ablations == ()


def test_rows_without_another_weight_stay_zero() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]], requires_grad=True)
    found = zero_expert_weight(rows, 0, renormalize=True)
    assert found.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.5, 0.5]]
    found.square().sum().backward()
    assert torch.isfinite(rows.grad).all()
