"""The switches of PEFT."""

from __future__ import annotations

import copy
import tempfile
import warnings

import peft
import pytest
import torch
from compatibility.case import ALL, case, layers, trainable
from compatibility.stage import Stage, config_of
from peft import get_layer_status, get_model_status
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter

import moe_lora


@case("PEFT", "inject_adapter_in_model, set_peft_model_state_dict")
def inject_adapter(stage: Stage) -> None:
    model = stage.build()
    for name in stage.order:
        peft.inject_adapter_in_model(config_of(name), model, name)
        stage.put(model, name)
    peft.functional.set_adapter(model, list(ALL))
    stage.check(model, ALL)


@case(
    "PEFT",
    "get_peft_model_state_dict",
    note="Keys are those of the bare model, with other adapters around the layers, too.",
)
def get_state_dict(stage: Stage) -> None:
    for model in (stage.model(), stage.peft_model()):
        for name in ALL:
            if isinstance(model, peft.PeftModel) and name != "mix":
                continue
            found = peft.get_peft_model_state_dict(model, adapter_name=name)
            found = {key.removeprefix("base_model.model."): t for key, t in found.items()}
            expected = stage.state_dict(name)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)


@case("PEFT", "set_adapter")
def functional_set_adapter(stage: Stage) -> None:
    model = stage.model()
    peft.functional.set_adapter(model, ["style"])
    stage.check(model, {"style": 1.0})
    assert not trainable(model)
    peft.functional.set_adapter(model, ["mix"], inference_mode=True)
    stage.check(model, {"mix": 1.0})
    assert not trainable(model)


@case("PEFT", "delete_adapter")
def functional_delete_adapter(stage: Stage) -> None:
    model = stage.model()
    peft.functional.delete_adapter(model, "mix", prefix="moe_lora_")
    stage.check(model, {"turbo": 1.0, "style": 1.0})


@case("PEFT", "set_requires_grad", note="Switches experts and router.")
def set_requires_grad(stage: Stage) -> None:
    for model, call in (
        (stage.model(), peft.functional.set_requires_grad),
        (stage.peft_model(), lambda m, *a, **k: m.set_requires_grad(*a, **k)),
    ):
        call(model, "mix", requires_grad=False)
        assert not trainable(model)
        call(model, ["mix", "turbo"])
        assert trainable(model) == {"mix", "mix router"}


@case("PEFT", "cast_adapter_dtype")
def cast_adapter_dtype(stage: Stage) -> None:
    model = stage.model().to(torch.bfloat16)
    peft.functional.cast_adapter_dtype(model, "mix")
    kept = {p.dtype for name, p in model.named_parameters() if "moe_lora_" in name}
    assert kept == {torch.float32}


@case(
    "PEFT",
    "PeftModel.set_adapter",
    note="Switches the adapters of its own tuner only, as with LoRAs.",
)
def peft_set_adapter(stage: Stage) -> None:
    model = stage.peft_model()
    model.add_adapter("second", config_of("mix", init_lora_weights=True))
    model.set_adapter("second")
    stage.check(model, {"turbo": 1.0, "style": 1.0})
    assert trainable(model) == {"second", "second router"}
    model.set_adapter("mix")
    stage.check(model, ALL)


@case("PEFT", "PeftModel.disable_adapter")
def disable_adapter(stage: Stage) -> None:
    model = stage.peft_model()
    with model.disable_adapter():
        stage.check(model, {})
    stage.check(model, ALL)


@case(
    "PEFT",
    "tuner.disable_adapter_layers, enable_adapter_layers",
    note="Switches the LoRAs beside the mixture as well.",
)
def disable_adapter_layers(stage: Stage) -> None:
    model = stage.peft_model()
    model.base_model.disable_adapter_layers()
    stage.check(model, {})
    assert not trainable(model)
    model.base_model.enable_adapter_layers()
    stage.check(model, ALL)
    assert trainable(model) == {"mix", "mix router"}


@case("PEFT", "supports_lora_conversion, convert_to_lora", "raises", "Use export_lora.")
def lora_conversion(stage: Stage) -> None:
    model = stage.peft_model()
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=4)


@case("PEFT", "PeftModel.save_pretrained, from_pretrained, load_adapter, add_adapter")
def peft_files(stage: Stage) -> None:
    model = stage.peft_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.load_adapter(f"{folder}/mix", "again")
        base = stage.model(without="mix")
        loaded = peft.PeftModel.from_pretrained(base, f"{folder}/mix", "mix").eval()
        again = stage.model(without="mix")
        again = peft.PeftModel.from_pretrained(again, f"{folder}/mix", is_trainable=True).eval()
    model.set_adapter("again")
    stage.check(model, ALL)
    stage.check(loaded, ALL)
    stage.check(again, ALL)
    assert not trainable(loaded)
    assert trainable(again) == {"default", "default router"}


@case(
    "PEFT",
    "PeftModel.merge_adapter, unmerge_adapter",
    note="For fixed mixtures. Raises while the router decides.",
)
def merge_adapter(stage: Stage) -> None:
    model = stage.peft_model()
    with pytest.raises(ValueError, match="computes them from the"):
        model.merge_adapter()
    stage.check(model, ALL)
    moe_lora.set_routing_mode(model, "uniform")
    uniform = torch.full_like(stage.weights, 1 / 3)
    model.merge_adapter(safe_merge=True)
    stage.check(model, ALL, uniform)
    model.unmerge_adapter()
    stage.check(model, ALL, uniform)


@case("PEFT", "PeftModel.unload", note="Leaves the adapters of other tuners.")
def unload(stage: Stage) -> None:
    model = stage.peft_model().unload()
    stage.check(model, {"turbo": 1.0, "style": 1.0})
    assert set(model.peft_config) == {"turbo", "style"}
    assert not any("moe_" in name for name, _ in model.named_modules())


@case(
    "PEFT", "PeftModel.merge_and_unload", note="For fixed mixtures. Leaves other tuners' adapters."
)
def merge_and_unload(stage: Stage) -> None:
    model = stage.peft_model()
    moe_lora.set_routing_mode(model, "uniform")
    plain = model.merge_and_unload(safe_merge=True)
    stage.check(plain, ALL, torch.full_like(stage.weights, 1 / 3))
    peft.functional.set_adapter(plain, "style")
    stage.check(plain, {"mix": 1.0, "style": 1.0}, torch.full_like(stage.weights, 1 / 3))


@case("PEFT", "PeftModel.delete_adapter")
def peft_delete_adapter(stage: Stage) -> None:
    model = stage.peft_model()
    model.delete_adapter("mix")
    stage.check(model.base_model.model, {"turbo": 1.0, "style": 1.0})
    assert not list(model.base_model.model.moe_router.parameters())


@case(
    "PEFT",
    "PeftModel.forward(adapter_names=...)",
    "raises",
    "Call the model once per adapter, or weigh the experts per sample with moe_lora.route.",
)
def adapter_names(stage: Stage) -> None:
    model = stage.peft_model()
    with pytest.raises(ValueError, match="Expected no `adapter_names`"):
        stage(model, adapter_names=["mix", "__base__"])
    stage.check(model, ALL)
    with pytest.raises(TypeError, match="adapter_names"):
        layers(model)[0](torch.rand(2, layers(model)[0].in_features), adapter_names=["mix"] * 2)


@case("PEFT", "get_layer_status, get_model_status")
def status(stage: Stage) -> None:
    model = stage.model()
    found = get_layer_status(model)
    ours = [layer for layer in found if "mix" in layer.available_adapters]
    assert len(ours) == len(stage.paths["mix"])
    assert get_model_status(model).active_adapters == list(stage.order)
    assert get_model_status(stage.peft_model()).available_adapters == sorted(ALL)


@case("PEFT", "disable_input_dtype_casting", note="Has no effect on a mixture.")
def input_dtype_casting(stage: Stage) -> None:
    model = stage.model()
    with disable_input_dtype_casting(model):
        stage.check(model, ALL)


@case("PEFT", "rescale_adapter_scale", "not for mixtures", "Scales plain LoRAs only.")
def rescale(stage: Stage) -> None:
    model = stage.model()
    with rescale_adapter_scale(model, 0.5):
        stage.check(model, {"mix": 1.0, "turbo": 0.5, "style": 0.5})
    stage.check(model, ALL)


@case("PEFT", "hotswap_adapter", "raises", "PEFT swaps plain LoRAs only.")
def peft_hotswap(stage: Stage) -> None:
    model = stage.peft_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["mix"])
        with pytest.raises(ValueError, match="Hotswapping only supports"):
            hotswap_adapter(model, f"{folder}/mix", "mix", torch_device="cpu")
    stage.check(model, ALL)


@case("PEFT", "PeftMixedModel", "raises", "Inject adapters of several methods one by one.")
def mixed_model(stage: Stage) -> None:
    base = stage.build()
    with pytest.raises(ValueError, match="MOE_LORA"):
        peft.PeftMixedModel(base, config_of("mix"), "mix")
    stage.check(base, {})


@case(
    "PEFT",
    'LoraConfig(target_modules="all-linear") beside a router',
    "raises",
    'Exclude it with exclude_modules=r".*moe_router.*".',
)
def all_linear(stage: Stage) -> None:
    model = stage.model()
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    peft.inject_adapter_in_model(config, model, "wide")
    with pytest.raises(ValueError, match="exclude_modules"):
        stage(model)
    model = stage.model()
    config.exclude_modules = ".*moe_router.*"
    peft.inject_adapter_in_model(config, model, "wide")
    model.set_adapter([*ALL, "wide"])
    stage.check(model, ALL)


@case("PEFT", "LoraModel.unload", note="Removes the mixture as well: everything that is adapted.")
def lora_unload(stage: Stage) -> None:
    model = stage.build()
    for name in ("mix", "turbo"):
        peft.inject_adapter_in_model(config_of(name), model, name)
        stage.put(model, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.get_peft_model(model, config_of("style"), "style")
    plain = lora.unload()
    stage.check(plain, {})
    assert plain.state_dict().keys() == stage.build().state_dict().keys()


@case("PEFT", "get_base_model_state_dict", note="The tensors of the routers are in it as well.")
def base_state_dict(stage: Stage) -> None:
    found = peft.get_base_model_state_dict(stage.peft_model())
    ours = {key for key in found if key.startswith("moe_router.")}
    assert found.keys() - ours == stage.build().state_dict().keys()


@case("PEFT", "copy.deepcopy of an adapted model")
def deepcopied(stage: Stage) -> None:
    model = stage.model()
    clone = copy.deepcopy(model)
    clone.set_adapter(["turbo"])
    assert trainable(model) == {"mix", "mix router"}
    assert not trainable(clone)
    stage.check(model, ALL)
    stage.check(clone, {"turbo": 1.0})
    clone.set_adapters(["mix", "style"])
    stage.check(clone, {"mix": 1.0, "style": 1.0})
