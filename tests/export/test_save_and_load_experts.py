from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.export import export_lora, load_experts, save_and_load_experts


@pytest.fixture
def model(make_flux, flux_targets):
    config = MoELoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=flux_targets,
        rank_pattern={"to_q": 2},
        alpha_pattern={"proj_mlp": 3},
        router="three_expert_removal",
        init_lora_weights=False,
    )
    return get_peft_model(make_flux(), config).eval()


def test_every_expert_loads_with_stock_peft_and_equals_one_hot_weights(
    model, make_flux, make_flux_inputs, tmp_path
):
    folders = moe_lora.save_experts(model, tmp_path)
    names = ["removal_expert", "background_expert", "completion_expert"]
    assert folders == [tmp_path / name for name in names]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    inputs = make_flux_inputs()
    for index, folder in enumerate(folders):
        with moe_lora.route(model, torch.eye(3)[index].expand(2, 3)):
            expected = model(**inputs)[0]
        plain = PeftModel.from_pretrained(make_flux(), folder).eval()
        assert type(plain.peft_config["default"]).__name__ == "LoraConfig"
        torch.testing.assert_close(plain(**inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_experts_of_a_checkpoint_are_those_of_the_model(model, tmp_path):
    moe_lora.save_adapter(model, tmp_path / "checkpoint")
    folders = moe_lora.save_experts(model, tmp_path / "of_the_model")
    again = moe_lora.save_experts(tmp_path / "checkpoint", tmp_path / "of_the_checkpoint")
    assert [folder.name for folder in again] == [folder.name for folder in folders]
    for ours, theirs in zip(again, folders, strict=True):
        configs = [(folder / "adapter_config.json").read_text() for folder in (ours, theirs)]
        assert configs[0] == configs[1]
        files = [folder / "adapter_model.safetensors" for folder in (ours, theirs)]
        found, expected = map(load_file, files)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        found, expected = (safe_open(file, framework="pt").metadata() for file in files)
        assert found == expected
    with pytest.raises(FileNotFoundError, match="checkpoint's folder"):
        moe_lora.save_experts(tmp_path / "none", tmp_path)


def test_saving_again_replaces_its_own_files_alone(model, tmp_path):
    (tmp_path / "removal_expert" / "photos").mkdir(parents=True)
    for mine in ("removal_expert/photos/1.jpg", "removal_expert/notes.txt", "notes.txt"):
        (tmp_path / mine).write_text("mine")
    for _ in range(2):
        moe_lora.save_experts(model, tmp_path)
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert sorted(p.name for p in (tmp_path / "removal_expert").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "notes.txt",
            "photos",
        ]
        assert (tmp_path / "removal_expert" / "photos" / "1.jpg").read_text() == "mine"


def test_no_name_leads_out_of_the_folder(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.jpg").write_text("mine")
    for name in ("../photos", str(photos), ""):
        model.peft_config["default"].expert_names = ("removal_expert", name, "completion_expert")
        with pytest.raises(ValueError, match="`expert_names`"):
            moe_lora.save_experts(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert (photos / "1.jpg").read_text() == "mine"


def test_a_file_in_the_place_of_a_folder_is_left_alone(model, tmp_path):
    (tmp_path / "removal_expert").write_text("mine")
    with pytest.raises(FileExistsError):
        moe_lora.save_experts(model, tmp_path)
    assert (tmp_path / "removal_expert").read_text() == "mine"


@pytest.mark.parametrize("rslora", [False, True])
def test_the_strength_that_acts_is_saved(make_flux, make_flux_inputs, tmp_path, rslora):
    model = make_flux()
    config = MoELoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["to_q", "proj_out", "ff.net.2"],
        rank_pattern={"to_q": 2},
        alpha_pattern={"proj_out": 3},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model.add_adapter(config)
    inputs = make_flux_inputs()
    for strength in (0.3, -2.0, 0.0):
        model.set_adapters(["default"], [strength])
        moe_lora.save_experts(model, tmp_path)
        with moe_lora.route(model.eval(), torch.eye(3)[1]):
            expected = model(**inputs)[0]
        plain = PeftModel.from_pretrained(make_flux(), tmp_path / "background_expert").eval()
        torch.testing.assert_close(plain(**inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_failing_save_leaves_the_previous_folder_whole(model, tmp_path, monkeypatch):
    moe_lora.save_experts(model, tmp_path)
    before = (tmp_path / "removal_expert" / "adapter_model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(save_and_load_experts, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        moe_lora.save_experts(model, tmp_path)
    assert (tmp_path / "removal_expert" / "adapter_model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unknown_adapter_raises(model, tmp_path):
    with pytest.raises(ValueError, match="'other'"):
        moe_lora.save_experts(model, tmp_path, adapter_name="other")


def test_the_files_say_whose_expert_they_are(model, tmp_path):
    moe_lora.save_experts(model, tmp_path)
    with safe_open(tmp_path / "removal_expert" / "adapter_model.safetensors", "pt") as file:
        noted = json.loads(file.metadata()["moe_lora"])
    assert noted == {
        "version": moe_lora.__version__,
        "expert": "removal_expert",
        "base_class": "FluxTransformer2DModel",
        "in_channels": 384,
    }


def test_the_root_layer_does_not_stand_for_its_namesakes(make_flux, tmp_path):
    config = MoELoraConfig(
        target_modules=r"proj_out|transformer_blocks\.0\.ff\.net\.2",
        rank_pattern={"^proj_out": 2},
        init_lora_weights=False,
    )
    moe_lora.save_experts(get_peft_model(make_flux(), config), tmp_path)
    loaded = PeftModel.from_pretrained(make_flux(), tmp_path / "removal_expert")
    adapted = {
        n: m.r["default"] for n, m in loaded.named_modules() if isinstance(m, BaseTunerLayer)
    }
    assert adapted == {
        "base_model.model.proj_out": 2,
        "base_model.model.transformer_blocks.0.ff.net.2": 8,
    }


NAMES = ("removal_expert", "background_expert", "completion_expert")


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def mixture(make_mlp, names=NAMES, **fields):
    given = {"target_modules": ["first", "second"], "r": 3, "lora_alpha": 6, **fields}
    return get_peft_model(make_mlp(), MoELoraConfig(expert_names=names, **given)).eval()


class TestLoad:
    @pytest.fixture
    def saved(self, make_mlp, tmp_path):
        source = mixture(make_mlp, init_lora_weights=False)
        moe_lora.save_experts(source, tmp_path / "experts")
        return source, tmp_path / "experts"

    @torch.no_grad()
    def test_any_subset_into_another_order(self, saved, make_mlp):
        source, folder = saved
        names = ("completion_expert", "fourth", "removal_expert")
        target = mixture(make_mlp, names)
        loaded = load_experts(target, folder, ["removal_expert", "completion_expert"])
        assert loaded == ["removal_expert", "completion_expert"]
        x = torch.randn(2, 6)
        for name in loaded:
            with moe_lora.route(source, torch.eye(3)[NAMES.index(name)]):
                expected = source(x)
            with moe_lora.route(target, torch.eye(3)[names.index(name)]):
                torch.testing.assert_close(target(x), expected)
        with moe_lora.route(target, torch.eye(3)[1]):  # the fourth one is untouched
            torch.testing.assert_close(target(x), make_mlp()(x))

    def test_all_that_the_folder_has_by_default(self, saved, make_mlp):
        source, folder = saved
        target = mixture(make_mlp)
        assert load_experts(target, folder) == sorted(NAMES)
        for key, value in target.state_dict().items():
            assert torch.equal(value, source.state_dict()[key])

    def test_a_mapping_names_files_of_any_layout(self, saved, make_mlp, tmp_path):
        source, _ = saved
        export_lora(source, tmp_path / "one.safetensors", "removal_expert")
        target = mixture(make_mlp, lora_alpha=1.5)
        load_experts(target, {"background_expert": tmp_path / "one.safetensors"})
        x = torch.randn(2, 6)
        with moe_lora.route(source, torch.eye(3)[0]), moe_lora.route(target, torch.eye(3)[1]):
            torch.testing.assert_close(target(x), source(x), rtol=1e-5, atol=1e-6)

    def test_experts_of_8_bits(self, saved, make_mlp):
        _, folder = saved
        file = folder / "removal_expert" / "adapter_model.safetensors"
        tensors = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}
        save_file(tensors, file)
        target = mixture(make_mlp, lora_alpha=3)
        load_experts(target, folder, ["removal_expert"])
        found = target.base_model.model.first.moe_lora_experts["default"].lora_B[:, 0]
        wanted = tensors["base_model.model.first.lora_B.weight"].float() * 2
        assert torch.equal(found, wanted)

    def test_into_one_adapter_of_several(self, saved, make_mlp):
        source, folder = saved
        target = mixture(make_mlp)
        target.add_adapter("other", target.peft_config["default"])
        load_experts(target, folder, adapter_name="other")
        first = target.base_model.model.first.moe_lora_experts
        expected = source.base_model.model.first.moe_lora_experts["default"].lora_B
        assert torch.equal(first["other"].lora_B, expected)
        assert not first["default"].lora_B.any()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"r": 2}, "to have rank 2 in 'first', but got 3"),
            ({"target_modules": ["first"]}, "also adapts 'second'"),
            ({"target_modules": ["first", "second", "head"]}, "lacks 'head'"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, saved, make_mlp, fields, message):
        _, folder = saved
        target = mixture(make_mlp, **fields)
        before = state(target)
        with pytest.raises(ValueError, match=message):
            load_experts(target, folder)
        assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())

    def test_one_bad_file_of_several_changes_nothing(self, saved, make_mlp):
        _, folder = saved
        file = folder / "removal_expert" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        target = mixture(make_mlp)
        before = state(target)
        with pytest.raises(ValueError, match="truncated, corrupt"):
            load_experts(target, folder)
        assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())

    def test_unknown_names(self, saved, make_mlp, tmp_path):
        _, folder = saved
        target = mixture(make_mlp, ("a", "b"))
        with pytest.raises(ValueError, match=r"Expected experts out of \['a', 'b'\]"):
            load_experts(target, folder)
        with pytest.raises(ValueError, match="Expected `names` out of"):
            load_experts(target, folder, ["a"])
        with pytest.raises(FileNotFoundError, match="Expected a folder"):
            load_experts(target, tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="but got none"):
            load_experts(target, tmp_path / "empty")

    def test_merged_experts_are_refused(self, saved, make_mlp):
        _, folder = saved
        target = mixture(make_mlp)
        moe_lora.merge(target)
        with pytest.raises(ValueError, match="unmerge"):
            load_experts(target, folder)
