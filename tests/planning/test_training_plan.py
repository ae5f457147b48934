from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_models import tiny_flux
from torch import nn

from moe_lora import MoELoraConfig
from moe_lora.cli import main
from moe_lora.planning import OPTIMIZERS, example_call, model_on_meta, plan_training

pytestmark = pytest.mark.slow

GIB = 2**30
# The layers that the example adapts by default.
ATTENTION_AND_FEED_FORWARD = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "proj_out"),
]


def tiny() -> FluxTransformer2DModel:
    return tiny_flux(guidance=True, joint_attention_dim=24, pooled_projection_dim=8)


def test_flux_fill_with_experts_of_rank_256_needs_69_gib_before_activations() -> None:
    config = MoELoraConfig(
        r=256, target_modules=ATTENTION_AND_FEED_FORWARD, router="three_expert_removal"
    )
    found = plan_training(model_on_meta("black-forest-labs/FLUX.1-Fill-dev"), config)
    assert found.trained_parameters == pytest.approx(3.14e9, rel=0.001)
    constant = found.base + found.adapter + found.optimizer + found.gradients
    assert constant / GIB == pytest.approx(69, abs=0.1)
    assert found.activations is None
    assert found.fits[24] is not None
    assert found.fits[24].base_precision == "nf4"
    assert "activations                unknown" in str(found)


def test_parts_are_those_of_a_real_model_and_its_optimizer() -> None:
    base = tiny()
    model = copy.deepcopy(base).requires_grad_(False)
    config = MoELoraConfig(r=4, target_modules=["to_q"], router="three_expert_removal")
    model.add_adapter(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    sum(p.sum() for p in trained).backward()
    optimizer.step()
    moments = [s for state in optimizer.state.values() for s in state.values() if s.ndim]

    found = plan_training(base, config, base_precision="fp32")
    assert found.trained_parameters == sum(p.numel() for p in trained)
    assert found.adapter == found.gradients == sum(p.numel() * 4 for p in trained)
    assert found.base == sum(p.numel() * 4 for p in base.parameters())
    states = sum(s.numel() * 4 for s in moments)
    # The count of steps is one number for every parameter.
    assert found.optimizer == pytest.approx(states, rel=0.01)
    assert found.layers == 2
    assert not hasattr(base, "moe_router")


def test_precisions_and_optimizers_change_their_own_part_only() -> None:
    model, config = tiny(), MoELoraConfig(r=4, target_modules=["to_q"])
    reference = plan_training(model, config, base_precision="fp32")
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    # The largest weight is made anew in float32.
    for precision, less in (("bf16", 2.0), ("fp8", 3.0), ("int8", 3.0), ("nf4", 4 - 0.5625)):
        found = plan_training(model, config, base_precision=precision)
        saved = less * sum(weights) - 4 * max(weights)
        assert reference.base - found.base == pytest.approx(saved, abs=1)
        assert found.optimizer == reference.optimizer
    for name, uses in OPTIMIZERS.items():
        found = plan_training(model, config, base_precision="fp32", optimizer=name)
        assert found.optimizer == int(uses.state * found.trained_parameters)
        assert found.base == reference.base


def test_the_peak_is_that_of_the_backward_pass_or_of_the_optimizer_step() -> None:
    model, config = tiny(), MoELoraConfig(r=4, target_modules=["to_q"])
    call = example_call(model, 128, 96, batch_size=2, text_tokens=8)
    assert call is not None
    found = plan_training(model, config, call)
    constant = found.base + found.adapter + found.optimizer + found.gradients
    assert found.activations is not None
    assert found.total == constant + max(found.activations, found.optimizer_temporaries)
    assert found.activations > found.optimizer_temporaries
    assert plan_training(model, config).total == constant + found.optimizer_temporaries
    kept = plan_training(model, config, call, checkpointing=False)
    assert kept.activations is not None
    assert kept.activations > found.activations


def test_offloaded_layers_are_on_the_device_one_at_a_time() -> None:
    model, config = tiny(), MoELoraConfig(r=4, target_modules=["to_q"])
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    layers = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    away = 4 * sum(p.numel() for layer in layers for p in layer.parameters())
    largest = max(layer.weight.numel() for layer in layers)
    found = plan_training(model, config, base_precision="fp32", offload=True)
    reference = plan_training(model, config, base_precision="fp32")
    assert found.base == reference.base - away + 4 * largest
    assert found.base < 0.7 * reference.base
    assert found.optimizer == reference.optimizer
    # A quantized one is copied, and made anew; the embedder's is made anew.
    int8 = plan_training(model, config, base_precision="int8", offload=True)
    others = [p.numel() for p in model.parameters()]
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    stays = linear - sum(layer.weight.numel() for layer in layers)
    rest = sum(others) - away // 4 - stays
    widest = model.x_embedder.weight.numel()
    assert int8.base == 4 * rest + stays + max(4 * widest, 5 * largest)


@pytest.mark.parametrize(("precision", "qdata"), [("int8", "Int8"), ("fp8", "Float8")])
def test_the_size_of_a_quantized_base_is_that_of_torchao(precision, qdata) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_flux(num_attention_heads=8, joint_attention_dim=128).to(torch.bfloat16)
    planned = plan_training(
        model, MoELoraConfig(r=4, target_modules=["to_q"]), base_precision=precision
    ).base
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    torchao.quantize_(model, getattr(torchao, f"{qdata}WeightOnlyConfig")())
    stored = 0
    for parameter in model.parameters():
        parts = [getattr(parameter, name, None) for name in ("qdata", "scale")]
        tensors = [part for part in parts if part is not None] or [parameter]
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert planned == pytest.approx(stored + 2 * max(weights), rel=0.05)


def test_what_fits_a_card_fits_with_one_gib_left() -> None:
    model = model_on_meta("FLUX.1-Fill-dev")
    config = MoELoraConfig(r=64, target_modules=["attn.to_q", "attn.to_v"])
    found = plan_training(model, config, cards=(8, 12, 24, 80))
    assert found.fits[8] is None or found.fits[8].memory + GIB <= 8 * GIB
    for card in (12, 24, 80):
        fit = found.fits[card]
        assert fit is not None
        again = MoELoraConfig(r=fit.r, target_modules=["attn.to_q", "attn.to_v"])
        names = {
            "base_precision": fit.base_precision,
            "optimizer": fit.optimizer,
            "offload": fit.offload,
        }
        assert plan_training(model, again, **names).total == fit.memory <= (card - 1) * GIB
    assert found.fits[80].base_precision == "bf16"
    assert found.fits[80].r == 64


def test_unknown_names_raise() -> None:
    config = MoELoraConfig(target_modules=["to_q"])
    with pytest.raises(ValueError, match=r"Expected one of .*'nf4'.*, but got 'fp4'"):
        plan_training(tiny(), config, base_precision="fp4")
    with pytest.raises(ValueError, match=r"Expected one of .*'adamw'.*, but got 'adam'"):
        plan_training(tiny(), config, optimizer="adam")


def test_the_command_plans_for_a_folder(tmp_path, capsys) -> None:
    model = tiny()
    model.save_config(tmp_path / "transformer")
    words = ["plan", str(tmp_path), "--r", "4", "--target_modules", "to_q", "--json"]
    sizes = ["--height", "64", "--width", "64", "--text_tokens", "8"]
    assert main([*words, *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    config = MoELoraConfig(r=4, target_modules=["to_q"])
    call = example_call(model.to(torch.bfloat16), 64, 64, text_tokens=8)
    expected = plan_training(model, config, call).as_dict()
    assert found == json.loads(json.dumps(expected))


@pytest.mark.parametrize("targets", [["all-linear"], [r".*to_(q|v)"], ["to_q", "to_v"]])
def test_the_command_takes_targets_as_peft_does(targets, tmp_path, capsys) -> None:
    tiny().save_config(tmp_path)
    assert main(["plan", str(tmp_path), "--target_modules", *targets]) == 0
    assert "trained parameters in" in capsys.readouterr().out


def test_a_folder_wins_over_a_known_name(tmp_path, monkeypatch) -> None:
    tiny().save_config(tmp_path / "FLUX.1-Fill-dev")
    monkeypatch.chdir(tmp_path)
    assert model_on_meta("FLUX.1-Fill-dev").config.num_layers == 1
    assert model_on_meta("black-forest-labs/FLUX.1-Fill-dev").config.num_layers == 19


def test_a_folder_without_a_model_is_told_in_a_sentence(tmp_path, capsys) -> None:
    assert main(["plan", str(tmp_path)]) == 1
    assert "Expected config.json of a model or a pipeline" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"_class_name": "DDPMScheduler"}')
    assert main(["plan", str(tmp_path)]) == 1
    assert "but it is one of 'DDPMScheduler'" in capsys.readouterr().err
