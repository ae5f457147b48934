from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from peft import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from torch import nn

from moe_lora.export import from_loras
from moe_lora.export.formats.lora_config import (
    ADDS_TENSORS,
    REFUSED,
    USED,
    WITHOUT_EFFECT,
    LoraScaling,
)

CONFIG = "adapter_config.json"


def trained(make_mlp, folder, prepare=None, **fields):
    """Train every tensor of a stock LoRA at random, save it, and return the model."""
    base = make_mlp()
    fields = {"r": 2, "lora_alpha": 5, "target_modules": ["first", "second"], **fields}
    config = LoraConfig(**fields)
    if prepare is not None:
        prepare(base, config)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 3
    model.save_pretrained(folder)
    return model


def difference(make_mlp, model, folder):
    x = torch.randn(5, 6)
    built = from_loras({"only": folder}, make_mlp()).eval()
    with torch.no_grad():
        return float((built(x) - model(x)).abs().max())


def test_every_field_of_peft_has_one_decision():
    decided = [*USED, *ADDS_TENSORS, *WITHOUT_EFFECT, *REFUSED]
    assert sorted(decided) == sorted(field.name for field in dataclasses.fields(LoraConfig))


HARMLESS = {
    "r": {"r": 4},
    "lora_alpha": {"lora_alpha": 0.5},
    "rank_pattern": {"rank_pattern": {"fir.*": 3}},
    "alpha_pattern": {"alpha_pattern": {"second": 9}, "use_rslora": True},
    "use_rslora": {"use_rslora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "lora_dropout": {"lora_dropout": 0.5},
    "velora_config": {"velora_config": VeloraConfig(num_groups=2, init_type="random")},
    "eva_config": {"eva_config": EvaConfig()},
    "qalora_group_size": {"qalora_group_size": 4},
    "target_modules": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": ["second"]},
    "ensure_weight_tying": {"ensure_weight_tying": True},
}


@pytest.mark.parametrize("fields", HARMLESS.values(), ids=HARMLESS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_honored_gives_the_lora_exactly(make_mlp, tmp_path, fields):
    model = trained(make_mlp, tmp_path, **fields)
    assert difference(make_mlp, model, tmp_path) < 1e-5


def with_gradients(base, config):
    for layer in (base.first, base.second):
        layer._peft_loraga_grad = torch.randn_like(layer.weight)


def with_covariance(base, config):
    x = torch.randn(64, 6)
    preprocess_corda(base, config, run_model=lambda: base(x))


INITS = {
    "True": (True, None, {}),
    "False": (False, None, {}),
    "gaussian": ("gaussian", None, {}),
    "Gaussian": ("Gaussian", None, {}),
    "eva": ("eva", None, {}),
    "orthogonal": ("orthogonal", None, {}),
    "mica": ("mica", None, {}),
    "pissa": ("pissa", None, {}),
    "pissa_niter_4": ("pissa_niter_4", None, {}),
    "olora": ("olora", None, {}),
    "OLoRA": ("OLoRA", None, {}),
    "corda": ("corda", with_covariance, {"corda_config": CordaConfig()}),
    "lora_ga": ("lora_ga", with_gradients, {"lora_ga_config": LoraGAConfig()}),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.filterwarnings("ignore")
def test_an_initialization_that_changes_the_base_is_refused(make_mlp, tmp_path, init):
    value, prepare, fields = INITS[init]
    model = trained(make_mlp, tmp_path, prepare, init_lora_weights=value, **fields)
    bare = make_mlp()
    changed = any(
        not torch.equal(getattr(model.base_model.model, name).base_layer.weight, layer.weight)
        for name, layer in (("first", bare.first), ("second", bare.second))
    )
    if changed:
        with pytest.raises(ValueError, match="changed the base weights"):
            from_loras({"only": tmp_path}, bare)
    else:
        assert difference(make_mlp, model, tmp_path) < 1e-5
    assert changed == (init.lower().partition("_n")[0] in ("pissa", "olora", "corda", "lora_ga"))


def test_loftq_which_quantizes_the_base_is_refused():
    config = LoraConfig(init_lora_weights=True, loftq_config={}).to_dict()
    config |= {"init_lora_weights": "loftq", "loftq_config": vars(LoftQConfig())}
    with pytest.raises(ValueError, match="'loftq' changed the base weights"):
        LoraScaling(config, "here")


def test_what_a_later_peft_may_call_an_initialization_is_refused():
    with pytest.raises(ValueError, match="'next' changed the base weights"):
        LoraScaling({"lora_alpha": 1, "init_lora_weights": "next"}, "here")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_own_conversion_is_read(make_mlp, tmp_path, init):
    model = get_peft_model(
        make_mlp(), LoraConfig(r=2, target_modules=["first"], init_lora_weights=init)
    ).eval()
    # As PEFT's guide has it: the initial adapter is saved before the training.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight += 0.3
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert difference(make_mlp, model, tmp_path / "plain") < 1e-5


VARIANTS = {
    "use_dora": True,
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": MontecloraConfig(),
    "layer_replication": [(0, 1), (0, 1)],
    "target_parameters": ["first.weight"],
    "use_bdlora": BdLoraConfig(target_modules_bd_a=["first"]),
    "arrow_config": ArrowConfig(),
    "kasa_config": KasaConfig(),
    "megatron_config": {"hidden": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("place", ["config", "header"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_more_than_a_sum_of_products_is_refused(make_mlp, tmp_path, name, place):
    assert sorted(VARIANTS) == sorted(REFUSED)
    trained(make_mlp, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / CONFIG).read_text())
    LoraConfig(**{name: VARIANTS[name]}).save_pretrained(tmp_path / "variant")
    config[name] = json.loads((tmp_path / "variant" / CONFIG).read_text())[name]
    source = tmp_path / "plain"
    if place == "config":
        (source / CONFIG).write_text(json.dumps(config))
    else:
        tensors = load_file(source / "adapter_model.safetensors")
        tensors = {k.replace("base_model.model", "transformer"): v for k, v in tensors.items()}
        header = json.dumps({f"transformer.{k}": v for k, v in config.items()})
        source = tmp_path / "a.safetensors"
        save_file(tensors, source, {"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match=f"by `{name}` it"):
        from_loras({"only": source}, make_mlp())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "by `use_dora` it"),
        ({"kasa_config": KasaConfig()}, "by `kasa_config` it"),
        ({"lora_bias": True}, "changes the layer's bias"),
        ({"bias": "all"}, "'base_model.model.first.*bias'"),
        ({"bias": "lora_only"}, "'base_model.model.first.*bias'"),
        ({"modules_to_save": ["head"]}, "'base_model.model.head.bias'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_variants_as_peft_saves_them(make_mlp, tmp_path, fields, message):
    trained(make_mlp, tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        from_loras({"only": tmp_path}, make_mlp())


def test_a_lora_bias_of_zero_changes_nothing(make_mlp, tmp_path):
    model = trained(make_mlp, tmp_path, lora_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.zero_()
    model.save_pretrained(tmp_path)
    assert difference(make_mlp, model, tmp_path) < 1e-5


def test_the_indices_of_tokens_come_with_tensors(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.first = nn.Embedding(4, 6), nn.Linear(6, 6)

    config = LoraConfig(target_modules=["first"], trainable_token_indices={"words": [1]})
    get_peft_model(Words(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"words.*trainable_tokens_delta"):
        from_loras({"only": tmp_path}, Words())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"new_method": {"a": 1}}, "known fields of a LoRA in here, but got 'new_method'"),
        ({"lora_alpha": float("nan")}, "a finite number as `lora_alpha`"),
        ({"lora_alpha": "8"}, "a finite number as `lora_alpha`"),
        ({"lora_alpha": True}, "a finite number as `lora_alpha`"),
        ({"lora_alpha": None}, "a finite number as `lora_alpha`"),
        ({"alpha_pattern": {"x": float("inf")}}, r"a finite number as `alpha_pattern\['x'\]`"),
        ({"alpha_pattern": ["x"]}, "`alpha_pattern` in here to be numbers by layer"),
        ({"rank_pattern": {"(": 2}}, "Expected regular expressions in `rank_pattern`"),
    ],
)
def test_fields_of_no_use(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraScaling({"lora_alpha": 1, **fields}, "here")


def test_unknown_fields_that_are_off_do_not_matter():
    scaling = LoraScaling({"lora_alpha": 4, "merge_weights": False, "enable": None}, "")
    assert scaling.of_layer("x", 2, None) == 2


def test_a_rank_that_is_not_the_configs(make_mlp, tmp_path):
    trained(make_mlp, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "rank_pattern": {"second": 3}}))
    with pytest.raises(ValueError, match=r"'second' to have rank 3, as .* says, but got 2"):
        from_loras({"only": tmp_path}, make_mlp())


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.tensor(math.inf)])
def test_alphas_of_the_file_are_finite(alpha):
    with pytest.raises(ValueError, match="a finite number as `alpha of x`"):
        LoraScaling(None, "here").of_layer("x", 2, alpha)
    with pytest.raises(ValueError, match=r"one number as alpha of 'x' in here, .* \(2,\)"):
        LoraScaling(None, "here").of_layer("x", 2, torch.ones(2))


def test_stock_peft_agrees_on_ranks_and_alphas(make_mlp, tmp_path):
    fields = {"rank_pattern": {"first": 5}, "alpha_pattern": {"^second": 3}, "use_rslora": True}
    trained(make_mlp, tmp_path, **fields)
    stock = PeftModel.from_pretrained(make_mlp(), tmp_path).eval()
    assert difference(make_mlp, stock, tmp_path) < 1e-5
