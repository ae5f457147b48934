from __future__ import annotations

import json

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.export import export_lora

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
# What diffusers' loader of kohya's keys does not drop.
BLOCKS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qv]|to_out\.0|add_[qkv]_proj|to_add_out)|norm1\.linear"
    r"|norm1_context\.linear|ff\.net\.(0\.proj|2)|ff_context\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(proj_out|norm\.linear)"
)


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@torch.no_grad()
def output(model, inputs):
    return model(**inputs)[0]


@torch.no_grad()
def mixed(model, inputs, weights=WEIGHTS):
    with moe_lora.route(model, weights):
        return model(**inputs)[0]


def keys(path):
    return sorted(load_file(path))


class TestDiffusers:
    @pytest.mark.parametrize("weights", [WEIGHTS, torch.tensor([0.0, 1.5, -0.5])])
    def test_the_stock_pipeline_gives_the_mixture(
        self, flux, load_flux, make_flux_inputs, tmp_path, weights
    ):
        export_lora(flux, tmp_path, weights)
        loaded = load_flux(tmp_path)
        expected = mixed(flux, make_flux_inputs(), weights)
        torch.testing.assert_close(
            output(loaded, make_flux_inputs()), expected, rtol=1e-5, atol=1e-5
        )

    def test_golden_keys(self, flux, tmp_path):
        report = export_lora(flux, tmp_path / "one.safetensors", WEIGHTS)
        assert report.path == tmp_path / "one.safetensors"
        layers = [
            "context_embedder",
            "proj_out",
            "single_transformer_blocks.0.attn.to_q",
            "single_transformer_blocks.0.attn.to_v",
            "single_transformer_blocks.0.norm.linear",
            "single_transformer_blocks.0.proj_mlp",
            "single_transformer_blocks.0.proj_out",
            "transformer_blocks.0.attn.add_q_proj",
            "transformer_blocks.0.attn.to_out.0",
            "transformer_blocks.0.attn.to_q",
            "transformer_blocks.0.attn.to_v",
            "transformer_blocks.0.ff.net.2",
            "transformer_blocks.0.norm1.linear",
            "x_embedder",
        ]
        assert keys(report.path) == [
            f"transformer.{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"
        ]
        assert sorted(report.ranks) == layers
        assert report.ranks["x_embedder"] == 12
        assert report.ranks["transformer_blocks.0.attn.to_q"] == 6

    def test_a_loader_that_reads_no_header_gives_the_same(
        self, flux, load_flux, make_flux_inputs, tmp_path
    ):
        export_lora(flux, tmp_path / "lora.safetensors", WEIGHTS)
        save_file(load_file(tmp_path / "lora.safetensors"), tmp_path / "bare.safetensors")
        loaded = load_flux(tmp_path / "bare.safetensors")
        torch.testing.assert_close(
            output(loaded, make_flux_inputs()),
            mixed(flux, make_flux_inputs()),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_an_expert_by_name_leaves_the_others_out(
        self, flux, load_flux, make_flux_inputs, tmp_path
    ):
        report = export_lora(flux, tmp_path, "background_expert")
        assert report.ranks["x_embedder"] == 4
        assert report.weights == {
            "removal_expert": 0.0,
            "background_expert": 1.0,
            "completion_expert": 0.0,
        }
        expected = mixed(flux, make_flux_inputs(), torch.eye(3)[1])
        torch.testing.assert_close(
            output(load_flux(tmp_path), make_flux_inputs()), expected, rtol=1e-5, atol=1e-5
        )

    def test_rslora(self, make_flux, mixed_config, load_flux, make_flux_inputs, tmp_path):
        config = mixed_config(target_modules=["to_q", "to_k"], use_rslora=True)
        model = get_peft_model(make_flux(), config).eval()
        export_lora(model, tmp_path, WEIGHTS)
        torch.testing.assert_close(
            output(load_flux(tmp_path), make_flux_inputs()),
            mixed(model, make_flux_inputs()),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_the_root_layer_does_not_stand_for_its_namesakes(
        self, make_flux, mixed_config, load_flux, tmp_path
    ):
        model = get_peft_model(
            make_flux(), mixed_config(target_modules="proj_out", rank_pattern={})
        )
        export_lora(model, tmp_path, WEIGHTS)
        loaded = load_flux(tmp_path)
        adapted = [n for n, m in loaded.named_modules() if isinstance(m, BaseTunerLayer)]
        assert adapted == ["proj_out"]

    @pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
    def test_a_unet_with_every_linear_and_convolution(
        self, make_unet, unet_inputs, load_unet, mixed_config, tmp_path, format
    ):
        unet = make_unet()
        targets = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        ranks = {"to_q": 2, "conv1": 3}
        unet.add_adapter(mixed_config(target_modules=targets, rank_pattern=ranks))
        export_lora(unet, tmp_path / "lora", WEIGHTS, format=format)
        if format == "peft":
            loaded = PeftModel.from_pretrained(make_unet(), tmp_path / "lora").eval()
        else:
            loaded = load_unet(tmp_path / "lora")
        adapted = [
            n.removeprefix("base_model.model.")
            for n, m in loaded.named_modules()
            if isinstance(m, BaseTunerLayer)
        ]
        assert sorted(adapted) == sorted(targets)
        torch.testing.assert_close(
            output(loaded, unet_inputs), mixed(unet, unet_inputs), rtol=1e-5, atol=1e-5
        )


class TestPeft:
    def test_stock_peft_gives_the_mixture(self, flux, make_flux, make_flux_inputs, tmp_path):
        report = export_lora(flux, tmp_path / "lora", WEIGHTS, format="peft")
        assert report.path == tmp_path / "lora"
        loaded = PeftModel.from_pretrained(make_flux(), tmp_path / "lora").eval()
        assert type(loaded.peft_config["default"]).__name__ == "LoraConfig"
        torch.testing.assert_close(
            output(loaded, make_flux_inputs()),
            mixed(flux, make_flux_inputs()),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_golden_keys(self, make_mlp, tmp_path):
        model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
        export_lora(model, tmp_path / "lora", format="peft")
        assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert keys(tmp_path / "lora" / "adapter_model.safetensors") == [
            "base_model.model.first.lora_A.weight",
            "base_model.model.first.lora_B.weight",
        ]

    def test_only_an_earlier_export_is_replaced(self, flux, tmp_path):
        export_lora(flux, tmp_path / "lora", WEIGHTS, format="peft")
        export_lora(flux, tmp_path / "lora", "removal_expert", format="peft")
        (tmp_path / "lora" / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"holds 'notes\.txt'"):
            export_lora(flux, tmp_path / "lora", WEIGHTS, format="peft")
        assert (tmp_path / "lora" / "notes.txt").exists()

    def test_a_file_is_no_folder(self, flux, tmp_path):
        with pytest.raises(ValueError, match="Expected a folder"):
            export_lora(flux, tmp_path / "lora.safetensors", WEIGHTS, format="peft")


class TestKohya:
    def test_the_stock_pipeline_gives_the_mixture(
        self, make_flux, mixed_config, load_flux, make_flux_inputs, tmp_path
    ):
        config = mixed_config(target_modules=BLOCKS)
        model = get_peft_model(make_flux(), config).eval()
        export_lora(model, tmp_path, WEIGHTS, format="kohya")
        loaded = load_flux(tmp_path)
        adapted = [n for n, m in loaded.named_modules() if isinstance(m, BaseTunerLayer)]
        # The loader gives all of q, k and v a LoRA: that of k, which has none, is zero.
        assert len(adapted) == 15
        torch.testing.assert_close(
            output(loaded, make_flux_inputs()),
            mixed(model, make_flux_inputs()),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_golden_keys(self, make_flux, mixed_config, tmp_path):
        config = mixed_config(target_modules=BLOCKS)
        export_lora(get_peft_model(make_flux(), config), tmp_path, format="kohya")
        names = [
            "double_blocks_0_img_attn_proj",
            "double_blocks_0_img_attn_qkv",
            "double_blocks_0_img_mlp_0",
            "double_blocks_0_img_mlp_2",
            "double_blocks_0_img_mod_lin",
            "double_blocks_0_txt_attn_proj",
            "double_blocks_0_txt_attn_qkv",
            "double_blocks_0_txt_mlp_2",
            "double_blocks_0_txt_mod_lin",
            "single_blocks_0_linear2",
            "single_blocks_0_modulation_lin",
        ]
        assert keys(tmp_path / "pytorch_lora_weights.safetensors") == [
            f"lora_unet_{name}.{part}"
            for name in names
            for part in ("alpha", "lora_down.weight", "lora_up.weight")
        ]

    def test_single_blocks_of_the_real_width_convert(self, tmp_path):
        # diffusers' conversion knows this one width, so the layers stand alone.
        parts = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
        model = type("FluxTransformer2DModel", (nn.Module,), {})()
        model.single_transformer_blocks = nn.ModuleList([nn.Module()])
        model.single_transformer_blocks[0].attn = nn.Module()
        for name, width in parts.items():
            parent, _, child = f"single_transformer_blocks.0.{name}".rpartition(".")
            layer = nn.Linear(3072, width, bias=False, device="meta")
            model.get_submodule(parent).add_module(child, layer)
        config = MoELoraConfig(
            target_modules=r".*(to_[qkv]|proj_mlp)",
            r=2,
            lora_alpha=6,
            rank_pattern={"to_k": 1},
            init_lora_weights=False,
        )
        wrapped = get_peft_model(model, config)
        for name, parameter in list(wrapped.named_parameters()):
            if "moe_lora_experts" in name:
                owner, _, child = name.rpartition(".")
                values = torch.randn(parameter.shape) / 50
                setattr(wrapped.get_submodule(owner), child, nn.Parameter(values))
        export_lora(wrapped, tmp_path, WEIGHTS, format="kohya")
        state = FluxPipeline.lora_state_dict(tmp_path)
        x = torch.randn(3, 3072)
        for name in parts:
            path = f"single_transformer_blocks.0.{name}"
            experts = model.get_submodule(path).moe_lora_experts["default"]
            A, B = (state[f"transformer.{path}.lora_{f}.weight"] for f in "AB")
            expected = x @ experts.delta_weight(WEIGHTS).detach().T
            torch.testing.assert_close(x @ A.T @ B.T, expected, rtol=1e-4, atol=1e-5)

    def test_layers_that_diffusers_would_drop_are_an_error(self, flux, tmp_path):
        with pytest.raises(ValueError, match="silently drop 'context_embedder', 'x_embedder'"):
            export_lora(flux, tmp_path, WEIGHTS, format="kohya")
        assert list(tmp_path.iterdir()) == []

    def test_diffusers_does_drop_them(self, tmp_path):
        tensors = {
            "lora_unet_img_in.lora_down.weight": torch.ones(1, 4),
            "lora_unet_img_in.lora_up.weight": torch.ones(6, 1),
        }
        save_file(tensors, tmp_path / "lora.safetensors")
        state = FluxPipeline.lora_state_dict(tmp_path / "lora.safetensors")
        assert not [key for key in state if key.startswith("transformer.")]

    def test_another_family_is_an_error(self, make_mlp, tmp_path):
        model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
        with pytest.raises(ValueError, match=r'format="kohya", but the base model is MLP'):
            export_lora(model, tmp_path, format="kohya")


class TestRank:
    def test_the_full_rank_loses_nothing(self, flux, tmp_path):
        report = export_lora(flux, tmp_path, WEIGHTS, rank=12)
        assert report.relative_error == 0.0
        assert report.ranks["transformer_blocks.0.attn.to_q"] == 6

    def test_the_error_is_that_of_the_written_file(self, flux, tmp_path):
        export_lora(flux, tmp_path / "whole", WEIGHTS)
        report = export_lora(flux, tmp_path / "small", WEIGHTS, rank=3)
        whole = load_file(tmp_path / "whole" / "pytorch_lora_weights.safetensors")
        small = load_file(report.path)
        lost = norm = 0.0
        for layer in report.ranks:
            a, b = (f"transformer.{layer}.lora_{f}.weight" for f in "AB")
            assert small[a].shape[0] == 3
            delta = whole[b] @ whole[a]
            lost += float((delta - small[b] @ small[a]).square().sum())
            norm += float(delta.square().sum())
        assert report.relative_error == pytest.approx((lost / norm) ** 0.5, rel=1e-4)
        assert 0 < report.relative_error < 1
        noted = json.loads(metadata_of(report.path)["moe_lora"])
        assert noted["relative_error"] == report.relative_error

    def test_a_rank_below_one_is_an_error(self, flux, tmp_path):
        with pytest.raises(ValueError, match="Expected `rank` to be >= 1, but got 0"):
            export_lora(flux, tmp_path, WEIGHTS, rank=0)


class TestMetadata:
    @pytest.mark.parametrize("format", ["diffusers", "peft"])
    def test_it_says_what_the_file_is(self, flux, tmp_path, format):
        report = export_lora(flux, tmp_path / "lora", [0.5, 0.25, 0.25], format=format)
        file = report.path / "adapter_model.safetensors" if format == "peft" else report.path
        assert json.loads(metadata_of(file)["moe_lora"]) == {
            "version": moe_lora.__version__,
            "weights": {
                "removal_expert": 0.5,
                "background_expert": 0.25,
                "completion_expert": 0.25,
            },
            "weights_from": "given",
            "base_model": None,
            "base_class": "FluxTransformer2DModel",
            "in_channels": 384,
            "relative_error": 0.0,
        }

    def test_the_report_reads_well(self, flux, tmp_path):
        report = export_lora(flux, tmp_path / "x.safetensors", "removal_expert", rank=2)
        assert str(report).startswith(
            f"{tmp_path / 'x.safetensors'}: 14 layers of rank 2 in the diffusers layout, "
            "removal_expert=1, background_expert=0, completion_expert=0 (expert), relative error 0."
        )


def test_the_dtype_of_the_file(flux, tmp_path):
    report = export_lora(flux, tmp_path, WEIGHTS, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(report.path).values()} == {torch.bfloat16}
    with pytest.raises(TypeError, match="floating-point"):
        export_lora(flux, tmp_path, WEIGHTS, dtype=torch.int8)


def test_an_unknown_format(flux, tmp_path):
    with pytest.raises(ValueError, match="`format` to be one of"):
        export_lora(flux, tmp_path, WEIGHTS, format="a1111")


def test_the_strength_set_by_scale_layer_is_exported(make_mlp, tmp_path):
    model = get_peft_model(
        make_mlp(), MoELoraConfig(target_modules=["first"], init_lora_weights=False)
    )
    first = export_lora(model, tmp_path / "a", format="peft")
    layer = model.base_model.model.first
    layer.scale_layer(0.5)
    second = export_lora(model, tmp_path / "b", format="peft")
    key = "base_model.model.first.lora_B.weight"
    whole, half = (load_file(r.path / "adapter_model.safetensors")[key] for r in (first, second))
    torch.testing.assert_close(half, whole / 2)


def test_modules_trained_whole_are_an_error(make_mlp, tmp_path):
    config = MoELoraConfig(target_modules=["first"], modules_to_save=["head"])
    model = get_peft_model(make_mlp(), config)
    with pytest.raises(ValueError, match="trains \\['head'\\] whole"):
        export_lora(model, tmp_path)
    with pytest.raises(ValueError, match="trains \\['head'\\] whole"):
        moe_lora.save_experts(model, tmp_path)


def test_an_offloaded_model_is_an_error(make_mlp, tmp_path):
    model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"])).to("meta")
    with pytest.raises(ValueError, match=r"'first\.lora_A' is on the meta device"):
        export_lora(model, tmp_path)


def test_paths_are_those_of_the_base_model_under_wrappers(make_mlp, tmp_path):
    model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
    inner = model.base_model.model
    compiled = nn.Module()
    compiled._orig_mod = inner.first
    inner.first = compiled
    report = export_lora(nn.DataParallel(model), tmp_path, format="peft")
    assert list(report.ranks) == ["first"]


class TestWhatIsWritten:
    """Nothing is written that is not whole and finite, and what was there before stays."""

    def check(self, model, path, error, message, **options):
        before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
        with pytest.raises(error, match=message):
            export_lora(model, path, **options)
        assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()} == before
        assert not list(path.parent.rglob(".*"))

    @pytest.mark.parametrize("format", ["diffusers", "peft"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_experts_that_are_not_finite(self, flux, tmp_path, format, value):
        path = tmp_path / ("lora" if format == "peft" else "lora.safetensors")
        export_lora(flux, path, WEIGHTS, format=format)
        with torch.no_grad():
            flux.base_model.model.x_embedder.moe_lora_experts["default"].lora_A[0, 0, 0] = value
        message = "finite weights to export, but those of 'x_embedder' hold NaN or inf"
        self.check(flux, path, ValueError, message, weights=WEIGHTS, format=format)
        # The expert that is whole can still be taken.
        export_lora(flux, path, "background_expert", format=format)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
    def test_a_dtype_that_is_too_narrow(self, flux, tmp_path, dtype):
        with torch.no_grad():
            flux.base_model.model.x_embedder.moe_lora_experts["default"].lora_B *= 1e7
        path, message = tmp_path / "lora.safetensors", f"within the range of {dtype}, up to"
        self.check(flux, path, ValueError, message, weights=WEIGHTS, dtype=dtype)

    def test_a_failure_while_writing(self, flux, tmp_path, monkeypatch):
        export_lora(flux, tmp_path / "lora", WEIGHTS, format="peft")

        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr("peft.LoraConfig.save_pretrained", fail)
        path = tmp_path / "lora"
        self.check(flux, path, OSError, "disk full", weights=[1, 0, 0], format="peft")

    def test_a_place_that_is_taken(self, flux, tmp_path):
        (tmp_path / "folder.safetensors").mkdir()
        self.check(
            flux, tmp_path / "folder.safetensors", ValueError, "is a folder", weights=WEIGHTS
        )
        (tmp_path / "notes.txt").write_text("mine")
        self.check(flux, tmp_path / "notes.txt", ValueError, "is a file", weights=WEIGHTS)


class TestStrength:
    """What acts is what is written, whoever set the strength."""

    @pytest.fixture
    def model(self, make_flux, mixed_config, flux_targets):
        model = make_flux().eval()
        model.add_adapter(mixed_config(target_modules=flux_targets))
        return model

    def check(self, model, load_flux, make_flux, inputs, folder):
        expected = mixed(model, inputs)
        export_lora(model, folder / "lora.safetensors", WEIGHTS)
        export_lora(model, folder / "small.safetensors", WEIGHTS, rank=12)
        export_lora(model, folder / "peft", WEIGHTS, format="peft")
        for stock in (
            load_flux(folder / "lora.safetensors"),
            load_flux(folder / "small.safetensors"),
            PeftModel.from_pretrained(make_flux(), folder / "peft").eval(),
        ):
            torch.testing.assert_close(output(stock, inputs), expected, rtol=1e-5, atol=1e-5)
        return expected

    @pytest.mark.parametrize("strength", [0.5, 0.0, -1.5])
    def test_set_adapters(self, model, load_flux, make_flux, make_flux_inputs, tmp_path, strength):
        before = mixed(model, make_flux_inputs())
        model.set_adapters(["default"], [strength])
        after = self.check(model, load_flux, make_flux, make_flux_inputs(), tmp_path)
        assert not torch.allclose(before, after, atol=1e-4)

    def test_beside_a_plain_lora(self, model, load_flux, make_flux, make_flux_inputs, tmp_path):
        turbo = LoraConfig(target_modules=["to_q", "proj_out"], init_lora_weights=False)
        model.add_adapter(turbo, adapter_name="turbo")
        model.set_adapters(["default", "turbo"], [0.25, 2.0])
        model.set_adapters(["default"], [0.25])
        self.check(model, load_flux, make_flux, make_flux_inputs(), tmp_path)

    def test_layer_by_layer(self, model, load_flux, make_flux, make_flux_inputs, tmp_path):
        layers = [m for m in model.modules() if isinstance(m, moe_lora.MoELoraLinear)]
        for index, layer in enumerate(layers):
            layer.set_scale("default", 0.1 * index)
            layer.scale_layer(3.0)
        self.check(model, load_flux, make_flux, make_flux_inputs(), tmp_path)
        for layer in layers:
            layer.unscale_layer()
        self.check(model, load_flux, make_flux, make_flux_inputs(), tmp_path)


class TestAnotherNumberOfExperts:
    """An adapter that is not active has nothing to say to an export of another one."""

    @pytest.fixture
    def model(self, make_flux, mixed_config, flux_targets):
        model = make_flux().eval()
        fields = {"target_modules": flux_targets, "router": "three_expert_removal"}
        model.add_adapter(mixed_config(**fields))
        model.add_adapter(
            mixed_config(target_modules=["to_q"], num_experts=2, router="uniform"),
            adapter_name="pair",
        )
        model.set_adapter("default")
        return model

    def test_each_is_exported_by_itself(self, model, load_flux, make_flux_inputs, tmp_path):
        inputs = {
            k: v if k in ("img_ids", "txt_ids") else v[:1] for k, v in make_flux_inputs().items()
        }
        expected = output(model, inputs)
        weights = moe_lora.export.weights_for(model, **inputs)
        export_lora(model, tmp_path / "asked.safetensors", weights)
        export_lora(model, tmp_path / "mean.safetensors", "mean")
        export_lora(model, tmp_path / "for.safetensors", "for", inputs=inputs)
        for name in ("asked", "mean", "for"):
            stock = load_flux(tmp_path / f"{name}.safetensors")
            torch.testing.assert_close(output(stock, inputs), expected, rtol=1e-5, atol=1e-5)
        pair = export_lora(model, tmp_path / "pair.safetensors", adapter_name="pair")
        assert list(pair.weights.values()) == [0.5, 0.5]
        pair = export_lora(model, tmp_path / "one.safetensors", "expert_1", adapter_name="pair")
        assert list(pair.weights.values()) == [0.0, 1.0]
        asked = moe_lora.export.weights_for(model, adapter_name="pair", **inputs)
        torch.testing.assert_close(asked, torch.full((2,), 0.5))
