from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    FluxFillPipeline,
    FluxPriorReduxPipeline,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from tiny_models import tiny_flux, tiny_flux_fill, tiny_vae
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel


def build_random_pipeline(*, guidance_embeds: bool = False) -> FluxFillPipeline:
    return tiny_flux_fill(
        vae=tiny_vae(mid_block_add_attention=False, sample_size=64),
        transformer=tiny_flux(
            guidance=guidance_embeds, joint_attention_dim=8, pooled_projection_dim=8
        ),
    )


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Forget the settings of the last run, which accelerate keeps for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def random_flux_fill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("random_flux_fill")
    build_random_pipeline().save_pretrained(folder)
    return folder


def write_triplets(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate(sizes):
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[8 : 24 + 4 * (index % 4), 16:40] = 255
        for name in ("src", "result", "ref"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{index:03d}.png")
        (folder / "mask").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "mask" / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def guided_flux_fill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("guided_flux_fill")
    build_random_pipeline(guidance_embeds=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def redux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    folder: Path = tmp_path_factory.mktemp("redux")
    FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel(config),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        image_embedder=ReduxImageEncoder(redux_dim=8, txt_in_features=4096),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("triplets")
    return write_triplets(folder, [(64, 64), (64, 96), (64, 64), (64, 64), (64, 96)])


@pytest.fixture(scope="session")
def arguments_in(random_flux_fill: Path, triplets: Path) -> Callable[..., list[str]]:
    """Return a function that makes the flags of a short run in a folder; keyword arguments win."""

    def make(folder: Path, **changed: object) -> list[str]:
        entries: dict[str, object] = {
            "flux_fill_id": random_flux_fill,
            "train_data_dir": triplets,
            "output_dir": folder / "out",
            "logging_dir": folder / "logs",
            "report_to": "none",
            "max_train_steps": 2,
            "logging_steps": 1,
            "lora_r": 2,
            "lora_alpha": 2,
            "learning_rate": 0.01,
        } | changed
        return [word for name, value in entries.items() for word in (f"--{name}", str(value))]

    return make


@pytest.fixture
def arguments(arguments_in: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that makes the flags of a short run; keyword arguments win."""
    return functools.partial(arguments_in, tmp_path)


ALL_LOSSES = {
    "enable_boundary_loss": True,
    "enable_consistency_loss": True,
    "enable_detail_loss": True,
    "enable_mask_info": True,
    "max_sigma": 1.0,
}


@pytest.fixture
def all_losses() -> dict[str, object]:
    return dict(ALL_LOSSES)


@pytest.fixture(scope="session")
def routed_checkpoint(
    arguments_in: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the checkpoint of one run with all losses; tests read it and leave it alone."""
    from train import parse_options, train

    folder = tmp_path_factory.mktemp("routed_run")
    checkpoint: Path = train(parse_options(arguments_in(folder, **ALL_LOSSES)))
    return checkpoint
