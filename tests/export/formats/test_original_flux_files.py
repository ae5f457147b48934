"""Files with the dotted names of Flux's original code, as Black Forest Labs writes them."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers
from safetensors.torch import save_file

from moe_lora.export import export_lora, from_loras
from moe_lora.export.formats.match_layers import read_lora_for

ROOT = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}
NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k",
    "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k",
}


def plan(model):
    """Return the layers behind every name of the original code."""
    names = dict(ROOT)
    for count, blocks, ours, table in (
        (len(model.transformer_blocks), "double_blocks", "transformer_blocks", DOUBLE),
        (
            len(model.single_transformer_blocks),
            "single_blocks",
            "single_transformer_blocks",
            SINGLE,
        ),
    ):
        for index in range(count):
            for name, paths in table.items():
                whole = [f"{ours}.{index}.{path}" for path in paths.split()]
                names[f"{blocks}.{index}.{name}"] = " ".join(whole)
    return names


def factors(model, rank):
    tensors = {}
    for name, paths in plan(model).items():
        layers = [model.get_submodule(path) for path in paths.split()]
        width = sum(layer.out_features for layer in layers)
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, layers[0].in_features) / 5
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, rank) / 5
    return tensors


def norms(model):
    found = {}
    for key, path in NORMS.items():
        blocks = model.get_submodule(path.partition(".")[0])
        for index in range(len(blocks)):
            found[key.format(index)] = model.get_submodule(path.format(index)).weight.detach()
    return found


@pytest.fixture
def guided(make_flux):
    return lambda: make_flux(64, guidance=True, layers=2).eval()


@torch.no_grad()
def output(model, inputs):
    return model(guidance=torch.ones(2), **inputs)[0]


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_mixture_is_the_lora(guided, make_flux_inputs, tmp_path, prefix, dtype):
    model = guided()
    tensors = {k: v.to(dtype) for k, v in factors(model, 3).items()}
    with torch.no_grad():
        for name, paths in plan(model).items():
            up, down = (tensors[f"{name}.lora_{f}.weight"].float() for f in "BA")
            delta = up @ down
            if name.startswith("final_layer.adaLN"):
                delta = torch.cat(delta.chunk(2)[::-1])
            layers = [model.get_submodule(path) for path in paths.split()]
            for layer, rows in zip(
                layers, delta.split([layer.out_features for layer in layers]), strict=True
            ):
                layer.weight += rows
    tensors |= norms(model)
    file = tmp_path / "bfl.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, file)
    inputs = make_flux_inputs(in_channels=64)
    built = from_loras({"only": file}, guided()).eval()
    torch.testing.assert_close(output(built, inputs), output(model, inputs), rtol=1e-4, atol=1e-4)

    export_lora(built, tmp_path / "again.safetensors")
    stock = guided()
    stock.load_lora_adapter(tmp_path / "again.safetensors", prefix="transformer")
    torch.testing.assert_close(output(stock, inputs), output(model, inputs), rtol=1e-4, atol=1e-4)


def test_diffusers_makes_the_same_of_a_file_of_the_real_size(tmp_path):
    with torch.device("meta"):
        model = FluxTransformer2DModel(in_channels=128, out_channels=64, guidance_embeds=True)
    tensors = factors(model, 2)
    save_file(tensors, tmp_path / "depth.safetensors")
    ours = read_lora_for(model, tmp_path / "depth.safetensors")
    scales = {key.format(i): torch.ones(1) for key in NORMS for i in range(38)}
    wanted = {k: v for k, v in scales.items() if "single" in k or int(k.split(".")[1]) < 19}
    theirs = _convert_bfl_flux_control_lora_to_diffusers({**tensors, **wanted})
    theirs = {key.removeprefix("transformer."): value for key, value in theirs.items()}
    assert sorted(ours) == sorted({k.partition(".lora_")[0] for k in theirs if ".lora_" in k})
    for path, stored in ours.items():
        assert stored.scaling == 1.0
        assert torch.equal(stored.up, theirs[f"{path}.lora_B.weight"])
        down = theirs[f"{path}.lora_A.weight"]
        if path == "norm_out.linear":
            # diffusers also swaps the halves of A, which are ranks and not shift and scale.
            down = torch.cat(down.chunk(2)[::-1])
        assert torch.equal(stored.down, down)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "double_blocks.1.txt_attn.norm.key_norm.scale",
            torch.full((16,), 1.5),
            r"replaces the norm 'transformer_blocks\.1\.attn\.norm_added_k'",
        ),
        ("single_blocks.7.norm.query_norm.scale", torch.ones(16), "replaces the norm"),
        ("img_in.lora_B.bias", torch.ones(32), "'img_in' also changes the layer's bias"),
        ("img_in.bias", torch.ones(32), r"keys of a plain LoRA in .* but got 'img_in\.bias'"),
        ("double_blocks.5.img_mod.lin.lora_A.weight", torch.ones(2, 32), "up one is missing"),
    ],
)
def test_what_an_expert_cannot_hold(guided, tmp_path, key, value, message):
    tensors = {**factors(guided(), 2), key: value}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        from_loras({"only": tmp_path / "a.safetensors"}, guided())


def test_a_bias_of_zero_and_what_is_skipped_do_not_matter(guided, tmp_path):
    tensors = {**factors(guided(), 2), "img_in.lora_B.bias": torch.zeros(32)}
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.full((16,), 1.5)
    save_file(tensors, tmp_path / "a.safetensors")
    skip = ["double_blocks.0.img_attn.norm"]
    from_loras({"only": tmp_path / "a.safetensors"}, guided(), skip=skip)


def test_blocks_that_the_model_does_not_have(make_flux, guided, tmp_path):
    save_file(factors(guided(), 2), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"it has no .*'double_blocks\.1\.img_attn\.proj'"):
        from_loras({"only": tmp_path / "a.safetensors"}, make_flux(64, guidance=True))
