from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from peft import PeftModel, get_peft_model

import moe_lora
from moe_lora import MoELoraConfig, RemovalLoss
from moe_lora.routing.lookup import routing_state


@moe_lora.register_router("reads_mean")
class ReadsMean(moe_lora.Router):
    """Route by the mean of the first channel; a router as a user would write one."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()) * gain)

    def logits(self, inputs):
        signal = inputs.hidden_states[..., 0].mean(1, keepdim=True)
        return self.gain * torch.cat([signal, -signal, torch.zeros_like(signal)], dim=1)


@pytest.fixture
def model(make_mlp):
    config = MoELoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    return get_peft_model(make_mlp(), config)


X = torch.linspace(-1, 1, 48).view(2, 4, 6)
ONE_HOT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


def test_precedence_is_route_then_mode_then_router(model):
    uniform = model(X)
    moe_lora.attach_router(model, ReadsMean())
    routed = model(X)
    assert not torch.allclose(routed, uniform)
    with moe_lora.route(model, ONE_HOT):
        handed = model(X)
        moe_lora.set_routing_mode(model, "uniform")
        assert torch.equal(model(X), handed)
    assert torch.equal(model(X), uniform)
    moe_lora.set_routing_mode(model, "routed")
    assert torch.equal(model(X), routed)


def test_routes_nest_and_end_with_an_error_too(model):
    uniform = model(X)
    with moe_lora.route(model, ONE_HOT):
        outer = model(X)
        with moe_lora.route(model, ONE_HOT.flip(0)):
            assert not torch.allclose(model(X), outer)
        assert torch.equal(model(X), outer)
    with pytest.raises(KeyError), moe_lora.route(model, ONE_HOT):
        raise KeyError
    assert torch.equal(model(X), uniform)


def test_a_submodule_called_by_itself_is_routed_inside_the_context(model):
    layer = model.base_model.model.first
    with moe_lora.route(model, ONE_HOT):
        inside = layer(X)
    experts = layer.moe_lora_experts["default"]
    expected = layer.base_layer(X) + moe_lora.tuner.mixture(
        X, experts.lora_A, experts.lora_B, ONE_HOT[:, None], experts.scaling
    )
    torch.testing.assert_close(inside, expected)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.rand(2, 2), ValueError, r"E in \[3\], but got \(2, 2\)"),
        (torch.rand(1, 2, 4, 3), ValueError, "shape"),
        (torch.ones(2, 3, dtype=torch.long), TypeError, "floating-point"),
        ([1.0, 0.0, 0.0], TypeError, "floating-point tensor"),
    ],
)
def test_weights_that_cannot_be_used_raise(model, weights, error, message):
    with pytest.raises(error, match=message), moe_lora.route(model, weights):
        pass


def test_weights_for_another_batch_raise_in_the_layer(model):
    with (
        moe_lora.route(model, ONE_HOT),
        pytest.raises(ValueError, match="for the 3 samples"),
    ):
        model(torch.rand(3, 4, 6))


def test_modes_are_checked(model):
    with pytest.raises(ValueError, match="attach_router"):
        moe_lora.set_routing_mode(model, "routed")
    with pytest.raises(ValueError, match=r"\['routed', 'uniform'\], but got 'soft'"):
        moe_lora.set_routing_mode(model, "soft")


def test_the_mode_is_saved_and_the_first_adapter_decides_it(model, make_mlp, tmp_path):
    moe_lora.attach_router(model, ReadsMean())
    moe_lora.set_routing_mode(model, "uniform")
    uniform = model(X)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_mlp(), tmp_path)
    torch.testing.assert_close(loaded(X), uniform)
    assert moe_lora.current_routing(loaded) is None
    moe_lora.set_routing_mode(loaded, "routed")
    assert not torch.allclose(loaded(X), uniform)
    loaded.load_adapter(tmp_path, "second")
    assert not torch.allclose(loaded(X), uniform)
    with pytest.raises(ValueError, match=r"`routing_mode` .* got 'soft'"):
        MoELoraConfig(routing_mode="soft")


def test_the_mode_for_losses_is_that_of_the_document():
    assert (
        moe_lora.routing.routing_mode_for(RemovalLoss(boundary=0, consistency=0, detail=0))
        == "uniform"
    )
    for name in ("boundary", "consistency", "detail"):
        weights = {"boundary": 0.0, "consistency": 0.0, "detail": 0.0, name: 0.5}
        loss = RemovalLoss(**weights, decoder=lambda latents: latents)
        assert moe_lora.routing.routing_mode_for(loss) == "routed"


def test_an_attached_router_routes_learns_saves_and_loads(model, make_mlp, tmp_path):
    from peft import PeftModel

    moe_lora.attach_router(model, ReadsMean(gain=2.0))
    expected = model(X)
    expected.square().sum().backward()
    (gain,) = model.base_model.model.moe_router.parameters()
    assert gain.requires_grad
    assert gain.grad.abs() > 0
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_mlp(), tmp_path)
    assert loaded.peft_config["default"].router == "reads_mean"
    assert loaded.peft_config["default"].router_kwargs == {"gain": 2.0}
    assert torch.equal(loaded(X), expected)


def test_invalid_routers_cannot_be_attached(model):
    with pytest.raises(TypeError, match=r"moe_lora\.Router"):
        moe_lora.attach_router(model, torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="JSON"):
        moe_lora.attach_router(model, ReadsMean(gain=torch.ones(())))
    with pytest.raises(ValueError, match="'other'"):
        moe_lora.attach_router(model, ReadsMean(), adapter_name="other")


def test_router_inputs_are_given_and_forgotten(model):
    moe_lora.attach_router(model, ReadsMean())
    plain = model(X)
    moe_lora.set_router_inputs(model, task_hint="background_only")
    model(X)
    assert torch.equal(
        moe_lora.current_routing(model).weights, torch.tensor([0.0, 1.0, 0.0]).expand(2, 3)
    )
    moe_lora.set_router_inputs(model)
    assert torch.equal(model(X), plain)
    with pytest.raises(ValueError, match="removal_focus"):
        moe_lora.set_router_inputs(model, task_hint="sky_focus")
    mask = torch.ones(1, 1, 8, 8)
    with pytest.raises(ValueError, match="got both"):
        moe_lora.set_router_inputs(model, mask=mask, mask_info=moe_lora.masks.analyze(mask))
    with pytest.raises(ValueError, match="`mask` together with `image`"):
        moe_lora.set_router_inputs(model, image=torch.ones(1, 3, 8, 8))


def test_every_sample_of_a_batch_follows_its_own_hint(model):
    moe_lora.attach_router(model, ReadsMean())
    x = torch.randn(4, 4, 6)
    hints = ["completion_only", None, "removal_only", "background_focus"]
    moe_lora.set_router_inputs(model, task_hint=hints)
    hints[0] = "removal_only"  # copied
    together, weights = model(x), moe_lora.current_routing(model).weights
    for index, hint in enumerate(["completion_only", *hints[1:]]):
        with moe_lora.router_inputs(model, task_hint=hint):
            torch.testing.assert_close(model(x[index : index + 1])[0], together[index])
            assert torch.equal(moe_lora.current_routing(model).weights[0], weights[index])
    assert weights[0].tolist() == [0, 0, 1]
    assert weights[2].tolist() == [1, 0, 0]
    assert weights[1].gt(0).all()


def test_hints_follow_a_batch_that_guidance_repeats(model):
    moe_lora.attach_router(model, ReadsMean())
    moe_lora.set_router_inputs(model, task_hint=["completion_only", "removal_only"])
    x = torch.randn(2, 4, 6)
    model(torch.cat([x, x]))
    assert moe_lora.current_routing(model).weights.argmax(-1).tolist() == [2, 0, 2, 0]
    with pytest.raises(ValueError, match="for the 3 samples of the call"):
        model(torch.randn(3, 4, 6))
    moe_lora.set_router_inputs(model, task_hint=["background_only"])
    model(torch.randn(3, 4, 6))
    assert moe_lora.current_routing(model).weights.argmax(-1).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="got 'sky_only'"):
        moe_lora.set_router_inputs(model, task_hint=["sky_only", None])


def chosen(model):
    """Call the model, and return the expert that every sample got if it is the same for all."""
    model(X)
    (expert,) = moe_lora.current_routing(model).weights.argmax(-1).unique().tolist()
    return expert


def test_router_inputs_act_in_the_context_nest_and_are_restored(model):
    moe_lora.attach_router(model, ReadsMean())
    moe_lora.set_router_inputs(model, task_hint="removal_only")
    with moe_lora.router_inputs(model, task_hint="background_only"):
        assert chosen(model) == 1
        with moe_lora.router_inputs(model, task_hint="completion_only"):
            assert chosen(model) == 2
        assert chosen(model) == 1
        with moe_lora.router_inputs(model):  # replaces what is given outside, as a whole
            model(X)
            assert moe_lora.current_routing(model).weights.gt(0).all()
        moe_lora.set_router_inputs(model, task_hint="completion_only")
        assert chosen(model) == 1
    assert chosen(model) == 2
    with pytest.raises(KeyError), moe_lora.router_inputs(model, task_hint="background_only"):
        raise KeyError
    assert chosen(model) == 2


def test_router_inputs_reach_the_thread_that_opened_the_context_only(model):
    moe_lora.attach_router(model, ReadsMean())
    moe_lora.set_router_inputs(model, task_hint="removal_only")
    both_inside = Barrier(2, timeout=10)

    def request(hint):
        with moe_lora.router_inputs(model, task_hint=hint):
            both_inside.wait()
            found = chosen(model)
            both_inside.wait()
        return found, chosen(model)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(request, ("background_only", "completion_only")))
        with moe_lora.router_inputs(model, task_hint="background_only"):
            elsewhere = pool.submit(chosen, model).result()
    assert found == [(1, 0), (2, 0)]
    assert elsewhere == 0


def test_router_inputs_carry_a_mask(model):
    seen = []

    class Reads(ReadsMean):
        def logits(self, inputs):
            seen.append(inputs.mask_info)
            return super().logits(inputs)

    moe_lora.attach_router(model, Reads())
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    with moe_lora.router_inputs(model, mask=mask):
        model(X)
    model(X)
    assert torch.equal(seen[0].mask[:1], mask)
    assert seen[1] is None


def test_router_inputs_that_cannot_be_used_raise(model):
    mask = torch.ones(1, 1, 8, 8)
    for given, message in (
        ({"task_hint": "sky_focus"}, "removal_focus"),
        ({"mask": mask, "mask_info": moe_lora.masks.analyze(mask)}, "got both"),
        ({"image": torch.ones(1, 3, 8, 8)}, "`mask` together with `image`"),
        ({"timestep_range": (1, 1)}, "timestep_range"),
    ):
        with pytest.raises(ValueError, match=message), moe_lora.router_inputs(model, **given):
            pass


def test_statistics_and_current_routing_follow_the_forward_passes(model):
    moe_lora.attach_router(model, ReadsMean())
    stats = moe_lora.routing_stats(model)
    for _ in range(3):
        model(X)
    decision = moe_lora.current_routing(model)
    assert decision.weights.requires_grad
    assert sum(stats.usage) == 6
    torch.testing.assert_close(
        torch.tensor(stats.mean_weights), decision.weights.detach().mean(0), rtol=1e-5, atol=1e-6
    )
    moe_lora.set_routing_mode(model, "uniform")
    model(X)
    assert moe_lora.current_routing(model) is None
    assert sum(stats.usage) == 6
    with pytest.raises(ValueError, match="'other'"):
        moe_lora.routing_stats(model, "other")


def test_auxiliary_losses_reach_the_router(model):
    moe_lora.attach_router(model, ReadsMean())
    model(X)
    decision = moe_lora.current_routing(model)
    loss = moe_lora.routing.load_balancing_loss(decision.weights) + moe_lora.routing.router_z_loss(
        decision.logits
    )
    loss.backward()
    (gain,) = model.base_model.model.moe_router.parameters()
    assert gain.grad.abs() > 0


def test_a_model_without_an_adapter_is_named(mlp):
    with pytest.raises(ValueError, match="MLP has none"):
        moe_lora.set_routing_mode(mlp, "uniform")


def test_wrappers_are_looked_through(model):
    wrapped = torch.nn.Sequential(torch.nn.Identity(), model)
    moe_lora.set_routing_mode(wrapped, "uniform")
    assert routing_state(model).mode == "uniform"


def test_the_gradient_mask_applies_also_when_backward_comes_later(model):
    experts = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    expert_grad_mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with moe_lora.routing.teach_experts(model, expert_grad_mask):
        masked = model(X)
    plain = model(X)
    torch.testing.assert_close(masked, plain)
    masked[:1].sum().backward()
    for parameter in experts.values():
        assert (parameter.grad != 0).any(dim=2).any(dim=0).tolist() == [True, False, False]
        parameter.grad = None
    plain[:1].sum().backward()
    assert all((p.grad != 0).any(dim=2).any(dim=0).all() for p in experts.values())


@pytest.mark.parametrize(
    ("expert_grad_mask", "message"),
    [(torch.ones(2, 4), r"E in \[3\], but got \(2, 4\)"), (torch.full((2, 3), 0.5), "0 or 1")],
)
def test_invalid_expert_grad_masks_raise(model, expert_grad_mask, message):
    with (
        pytest.raises(ValueError, match=message),
        moe_lora.routing.teach_experts(model, expert_grad_mask),
    ):
        pass


def test_a_checkpointed_block_has_the_same_masked_gradients(
    make_flux, make_flux_inputs, flux_targets
):
    results = []
    for checkpointing in (False, True):
        model = make_flux(layers=2).eval()
        torch.manual_seed(2)
        model.add_adapter(MoELoraConfig(r=2, target_modules=flux_targets, init_lora_weights=False))
        if checkpointing:
            model.enable_gradient_checkpointing()
        with moe_lora.routing.teach_experts(
            model, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        ):
            out = model(**make_flux_inputs())[0]
        out.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert all(g[:, 2].eq(0).all() for n, g in results[-1].items() if "lora_B" in n)
    for name, found in results[1].items():
        torch.testing.assert_close(found, results[0][name], rtol=1e-4, atol=1e-7, msg=name)
