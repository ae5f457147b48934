"""Exports of a mixture that is not alone in its model."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel
from peft.functional import delete_adapter, set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import moe_lora
from moe_lora import MoELoraConfig, export_lora, from_loras
from moe_lora.export.expert_table import table_of_model

pytestmark = pytest.mark.slow

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
PLAIN = ["to_q", "proj_out", "x_embedder", "norm1.linear", "to_k"]


@torch.no_grad()
def output(model, inputs):
    return model(**inputs)[0]


def other(kind="lora", **fields):
    cls = {"lora": LoraConfig, "loha": LoHaConfig}[kind]
    return cls(target_modules=list(PLAIN), **fields)


@pytest.fixture
def mixture(flux_targets):
    return lambda **fields: MoELoraConfig(
        r=4, lora_alpha=10, target_modules=flux_targets, init_lora_weights=False, **fields
    )


@pytest.fixture
def alone(make_flux, mixture, make_flux_inputs):
    """Adapt a model with the mixture only; its output is what every export must give."""
    model = make_flux().eval()
    torch.manual_seed(7)
    model.add_adapter(mixture(), adapter_name="default")
    with moe_lora.route(model, WEIGHTS):
        return model, output(model, make_flux_inputs())


def experts_of(model):
    return {
        moe_lora.tuner.state_dict.module_paths.bare_path(name, model): parameter
        for name, parameter in model.named_parameters()
        if "moe_lora_" in name
    }


@torch.no_grad()
def copy_experts(source, target):
    theirs = experts_of(target)
    for name, parameter in experts_of(source).items():
        theirs.pop(name).copy_(parameter)
    assert not theirs


def add(model, config, name):
    model.add_adapter(config, adapter_name=name)


def after_and_deleted(model, mixture, kind):
    add(model, mixture, "default")
    add(model, other(kind), "turbo")
    delete_adapter(model, "turbo", prefix=f"{'hada' if kind == 'loha' else 'lora'}_")
    set_adapter(model, "default")


def after(model, mixture, kind):
    add(model, mixture, "default")
    add(model, other(kind), "turbo")


def before(model, mixture, kind):
    add(model, other(kind), "turbo")
    add(model, mixture, "default")


def before_and_deleted(model, mixture, kind):
    before(model, mixture, kind)
    delete_adapter(model, "turbo", prefix=f"{'hada' if kind == 'loha' else 'lora'}_")


def between(model, mixture, kind):
    add(model, other(kind), "turbo")
    add(model, mixture, "default")
    add(model, other(kind), "style")


LIVES = [after, after_and_deleted, before, before_and_deleted, between]


def check_export(model, alone, load_flux, make_flux, make_flux_inputs, folder):
    """Compare layers and outputs in every stock loader with those of the mixture alone."""
    source, expected = alone
    layers = sorted(table_of_model(source).layers)
    report = export_lora(model, folder / "lora.safetensors", WEIGHTS)
    assert sorted(report.ranks) == layers
    adapter = make_flux().eval()
    adapter.load_lora_adapter(folder / "lora.safetensors", prefix="transformer")
    export_lora(model, folder / "peft", WEIGHTS, format="peft")
    loaded = [
        load_flux(folder / "lora.safetensors"),
        adapter,
        PeftModel.from_pretrained(make_flux(), folder / "peft").eval(),
        from_loras({"only": folder / "lora.safetensors"}, make_flux()).eval(),
    ]
    for stock in loaded:
        tuned = [m for m in stock.modules() if isinstance(m, BaseTunerLayer)]
        assert len([m for m in tuned if "base_layer" in m._modules]) == len(layers)
        torch.testing.assert_close(
            output(stock, make_flux_inputs()), expected, rtol=1e-5, atol=2e-5
        )


@pytest.mark.parametrize("kind", ["lora", "loha"])
@pytest.mark.parametrize("live", LIVES, ids=lambda f: f.__name__)
def test_beside_another_adapter(
    live, kind, mixture, alone, load_flux, make_flux, make_flux_inputs, tmp_path
):
    model = make_flux().eval()
    live(model, mixture(), kind)
    copy_experts(alone[0], model)
    check_export(model, alone, load_flux, make_flux, make_flux_inputs, tmp_path)


def compiled(model):
    blocks = model.transformer_blocks
    blocks[0] = torch.compile(blocks[0])
    model.x_embedder = torch.compile(model.x_embedder)


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda m: "Block" in type(m).__name__)


def parallel(model):
    model.single_transformer_blocks[0].proj_out = torch.nn.DataParallel(
        model.single_transformer_blocks[0].proj_out
    )


@pytest.mark.parametrize("wrap", [compiled, checkpointed, parallel], ids=lambda f: f.__name__)
@pytest.mark.parametrize("live", [after, after_and_deleted], ids=lambda f: f.__name__)
def test_in_wrapped_modules(
    wrap, live, mixture, alone, load_flux, make_flux, make_flux_inputs, tmp_path
):
    model = make_flux().eval()
    live(model, mixture(), "lora")
    copy_experts(alone[0], model)
    wrap(model)
    check_export(model, alone, load_flux, make_flux, make_flux_inputs, tmp_path)


@pytest.mark.parametrize("wrap", [compiled, checkpointed, parallel], ids=lambda f: f.__name__)
def test_a_mixture_is_built_before_its_layers_are_wrapped(wrap, make_flux, alone, tmp_path):
    export_lora(alone[0], tmp_path / "lora.safetensors", WEIGHTS)
    model = make_flux().eval()
    add(model, other(), "turbo")
    from_loras({"only": tmp_path / "lora.safetensors"}, model, adapter_name="mixture")
    table = table_of_model(model, "mixture")
    assert sorted(table.layers) == sorted(table_of_model(alone[0]).layers)

    model = make_flux().eval()
    wrap(model)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="Wrap or compile it after"):
        from_loras({"only": tmp_path / "lora.safetensors"}, model)
    assert [name for name, _ in model.named_modules()] == names
