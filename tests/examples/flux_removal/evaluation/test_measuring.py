from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import measuring as evaluation
from evaluation.measuring import measure, measure_samples, regions, run_pipeline, table
from flux_fill.models import Conditioner, add_experts, load_pipeline
from options.train_options import parse_options
from removal_data.dataset import RemovalDataset


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


def test_regions_of_a_few_pixels_do_not_count(tmp_path: Path) -> None:
    item = make_item()
    item["src"][:, 16:20, 8:16] = item["result"][:, 16:20, 8:16]
    item["src"][:, 16:18, 8:15] = 0.3
    dataset = write(tmp_path, [item])
    assert int(regions(dataset[0])["shadow"].sum()) == evaluation.SMALLEST_REGION - 2
    assert set(measure([dataset[0]["result"]], dataset)) == set(evaluation.REGIONS) - {"shadow"}


def test_samples_are_measured_by_every_metric_against_their_own_target(tmp_path: Path) -> None:
    plain = make_item()
    plain["src"] = plain["result"].clone()
    dataset = write(tmp_path, [make_item(), plain])
    images = [dataset[0]["result"], dataset[1]["result"] + 0.1 * (dataset[1]["mask"] >= 0.5)]
    found = measure_samples(images, dataset)
    assert found["psnr/inside"].tolist() == [100.0, pytest.approx(20.0, abs=1e-3)]
    assert found["seam_error"].tolist() == pytest.approx([0.0, 0.1], abs=1e-6)
    assert found["psnr/effect"].tolist() == [100.0, None]
    assert found["ssim/whole"].tolist()[0] == pytest.approx(1.0)


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


def test_weights_of_tokens_count_by_their_mean(random_flux_fill: Path, triplets: Path) -> None:
    pipe, dataset = load_pipeline(str(random_flux_fill)), RemovalDataset(triplets)
    flags = ["--train_data_dir", "d", "--lora_r", "2", "--target_modules", "to_q"]
    flags += ["--router", "token_removal"]
    add_experts(pipe.transformer, parse_options(flags), routed=True).eval()
    found = run_pipeline(pipe, Conditioner(pipe), dataset, steps=1).weights
    assert [tuple(weights.shape) for weights in found] == [(3,)] * 5
    assert [weights.sum().item() for weights in found] == pytest.approx([1.0] * 5, abs=1e-5)


def test_the_table_has_a_gain() -> None:
    text = table(
        {
            "base": dict.fromkeys(evaluation.REGIONS, 20.0),
            "ours": {name: 20.0 + i for i, name in enumerate(evaluation.REGIONS)},
        }
    )
    assert text.splitlines()[-1].split() == ["shadow", "20.00", "24.00", "+4.00"]
