"""The integrations: small diffs, which train experts and router and load in stock pipelines."""

from __future__ import annotations

import difflib
import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FluxFillPipeline,
    RePaintPipeline,
    RePaintScheduler,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_flux_fill, tiny_vae
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import moe_lora

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "integrations"
PAGE = ROOT / "docs" / "how_to" / "use_other_training_scripts.md"
KINDS = ["flux_fill", "inpainting_unet", "lightning"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def computed_diff(kind: str, context: int = 1) -> list[str]:
    before, after = f"{kind}_lora.py", f"{kind}_moe.py"
    texts = [(FOLDER / name).read_text(encoding="utf-8").splitlines() for name in (before, after)]
    return list(difflib.unified_diff(*texts, before, after, n=context, lineterm=""))


def changed_lines(diff: list[str]) -> list[str]:
    return [line for line in diff[2:] if line[0] in "+-"]


@pytest.mark.parametrize("kind", KINDS)
def test_at_most_ten_lines_change(kind: str) -> None:
    changed = changed_lines(computed_diff(kind))
    assert 0 < len(changed) <= 10
    before = (FOLDER / f"{kind}_lora.py").read_text(encoding="utf-8")
    assert "moe_lora" not in before
    assert any("MoELoraConfig" in line for line in changed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_guide_shows_the_diff(kind: str) -> None:
    shown = "```diff\n" + "\n".join(computed_diff(kind)) + "\n```\n"
    assert shown in PAGE.read_text(encoding="utf-8")


def test_the_command_in_the_guide_is_understood() -> None:
    (block,) = re.findall(r"```shell\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    words = shlex.split(block.replace("\\\n", " "))
    script = ROOT / words[2]
    assert script.is_file()
    options = importlib.import_module(script.stem).parse_args(words[3:])
    assert options.gradient_checkpointing


def clip() -> tuple[CLIPTextModel, CLIPTokenizer]:
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config), tokenizer


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *LETTERS]
    tokenizer = T5Tokenizer([(piece, 0.0) for piece in pieces], extra_ids=0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2
    )
    return T5EncoderModel(config), tokenizer


def flux_fill() -> FluxFillPipeline:
    (text_encoder, tokenizer), (text_encoder_2, tokenizer_2) = clip(), t5()
    return tiny_flux_fill(
        vae=tiny_vae(mid_block_add_attention=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def inpainting_unet() -> StableDiffusionInpaintPipeline:
    text_encoder, tokenizer = clip()
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=9,
        out_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionInpaintPipeline(
        tiny_vae(4, mid_block_add_attention=False),
        text_encoder,
        tokenizer,
        unet,
        DDPMScheduler(num_train_timesteps=100, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def lightning() -> DDPMPipeline:
    unet = UNet2DModel(
        sample_size=64,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100))


BUILD: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux_fill": flux_fill,
    "inpainting_unet": inpainting_unet,
    "lightning": lightning,
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for kind, build in BUILD.items():
        torch.manual_seed(0)
        folders[kind] = tmp_path_factory.mktemp(kind)
        build().save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    random = np.random.default_rng(0)
    for index, size in enumerate([12, 40, 24]):
        pixels = random.integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        mask = Image.new("L", (80, 64), 0)
        mask.paste(255, (16, 8, 16 + size, 8 + size))
        mask.save(folder / "masks" / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def _scripts_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def train(script: str, source: Path, data: Path, output: Path, steps: int, *more: str) -> Path:
    arguments = {
        "pretrained_model_name_or_path": source,
        "data_dir": data,
        "output_dir": output,
        "rank": 2,
        "resolution": 64,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_train_steps": steps,
    }
    flags = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    if script.startswith("lightning"):
        flags += ["--accelerator", "cpu"]
    importlib.import_module(script).main([*flags, *more])
    return output


def adapted(pipe: DiffusionPipeline) -> nn.Module:
    model: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_script_trains_a_lora(
    kind: str, pipelines: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    output = train(f"{kind}_lora", pipelines[kind], data, tmp_path / "adapter", 2)
    (file,) = output.glob("*.safetensors")
    trained = {name: value for name, value in load_file(file).items() if "lora_B" in name}
    assert trained
    assert all(value.abs().max() > 0 for value in trained.values())
    if kind != "lightning":  # which saves by PEFT
        model = adapted(BUILD[kind]())
        model.load_lora_adapter(output, prefix=None, weight_name=file.name)
        assert model.active_adapters() == ["default_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_routed_script_trains_every_expert_and_the_router(
    kind: str, pipelines: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    states = [
        load_file(
            train(f"{kind}_moe", pipelines[kind], data, tmp_path / str(steps), steps)
            / "adapter_model.safetensors"
        )
        for steps in (0, 3)
    ]
    # Without weight decay only a gradient moves a parameter.
    before, after = states
    assert before.keys() == after.keys()
    assert {name.split(".moe_lora_")[1].split(".")[0] for name in after} == {"experts", "routers"}
    still = []
    for name, value in after.items():
        moved = value != before[name]
        # One row of lora_A or one block of lora_B belongs to one expert.
        experts = moved.movedim(1, 0) if name.endswith("lora_B") else moved
        parts = experts if ".moe_lora_experts." in name else [moved]
        still += [f"{name}[{index}]" for index, part in enumerate(parts) if not part.any()]
    assert still == []
    config = json.loads((tmp_path / "3" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "MOE_LORA"
    assert config["router"] == "three_expert_removal"


def fill(kind: str, source: Path, adapter: Path | None, mask: Image.Image) -> tuple[Tensor, Any]:
    """Run the stock pipeline, with an adapter; return its image and the last routing."""
    image = Image.new("RGB", (64, 64), (200, 90, 40))
    generator = torch.Generator().manual_seed(0)
    if kind == "lightning":
        pipe = RePaintPipeline.from_pretrained(
            source, scheduler=RePaintScheduler(num_train_timesteps=100)
        )
        keep = Image.eval(mask, lambda value: 255 - value)
        settings = {"image": image, "mask_image": keep, "jump_n_sample": 1}
    else:
        pipe = (
            FluxFillPipeline if kind == "flux_fill" else StableDiffusionInpaintPipeline
        ).from_pretrained(source, safety_checker=None)
        settings = {"prompt": "", "image": image, "mask_image": mask, "height": 64, "width": 64}
    pipe.set_progress_bar_config(disable=True)
    model = adapted(pipe)
    if adapter is not None:
        PeftModel.from_pretrained(model, adapter).eval()
        if kind == "lightning":
            pixels = torch.from_numpy(np.array(mask))[None, None] / 255
            moe_lora.set_router_inputs(model, mask=pixels)
    image = pipe(**settings, num_inference_steps=2, generator=generator, output_type="np").images[0]
    decision = None if adapter is None else moe_lora.current_routing(model)
    return torch.from_numpy(image), decision


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_pipeline_routes_with_the_saved_adapter(
    kind: str, pipelines: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    source = pipelines[kind]
    adapter = train(f"{kind}_moe", source, data, tmp_path / "adapter", 3)
    masks = []
    for size in (10, 56):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (4, 4, 4 + size, 4 + size))
        masks.append(mask)
    weights = []
    for mask in masks:
        image, decision = fill(kind, source, adapter, mask)
        assert not torch.equal(image, fill(kind, source, None, mask)[0])
        weights.append(decision.weights[-1])
    assert not torch.allclose(*weights, atol=1e-2)


@pytest.mark.parametrize("kind", ["flux_fill", "inpainting_unet"])
def test_accumulation_and_checkpointing_work_as_before(
    kind: str, pipelines: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    more = ["--gradient_accumulation_steps", "2", "--mixed_precision", "bf16"]
    more.append("--gradient_checkpointing")
    output = train(f"{kind}_moe", pipelines[kind], data, tmp_path, 2, *more)
    state = load_file(output / "adapter_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(v.any() for name, v in state.items() if name.endswith("lora_B"))


def test_a_image_without_a_mask_is_an_error(tmp_path: Path) -> None:
    images = importlib.import_module("masked_images").MaskedImages
    with pytest.raises(FileNotFoundError, match="Expected images"):
        images(str(tmp_path), 64)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"Expected a mask .*a\.png"):
        images(str(tmp_path), 64)


def test_masks_are_binary_and_images_symmetric(data: Path) -> None:
    sample = importlib.import_module("masked_images").MaskedImages(str(data), 64)[0]
    assert sample["image"].shape == (3, 64, 64)
    assert sample["image"].min() >= -1
    assert sample["image"].max() <= 1
    assert sample["mask"].shape == (1, 64, 64)
    # 12 x 12 pixels, of which the crop from 80 to 64 columns takes none.
    assert sample["mask"].sum() == 144
