from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

import moe_lora
from flux_fill.models import load_pipeline
from image_session.removal_session import RemovalSession

TARGETS = ["to_q", "to_v", "ff.net.2", "proj_out"]


def write_checkpoint(flux_fill_id: Path, folder: Path, router: str | None) -> Path:
    """Write experts at random that change images, with a router at random."""
    pipe = load_pipeline(str(flux_fill_id))
    torch.manual_seed(0)
    config = moe_lora.MoELoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, router=router)
    model = get_peft_model(pipe.transformer, config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def checkpoint_of(
    random_flux_fill: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str | None], Path]:
    """Return a function that makes a checkpoint with a router."""

    def make(router: str | None) -> Path:
        folder: Path = tmp_path_factory.mktemp(f"{router}") / "checkpoint"
        return write_checkpoint(random_flux_fill, folder, router)

    return make


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: Callable[[str | None], Path]) -> Path:
    return checkpoint_of("three_expert_removal")


@pytest.fixture(scope="session")
def session(random_flux_fill: Path, checkpoint: Path) -> RemovalSession:
    return RemovalSession(str(random_flux_fill), checkpoint)


@pytest.fixture(scope="session")
def base_session(random_flux_fill: Path) -> RemovalSession:
    return RemovalSession(str(random_flux_fill), None)


@pytest.fixture(scope="session")
def image() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (61, 90, 3), dtype=np.uint8))


def box(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (left, top, right, bottom))
    return mask


@pytest.fixture(scope="session")
def mask(image: Image.Image) -> Image.Image:
    return box(image.size, 30, 20, 60, 50)


@pytest.fixture
def photo_file(image: Image.Image, tmp_path: Path) -> Path:
    """Return a JPEG file with EXIF data."""
    exif = Image.Exif()
    exif[0x010E] = "a test"
    path = tmp_path / "photo.jpg"
    image.save(path, quality=95, exif=exif)
    return path
