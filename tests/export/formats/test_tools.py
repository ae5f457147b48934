from __future__ import annotations

import warnings

import pytest
from peft import get_peft_model

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.cli.main import main
from moe_lora.export.formats.tools import TOOLS, refusal, tool_table

FLUX = "FluxTransformer2DModel"
IMAGE = ["attn.to_q", "attn.to_k", "attn.to_v"]
TEXT = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
SINGLE = [f"single_transformer_blocks.0.{name}" for name in IMAGE]
ATTENTION = [*(f"transformer_blocks.0.{name}" for name in (*IMAGE, *TEXT)), *SINGLE]

# What InvokeAI 6.14.2 did with files of a model with two double and two single blocks: its
# `flux_format_from_state_dict` recognized the layout, and the converter of the layout ran.
CONVERTED_BY_INVOKEAI = {
    "attention of both streams": (ATTENTION, True),
    "attention of the image stream": ([*ATTENTION[:3], *SINGLE], False),
    "without keys": ([layer for layer in ATTENTION if "k" not in layer.split(".")[-1]], False),
    "single blocks without keys": (
        [layer for layer in ATTENTION if layer != "single_transformer_blocks.0.attn.to_k"],
        True,
    ),
    "feed-forward": (
        [*ATTENTION, "transformer_blocks.0.ff.net.0.proj", "single_transformer_blocks.0.proj_mlp"],
        True,
    ),
    "norms": (
        [
            *ATTENTION,
            "transformer_blocks.1.norm1.linear",
            "single_transformer_blocks.1.norm.linear",
        ],
        True,
    ),
    "norms alone": (["transformer_blocks.0.norm1.linear"], False),
    "x_embedder": ([*ATTENTION, "x_embedder"], True),
    "context_embedder": ([*ATTENTION, "context_embedder"], True),
    "last proj_out": ([*ATTENTION, "proj_out"], True),
    "norm_out": ([*ATTENTION, "norm_out.linear"], False),
    "time": ([*ATTENTION, "time_text_embed.timestep_embedder.linear_1"], True),
    "guidance": ([*ATTENTION, "time_text_embed.guidance_embedder.linear_1"], False),
}


@pytest.mark.parametrize("case", CONVERTED_BY_INVOKEAI)
def test_the_converter_of_invokeai_agrees(case):
    layers, converted = CONVERTED_BY_INVOKEAI[case]
    assert (refusal("invokeai", "diffusers", layers, FLUX) is None) == converted


@pytest.mark.parametrize(
    ("tool", "format", "layers", "words"),
    [
        ("comfyui", "peft", ATTENTION, ["'peft'", "['diffusers', 'kohya']"]),
        ("sd-scripts", "peft", ATTENTION, ["'peft'"]),
        ("invokeai", "peft", ATTENTION, ["'peft'"]),
        ("peft", "kohya", ATTENTION, ["'kohya'", "['peft']"]),
        ("diffusers", "peft", ATTENTION, ["'peft'"]),
        ("sd-scripts", "diffusers", [*ATTENTION, "x_embedder"], ["'x_embedder'", "not adapt"]),
        ("invokeai", "diffusers", ATTENTION[:6], ["single_transformer_blocks.0", "'kohya'"]),
        ("invokeai", "diffusers", ATTENTION[1:], ["'transformer_blocks.0.attn.to_q'", "'kohya'"]),
    ],
)
def test_a_refusal_says_why_and_what_to_do(tool, format, layers, words):
    reason = refusal(tool, format, layers, FLUX)
    assert TOOLS[tool].title in str(reason)
    assert all(word in str(reason) for word in words)


@pytest.mark.parametrize(
    ("tool", "format"),
    [
        ("diffusers", "diffusers"),
        ("diffusers", "kohya"),
        ("peft", "peft"),
        ("comfyui", "diffusers"),
        ("comfyui", "kohya"),
        ("sd-scripts", "diffusers"),
        ("sd-scripts", "kohya"),
        ("invokeai", "kohya"),
    ],
)
def test_a_file_that_the_tool_loads_is_not_refused(tool, format):
    assert refusal(tool, format, ATTENTION, FLUX) is None


def test_other_models_were_not_tried():
    reason = refusal("comfyui", "diffusers", ["blocks.0.attn1.to_q"], "WanTransformer3DModel")
    assert (
        reason
        == "ComfyUI was tried with LoRAs of FLUX.1 only, but this one is of WanTransformer3DModel."
    )
    assert (
        refusal("diffusers", "diffusers", ["blocks.0.attn1.to_q"], "WanTransformer3DModel") is None
    )


def test_the_table_has_a_row_for_each_tool():
    rows = tool_table()
    assert [row[0] for row in rows] == list(TOOLS)
    assert {len(row) for row in rows} == {5}


@pytest.fixture
def adapted(make_flux):
    model = make_flux()
    model.add_adapter(MoELoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False))
    return model


def test_export_lora_warns_and_writes(adapted, tmp_path):
    path = tmp_path / "lora.safetensors"
    with pytest.warns(UserWarning, match="InvokeAI") as caught:
        moe_lora.export_lora(adapted, path, "uniform", tool="invokeai")
    assert caught[0].filename == __file__
    assert path.is_file()


def test_export_lora_is_silent_for_a_file_that_is_loaded(adapted, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tool in ("diffusers", "comfyui", "sd-scripts"):
            moe_lora.export_lora(adapted, tmp_path / f"{tool}.safetensors", "uniform", tool=tool)
        moe_lora.export_lora(adapted, tmp_path / "none.safetensors", "uniform")


def test_an_unknown_tool_is_an_error(adapted, tmp_path):
    with pytest.raises(ValueError, match="`tool` to be one of"):
        moe_lora.export_lora(adapted, tmp_path / "lora.safetensors", "uniform", tool="gimp")
    assert not list(tmp_path.iterdir())


def test_the_command_warns_on_stderr(make_flux, tmp_path, capsys):
    config = MoELoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False)
    get_peft_model(make_flux(), config).save_pretrained(tmp_path / "checkpoint")
    arguments = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "lora.safetensors")]
    assert main([*arguments, "--tool", "invokeai"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("moe-lora: warning: InvokeAI")
    assert main([*arguments, "--tool", "comfyui"]) == 0
    assert capsys.readouterr().err == ""
