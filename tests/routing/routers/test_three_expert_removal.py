from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from moe_lora.masks import analyze
from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.registry import router_class
from moe_lora.routing.routers.three_expert_removal import (
    MASK_FEATURES,
    REMOVAL_EXPERTS,
    RemovalRules,
    SoftThreshold,
    ThreeExpertRemovalRouter,
)

SIZE = 96
GRID = (6, 6)
WIDTH = 8
MODES = ["mask_focused", "boundary_aware", "content_adaptive"]
REMOVAL, BACKGROUND, COMPLETION = range(3)


def polar() -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(SIZE) - 47.5, torch.arange(SIZE) - 47.5, indexing="ij")
    return torch.hypot(x, y), torch.atan2(y, x)


def disk(area: float) -> Tensor:
    radius, _ = polar()
    return (math.pi * radius**2 <= area * SIZE**2).float()


def square(area: float) -> Tensor:
    start = round(SIZE * (1 - math.sqrt(area)) / 2)
    mask = torch.zeros(SIZE, SIZE)
    mask[start : SIZE - start, start : SIZE - start] = 1
    return mask


def star(area: float, arms: int = 9) -> Tensor:
    radius, angle = polar()
    scaled = radius / (1 + 0.5 * torch.cos(arms * angle))
    return (scaled <= scaled.flatten().quantile(area)).float()


def comb(area: float) -> Tensor:
    stripes = torch.arange(SIZE) // 4 % 2 == 0
    mask = square(2 * area)
    mask[:, ~stripes] = 0
    mask[SIZE // 2 - 2 : SIZE // 2 + 2] = square(2 * area)[SIZE // 2]
    return mask


def call(*masks: Tensor, image: Tensor | None = None, seed: int = 0) -> RouterInputs:
    batch = torch.stack(masks)[:, None]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(masks), GRID[0] * GRID[1], WIDTH, generator=generator)
    return RouterInputs(hidden, mask_info=analyze(batch, image), grid_size=GRID)


def make(seed: int = 0, **kwargs) -> ThreeExpertRemovalRouter:
    torch.manual_seed(seed)
    return ThreeExpertRemovalRouter(WIDTH, **kwargs).configure(REMOVAL_EXPERTS).eval()


def noise() -> Tensor:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("mask", "expert"),
    [
        (star(0.12), REMOVAL),
        (star(0.2), REMOVAL),
        (star(0.2, arms=5), REMOVAL),
        (comb(0.15), REMOVAL),
        (disk(0.4), BACKGROUND),
        (square(0.5), BACKGROUND),
        (square(0.9), BACKGROUND),
        (disk(0.01), COMPLETION),
        (square(0.02), COMPLETION),
        (star(0.02), COMPLETION),
        (comb(0.01), COMPLETION),
    ],
)
def test_the_documented_rules_decide_at_first(mode, mask, expert):
    for seed in range(3):
        weights = make(seed, mode=mode)(call(mask, seed=seed)).weights[0]
        assert weights.argmax() == expert
        assert weights[expert] > 0.5
        assert weights.min() > 0.02, "the prior must not collapse the router"


def test_detail_turns_large_masks_from_background_to_completion():
    flat = torch.full((1, 3, SIZE, SIZE), 0.5)
    router = make()
    assert router(call(disk(0.4))).weights.argmax() == BACKGROUND
    assert router(call(disk(0.4), image=flat)).weights.argmax() == BACKGROUND
    assert router(call(disk(0.4), image=noise())).weights.argmax() == COMPLETION


def test_unknown_detail_counts_as_none():
    flat = torch.full((1, 3, SIZE, SIZE), 0.5)
    router = make()
    torch.testing.assert_close(
        router(call(star(0.2))).weights, router(call(star(0.2), image=flat)).weights
    )


def test_rules_equal_the_formula():
    rules = RemovalRules(1.5)
    with torch.no_grad():
        rules.strengths.copy_(torch.tensor([1.5, 0.5, -2.0]))
    torch.manual_seed(0)
    features = torch.rand(20, MASK_FEATURES)

    def above(step: SoftThreshold, value: float) -> float:
        slope = math.exp(step.log_slope.item())
        return 1 / (1 + math.exp(-slope * (value - step.threshold.item())))

    for row, logits in zip(features.tolist(), rules(features).tolist(), strict=True):
        area, edge, _, _, detail = row
        small, detailed = 1 - above(rules.above_small, area), above(rules.detailed, detail)
        expected = [
            1.5 * above(rules.ragged, edge) * above(rules.medium, area),
            0.5 * above(rules.large, area) * (1 - detailed),
            -2.0 * (small + detailed - small * detailed),
        ]
        assert logits == pytest.approx(expected, abs=1e-5)


def test_each_rule_moves_with_its_features():
    rules, base = RemovalRules(2.0), torch.tensor([[0.1, 0.3, 0.9, 0.0, 0.4]])

    def change(column: int, by: float) -> list[float]:
        moved = base.clone()
        moved[0, column] += by
        return (rules(moved) - rules(base))[0].sign().tolist()

    assert change(0, 0.05) == [1, 1, -1]
    assert change(1, 0.05) == [1, 0, 0]
    assert change(4, 0.05) == [0, -1, 1]


def test_prior_scale_zero_starts_near_uniform():
    weights = make(prior_scale=0.0)(call(disk(0.4), disk(0.01), star(0.2))).weights
    torch.testing.assert_close(weights, torch.full((3, 3), 1 / 3), atol=0.05, rtol=0)


def test_the_network_is_the_documented_one():
    router = ThreeExpertRemovalRouter()
    first, relu, dropout, last = router.router
    assert (first.in_features, first.out_features) == (128 + MASK_FEATURES, 64)
    assert isinstance(relu, nn.ReLU)
    assert isinstance(dropout, nn.Dropout)
    assert dropout.p == 0.1
    assert (last.in_features, last.out_features) == (64, 3)
    assert router_class("three_expert_removal") is ThreeExpertRemovalRouter


def test_logits_add_network_and_rules():
    router, inputs = make(), call(star(0.2), disk(0.3))
    assert inputs.mask_info is not None
    features = inputs.mask_info.features()
    pooled = router.extractor(inputs.hidden_states, inputs.mask_info.mask, GRID)
    expected = router.router(torch.cat([pooled, features], 1)) + router.rules(features)
    torch.testing.assert_close(router(inputs).logits, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("detail", [False, True])
def test_every_parameter_exists_at_once_and_gets_gradient(mode, detail):
    router = make(mode=mode)
    before = {name: id(p) for name, p in router.named_parameters()}
    inputs = call(star(0.2), image=noise() if detail else None)
    weights = router(inputs).weights
    (weights * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    assert {name: id(p) for name, p in router.named_parameters()} == before
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_weights_depend_on_the_visual_tokens():
    router = make()
    nn.init.normal_(router.router[-1].weight)
    one, other = call(star(0.2), seed=1), call(star(0.2), seed=2)
    assert not torch.allclose(router(one).weights, router(other).weights, atol=1e-3)


def test_it_can_learn_another_rule():
    torch.manual_seed(0)
    router = make()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    inputs = call(disk(0.01), disk(0.4), star(0.2))
    wanted = torch.tensor([BACKGROUND, REMOVAL, COMPLETION])
    for _ in range(60):
        loss = nn.functional.nll_loss(router(inputs).weights.log(), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(router(inputs).weights.argmax(-1), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_equals_its_samples(mode):
    router = make(mode=mode)
    masks = [disk(0.01), torch.zeros(SIZE, SIZE), disk(0.4), star(0.2)]
    together = call(*masks)
    for i, mask in enumerate(masks):
        alone = RouterInputs(together.hidden_states[[i]], call(mask).mask_info, grid_size=GRID)
        torch.testing.assert_close(router(alone).weights[0], router(together).weights[i])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("strategy", "top_k"), [("soft", None), ("hard", None), ("topk", 2)])
def test_extreme_masks_stay_finite(mode, strategy, top_k):
    one_pixel = torch.zeros(SIZE, SIZE)
    one_pixel[50, 70] = 1
    soft = 0.5 * disk(0.3)
    masks = [torch.zeros(SIZE, SIZE), torch.ones(SIZE, SIZE), one_pixel, soft]
    router = make(mode=mode).configure(REMOVAL_EXPERTS, strategy=strategy, top_k=top_k)
    inputs = call(*masks)
    inputs.hidden_states.requires_grad_()
    weights = router(inputs).weights
    (weights * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))
    assert ((weights != 0).sum(-1) == {"soft": 3, "hard": 1, "topk": 2}[strategy]).all()
    assert inputs.hidden_states.grad is not None
    assert inputs.hidden_states.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())


def test_hints():
    router, inputs = make(), call(disk(0.4))
    plain = router(inputs).weights
    focus = RouterInputs(inputs.hidden_states, inputs.mask_info, None, "removal_focus", GRID)
    assert router(focus).weights[0, REMOVAL] > plain[0, REMOVAL]
    only = RouterInputs(inputs.hidden_states, inputs.mask_info, None, "removal_only", GRID)
    assert torch.equal(router(only).weights, torch.tensor([[1.0, 0.0, 0.0]]))


def test_dropout_acts_in_training_only():
    router, inputs = make(), call(star(0.2))
    nn.init.normal_(router.router[-1].weight)
    assert torch.equal(router(inputs).weights, router(inputs).weights)
    router.train()
    assert not torch.equal(router(inputs).weights, router(inputs).weights)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_models_keep_the_router_in_float32(mode):
    router, inputs = make(mode=mode), call(star(0.2), disk(0.3))
    before = router(inputs)
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "router": router}).to(torch.bfloat16)
    assert model["body"].weight.dtype == torch.bfloat16
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    assert torch.equal(router(inputs).weights, before.weights)
    half = RouterInputs(inputs.hidden_states.bfloat16(), inputs.mask_info, grid_size=GRID)
    after = router(half)
    assert after.weights.dtype == torch.float32
    torch.testing.assert_close(after.weights, before.weights, atol=1e-3, rtol=0)


def test_float64_tokens_and_router():
    router, inputs = make(), call(star(0.2))
    wide = RouterInputs(inputs.hidden_states.double(), inputs.mask_info, grid_size=GRID)
    torch.testing.assert_close(router(wide).weights, router(inputs).weights)
    assert router.double()(wide).weights.dtype == torch.float64


def test_state_dict_round_trip():
    router, other, inputs = make(0), make(1), call(star(0.2))
    with torch.no_grad():
        router.rules.ragged.threshold.add_(0.1)
    assert not torch.equal(other(inputs).weights, router(inputs).weights)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(inputs).weights, router(inputs).weights)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies(clone):
    router, inputs = make(mode="content_adaptive", prior_scale=1.0), call(star(0.2))
    twin = clone(router)
    assert twin.init_kwargs == router.init_kwargs
    assert twin.init_kwargs == {"input_dim": 8, "mode": "content_adaptive", "prior_scale": 1.0}
    assert torch.equal(twin(inputs).weights, router(inputs).weights)


@pytest.mark.parametrize(("channels", "width"), [(384, 128), (9, 8), (64, 64), (4, 4)])
def test_width_is_read_off_the_model(channels, width):
    family = "UNet2DConditionModel" if channels == 9 else "FluxTransformer2DModel"
    model = type(family, (nn.Module,), {})()
    model.config = SimpleNamespace(in_channels=channels)
    assert ThreeExpertRemovalRouter.default_kwargs(model) == {"input_dim": width}


def test_a_model_that_does_not_tell_its_width_raises():
    with pytest.raises(ValueError, match=r"Linear to have `config.in_channels`.*router_kwargs="):
        ThreeExpertRemovalRouter.default_kwargs(nn.Linear(1, 1))
    assert ThreeExpertRemovalRouter.default_kwargs(nn.Linear(1, 1), ["input_dim"]) == {}


def test_another_number_of_experts_raises():
    with pytest.raises(ValueError, match=r"exactly 3 experts .* but got 4"):
        ThreeExpertRemovalRouter(WIDTH).configure(["a", "b", "c", "d"])


def test_the_known_experts_must_be_in_order():
    ThreeExpertRemovalRouter(WIDTH).configure(["a", "background_expert", "c"])
    with pytest.raises(ValueError, match="`expert_names` in the order"):
        ThreeExpertRemovalRouter(WIDTH).configure(REMOVAL_EXPERTS[::-1])


def test_no_mask_no_grid_and_other_widths_raise():
    router, inputs = make(), call(star(0.2))
    with pytest.raises(ValueError, match="ThreeExpertRemovalRouter needs a mask"):
        router(RouterInputs(inputs.hidden_states, grid_size=GRID))
    with pytest.raises(ValueError, match="Expected `grid_size`"):
        router(RouterInputs(inputs.hidden_states, inputs.mask_info))
    with pytest.raises(ValueError, match=r"\(B, T, input_dim=8\), but got \(1, 36, 7\)"):
        router(RouterInputs(inputs.hidden_states[..., :7], inputs.mask_info, grid_size=GRID))


def test_every_parameter_has_a_dimension_as_sharding_needs_and_older_numbers_load():
    router = ThreeExpertRemovalRouter(input_dim=8)
    assert all(parameter.ndim > 0 for parameter in router.parameters())
    older = {
        name: value.squeeze() + 1 if name.endswith(("threshold", "log_slope")) else value
        for name, value in router.state_dict().items()
    }
    other = ThreeExpertRemovalRouter(input_dim=8)
    other.load_state_dict(older)
    assert other.rules.ragged.threshold.tolist() == pytest.approx([1.3])
