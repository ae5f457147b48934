"""The bundled tiny Flux Fill loads with the stock pipeline, and is trained on what it is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline

import make_tiny_flux_fill as tiny
from autoencoder import build_autoencoder, psnr

BUNDLED = Path(tiny.__file__).parent / "model"
NO_TEXT = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


@pytest.fixture(scope="module")
def bundled() -> FluxFillPipeline:
    return FluxFillPipeline.from_pretrained(BUNDLED, **NO_TEXT)


def test_bundle_is_small_and_holds_only_safetensors() -> None:
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    index = json.loads((BUNDLED / "model_index.json").read_text())
    assert index["_class_name"] == "FluxFillPipeline"


def test_bundle_is_what_the_script_builds(bundled: FluxFillPipeline) -> None:
    for part, built in (
        (bundled.transformer, tiny.build_base()),
        (bundled.vae, build_autoencoder()),
    ):
        shapes = {name: tuple(p.shape) for name, p in part.state_dict().items()}
        assert shapes == {name: tuple(p.shape) for name, p in built.state_dict().items()}
    assert bundled.transformer.config.in_channels == 384


def test_bundle_keeps_what_is_outside_the_mask(bundled: FluxFillPipeline) -> None:
    scene = tiny.random_scene(np.random.default_rng(3), "test")
    src = tiny.to_tensor([scene.src])
    mask = torch.from_numpy(scene.mask)[None, None]
    filled = tiny.fill(bundled, src, mask, steps=4)
    assert filled.shape == src.shape
    assert psnr(filled, src, 1 - mask) > 18
    assert psnr(filled, src, mask) < psnr(filled, src, 1 - mask)
