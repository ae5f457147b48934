from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moe_lora import MoELoraConfig
from moe_lora.routing.weights.context import RoutingContext
from moe_lora.routing.weights.fitting.layer import align_weights
from moe_lora.routing.weights.routing import Routing
from moe_lora.tuner import MoELoraConv2d, mixture
from moe_lora.tuner.layer import MoELoraLinear

E, R, D_IN, D_OUT = 3, 4, 6, 5
SHAPES = {"(B, D)": (2, D_IN), "(B, T, D)": (2, 7, D_IN), "(B, H, W, D)": (2, 3, 4, D_IN)}


class Given(RoutingContext):
    """Routes layers that run by themselves."""

    routing = None

    def put(self, weights, top_k=None):
        self.routing = Routing.from_weights(weights, top_k)

    def routing_outside_pass(self):
        return self.routing


def layer(**kwargs) -> MoELoraLinear:
    config = MoELoraConfig(r=R, lora_alpha=8, init_lora_weights=False, **kwargs)
    base = nn.Linear(D_IN, D_OUT)
    return MoELoraLinear(base, "default", config, R, config.lora_alpha, context=Given())


def test_uniform_mode_equals_the_plain_lora_of_rank_e_times_r(mlp, tolerance):
    mixed = layer()
    experts = mixed.moe_lora_experts["default"]
    plain = get_peft_model(
        nn.Sequential(mixed.base_layer),
        LoraConfig(r=E * R, lora_alpha=8 / R / E * (E * R), target_modules=["0"]),
    )
    linear = plain.base_model.model[0]
    linear.lora_A["default"].weight.data = experts.lora_A.detach().flatten(0, 1)
    linear.lora_B["default"].weight.data = experts.lora_B.detach().flatten(1)
    x = torch.randn(2, 7, D_IN)
    torch.testing.assert_close(mixed(x), plain(x), rtol=1e-5, atol=1e-5)


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert layer().moe_lora_experts["default"].scaling == 2.0
    assert layer(use_rslora=True).moe_lora_experts["default"].scaling == 4.0


def test_scale_layer_changes_the_strength_and_unscale_restores_it():
    mixed, x = layer(), torch.randn(2, D_IN)
    base, before = mixed.base_layer(x), mixed(x)
    mixed.scale_layer(0.5)
    torch.testing.assert_close(mixed(x) - base, (before - base) / 2)
    mixed.unscale_layer()
    torch.testing.assert_close(mixed(x), before)


@pytest.mark.parametrize("init", [True, "kaiming", "gaussian"])
def test_a_new_mixture_changes_nothing(init):
    config = MoELoraConfig(r=R, init_lora_weights=init)
    base = nn.Linear(512, D_OUT)
    mixed = MoELoraLinear(base, "default", config, R, 8, context=Given())
    x = torch.randn(2, 512)
    assert torch.equal(mixed(x), base(x))
    lora_A = mixed.moe_lora_experts["default"].lora_A
    assert not torch.equal(lora_A[0], lora_A[1])
    # kaiming_uniform_(a=sqrt(5)): bound sqrt(6 / (6 * fan_in)); gaussian: deviation 1 / r.
    deviation = 1 / R if init == "gaussian" else (1 / 512) ** 0.5 / 3**0.5
    assert lora_A.std().item() == pytest.approx(deviation, rel=0.1)


def test_dropout_acts_in_training_only():
    mixed, x = layer(lora_dropout=0.5), torch.randn(2, 7, D_IN)
    assert not torch.equal(mixed(x), mixed(x))
    mixed.eval()
    assert torch.equal(mixed(x), mixed(x))


def test_dropout_that_is_switched_on_by_itself_spares_the_base_layer():
    mixed, x = layer(lora_dropout=0.5).eval(), torch.randn(2, 7, D_IN)
    experts = mixed.moe_lora_experts["default"]
    mixed.base_layer.requires_grad_(False)
    experts.dropout.train()  # as Monte Carlo dropout does
    torch.manual_seed(0)
    found = mixed(x)
    torch.manual_seed(0)
    added = mixture(experts.dropout(x), experts.lora_A, experts.lora_B, scaling=experts.scaling)
    torch.testing.assert_close(found, mixed.base_layer(x) + added)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_base_with_float32_experts(shape, autocast, tolerance):
    mixed = layer()
    x = torch.randn(shape)
    mixed.context.put({"default": torch.rand(2, E).softmax(-1).requires_grad_()})
    exact = mixed(x)
    mixed.base_layer.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = mixed(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=5e-2, atol=5e-2)
    out.float().square().sum().backward()
    for parameter in mixed.moe_lora_experts.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0
    assert mixed.context.routing.weights["default"].grad.abs().sum() > 0


def given(weights, top_k=None):
    context = Given()
    context.put({"default": weights}, {"default": top_k})
    return context


def expected_of(mixed, x, weights):
    experts = mixed.moe_lora_experts["default"]
    added = mixture(x, experts.lora_A, experts.lora_B, align_weights(weights, x), experts.scaling)
    return mixed.base_layer(x) + added


class Doubled(nn.Linear):
    """A linear layer with a forward pass of its own, as quantized ones have."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked(linear):
    linear.register_forward_hook(lambda module, args, out: 2 * out)
    return linear


def prehooked(linear):
    linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return linear


def patched(linear):
    original = linear.forward
    linear.forward = lambda x: 2 * original(x)
    return linear


BASES = {
    "plain": lambda: nn.Linear(D_IN, D_OUT).requires_grad_(False),
    "without bias": lambda: nn.Linear(D_IN, D_OUT, bias=False).requires_grad_(False),
    "trained": lambda: nn.Linear(D_IN, D_OUT),
    "of a subclass": lambda: Doubled(D_IN, D_OUT).requires_grad_(False),
    "hooked": lambda: hooked(nn.Linear(D_IN, D_OUT).requires_grad_(False)),
    "prehooked": lambda: prehooked(nn.Linear(D_IN, D_OUT).requires_grad_(False)),
    "patched": lambda: patched(nn.Linear(D_IN, D_OUT).requires_grad_(False)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_mixture_is_added_to_any_base_layer(base, shape):
    config = MoELoraConfig(r=R, lora_alpha=8, init_lora_weights=False)
    weights = torch.rand(2, E).softmax(-1)
    mixed = MoELoraLinear(base(), "default", config, R, 8, context=given(weights))
    x = torch.randn(shape, requires_grad=True)
    out, expected = mixed(x), expected_of(mixed, x, weights)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    parameters = [x, *(p for p in mixed.parameters() if p.requires_grad)]
    grad = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, parameters, grad),
        torch.autograd.grad(expected, parameters, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_layer_given_top_k_computes_the_same(shape):
    config = MoELoraConfig(r=R, lora_alpha=8, init_lora_weights=False)
    weights = torch.tensor([[0.0, 0.3, 0.7], [0.6, 0.0, 0.4]]).requires_grad_()
    mixed = MoELoraLinear(
        BASES["plain"](), "default", config, R, 8, context=given(weights, top_k=2)
    )
    x = torch.randn(shape)
    out = mixed(x)
    torch.testing.assert_close(out, expected_of(mixed, x, weights), rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert (weights.grad != 0).tolist() == (weights != 0).tolist()


def test_an_input_without_tokens_or_by_keyword_is_taken_as_by_a_linear_layer():
    config = MoELoraConfig(r=R, init_lora_weights=False)
    for weights, k in ((torch.rand(2, E), None), (torch.eye(3)[:2], 1)):
        mixed = MoELoraLinear(
            BASES["plain"](), "default", config, R, 8, context=given(weights, top_k=k)
        )
        out = mixed(torch.randn(2, 0, D_IN).requires_grad_())
        assert out.shape == (2, 0, D_OUT)
        out.sum().backward()
        x = torch.randn(2, 7, D_IN)
        assert torch.equal(mixed(input=x), mixed(x))


def test_two_active_adapters_add_up():
    config = MoELoraConfig(r=R, lora_alpha=8, init_lora_weights=False)
    context = Given()
    mixed = MoELoraLinear(BASES["plain"](), "default", config, R, 8, context=context)
    mixed.update_layer("other", config, 2, 8)
    weights = {name: torch.rand(2, E).softmax(-1) for name in ("default", "other")}
    context.put(weights)
    x = torch.randn(2, 7, D_IN)
    outputs = []
    for active in (["default"], ["other"], ["default", "other"]):
        mixed.set_adapter(active)
        outputs.append(mixed(x) - mixed.base_layer(x))
    torch.testing.assert_close(outputs[2], outputs[0] + outputs[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1])


CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "1x1 without bias": {"kernel_size": 1, "bias": False},
    "reflecting": {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "reflect"},
    "dilated": {"kernel_size": 3, "dilation": 2},
}


def conv(**kwargs) -> MoELoraConv2d:
    config = MoELoraConfig(r=R, lora_alpha=8, init_lora_weights=False)
    base = nn.Conv2d(4, D_OUT, **kwargs)
    return MoELoraConv2d(base, "default", config, R, config.lora_alpha, context=Given())


@pytest.mark.parametrize("kwargs", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("kind", ["sample", "fixed", "uniform"])
def test_a_convolution_equals_one_with_the_weight_of_every_sample_s_mixture(kwargs, kind):
    mixed, x = conv(**kwargs), torch.randn(2, 4, 7, 6)
    weights = {
        "sample": torch.rand(2, E).softmax(-1),
        "fixed": torch.rand(E).softmax(-1),
        "uniform": None,
    }[kind]
    if weights is not None:
        mixed.context.put({"default": weights})
    out = mixed(x)
    for i in range(2):
        own = weights[i] if kind == "sample" else weights
        weight = mixed.base_layer.weight + mixed.get_delta_weight("default", own)
        expected = mixed.base_layer._conv_forward(x[i : i + 1], weight, mixed.base_layer.bias)
        torch.testing.assert_close(out[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_a_uniform_convolution_equals_stock_peft():
    mixed, x = conv(kernel_size=3, padding=1, stride=2), torch.randn(2, 4, 7, 6)
    experts = mixed.moe_lora_experts["default"]
    plain = get_peft_model(
        nn.Sequential(mixed.base_layer),
        LoraConfig(r=E * R, lora_alpha=8 / R / E * (E * R), target_modules=["0"]),
    )
    layer = plain.base_model.model[0]
    layer.lora_A["default"].weight.data = experts.lora_A.detach().flatten(0, 1)
    layer.lora_B["default"].weight.data = experts.lora_B.detach().flatten(1)[..., None, None]
    torch.testing.assert_close(mixed(x), plain(x), rtol=1e-5, atol=1e-5)


def test_token_weights_of_a_convolution_are_those_of_its_positions():
    mixed, x = conv(kernel_size=1), torch.randn(2, 4, 3, 2)
    weights = torch.rand(2, 6, E).softmax(-1).requires_grad_()
    mixed.context.put({"default": weights})
    out = mixed(x)
    for i, place in ((0, 1), (1, 4)):
        mixed.context.put({"default": weights[i : i + 1, place]})
        row, column = divmod(place, 2)
        one = mixed(x[i : i + 1])[0, :, row, column]
        torch.testing.assert_close(out[i, :, row, column], one, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert (weights.grad != 0).all()
    mixed.context.put({"default": weights[:, :5]})
    with pytest.raises(ValueError, match="for 5 tokens"):
        mixed(x)


def test_a_merged_convolution_computes_the_same():
    mixed, x = conv(kernel_size=3), torch.randn(2, 4, 7, 6)
    before, base = mixed(x), mixed.base_layer.weight.clone()
    mixed.merge()
    assert not torch.equal(mixed.base_layer.weight, base)
    torch.testing.assert_close(mixed(x), before, rtol=1e-4, atol=1e-5)
    mixed.unmerge()
    torch.testing.assert_close(mixed.base_layer.weight, base, rtol=1e-5, atol=1e-6)


def test_a_convolution_in_groups_is_an_error():
    with pytest.raises(ValueError, match="got 4 groups"):
        MoELoraConv2d(
            nn.Conv2d(4, 4, 3, groups=4), "default", MoELoraConfig(), R, 8, context=Given()
        )


def test_half_precision_bases_take_experts_of_full_precision():
    mixed, x = conv(kernel_size=3), torch.randn(2, 4, 7, 6)
    mixed.context.put({"default": torch.rand(2, E).softmax(-1)})
    exact = mixed(x)
    mixed.base_layer.to(torch.bfloat16)
    out = mixed(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=5e-2, atol=5e-2)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mixed.moe_lora_experts.parameters())


def test_the_gradient_mask_of_a_convolution():
    mixed, x = conv(kernel_size=3), torch.randn(2, 4, 7, 6, requires_grad=True)
    mixed.context.put({"default": torch.rand(2, E).softmax(-1)})
    experts = list(mixed.moe_lora_experts.parameters())
    expert_grad_mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), [x, *experts])

    out = mixed(x)
    expected = gradients(out)
    routing = mixed.context.routing
    mixed.context.routing = routing.with_grad_mask(expert_grad_mask)
    masked = mixed(x)
    found = gradients(masked)
    torch.testing.assert_close(masked, out)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    mixed.context.routing = routing
    alone = []
    for i in range(2):
        kept = torch.zeros(2, 1, 1, 1)
        kept[i] = 1
        alone.append(gradients(mixed(x) * kept)[1:])
    of_A = sum(g[0] * expert_grad_mask[i].view(-1, 1, 1, 1, 1) for i, g in enumerate(alone))
    of_B = sum(g[1] * expert_grad_mask[i].view(1, -1, 1) for i, g in enumerate(alone))
    torch.testing.assert_close(found[1], of_A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], of_B, rtol=1e-4, atol=1e-4)
