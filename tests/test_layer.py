from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moe_lora import MoELoraConfig, mixture
from moe_lora.handover import WeightSlot
from moe_lora.layer import MoELoraLinear
from moe_lora.mixing import align_weights

E, R, D_IN, D_OUT = 3, 4, 6, 5
SHAPES = {"(B, D)": (2, D_IN), "(B, T, D)": (2, 7, D_IN), "(B, H, W, D)": (2, 3, 4, D_IN)}


def experts_loop(x, lora_A, lora_B, weights, scaling):
    """y = sum_e w_e * s * B_e (A_e x), one sample, one token, one expert at a time."""
    y = torch.zeros(*x.shape[:-1], lora_B.shape[0], dtype=x.dtype)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in x.shape[:-1]]).reshape(
        -1, x.ndim - 1
    ):
        at = tuple(index.tolist())
        for e in range(lora_A.shape[0]):
            if weights is None:
                w = 1 / lora_A.shape[0]
            elif weights.ndim == 2:
                w = weights[at[0], e]
            else:
                token = 0
                for n, i in zip(x.shape[1:-1], at[1:], strict=True):
                    token = token * n + i
                w = weights[at[0], token, e] if x.ndim > 2 else weights[at[0], :, e].mean()
            y[at] += w * scaling * (lora_B[:, e] @ (lora_A[e] @ x[at]))
    return y


def draw(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    lora_A = torch.randn(E, R, D_IN, dtype=dtype)
    lora_B = torch.randn(D_OUT, E, R, dtype=dtype)
    return x, lora_A, lora_B


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["sample", "token", "uniform"])
def test_the_mixture_equals_the_loop_over_experts(dtype, shape, kind, tolerance):
    x, lora_A, lora_B = draw(shape, dtype)
    tokens = max(1, x[0, ..., 0].numel())
    weights = {
        "sample": torch.rand(2, E, dtype=dtype).softmax(-1),
        "token": torch.rand(2, tokens if x.ndim > 2 else 4, E, dtype=dtype).softmax(-1),
        "uniform": None,
    }[kind]
    aligned = None if weights is None else align_weights(weights, x)
    found = mixture(x, lora_A, lora_B, aligned, scaling=0.5)
    expected = experts_loop(x, lora_A, lora_B, weights, 0.5)
    torch.testing.assert_close(found, expected, rtol=tolerance[dtype], atol=tolerance[dtype])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_reach_experts_and_weights(shape):
    x, lora_A, lora_B = draw(shape, torch.float64)
    weights = torch.rand(2, E, dtype=torch.float64).softmax(-1)

    def run(x, lora_A, lora_B, weights):
        return mixture(x, lora_A, lora_B, align_weights(weights, x), 0.5)

    inputs = [t.requires_grad_() for t in (x, lora_A, lora_B, weights)]
    assert torch.autograd.gradcheck(run, inputs)


def test_a_batch_equals_its_samples_one_by_one():
    for shape in SHAPES.values():
        x, lora_A, lora_B = draw(shape, torch.float64)
        w = torch.rand(2, E, dtype=torch.float64)
        whole = mixture(x, lora_A, lora_B, align_weights(w, x))
        for i in range(2):
            one = mixture(x[i : i + 1], lora_A, lora_B, align_weights(w[i : i + 1], x[i : i + 1]))
            torch.testing.assert_close(whole[i : i + 1], one, rtol=1e-10, atol=1e-10)


def test_token_weights_follow_the_stream():
    tokens = torch.rand(2, 4, E)
    mean = tokens.mean(1)
    text = align_weights(tokens, torch.rand(2, 4, D_IN), "text")
    torch.testing.assert_close(text, mean[:, None])
    joint = align_weights(tokens, torch.rand(2, 7, D_IN), "joint")
    torch.testing.assert_close(joint[:, :3], mean[:, None].expand(2, 3, E))
    torch.testing.assert_close(joint[:, 3:], tokens)
    torch.testing.assert_close(align_weights(tokens, torch.rand(2, D_IN), "image"), mean)


def test_weights_that_do_not_fit_raise():
    with pytest.raises(ValueError, match=r"for the 3 samples .* got weights of shape \(2, 3\)"):
        align_weights(torch.rand(2, E), torch.rand(3, 4, D_IN))
    with pytest.raises(ValueError, match=r"for the 5 tokens .* weights for 4 tokens"):
        align_weights(torch.rand(2, 4, E), torch.rand(2, 5, D_IN))


def layer(**kwargs) -> MoELoraLinear:
    config = MoELoraConfig(r=R, lora_alpha=8, init_lora_weights=False, **kwargs)
    base = nn.Linear(D_IN, D_OUT)
    return MoELoraLinear(base, "default", config, R, config.lora_alpha, slot=WeightSlot())


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
    mixed = MoELoraLinear(base, "default", config, R, 8, slot=WeightSlot())
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


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_base_with_float32_experts(shape, autocast, tolerance):
    mixed = layer()
    x = torch.randn(shape)
    mixed.slot.put({"default": torch.rand(2, E).softmax(-1).requires_grad_()})
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
    assert mixed.slot.weights["default"].grad.abs().sum() > 0
