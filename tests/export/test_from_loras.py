from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.export import export_lora, from_loras, save_experts


@torch.no_grad()
def output(model, inputs):
    return model(**inputs)[0]


def one_hot(model, index, inputs):
    with moe_lora.route(model, torch.eye(3)[index]):
        return output(model, inputs)


def peft_lora(make_flux, folder, **fields):
    """Train (at random) a stock LoRA and save it as PEFT does."""
    model = get_peft_model(make_flux(), LoraConfig(init_lora_weights=False, **fields)).eval()
    model.save_pretrained(folder)
    return model


def diffusers_lora(make_flux, folder, **fields):
    """Save a stock LoRA as a diffusers training script does."""
    model = make_flux().eval()
    model.add_adapter(LoraConfig(init_lora_weights=False, **fields))
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        **_collate_lora_metadata({"transformer": model}),
    )
    return model


def kohya_lora(make_flux, file):
    """Save a LoRA as kohya's trainer does: one dense LoRA for q, k and v together."""
    model = make_flux().eval()
    tensors = {}
    plan = {
        "double_blocks_0_img_attn_qkv": ("transformer_blocks.0.attn.to_{}", 3, "q k v"),
        "double_blocks_0_txt_mlp_2": ("transformer_blocks.0.ff_context.net.2", 2, ""),
        "single_blocks_0_linear2": ("single_transformer_blocks.0.proj_out", 5, ""),
        "img_in": ("x_embedder", 1, ""),
        "final_layer_adaLN_modulation_1": ("norm_out.linear", 1, ""),
    }
    with torch.no_grad():
        for name, (path, rank, parts) in plan.items():
            layers = [model.get_submodule(path.format(p)) for p in parts.split() or [""]]
            down = torch.randn(rank, layers[0].in_features) / 5
            up = torch.randn(sum(layer.out_features for layer in layers), rank) / 5
            alpha = 0.5 * rank + 1
            tensors[f"lora_unet_{name}.lora_down.weight"] = down
            tensors[f"lora_unet_{name}.lora_up.weight"] = up
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
            if name.startswith("final"):
                up = torch.cat(up.chunk(2)[::-1])
            delta = alpha / rank * up @ down
            for layer, rows in zip(
                layers, delta.split([layer.out_features for layer in layers]), strict=True
            ):
                layer.weight += rows
    save_file(tensors, file)
    return model


class TestExactAtOneHotWeights:
    @pytest.mark.parametrize("autocast", [False, True])
    def test_experts_beside_a_base_in_bfloat16(self, make_flux, tmp_path, autocast):
        peft_lora(make_flux, tmp_path / "peft", r=4, lora_alpha=4, target_modules=["to_q"])
        files = {"removal_expert": tmp_path / "peft"}
        model = from_loras(files, make_flux().bfloat16(), autocast_adapter_dtype=autocast)
        experts = model.transformer_blocks[0].attn.to_q.moe_lora_experts["default"]
        tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
        name = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"
        assert experts.lora_A.dtype == (torch.float32 if autocast else torch.bfloat16)
        assert torch.equal(experts.lora_A[0], tensors[name].to(experts.lora_A.dtype))

    def test_files_of_every_layout_side_by_side(self, make_flux, make_flux_inputs, tmp_path):
        inputs = make_flux_inputs()
        stock = [
            peft_lora(
                make_flux,
                tmp_path / "peft",
                r=4,
                lora_alpha=10,
                target_modules=["to_q", "proj_out", "x_embedder"],
                rank_pattern={"to_q": 2},
                alpha_pattern={"^proj_out": 7},
                use_rslora=True,
            ),
            diffusers_lora(
                make_flux,
                tmp_path / "diffusers",
                r=3,
                lora_alpha=8,
                target_modules=["to_q", "to_v", "norm1.linear"],
                rank_pattern={"to_v": 6},
            ),
            kohya_lora(make_flux, tmp_path / "kohya.safetensors"),
        ]
        model = from_loras(
            {
                "removal_expert": tmp_path / "peft",
                "background_expert": tmp_path / "diffusers",
                "completion_expert": tmp_path / "kohya.safetensors",
            },
            make_flux(),
            router="three_expert_removal",
        )
        for index, alone in enumerate(stock):
            torch.testing.assert_close(
                one_hot(model.eval(), index, inputs), output(alone, inputs), rtol=1e-5, atol=1e-5
            )
        assert model.peft_config["default"].router == "three_expert_removal"
        config = model.peft_config["default"]
        layer = model.transformer_blocks[0].attn.to_q.moe_lora_experts["default"]
        assert layer.r == 3
        assert config.experts == ("removal_expert", "background_expert", "completion_expert")

    def test_a_unet_in_kohyas_layout(self, make_unet, unet_inputs, mixed_config, tmp_path):
        unet = make_unet()
        targets = ["to_q", "conv1", "proj_in", "time_emb_proj"]
        unet.add_adapter(mixed_config(target_modules=targets))
        export_lora(unet, tmp_path / "a.safetensors", [0.2, 0.3, 0.5], format="kohya")
        with moe_lora.route(unet, torch.tensor([0.2, 0.3, 0.5])):
            expected = output(unet, unet_inputs)
        built = from_loras({"only": tmp_path / "a.safetensors"}, make_unet())
        torch.testing.assert_close(output(built, unet_inputs), expected, rtol=1e-5, atol=1e-5)

    def test_linear_layers_written_as_pointwise_convolutions(self, make_mlp, tmp_path):
        down, up = torch.randn(2, 6), torch.randn(10, 2)
        tensors = {
            "lora_unet_first.lora_down.weight": down[..., None, None],
            "lora_unet_first.lora_up.weight": up[..., None, None],
        }
        save_file(tensors, tmp_path / "a.safetensors")
        model, x = from_loras({"only": tmp_path / "a.safetensors"}, make_mlp()), torch.randn(3, 6)
        plain = make_mlp()
        with torch.no_grad():
            plain.first.weight += up @ down
        torch.testing.assert_close(model(x), plain(x))


class TestTraining:
    @pytest.fixture
    def model(self, make_flux, tmp_path):
        peft_lora(make_flux, tmp_path / "a", r=2, target_modules=["to_q"])
        peft_lora(make_flux, tmp_path / "b", r=4, target_modules=["to_q", "to_v"])
        files = {name: tmp_path / name for name in "ab"}
        return from_loras(files, make_flux(), router="uniform")

    def test_what_a_file_lacks_can_be_trained(self, model, make_flux_inputs):
        model(**make_flux_inputs())[0].square().sum().backward()
        attention = model.transformer_blocks[0].attn
        for layer in (attention.to_q, attention.to_v):
            grad = layer.moe_lora_experts["default"].lora_B.grad
            assert (grad.abs().amax(dim=0) > 0).all()

    def test_it_saves_and_loads_as_any_mixture(self, model, make_flux, make_flux_inputs, tmp_path):
        folders = save_experts(model, tmp_path / "experts")
        plain = PeftModel.from_pretrained(make_flux(), folders[0]).eval()
        alone = PeftModel.from_pretrained(make_flux(), tmp_path / "a").eval()
        inputs = make_flux_inputs()
        torch.testing.assert_close(output(plain, inputs), output(alone, inputs))


class TestFaults:
    @pytest.fixture
    def good(self, make_flux, tmp_path):
        peft_lora(make_flux, tmp_path / "good", r=2, target_modules=["to_q", "x_embedder"])
        return tmp_path / "good"

    def check(self, model, files, error, message, **options):
        names = [name for name, _ in model.named_modules()]
        hooks = dict(model._forward_pre_hooks)
        grads = [p.requires_grad for p in model.parameters()]
        values = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(error, match=message):
            from_loras(files, model, **options)
        assert [name for name, _ in model.named_modules()] == names
        assert dict(model._forward_pre_hooks) == hooks
        assert [p.requires_grad for p in model.parameters()] == grads
        assert not getattr(model, "_hf_peft_config_loaded", False)
        assert not hasattr(model, "peft_config")
        assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())

    def test_another_input_width(self, good, make_flux, flux, tmp_path):
        # diffusers would widen the plain Flux without a word.
        export_lora(flux, tmp_path / "fill.safetensors", "removal_expert")
        self.check(
            make_flux(64),
            {"a": tmp_path / "fill.safetensors"},
            ValueError,
            r"fit 'x_embedder', whose weight has the shape \(32, 64\), but it is for \(32, 384\). "
            "It was made for a base model of 384 input channels, this one has 64",
        )
        self.check(make_flux(64), {"a": good}, ValueError, "fit 'x_embedder'")

    @pytest.mark.parametrize("kind", ["truncated", "not safetensors", "missing"])
    def test_a_bad_file_beside_a_good_one(self, good, make_flux, tmp_path, kind):
        file = tmp_path / "bad.safetensors"
        whole = (good / "adapter_model.safetensors").read_bytes()
        if kind != "missing":
            file.write_bytes(whole[: len(whole) // 2] if kind == "truncated" else b"x" * 64)
        error = FileNotFoundError if kind == "missing" else ValueError
        self.check(make_flux(), {"a": good, "b": file}, error, "bad.safetensors")

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({}, "but got none"),
            ({"a.weight": torch.ones(2, 2)}, "Expected the keys of a plain LoRA in .*'a.weight'"),
            (
                {"transformer.proj_out.lora_A.weight": torch.ones(1, 32)},
                "the up one is missing",
            ),
            (
                {
                    "transformer.nowhere.lora_A.weight": torch.ones(1, 32),
                    "transformer.nowhere.lora_B.weight": torch.ones(4, 1),
                },
                "it has no 'nowhere'",
            ),
            (
                {
                    "transformer.proj_out.lora_A.weight": torch.ones(1, 32),
                    "transformer.proj_out.lora_B.weight": torch.ones(64, 2),
                },
                r"to be \(r, in\) and \(out, r\), but got \(1, 32\) and \(64, 2\)",
            ),
            (
                {
                    "transformer.proj_out.lora_A.weight": torch.full((1, 32), float("nan")),
                    "transformer.proj_out.lora_B.weight": torch.ones(64, 1),
                },
                "NaN or inf",
            ),
            (
                {
                    "base_model.model.proj_out.lora_A.weight": torch.ones(1, 32),
                    "base_model.model.proj_out.lora_B.weight": torch.ones(64, 1),
                },
                "Expected a adapter_config.json beside",
            ),
        ],
    )
    def test_a_foreign_file(self, make_flux, tmp_path, tensors, message):
        save_file(tensors, tmp_path / "x.safetensors")
        self.check(make_flux(), {"a": tmp_path / "x.safetensors"}, ValueError, message)

    def test_a_folder_of_another_method(self, good, make_flux):
        config = json.loads((good / "adapter_config.json").read_text())
        (good / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
        self.check(make_flux(), {"a": good}, ValueError, "is of a 'LOHA' adapter")

    def test_a_router_that_nobody_registered(self, good, make_flux):
        self.check(make_flux(), {"a": good}, ValueError, "`router` to be one of", router="none")

    def test_a_router_that_cannot_be_built(self, good, make_flux):
        self.check(
            make_flux(),
            {"a": good},
            TypeError,
            "wings",
            router="three_expert_removal",
            router_kwargs={"wings": 2},
        )

    def test_a_failure_after_the_injection(self, good, make_flux, monkeypatch):
        def fail(*args):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(sys.modules["moe_lora.export.from_loras"], "_copy_expert", fail)
        self.check(make_flux(), {"a": good}, RuntimeError, "out of memory")

    def test_no_files(self, make_flux):
        self.check(make_flux(), {}, ValueError, "at least one file")

    def test_an_adapter_name_that_is_taken(self, good, make_flux):
        model = from_loras({"a": good}, make_flux())
        with pytest.raises(ValueError, match="'default' exists"):
            from_loras({"a": good}, model)
        from_loras({"a": good}, model, adapter_name="second")
        assert list(model.peft_config) == ["default", "second"]

    def test_a_peft_model_is_no_base_model(self, good, make_mlp):
        model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
        with pytest.raises(TypeError, match="base model"):
            from_loras({"a": good}, model)


def test_keys_that_do_not_matter_are_left_out_on_request_only(make_flux, tmp_path):
    kohya_lora(make_flux, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["lora_te1_x.lora_down.weight"] = torch.ones(1, 2)
    tensors["lora_te1_x.lora_up.weight"] = torch.ones(2, 1)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"no 'lora_te1_x'.*`skip`"):
        from_loras({"a": tmp_path / "b.safetensors"}, make_flux())
    from_loras({"a": tmp_path / "b.safetensors"}, make_flux(), skip=["lora_te"])
