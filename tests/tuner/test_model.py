from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

import moe_lora
from moe_lora import MoELoraConfig, MoELoraLinear
from moe_lora.families import UNKNOWN


def flux_config(targets, **kwargs) -> MoELoraConfig:
    kwargs = {"r": 4, "router": "three_expert_removal", "init_lora_weights": False, **kwargs}
    return MoELoraConfig(target_modules=targets, **kwargs)


def adapted_layers(model) -> dict[str, MoELoraLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, MoELoraLinear)}


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


class TestInjection:
    def test_diffusers_add_adapter_and_peft_give_the_same_model(
        self, make_flux, make_flux_inputs, flux_targets
    ):
        by_diffusers, inputs = make_flux(), make_flux_inputs()
        by_diffusers.add_adapter(flux_config(flux_targets))
        by_peft = get_peft_model(make_flux(), flux_config(flux_targets))
        state = get_peft_model_state_dict(by_peft)
        result = set_peft_model_state_dict(by_diffusers, state)
        assert not result.unexpected_keys
        by_diffusers.eval(), by_peft.eval()
        assert torch.equal(by_diffusers(**inputs)[0], by_peft(**inputs)[0])

    def test_experts_and_router_are_all_that_trains_and_all_of_it_gets_gradient(
        self, make_flux, make_flux_inputs, flux_targets
    ):
        model = make_flux()
        model.add_adapter(flux_config(flux_targets))
        names = trainable(model)
        assert names == {n for n, _ in model.named_parameters() if "moe_lora_" in n}
        assert any("moe_lora_routers" in n for n in names)
        model(**make_flux_inputs())[0].square().mean().backward()
        for name, parameter in model.named_parameters():
            if name in names:
                assert parameter.grad.abs().sum() > 0, name
                if "lora_A" in name:
                    assert (parameter.grad.flatten(1).abs().sum(1) > 0).all(), name

    def test_every_expert_trains_after_switching_off_on_and_activating(
        self, make_flux, flux_targets
    ):
        model = make_flux()
        model.add_adapter(flux_config(flux_targets))
        names = trainable(model)
        model.disable_adapters()
        assert not trainable(model)
        model.enable_adapters()
        model.set_adapter("default")
        assert trainable(model) == names

    def test_disabling_gives_the_base_model_exactly(
        self, make_flux, make_flux_inputs, flux_targets
    ):
        base, inputs = make_flux(), make_flux_inputs()
        model = get_peft_model(make_flux(), flux_config(flux_targets))
        assert not torch.equal(model(**inputs)[0], base(**inputs)[0])
        with model.disable_adapter():
            assert torch.equal(model(**inputs)[0], base(**inputs)[0])

    @pytest.mark.parametrize(
        ("kwargs", "expected"),
        [
            ({"target_modules": ["first", "second"]}, {"first", "second"}),
            ({"target_modules": ".*(first|head)"}, {"first", "head"}),
            ({"target_modules": "all-linear"}, {"first", "second", "head"}),
            (
                {"target_modules": ["first", "second"], "exclude_modules": ["second"]},
                {"first"},
            ),
            ({"target_modules": ["first"], "modules_to_save": ["head"]}, {"first"}),
        ],
    )
    def test_targets_are_matched_as_peft_matches(self, mlp, kwargs, expected):
        model = get_peft_model(mlp, MoELoraConfig(**kwargs))
        assert set(adapted_layers(model.base_model.model)) == expected

    def test_patterns_set_rank_and_alpha_of_single_layers(self, mlp):
        config = MoELoraConfig(
            r=4,
            lora_alpha=4,
            target_modules=["first", "second"],
            rank_pattern={"second": 2},
            alpha_pattern={"first": 16},
        )
        layers = adapted_layers(get_peft_model(mlp, config).base_model.model)
        experts = {name: layer.moe_lora_experts["default"] for name, layer in layers.items()}
        assert experts["first"].lora_A.shape == (3, 4, 6)
        assert experts["second"].lora_A.shape == (3, 2, 10)
        assert experts["first"].scaling == 4.0
        assert experts["second"].scaling == 2.0

    def test_unsupported_layers_raise(self, mlp):
        with pytest.raises(ValueError, match="target_modules"):
            get_peft_model(mlp, MoELoraConfig())
        conv = torch.nn.Sequential(torch.nn.Conv1d(3, 3, 1))
        with pytest.raises(TypeError, match=r"'0' to be an nn.Linear or nn.Conv2d, but got Conv1d"):
            get_peft_model(conv, MoELoraConfig(target_modules=["0"]))
        with pytest.raises(ValueError, match="register_router"):
            get_peft_model(mlp, MoELoraConfig(target_modules=["first"], router="nobody"))

    def test_a_sequential_model_still_calls_its_layers_in_turn(self):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
        x = torch.rand(2, 4)
        expected = model(x)
        assert torch.equal(get_peft_model(model, MoELoraConfig(target_modules=["0"]))(x), expected)

    def test_a_router_needs_no_model_config_when_its_width_is_given(self, make_mlp):
        kwargs = {"target_modules": ["first"], "router": "three_expert_removal"}
        with pytest.raises(ValueError, match="input_dim"):
            get_peft_model(make_mlp(), MoELoraConfig(**kwargs))
        model = get_peft_model(
            make_mlp(), MoELoraConfig(router_kwargs={"input_dim": 6, "hidden_dim": 8}, **kwargs)
        )
        moe_lora.set_router_inputs(model, mask=torch.ones(1, 1, 16, 16), grid_size=(1, 4))
        assert model(torch.rand(2, 4, 6)).shape == (2, 4, 2)


class TestRouting:
    def test_a_batch_equals_its_samples_one_by_one(self, make_flux, make_flux_inputs, flux_targets):
        model = make_flux().double().eval()
        model.add_adapter(flux_config(flux_targets))
        inputs = {k: v.double() for k, v in make_flux_inputs(batch=3).items()}
        whole = model(**inputs)[0]
        for i in range(3):
            one = {k: v if k.endswith("ids") else v[i : i + 1] for k, v in inputs.items()}
            torch.testing.assert_close(model(**one)[0], whole[i : i + 1], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("text", [5, 24])
    def test_token_weights_equal_sample_weights_when_all_tokens_agree(
        self, make_flux, make_flux_inputs, flux_targets, text
    ):
        model = make_flux()
        model.add_adapter(flux_config(flux_targets))
        inputs = make_flux_inputs(text=text)
        weights = torch.rand(2, 3).softmax(-1)
        with moe_lora.route(model, weights):
            by_sample = model(**inputs)[0]
        with moe_lora.route(model, weights[:, None].expand(2, 24, 3)):
            by_token = model(**inputs)[0]
        torch.testing.assert_close(by_token, by_sample, rtol=1e-5, atol=1e-5)

    def test_streams_follow_the_module_path(self):
        streams = {
            "transformer_blocks.0.attn.to_q": "image",
            "transformer_blocks.0.attn.to_add_out": "text",
            "transformer_blocks.0.ff_context.net.2": "text",
            "transformer_blocks.0.norm1_context.linear": "text",
            "single_transformer_blocks.0.attn.to_q": "joint",
            "single_transformer_blocks.11.proj_mlp": "joint",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "text",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q": "image",
            "context_embedder": "text",
        }
        assert {path: UNKNOWN.stream(path) for path in streams} == streams

    def test_the_router_reads_the_mask_of_flux_fill_inputs(
        self, make_flux, make_flux_inputs, flux_targets
    ):
        model = make_flux().eval()
        model.add_adapter(flux_config(flux_targets))
        inputs = make_flux_inputs()
        model(**inputs)
        routed = moe_lora.current_routing(model).weights
        assert not torch.allclose(routed[0], routed[1])
        other = dict(inputs, hidden_states=inputs["hidden_states"].clone())
        other["hidden_states"][..., 128:] = 1.0
        model(**other)
        assert not torch.allclose(moe_lora.current_routing(model).weights, routed)

    def test_without_a_mask_the_error_says_what_to_do(
        self, make_flux, make_flux_inputs, flux_targets
    ):
        model = make_flux(64)
        model.add_adapter(flux_config(flux_targets))
        inputs = make_flux_inputs(in_channels=64)
        with pytest.raises(ValueError, match=r"set_router_inputs\(model, mask=mask\)"):
            model(**inputs)
        moe_lora.set_router_inputs(model, mask=torch.rand(2, 1, 64, 96))
        assert model(**inputs)[0].isfinite().all()

    def test_a_nine_channel_unet_routes_by_itself(self):
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=9,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        unet.add_adapter(flux_config(["to_q", "to_k", "to_v"]))
        sample = torch.randn(2, 9, 8, 8)
        sample[:, 4] = 0.0
        sample[1, 4, 2:6, 2:6] = 1.0
        out = unet(sample, timestep=10, encoder_hidden_states=torch.randn(2, 3, 12)).sample
        weights = moe_lora.current_routing(unet).weights
        assert weights.shape == (2, 3)
        assert not torch.allclose(weights[0], weights[1])
        out.square().mean().backward()
        router = moe_lora.routing.control.routed_module(unet).moe_router
        assert all(p.grad is not None for p in router.parameters())

    def test_router_arithmetic_stays_in_float32_in_a_bfloat16_model(
        self, make_flux, make_flux_inputs, flux_targets
    ):
        model = make_flux().eval()
        model.add_adapter(flux_config(flux_targets))
        inputs = make_flux_inputs()
        exact = model(**inputs)[0]
        model.to(torch.bfloat16)
        half = {k: v if k.endswith("ids") else v.bfloat16() for k, v in inputs.items()}
        out = model(**half)[0]
        assert moe_lora.current_routing(model).weights.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in model.moe_router.parameters())
        assert (out.float() - exact).norm() / exact.norm() < 0.05

    def test_one_adapter_routes_while_another_is_uniform(
        self, make_flux, make_flux_inputs, flux_targets
    ):
        model, inputs = make_flux().eval(), make_flux_inputs()
        model.add_adapter(flux_config(flux_targets), adapter_name="routed")
        with pytest.warns(UserWarning, match="peft_config"):
            model.add_adapter(
                flux_config(flux_targets, router=None, num_experts=2), adapter_name="plain"
            )
        outputs = {}
        for name in ("routed", "plain"):
            model.set_adapter(name)
            outputs[name] = model(**inputs)[0]
            assert (moe_lora.current_routing(model, name) is None) == (name == "plain")
        model.set_adapter(["routed", "plain"])
        assert model(**inputs)[0].isfinite().all()
        assert not torch.allclose(outputs["routed"], outputs["plain"])


class TestSaving:
    def test_a_saved_model_loads_exactly_under_any_adapter_name(
        self, make_flux, make_flux_inputs, flux_targets, tmp_path
    ):
        inputs = make_flux_inputs()
        model = get_peft_model(make_flux(), flux_config(flux_targets)).eval()
        with torch.no_grad():
            for p in model.base_model.model.moe_router.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(tmp_path)
        keys = load_file(tmp_path / "adapter_model.safetensors").keys()
        assert not any("default" in key for key in keys)
        expected = model(**inputs)[0]
        for kwargs in (
            {},
            {"adapter_name": "other"},
            {"low_cpu_mem_usage": True},
            {"is_trainable": True},
        ):
            loaded = PeftModel.from_pretrained(make_flux(), tmp_path, **kwargs).eval()
            assert torch.equal(loaded(**inputs)[0], expected), kwargs
            assert bool(trainable(loaded)) == kwargs.get("is_trainable", False)

    def test_a_pipeline_style_load_needs_no_routing_code(
        self, make_flux, make_flux_inputs, flux_targets, tmp_path
    ):
        model = get_peft_model(make_flux(), flux_config(flux_targets)).eval()
        model.save_pretrained(tmp_path)
        transformer = make_flux().eval()
        PeftModel.from_pretrained(transformer, tmp_path)
        assert torch.equal(transformer(**make_flux_inputs())[0], model(**make_flux_inputs())[0])

    def test_modules_to_save_travel_along(self, make_mlp, tmp_path):
        config = MoELoraConfig(target_modules=["first"], modules_to_save=["head"])
        model = get_peft_model(make_mlp(), config)
        with torch.no_grad():
            model.base_model.model.head.modules_to_save["default"].weight.fill_(0.5)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_mlp(), tmp_path)
        x = torch.rand(2, 6)
        torch.testing.assert_close(loaded(x), model(x))

    def test_a_router_that_is_not_registered_cannot_be_loaded_silently(self, make_mlp, tmp_path):
        class Local(moe_lora.Router):
            def logits(self, inputs):
                return torch.zeros(inputs.batch_size, 3)

        model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
        moe_lora.attach_router(model, Local())
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="register_router"):
            PeftModel.from_pretrained(make_mlp(), tmp_path)


class TestSeveralAdapters:
    def test_adapters_are_added_switched_and_deleted(
        self, make_flux, make_flux_inputs, flux_targets
    ):
        inputs = make_flux_inputs()
        model = get_peft_model(make_flux(), flux_config(flux_targets)).eval()
        first = model(**inputs)[0]
        model.add_adapter("second", flux_config(["to_q", "proj_mlp"]))
        assert torch.equal(model(**inputs)[0], first)
        assert not any(".second." in name for name in trainable(model))
        model.set_adapter("second")
        assert not any(".default." in name for name in trainable(model))
        assert not torch.equal(model(**inputs)[0], first)
        model.set_adapter("default")
        assert torch.equal(model(**inputs)[0], first)
        model.delete_adapter("second")
        assert not any(".second." in name for name in model.state_dict())
        assert torch.equal(model(**inputs)[0], first)

    def test_all_linear_does_not_adapt_a_router(self, make_flux, make_flux_inputs):
        model = get_peft_model(make_flux(), flux_config("all-linear"))
        model.add_adapter("second", flux_config("all-linear"))
        assert not any("moe_router" in name for name in adapted_layers(model))

    def test_unloading_leaves_the_base_model(self, make_flux, make_flux_inputs, flux_targets):
        base, inputs = make_flux(), make_flux_inputs()
        model = get_peft_model(make_flux(), flux_config(flux_targets)).unload()
        assert model.state_dict().keys() == base.state_dict().keys()
        assert not model._forward_pre_hooks
        assert torch.equal(model(**inputs)[0], base(**inputs)[0])

    def test_peft_reports_status(self, make_flux, flux_targets):
        model = get_peft_model(make_flux(), flux_config(flux_targets))
        status = get_model_status(model)
        assert status.enabled is True
        assert status.active_adapters == ["default"]
        assert status.requires_grad == {"default": True}
        assert status.peft_types == {"default": "MOE_LORA"}
        assert len(get_layer_status(model)) == len(adapted_layers(model))


class TestCopies:
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_a_copy_routes_by_its_own_router(self, make_flux, make_flux_inputs, flux_targets, how):
        model, inputs = make_flux().eval(), make_flux_inputs()
        model.add_adapter(flux_config(flux_targets))
        before = model(**inputs)[0]
        clone = how(model)
        assert torch.equal(clone(**inputs)[0], before)
        with torch.no_grad():
            for parameter in clone.moe_router.parameters():
                parameter.add_(1.0)
            clone.moe_router.moe_lora_routers["default"].router[3].bias[0] += 3.0
        assert not torch.equal(clone(**inputs)[0], before)
        assert torch.equal(model(**inputs)[0], before)
        moe_lora.set_routing_mode(clone, "uniform")
        assert not torch.equal(clone(**inputs)[0], before)
        assert torch.equal(model(**inputs)[0], before)


class TestOffloading:
    def test_a_model_whose_weights_are_away_until_used_routes_alike(
        self, make_flux, make_flux_inputs, flux_targets
    ):
        from accelerate import cpu_offload

        model, inputs = make_flux().eval(), make_flux_inputs()
        model.add_adapter(flux_config(flux_targets))
        with torch.no_grad():
            expected = model(**inputs)[0]
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert all(p.is_meta for p in model.moe_router.parameters())
            assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.slow
class TestCompile:
    @pytest.mark.parametrize("mode", ["routed", "uniform"])
    def test_a_compiled_model_computes_and_learns_the_same(self, make_flux, make_flux_inputs, mode):
        model = make_flux().eval()
        model.add_adapter(flux_config(["to_q", "norm1.linear", "proj_mlp"]))
        moe_lora.set_routing_mode(model, mode)
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
        for batch in (2, 3):
            inputs = make_flux_inputs(batch=batch)
            outputs = [m(**inputs)[0] for m in (model, compiled)]
            torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
            for out in outputs:
                out.square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
            if p.grad is None:
                assert q.grad is None, name
            else:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
