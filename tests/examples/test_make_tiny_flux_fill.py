"""The bundled tiny Flux Fill loads with the stock pipeline, and is trained on what it is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline

import make_tiny_flux_fill as tiny

BUNDLED = Path(tiny.__file__).parent / "tiny_flux_fill"
NO_TEXT = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


@pytest.fixture(scope="module")
def bundled() -> FluxFillPipeline:
    return FluxFillPipeline.from_pretrained(BUNDLED, **NO_TEXT)


def test_packed_mask_is_that_of_the_stock_pipeline(bundled: FluxFillPipeline) -> None:
    mask = (torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    theirs, _ = bundled.prepare_mask_latents(
        mask, torch.zeros(2, 16, 8, 12), 2, 16, 1, 64, 96, torch.float32, "cpu", None
    )
    torch.testing.assert_close(tiny.pack_mask(mask), theirs)


def test_bundle_is_small_and_holds_only_safetensors() -> None:
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    index = json.loads((BUNDLED / "model_index.json").read_text())
    assert index["_class_name"] == "FluxFillPipeline"


def test_bundle_is_what_the_script_builds(bundled: FluxFillPipeline) -> None:
    for part, built in (
        (bundled.transformer, tiny.build_base()),
        (bundled.vae, tiny.build_autoencoder()),
    ):
        shapes = {name: tuple(p.shape) for name, p in part.state_dict().items()}
        assert shapes == {name: tuple(p.shape) for name, p in built.state_dict().items()}
    assert bundled.transformer.config.in_channels == 384


def test_targets_lose_the_object_and_keep_its_shadow() -> None:
    rng = np.random.default_rng(0)
    seen, wanted, mask = tiny.draw_examples(rng, "train")
    assert seen.shape == wanted.shape == (5, 3, 128, 128)
    outside = (1 - mask).expand_as(seen) > 0
    torch.testing.assert_close(seen[outside], wanted[outside], atol=0.05, rtol=0)
    for i in range(2):
        assert (seen[i] - wanted[i]).abs().max() > 0.1
    torch.testing.assert_close(seen[2:], wanted[2:])


def test_bundle_keeps_what_is_outside_the_mask(bundled: FluxFillPipeline) -> None:
    scene = tiny.random_scene(np.random.default_rng(3), "test")
    src = tiny.to_tensor([scene.src])
    mask = torch.from_numpy(scene.mask)[None, None]
    filled = tiny.fill(bundled, src, mask, steps=4)
    assert filled.shape == src.shape
    assert tiny.psnr(filled, src, 1 - mask) > 18
    assert tiny.psnr(filled, src, mask) < tiny.psnr(filled, src, 1 - mask)
