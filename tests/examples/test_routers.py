"""The worked routers: short, trained, saved, loaded and used in the stock pipeline."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline
from peft import PeftModel, get_peft_model
from PIL import Image, ImageDraw
from tiny_models import TEXT_PARTS
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig, Router, RouterInputs, masks
from moe_lora.routing import RoutingDecision

FOLDER = Path(__file__).parents[2] / "examples" / "routers"
FILES = {
    "pooled_prompt": "prompt_router",
    "mask_convolution": "mask_convolution",
    "rule_table": "rule_table",
}


@pytest.fixture(autouse=True)
def _routers_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    for module in FILES.values():
        importlib.import_module(module)


def test_every_file_is_short_and_holds_one_router() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(FILES.values())
    for name, module in FILES.items():
        text = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) < 40
        classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        assert len(classes) == 1
        assert name in moe_lora.routing.router_names()


def image_mask(kind: str) -> Image.Image:
    """Return a mask of 64x64 pixels: a small or large square, a large star."""
    mask = Image.new("L", (64, 64), 0)
    if kind == "small":
        mask.paste(255, (8, 8, 20, 20))
    elif kind == "large":
        mask.paste(255, (4, 4, 60, 60))
    else:
        angles = np.arange(32) * np.pi / 16
        radii = np.where(np.arange(32) % 2, 9, 31)
        points = np.stack([32 + radii * np.cos(angles), 32 + radii * np.sin(angles)], axis=1)
        ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=255)
    return mask


def call(
    pipe: FluxFillPipeline, mask: str = "large", *prompts: int
) -> tuple[Tensor, RoutingDecision | None]:
    """Run the stock pipeline; return its images and the routing of its last step."""
    embeds = [torch.Generator().manual_seed(prompt) for prompt in prompts or [0]]
    result = pipe(
        image=Image.new("RGB", (64, 64), (200, 90, 40)),
        mask_image=image_mask(mask),
        prompt_embeds=torch.cat([torch.randn(1, 4, 8, generator=g) for g in embeds]),
        pooled_prompt_embeds=torch.cat([3 * torch.randn(1, 8, generator=g) for g in embeds]),
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    adapted = any(isinstance(module, Router) for module in pipe.transformer.modules())
    return result.images, moe_lora.current_routing(pipe.transformer) if adapted else None


def load(folder: Path, adapter: Path | None = None) -> FluxFillPipeline:
    pipe = FluxFillPipeline.from_pretrained(folder, **dict.fromkeys(TEXT_PARTS))
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        PeftModel.from_pretrained(pipe.transformer, adapter).eval()
    return pipe


def router_of(model: nn.Module) -> Router:
    return next(module for module in model.modules() if isinstance(module, Router))


@pytest.fixture
def saved(random_flux_fill: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Train a router and its experts by three steps and save them."""
    torch.manual_seed(0)
    config = MoELoraConfig(r=2, target_modules=["to_q", "ff.net.2"], router=request.param)
    model = get_peft_model(load(random_flux_fill).transformer, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = [parameter.clone() for parameter in router_of(model).parameters()]
    for _ in range(3):
        model(**flux_call())[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = list(router_of(model).parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.save_pretrained(tmp_path)
    return tmp_path


def flux_call() -> dict[str, Tensor]:
    hidden = torch.randn(2, 16, 384)
    hidden[0, :, 128:], hidden[1, :, 128:] = 1.0, 0.0
    hidden[1, 5, 128:] = 1.0
    ids = torch.zeros(4, 4, 3)
    ids[..., 1] += torch.arange(4)[:, None]
    ids[..., 2] += torch.arange(4)[None]
    return {
        "hidden_states": hidden,
        "timestep": torch.tensor([0.3, 0.8]),
        "encoder_hidden_states": torch.randn(2, 4, 8),
        "pooled_projections": torch.randn(2, 8),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(4, 3),
    }


@pytest.mark.parametrize("saved", list(FILES), indirect=True)
def test_a_saved_router_is_loaded_and_used_by_the_stock_pipeline(
    saved: Path, random_flux_fill: Path
) -> None:
    plain, _ = call(load(random_flux_fill))
    pipe = load(random_flux_fill, saved)
    trained = {
        name.split("moe_lora_routers.")[1]: value
        for name, value in moe_lora_file(saved).items()
        if "moe_lora_routers." in name
    }
    router = router_of(pipe.transformer)
    assert set(trained) == {name for name, _ in router.named_parameters()}
    for name, parameter in router.named_parameters():
        assert torch.equal(parameter, trained[name])
    image, decision = call(pipe)
    assert not torch.equal(image, plain)
    torch.testing.assert_close(decision.weights.sum(-1), torch.ones(decision.weights.shape[:-1]))
    with moe_lora.route(pipe.transformer, decision.weights):
        torch.testing.assert_close(call(pipe)[0], image, atol=1e-4, rtol=0)


def moe_lora_file(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("saved", ["pooled_prompt"], indirect=True)
def test_the_prompt_router_follows_the_prompt_alone(saved: Path, random_flux_fill: Path) -> None:
    pipe = load(random_flux_fill, saved)
    first, other = (call(pipe, "small", prompt)[1].weights for prompt in (0, 1))
    assert first.shape == (1, 3)
    assert not torch.allclose(first, other, atol=1e-2)
    both = call(pipe, "large", 1, 0)[1].weights
    torch.testing.assert_close(both, torch.cat([other, first]))


@pytest.mark.parametrize("saved", ["mask_convolution"], indirect=True)
def test_the_convolution_follows_the_mask_around_each_token(
    saved: Path, random_flux_fill: Path
) -> None:
    pipe = load(random_flux_fill, saved)
    weights = call(pipe, "small")[1].weights
    assert weights.shape == (1, 16, 3)
    assert torch.equal(weights, call(pipe, "small", 1)[1].weights)
    router = router_of(pipe.transformer)
    mask = torch.from_numpy(np.array(image_mask("small")) / 255).float()[None, None]
    covered = masks.to_tokens(mask, (4, 4)).view(4, 4)
    # A token's logits, by a loop over its neighborhood of 5x5 tokens.
    first, last = router.net[0], router.net[2]
    padded = torch.nn.functional.pad(covered[None, None], (2, 2, 2, 2), mode="replicate")[0, 0]
    for row in range(4):
        for column in range(4):
            around = padded[row : row + 5, column : column + 5]
            hidden = (first.weight[:, 0] * around).sum((1, 2)) + first.bias
            logits = last.weight[:, :, 0, 0] @ (hidden * hidden.sigmoid()) + last.bias
            found = weights[0, 4 * row + column]
            torch.testing.assert_close(found, logits.softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", ["rule_table"], indirect=True)
def test_the_table_is_looked_up_by_area_and_edge(saved: Path, random_flux_fill: Path) -> None:
    pipe = load(random_flux_fill, saved)
    table = importlib.import_module("rule_table")
    for mask, expected in (
        ("small", table.SMOOTH[0]),
        ("large", table.SMOOTH[2]),
        ("star", table.RAGGED[1]),
    ):
        weights = call(pipe, mask)[1].weights
        torch.testing.assert_close(weights, torch.tensor([expected]))


def test_a_table_of_ones_own_is_saved_with_the_config(
    random_flux_fill: Path, tmp_path: Path
) -> None:
    rows: list[Any] = [[[1.0, 0.0], [0.25, 0.75]]] * 2
    config = MoELoraConfig(
        target_modules=["to_q"],
        num_experts=2,
        router="rule_table",
        router_kwargs={"areas": [0.5], "tables": rows},
    )
    get_peft_model(load(random_flux_fill).transformer, config).save_pretrained(tmp_path)
    pipe = load(random_flux_fill, tmp_path)
    for mask, expected in (("small", [1.0, 0.0]), ("large", [0.25, 0.75])):
        torch.testing.assert_close(call(pipe, mask)[1].weights, torch.tensor([expected]))


@pytest.mark.parametrize("module", ["mask_convolution", "rule_table"])
def test_without_a_mask_they_say_what_to_do(module: str) -> None:
    found = vars(importlib.import_module(module)).values()
    (cls,) = [c for c in found if isinstance(c, type) and issubclass(c, Router) and c is not Router]
    with pytest.raises(ValueError, match=r"needs a mask.*set_router_inputs"):
        cls()(RouterInputs(torch.zeros(1, 4, 8)))
