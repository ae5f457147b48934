from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation
from dataset import RemovalDataset
from evaluation import measure, psnr, regions, run_pipeline, table
from models import Conditioner, add_experts, load_pipeline
from options import parse_options


def make_item() -> dict[str, torch.Tensor]:
    result = torch.full((3, 32, 32), 0.5)
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:16, 8:16] = 1
    src = result.clone()
    src[:, 8:16, 8:16] = 0.9
    src[:, 16:20, 8:16] = 0.3
    return {"src": src, "mask": mask, "result": result}


def test_regions_lie_where_they_should() -> None:
    found = regions(make_item())
    assert {name: int(where.sum()) for name, where in found.items()} == {
        "whole": 1024,
        "inside": 64,
        "outside": 960,
        "boundary": 12 * 12 - 4 * 4,
        "shadow": 32,
    }
    assert found["shadow"][16:20, 8:16].all()


def test_psnr_is_that_of_the_region_alone() -> None:
    image, truth = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    image[:, :2] = 0.1
    upper = torch.zeros(4, 4, dtype=torch.bool)
    upper[:2] = True
    assert psnr(image, truth, upper) == pytest.approx(20.0)
    assert psnr(image, truth, ~upper) == pytest.approx(100.0)
    skimage = pytest.importorskip("skimage.metrics")
    expected = skimage.peak_signal_noise_ratio(truth.numpy(), image.numpy(), data_range=1)
    assert psnr(image, truth, torch.ones(4, 4, dtype=torch.bool)) == pytest.approx(expected)


def write(folder: Path, items: list[dict[str, torch.Tensor]]) -> RemovalDataset:
    for index, item in enumerate(items):
        for name, value in item.items():
            (folder / name).mkdir(exist_ok=True)
            array = (value * 255).round().byte().permute(1, 2, 0).numpy().squeeze()
            Image.fromarray(array.astype(np.uint8)).save(folder / name / f"{index}.png")
    return RemovalDataset(folder)


def test_samples_without_a_region_do_not_count_for_it(tmp_path: Path) -> None:
    plain = make_item()
    plain["src"] = plain["result"].clone()
    dataset = write(tmp_path, [make_item(), plain])
    images = [dataset[0]["result"] + 0.1, dataset[1]["result"] + 0.01]
    found = measure(images, dataset)
    assert found["shadow"] == pytest.approx(20.0, abs=1e-3)
    assert found["whole"] == pytest.approx(30.0, abs=1e-3)


def test_a_sample_depends_on_its_index_and_the_seed_alone(
    random_flux_fill: Path, triplets: Path
) -> None:
    pipe, dataset = load_pipeline(str(random_flux_fill)), RemovalDataset(triplets)
    conditioner = Conditioner(pipe)
    results = [
        run_pipeline(pipe, conditioner, dataset, steps=2, seed=seed, batch_size=batch_size)
        for seed, batch_size in ((0, 4), (0, 1), (1, 4))
    ]
    assert [image.shape[-1] for image in results[0].images] == [64, 96, 64, 64, 96]
    for together, alone, other in zip(*(r.images for r in results), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(together, other, atol=1e-3)
    assert results[0].weights == []


def test_routing_weights_are_those_of_the_samples(random_flux_fill: Path, triplets: Path) -> None:
    pipe, dataset = load_pipeline(str(random_flux_fill)), RemovalDataset(triplets)
    flags = ["--train_data_dir", "d", "--lora_r", "2", "--target_modules", "to_q"]
    add_experts(pipe.transformer, parse_options(flags), routed=True).eval()
    conditioner = Conditioner(pipe)
    found = run_pipeline(pipe, conditioner, dataset, steps=2).weights
    alone = run_pipeline(pipe, conditioner, dataset, steps=2, batch_size=1).weights
    assert len(found) == 5
    for a, b in zip(found, alone, strict=True):
        assert a.sum().item() == pytest.approx(1.0)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[3])


def test_the_table_has_a_gain() -> None:
    text = table(
        {
            "base": dict.fromkeys(evaluation.REGIONS, 20.0),
            "ours": {name: 20.0 + i for i, name in enumerate(evaluation.REGIONS)},
        }
    )
    assert text.splitlines()[-1].split() == ["shadow", "20.00", "24.00", "+4.00"]
