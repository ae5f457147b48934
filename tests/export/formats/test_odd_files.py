"""Plain LoRA files as they are found: broken, mixed, in every dtype."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from moe_lora.export import from_loras

DOWN, UP = torch.randn(2, 6), torch.randn(10, 2)


def pair(name, a=".lora_A.weight", b=".lora_B.weight", down=DOWN, up=UP):
    return {f"{name}{a}": down, f"{name}{b}": up}


def kohya(name="first", **factors):
    return pair(f"lora_unet_{name}", ".lora_down.weight", ".lora_up.weight", **factors)


@pytest.fixture
def build(make_mlp, tmp_path):
    def run(tensors, model=None, **options):
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "a.safetensors")
        return from_loras({"only": tmp_path / "a.safetensors"}, model or make_mlp(), **options)

    return run


def delta(model):
    layer = model.get_submodule("first")
    return layer.get_delta_weight("default", torch.ones(1))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("transformer.first") | kohya(), "it has no 'transformer.first'"),
        (pair("transformer.first") | pair("first"), "with and without 'transformer.'"),
        (pair("transformer.first") | pair("unet.first"), "'unet.first'"),
        (pair("first") | pair("first", ".lora_down.weight", ".lora_up.weight"), "several"),
        (pair("first") | pair("first", ".lora.down.weight", ".lora.up.weight"), "several"),
        (kohya() | {"lora_unet_first.alpha": torch.ones(2)}, r"the shape \(2,\)"),
        (kohya() | {"lora_unet_first.alpha": torch.tensor(float("nan"))}, "finite number"),
        (kohya() | {"lora_unet_second.alpha": torch.ones(())}, "the down one is missing"),
        (kohya() | {"lora_unet_first.lora_mid.weight": torch.ones(2, 2)}, "lora_mid"),
        (kohya() | {"lora_unet_first.hada_w1_a": torch.ones(2, 2)}, "hada_w1_a"),
        ({"first.lora_A.weight": DOWN}, "the up one is missing"),
        ({"first.lora_B.weight": UP}, "the down one is missing"),
        (pair("first", down=DOWN.int()), "is torch.int32"),
        (pair("first", up=UP.to(torch.complex64)), "is torch.complex64"),
        (pair("first", down=torch.ones(0, 6), up=torch.ones(10, 0)), "to be .r, in."),
        (pair("first", down=torch.ones(6)), "to be .r, in."),
        (pair("first", up=torch.full((10, 2), float("inf"))), "NaN or inf"),
        (pair("first", down=torch.full((2, 6), float("nan"))), "NaN or inf"),
        (
            pair("first", up=torch.full((10, 2), float("nan")).to(torch.float8_e5m2)),
            "NaN or inf",
        ),
        (
            {"first.lora_A.default.weight": DOWN, "first.lora_B.default.weight": UP},
            "lora_A.default",
        ),
    ],
)
def test_what_cannot_be_read(build, make_mlp, tensors, message):
    model = make_mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        build(tensors, model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
    ],
)
@pytest.mark.parametrize("alpha", [None, torch.tensor(3.0), torch.tensor([3]), torch.tensor(3)])
def test_every_dtype_at_its_own_precision(build, dtype, alpha):
    down, up = DOWN.to(dtype), UP.to(dtype)
    tensors = kohya(down=down, up=up)
    if alpha is not None:
        tensors["lora_unet_first.alpha"] = alpha
    expected = up.double() @ down.double() * (1 if alpha is None else 1.5)
    torch.testing.assert_close(delta(build(tensors)).double(), expected, rtol=1e-5, atol=1e-5)


def test_factors_of_two_dtypes(build):
    model = build(pair("first", down=DOWN.bfloat16(), up=UP.half()))
    expected = UP.half().double() @ DOWN.bfloat16().double()
    torch.testing.assert_close(delta(model).double(), expected, rtol=1e-5, atol=1e-5)


def test_eight_bits_in_a_fused_projection(make_flux, tmp_path):
    model = make_flux()
    down, up = torch.randn(2, 32), torch.randn(96, 2)
    down, up = down.to(torch.float8_e4m3fn), up.to(torch.float8_e4m3fn)
    save_file(kohya("double_blocks_0_img_attn_qkv", down=down, up=up), tmp_path / "a.safetensors")
    from_loras({"only": tmp_path / "a.safetensors"}, model)
    layer = model.transformer_blocks[0].attn.to_k
    expected = up.float()[32:64] @ down.float()
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_ranks_that_differ_per_layer_and_per_file(make_mlp, tmp_path):
    ranks = {"a": {"first": 1, "second": 4}, "b": {"first": 3}, "c": {"second": 2, "head": 5}}
    shapes = {"first": (10, 6), "second": (6, 10), "head": (2, 6)}
    deltas = {}
    for file, layers in ranks.items():
        tensors = {}
        for layer, rank in layers.items():
            out, width = shapes[layer]
            down, up = torch.randn(rank, width), torch.randn(out, rank)
            tensors |= pair(layer, down=down, up=up)
            deltas[file, layer] = up @ down
        save_file(tensors, tmp_path / f"{file}.safetensors")
    model = from_loras({name: tmp_path / f"{name}.safetensors" for name in ranks}, make_mlp())
    for index, file in enumerate(ranks):
        for layer, shape in shapes.items():
            got = model.get_submodule(layer).get_delta_weight("default", torch.eye(3)[index])
            expected = deltas.get((file, layer), torch.zeros(shape))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file(make_mlp, tmp_path, share):
    save_file(pair("first"), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.safetensors.* truncated, corrupt"):
        from_loras({"only": tmp_path / "cut.safetensors"}, make_mlp())


def test_a_pickle_is_never_loaded(make_mlp, tmp_path):
    torch.save(pair("first"), tmp_path / "a.bin")
    with pytest.raises(ValueError, match="of another format"):
        from_loras({"only": tmp_path / "a.bin"}, make_mlp())


def test_two_names_for_one_layer(make_flux, tmp_path):
    one = kohya("transformer_blocks_0_attn_to_q", down=torch.ones(1, 32), up=torch.ones(32, 1))
    other = kohya("double_blocks_0_img_attn_qkv", down=torch.ones(1, 32), up=torch.ones(96, 1))
    save_file(one | other, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"but 'transformer_blocks\.0\.attn\.to_q' has several"):
        from_loras({"only": tmp_path / "a.safetensors"}, make_flux())


def test_a_fused_lora_that_is_not_trained_yet(make_flux, tmp_path):
    tensors = kohya("double_blocks_0_img_attn_qkv", down=torch.ones(2, 32), up=torch.zeros(96, 2))
    save_file(tensors, tmp_path / "a.safetensors")
    attention = from_loras({"only": tmp_path / "a.safetensors"}, make_flux())
    for name in ("to_q", "to_k", "to_v"):
        layer = attention.transformer_blocks[0].attn.get_submodule(name)
        assert not layer.get_delta_weight("default").any()


def test_a_flat_name_that_two_layers_have(tmp_path):
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_b = nn.ModuleDict({"c": nn.Linear(6, 10)})
            self.a = nn.ModuleDict({"b_c": nn.Linear(6, 10)})

    save_file(kohya("a_b_c"), tmp_path / "flat.safetensors")
    save_file(pair("a.b_c"), tmp_path / "dotted.safetensors")
    with pytest.raises(ValueError, match="has no 'a_b_c'"):
        from_loras({"only": tmp_path / "flat.safetensors"}, Twins())
    from_loras({"only": tmp_path / "dotted.safetensors"}, Twins())


def test_what_to_skip_is_a_list(build):
    with pytest.raises(TypeError, match="`skip` to be a list of beginnings of keys"):
        build(pair("first"), skip="lora_te")


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_diffusers_own_files_of_one_model(make_flux, make_flux_inputs, tmp_path, strength):
    source = make_flux().eval()
    config = LoraConfig(
        r=2, lora_alpha=2 * strength, target_modules=["to_q", "proj_out"], init_lora_weights=False
    )
    source.add_adapter(config)
    source.save_lora_adapter(tmp_path)
    assert not any("." not in key for key in load_file(next(tmp_path.glob("*.safetensors"))))
    built = from_loras({"only": tmp_path}, make_flux()).eval()
    inputs = make_flux_inputs()
    with torch.no_grad():
        torch.testing.assert_close(built(**inputs)[0], source(**inputs)[0], rtol=1e-5, atol=1e-5)
