from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_lora
from moe_lora import MoELoraConfig, RouterInputs
from moe_lora.export.fixed_weights import (
    weights_for,
    weights_for_checkpoint,
    weights_for_model,
)
from moe_lora.export.to_lora import export_lora


def one(inputs):
    return {k: v[:1] if k not in ("img_ids", "txt_ids") else v for k, v in inputs.items()}


def chosen(model, weights=None, inputs=None):
    return weights_for_model(model, weights, adapter_name="default", inputs=inputs)


class PerToken(moe_lora.Router):
    def logits(self, inputs: RouterInputs):
        return torch.zeros(*inputs.hidden_states.shape[:2], 3)


class TestWhatIsFixed:
    def test_without_a_router_the_experts_are_equal(self, make_mlp):
        model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
        weights, source = chosen(model)
        assert source == "fixed"
        torch.testing.assert_close(weights, torch.ones(3) / 3)

    def test_a_fixed_router_says_what_it_says(self, make_mlp):
        config = MoELoraConfig(
            target_modules=["first"], router="fixed", router_kwargs={"weights": [0.5, 0.5, 0.0]}
        )
        weights, _ = chosen(get_peft_model(make_mlp(), config))
        torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0.0]))
        weights, _ = weights_for_checkpoint(None, config)
        torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0.0]))

    def test_uniform_mode_fixes_what_a_router_does_not(self, flux):
        moe_lora.set_routing_mode(flux, "uniform")
        torch.testing.assert_close(chosen(flux).weights, torch.ones(3) / 3)

    def test_an_input_dependent_routing_is_never_averaged_silently(self, flux, tmp_path):
        with pytest.raises(ValueError, match="computes them from the input") as caught:
            export_lora(flux, tmp_path)
        for choice in ("expert's name", '"uniform"', '"mean"', "weights_for"):
            assert choice in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        config = flux.peft_config["default"]
        with pytest.raises(ValueError, match="ThreeExpertRemovalRouter computes them from the"):
            weights_for_checkpoint(None, config)


class TestWhatIsGiven:
    @pytest.mark.parametrize("weights", [[0.5, 0.2, 0.3], torch.tensor([0.5, 0.2, 0.3])])
    def test_numbers(self, flux, weights):
        got = chosen(flux, weights)
        assert got.source == "given"
        torch.testing.assert_close(got.weights, torch.tensor([0.5, 0.2, 0.3]))

    def test_words(self, flux):
        assert chosen(flux, "completion_expert").weights.tolist() == [0, 0, 1]
        torch.testing.assert_close(chosen(flux, "uniform").weights, torch.ones(3) / 3)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([0.5, 0.5], r"shape \(E=3,\), but got \(2,\)"),
            (torch.ones(2, 3), r"got \(2, 3\)"),
            ([0.0, 0.0, 0.0], "not all 0"),
            ([float("nan"), 0.0, 1.0], "finite"),
            ("detail_expert", "The experts are"),
        ],
    )
    def test_what_does_not_fit(self, flux, weights, message):
        with pytest.raises(ValueError, match=message):
            chosen(flux, weights)


class TestMean:
    @torch.no_grad()
    def test_it_is_that_of_the_recorded_statistics(self, flux, make_flux_inputs):
        seen = []
        for batch in (2, 3):
            flux(**make_flux_inputs(batch))
            seen.append(moe_lora.current_routing(flux).weights)
        got = chosen(flux, "mean")
        assert got.source == "mean"
        torch.testing.assert_close(got.weights, torch.cat(seen).mean(0))

    def test_nothing_recorded_is_an_error(self, flux):
        with pytest.raises(ValueError, match="none were recorded"):
            chosen(flux, "mean")
        with pytest.raises(ValueError, match="a checkpoint holds no routing statistics"):
            weights_for_checkpoint("mean", flux.peft_config["default"])


class TestFor:
    @torch.no_grad()
    def test_it_is_what_the_router_says_of_the_call(self, flux, make_flux_inputs):
        inputs = one(make_flux_inputs())
        weights = weights_for(flux, **inputs)
        flux(**inputs)
        torch.testing.assert_close(weights, moe_lora.current_routing(flux).weights[0])
        assert weights.shape == (3,)
        assert len(set(weights.tolist())) == 3
        got = chosen(flux, "for", inputs)
        assert got.source == "for"
        torch.testing.assert_close(got.weights, weights)

    def test_it_depends_on_the_mask(self, flux, make_flux_inputs):
        inputs, large = one(make_flux_inputs()), torch.zeros(1, 1, 64, 96)
        large[..., 4:60, 4:92] = 1
        small = torch.zeros(1, 1, 64, 96)
        small[..., 30:34, 30:34] = 1
        picture = torch.full((1, 3, 64, 96), 0.5)
        by_mask = [weights_for(flux, mask=m, image=picture, **inputs) for m in (large, small)]
        assert [int(w.argmax()) for w in by_mask] == [1, 2]

    def test_a_plain_flux_gets_its_mask_from_the_caller(self, make_flux, make_flux_inputs):
        config = MoELoraConfig(target_modules=["to_q"], router="three_expert_removal")
        model = get_peft_model(make_flux(64), config)
        inputs = one(make_flux_inputs(in_channels=64))
        with pytest.raises(ValueError, match="needs a mask"):
            weights_for(model, **inputs)
        mask = torch.ones(1, 1, 64, 96)
        given = weights_for(model, mask=mask, **inputs)
        moe_lora.set_router_inputs(model, mask=mask)
        torch.testing.assert_close(weights_for(model, **inputs), given)

    def test_it_leaves_no_trace(self, flux, make_flux_inputs):
        flux.train()
        router = flux.base_model.model.moe_router.moe_lora_routers["default"]
        router.extractor.eval()
        modes = [m.training for m in router.modules()]
        first, second = (weights_for(flux, **one(make_flux_inputs())) for _ in range(2))
        assert torch.equal(first, second)  # without dropout, though the model trains
        assert [m.training for m in router.modules()] == modes
        assert moe_lora.routing_stats(flux).usage == [0, 0, 0]
        assert not first.requires_grad

    def test_a_batch_is_refused(self, flux, make_flux_inputs):
        with pytest.raises(ValueError, match=r"per sample, in the shape \(2, 3\)"):
            weights_for(flux, **make_flux_inputs())

    def test_token_weights_are_refused(self, flux, make_flux_inputs):
        moe_lora.attach_router(flux, PerToken())
        with pytest.raises(ValueError, match="per token"):
            weights_for(flux, **one(make_flux_inputs()))

    def test_inputs_and_the_word_belong_together(self, flux, make_flux_inputs):
        with pytest.raises(ValueError, match="Expected `inputs` together with"):
            chosen(flux, "for")
        with pytest.raises(ValueError, match="Expected `inputs` together with"):
            chosen(flux, "mean", one(make_flux_inputs()))

    def test_without_a_router_nobody_answers(self, make_mlp):
        model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
        with pytest.raises(ValueError, match="to have a router"):
            weights_for(model, torch.zeros(1, 6))

    def test_an_image_needs_its_mask(self, flux, make_flux_inputs):
        with pytest.raises(ValueError, match="Expected `mask` together with `image`"):
            weights_for(flux, image=torch.zeros(1, 3, 8, 8), **one(make_flux_inputs()))
