"""Wrapped, offloaded and shared models: the keys of the bare model, and only values that act."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.functional import delete_adapter, set_adapter
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import moe_lora
from moe_lora import MoELoraConfig, export_lora, load_adapter, save_adapter, save_experts
from moe_lora.tuner.state_dict.adapter_tensors import adapter_tensors

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"
TARGETS = ["to_q", "ff.net.2"]


def config(**fields):
    given = {
        "r": 3,
        "target_modules": TARGETS,
        "router": "three_expert_removal",
        "init_lora_weights": False,
        "rank_pattern": {"transformer_blocks.0.attn.to_q": 2},
    }
    return MoELoraConfig(**{**given, **fields})


def is_block(module):
    return type(module).__name__.endswith("TransformerBlock")


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=is_block)
    return model


def checkpointed_layers(model):
    apply_activation_checkpointing(
        model, check_fn=lambda m: isinstance(m, nn.Linear) and m.in_features == 32
    )
    return model


def compiled_blocks(model):
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for index, block in enumerate(blocks):
            blocks[index] = torch.compile(block, backend="eager")
    return model


def regional(model):
    model.compile_repeated_blocks(backend="eager")
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def parallel(model):
    return nn.DataParallel(model)


def parallel_blocks(model):
    model.transformer_blocks[0] = nn.DataParallel(model.transformer_blocks[0])
    return model


def twice(model):
    checkpointed(model)
    return compiled_blocks(model)


WRAPPERS = [checkpointed, compiled_blocks, regional, compiled, parallel, twice]


@pytest.fixture
def plain(make_flux, make_flux_inputs, tmp_path):
    """A saved mixture, its tensors, inputs, and what the model makes of them."""
    model = make_flux()
    model.add_adapter(config())
    inputs = make_flux_inputs()
    folder = save_adapter(model, tmp_path / "plain")
    return folder, load_file(folder / WEIGHTS), inputs, model.eval()(**inputs)[0].detach()


def equal(folder, tensors):
    found = load_file(folder / WEIGHTS)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("wrap", [*WRAPPERS, parallel_blocks])
def test_a_model_wrapped_after_it_is_adapted_is_saved_as_the_bare_one(
    make_flux, plain, tmp_path, wrap
):
    folder, tensors, *_ = plain
    model = make_flux()
    load_adapter(model, folder)
    wrapped = wrap(model)
    equal(save_adapter(wrapped, tmp_path / "again"), tensors)
    save_experts(wrapped, tmp_path / "experts")
    loaded = PeftModel.from_pretrained(make_flux(), tmp_path / "experts" / "removal_expert")
    assert loaded.peft_config["default"].peft_type == "LORA"


@pytest.mark.parametrize("wrap", [*WRAPPERS, checkpointed_layers])
@pytest.mark.parametrize("targets", ["endings", "paths", "regex"])
def test_an_adapter_is_loaded_into_a_wrapped_model(make_flux, plain, tmp_path, wrap, targets):
    folder, tensors, inputs, expected = plain
    file = folder / "adapter_config.json"
    entries = json.loads(file.read_text())
    layers = sorted({n.split(".moe_lora")[0][17:] for n in tensors if "experts" in n})
    entries["target_modules"] = {
        "endings": TARGETS,
        "paths": layers,
        "regex": "|".join(layers).replace(".", r"\."),
    }[targets]
    again = MoELoraConfig.from_peft_type(**entries)
    wrapped = wrap(make_flux())
    load_adapter(wrapped, folder, config=again)
    equal(save_adapter(wrapped, tmp_path / "again"), tensors)
    torch.testing.assert_close(wrapped.eval()(**inputs)[0], expected)


@pytest.mark.parametrize("wrap", [checkpointed, compiled_blocks, twice])
def test_stock_saving_and_loading_of_wrapped_models(make_flux, plain, tmp_path, wrap):
    folder, tensors, *_ = plain
    model = PeftModel.from_pretrained(wrap(make_flux()), folder)
    model.save_pretrained(tmp_path / "loaded")
    equal(tmp_path / "loaded", tensors)
    model = PeftModel.from_pretrained(make_flux(), folder)
    wrap(model.base_model.model)
    model.save_pretrained(tmp_path / "wrapped")
    equal(tmp_path / "wrapped", tensors)


@pytest.mark.parametrize("wrap", [checkpointed, compiled_blocks, twice])
def test_whole_modules_of_wrapped_blocks_are_saved_and_loaded(make_flux, tmp_path, wrap):
    model = make_flux()
    model.add_adapter(config(modules_to_save=["proj_mlp", "norm_out.linear"]))
    saved = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert len(saved) == 4
    for parameter in saved:
        parameter.data.fill_(0.25)
    folder = save_adapter(model, tmp_path / "plain")
    tensors = load_file(folder / WEIGHTS)
    assert len([n for n in tensors if "proj_mlp" in n or "norm_out" in n]) == 4
    equal(save_adapter(wrap(model), tmp_path / "wrapped"), tensors)
    loaded = wrap(make_flux())
    load_adapter(loaded, folder)
    equal(save_adapter(loaded, tmp_path / "again"), tensors)


def test_a_compiled_layer_is_refused_as_a_target(make_mlp):
    model = make_mlp()
    model.first = torch.compile(model.first, backend="eager")
    with pytest.raises(TypeError, match=r"'first' to be an nn\.Linear"):
        inject_adapter_in_model(MoELoraConfig(target_modules=["first"]), model)


OTHERS = {"lora": partial(LoraConfig, r=2), "loha": partial(LoHaConfig, r=2)}


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_tuner_beside_the_mixture_leaves_its_keys_alone(
    make_mlp, tmp_path, kind, first, deleted
):
    mixture = MoELoraConfig(target_modules=["first", "second"], init_lora_weights=False)
    alone = inject_adapter_in_model(mixture, make_mlp(), "mixture")
    model = make_mlp()
    other = OTHERS[kind](target_modules=["first", "head"])
    order = [(mixture, "mixture"), (other, "style")]
    for one, name in reversed(order) if first else order:
        model = inject_adapter_in_model(one, model, name)
    for name, tensor in adapter_tensors(model, "mixture").items():
        adapter_tensors(alone, "mixture")[name].data.copy_(tensor)
    set_adapter(model, ["mixture", "style"])
    if deleted:
        prefix = "lora_" if kind == "lora" else "hada_"
        delete_adapter(model, "style", prefix)
        set_adapter(model, "mixture")
    folder = save_adapter(model, tmp_path / "saved", "mixture")
    names = load_file(folder / WEIGHTS)
    assert set(names) == {
        f"base_model.model.{layer}.moe_lora_experts.lora_{factor}"
        for layer in ("first", "second")
        for factor in "AB"
    }
    loaded = make_mlp()
    load_adapter(loaded, folder)
    x = torch.rand(2, 6)
    assert torch.equal(loaded(x), alone(x))
    again = make_mlp()
    inject_adapter_in_model(OTHERS[kind](target_modules=["first"]), again, "style")
    load_adapter(again, folder)  # beside one that is there
    set_adapter(again, "default")
    torch.testing.assert_close(again(x), alone(x))


def test_files_with_the_keys_of_wrappers_are_loaded(make_mlp, tmp_path):
    mixture = MoELoraConfig(target_modules=["first"], init_lora_weights=False)
    model = get_peft_model(make_mlp(), mixture)
    folder = save_adapter(model, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    x = torch.rand(2, 6)
    for change in (
        lambda n: n.replace("first.moe", "first.base_layer.moe"),
        lambda n: n.replace("first.", "first._orig_mod."),
        lambda n: n.removeprefix("base_model.model."),
        lambda n: n.replace("base_model.model.", "transformer."),
        lambda n: n.replace("base_model.model.", "module._orig_mod."),
        lambda n: f"module.{n}",
    ):
        write(folder, {change(name): tensor for name, tensor in tensors.items()})
        loaded = make_mlp()
        load_adapter(loaded, folder)
        assert torch.equal(loaded(x), model(x))
        assert torch.equal(PeftModel.from_pretrained(make_mlp(), folder)(x), model(x))


def test_other_beginnings_of_keys_are_named(make_mlp, tmp_path):
    mixture = MoELoraConfig(target_modules=["first"], init_lora_weights=False)
    folder = save_adapter(get_peft_model(make_mlp(), mixture), tmp_path)
    tensors = load_file(folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"it has them in 'inner'\. Load the adapter into that"):
        load_adapter(nn.ModuleDict({"inner": make_mlp()}), folder)
    write(folder, {n.replace("model.first", "model.part.first"): t for n, t in tensors.items()})
    with pytest.raises(ValueError, match=r"without the prefix 'part\.'"):
        load_adapter(make_mlp(), folder)


def write(folder, tensors):
    from safetensors.torch import save_file

    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_layer_that_is_gone_is_noticed_before_anything_is_written(make_flux, tmp_path):
    model = make_flux(layers=2)
    model.add_adapter(config())
    folder = save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model.transformer_blocks = model.transformer_blocks[:1]
    with pytest.raises(ValueError, match="of their tensors are missing"):
        save_adapter(model, tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


class TestOffloading:
    @pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
    def test_group_offloading_in_memory_is_saved_and_to_disk_refused(
        self, make_flux, plain, tmp_path, kind
    ):
        folder, tensors, *_ = plain
        options = {"onload_device": torch.device("cpu"), "offload_type": kind}
        if kind == "block_level":
            options["num_blocks_per_group"] = 1
        model = make_flux()
        load_adapter(model, folder)
        model.enable_group_offload(**options)
        equal(save_adapter(model, tmp_path / "again"), tensors)

        model = make_flux()
        load_adapter(model, folder)
        model.enable_group_offload(**options, offload_to_disk_path=str(tmp_path / "disk"))
        before = {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}
        writers = (
            save_adapter,
            save_experts,
            lambda m, path: export_lora(m, path, "uniform"),
            lambda m, path: m.save_lora_adapter(path),
        )
        for save in writers:
            with pytest.raises(ValueError, match="is offloaded to disk"):
                save(model, tmp_path / "again")
        assert {f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()} == before
        with pytest.raises(ValueError, match="Load the adapter first"):
            load_adapter(model, folder, "other")

    def test_weights_that_accelerate_keeps_are_refused(self, make_flux, plain, tmp_path):
        from accelerate import cpu_offload, disk_offload

        folder, *_ = plain
        for offload in (cpu_offload, partial(disk_offload, offload_dir=str(tmp_path / "disk"))):
            model = make_flux()
            load_adapter(model, folder)
            offload(model, execution_device=torch.device("cpu"))
            for save in (save_adapter, save_experts, export_lora):
                with pytest.raises(ValueError, match="on the meta device"):
                    save(model, tmp_path / "again")
            assert not (tmp_path / "again").exists()

    def test_nothing_is_loaded_into_a_model_without_values(self, make_flux, plain):
        from accelerate import cpu_offload

        model = make_flux()
        cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(ValueError, match="on the meta device"):
            load_adapter(model, plain[0])
        assert not any("moe_lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_checkpoint_is_replaced_by_one_that_would_not_load(make_mlp, tmp_path, value):
    model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
    for save in (save_adapter, save_experts):
        save(model, tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.view(-1)[3] = value
    for save in (save_adapter, save_experts):
        with pytest.raises(ValueError, match="Expected finite weights"):
            save(model, tmp_path)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_a_state_dict_that_lacks_experts_is_refused_by_stock_saving(make_mlp, tmp_path):
    model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
    state = {n: t for n, t in model.state_dict().items() if "lora_B" not in n}
    with pytest.raises(ValueError, match="Expected the state dict to have all keys"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert get_peft_model_state_dict(model, state_dict={}) == {}


def test_a_layer_called_as_a_wrapper_keeps_its_name(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.base_layer = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.base_layer(self.module(x))

    model = get_peft_model(Odd(), MoELoraConfig(target_modules=["module", "base_layer"]))
    folder = save_adapter(model, tmp_path)
    assert len(load_file(folder / WEIGHTS)) == 4
    load_adapter(Odd(), folder)
    PeftModel.from_pretrained(Odd(), folder)


def test_checkpointed_leaf_layers_are_adapted_inside_their_wrapper(make_mlp):
    model = make_mlp()
    model.first = checkpoint_wrapper(model.first)
    model = inject_adapter_in_model(MoELoraConfig(target_modules=["first"]), model)
    assert moe_lora.routing.adapted_layers(model) == ("first",)
