"""References do not show the object, and diptychs lay them beside the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import remove
import train
from evaluation.measuring import run_pipeline
from flux_fill import inference_memory
from flux_fill.models import Conditioner, load_pipeline
from object_removal.removing import remove_object
from options.parsing import parse_options
from removal_data.batches import augment_masks, image_sizes
from removal_data.dataset import RemovalDataset
from removal_data.options import DataOptions
from removal_data.references import REFERENCES, cutout, largest_free_box


@pytest.mark.parametrize("how", REFERENCES)
@pytest.mark.parametrize("size", [(64, 64), (48, 200), (130, 70)])
def test_no_pixel_under_the_mask_counts(how: str, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    src, other = torch.rand(2, 3, *size, generator=generator)
    mask = torch.zeros(1, *size)
    mask[:, 20:35, 30:60] = 1
    found = REFERENCES[how](src, mask)
    assert found.shape == src.shape
    assert torch.equal(found, REFERENCES[how](torch.where(mask > 0, other, src), mask))
    assert not torch.equal(found, REFERENCES[how](other, mask))


def largest_by_search(taken: torch.Tensor) -> int:
    best, (height, width) = 0, taken.shape
    for top in range(height):
        for bottom in range(top + 1, height + 1):
            for left in range(width):
                for right in range(left + 1, width + 1):
                    if not taken[top:bottom, left:right].any():
                        best = max(best, (bottom - top) * (right - left))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_free_box_is_that_of_a_search(seed: int) -> None:
    taken = torch.rand(7, 9, generator=torch.Generator().manual_seed(seed)) < 0.25
    box = largest_free_box(taken)
    assert box is not None
    top, left, bottom, right = box
    assert not taken[top:bottom, left:right].any()
    assert (bottom - top) * (right - left) == largest_by_search(taken)


def test_a_cutout_is_the_larger_part_beside_the_mask() -> None:
    src = torch.zeros(3, 64, 64)
    src[:, :, 40:] = 1
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 36:40] = 1
    assert (cutout(src, mask) == 0).all()
    assert (cutout(src, torch.ones(1, 64, 64)) == 0.5).all()


def test_the_options_choose_the_reference(triplets: Path) -> None:
    given = RemovalDataset(triplets)[0]
    for how in REFERENCES:
        item = RemovalDataset(triplets, reading=DataOptions(redux_image=how))[0]
        assert torch.equal(item["ref"], REFERENCES[how](given["src"], given["mask"]))
        assert not torch.equal(item["ref"], given["ref"])


@pytest.mark.parametrize("resolution", [None, 64])
def test_a_diptych_has_the_reference_left_of_source_and_target(
    triplets: Path, resolution: int | None
) -> None:
    options: dict[str, Any] = {"resolution": resolution}
    single = RemovalDataset(triplets, reading=DataOptions(**options))
    double = RemovalDataset(triplets, reading=DataOptions(diptych=True, **options))
    for index in range(len(single)):
        one, two = single[index], double[index]
        width = one["src"].shape[-1]
        assert image_sizes(double)[index] == (2 * width, one["src"].shape[-2])
        for part in ("src", "result"):
            assert torch.equal(two[part], torch.cat([one["ref"], one[part]], dim=-1))
        assert not two["mask"][..., :width].any()
        assert torch.equal(two["mask"][..., width:], one["mask"])
        assert torch.equal(two["ref"], one["ref"])
        assert torch.equal(double.singles()[index]["src"], one["src"])


def test_a_diptych_needs_a_reference(triplets: Path, tmp_path: Path) -> None:
    for part in ("src", "mask", "result"):
        (tmp_path / part).symlink_to(triplets / part)
    with pytest.raises(ValueError, match="Expected a `ref` of sample '000' with --diptych"):
        RemovalDataset(tmp_path, reading=DataOptions(diptych=True))[0]


def test_augmented_masks_stay_in_the_right_half() -> None:
    mask = torch.zeros(64, 1, 32, 64)
    mask[..., 8:24, 34:50] = 1
    for diptych in (True, False):
        drawn = augment_masks(
            {"mask": mask}, 1.0, torch.Generator().manual_seed(0), diptych=diptych
        )["mask"]
        assert bool(drawn[..., :32].any()) is not diptych


def test_predictions_of_diptychs_are_their_right_half(
    random_flux_fill: Path, triplets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(str(random_flux_fill))
    dataset = RemovalDataset(triplets, reading=DataOptions(diptych=True))
    monkeypatch.setattr("evaluation.measuring.fill", lambda p, c, batch, **others: batch["src"])
    found = run_pipeline(pipe, Conditioner(pipe), dataset, steps=1)
    for index, image in enumerate(found.images):
        assert torch.equal(image, dataset.singles()[index]["src"])


@pytest.fixture
def checkpoint(arguments: Callable[..., list[str]]) -> Path:
    return train.train(parse_options(arguments(diptych=True, max_train_steps=1)))


def test_a_diptych_is_trained_evaluated_and_cropped_after_removal(
    checkpoint: Path,
    random_flux_fill: Path,
    triplets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ["--flux_fill_id", str(random_flux_fill), "--checkpoint", str(checkpoint)]
    model += ["--steps", "1", "--diptych"]
    out = tmp_path / "evaluation"
    evaluate.main([*model, "--data_dir", str(triplets), "--output_dir", str(out)])
    assert Image.open(out / "images" / "trained" / "001.png").size == (96, 64)
    src = Image.open(triplets / "src" / "000.png").crop((0, 0, 60, 61))
    src.save(tmp_path / "image.png")
    Image.open(triplets / "mask" / "000.png").crop((0, 0, 60, 61)).save(tmp_path / "mask.png")
    seen: list[dict[str, Any]] = []

    class Pipe:
        def __init__(self, pipe: Any) -> None:
            self.pipe = pipe

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pipe, name)

        def __call__(self, **given: Any) -> Any:
            seen.append(given)
            return type("Output", (), {"images": [given["image"]]})

    load = remove.load_pipeline
    monkeypatch.setattr(inference_memory, "load_checkpoint", lambda pipe, folder: None)
    monkeypatch.setattr(remove, "load_pipeline", lambda *a, **k: Pipe(load(*a, **k)))
    files = {name: str(tmp_path / f"{name}.png") for name in ("image", "mask", "output")}
    files["ref"] = str(triplets / "ref" / "001.png")
    flags = [word for name, path in files.items() for word in (f"--{name}", path)]
    remove.main([*model, *flags, "--outside", "prediction"])
    given = seen[0]
    assert given["image"].size == given["mask_image"].size == (128, 64)
    assert (given["width"], given["height"]) == (128, 64)
    assert not np.array(given["mask_image"])[:, :64].any()
    ref = Image.open(files["ref"]).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(np.array(given["image"])[:, :64], np.array(ref))
    assert np.array_equal(np.array(Image.open(files["output"])), np.array(src))


def test_redux_is_shown_the_masked_source_in_removal(
    random_flux_fill: Path, redux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(str(random_flux_fill))
    seen: list[torch.Tensor] = []

    class Stop(Exception):  # noqa: N818
        pass

    def conditioner(ref: torch.Tensor) -> None:
        seen.append(ref)
        raise Stop

    images = [
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)),
        Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), ((4, 20), (10, 30)))),
    ]
    with pytest.raises(Stop):
        remove_object(pipe, conditioner, *images)
    assert (seen[0][0, :, 4:12, 10:18] == 0.5).all()
    outside = np.array(images[0])[14:]
    assert np.array_equal((seen[0][0, :, 14:].permute(1, 2, 0) * 255).round().numpy(), outside)


def test_redux_scale_multiplies_its_embeddings(random_flux_fill: Path, redux: Path) -> None:
    ref = torch.rand(2, 3, 32, 32)
    full, half = (
        Conditioner(load_pipeline(str(random_flux_fill)), redux_id=str(redux), redux_scale=scale)
        for scale in (1.0, 0.5)
    )
    torch.testing.assert_close(half(ref)[0], 0.5 * full(ref)[0])
    assert full(ref)[0].abs().max() > 0
    assert full.weights()[0] != half.weights()[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--diptych"], "--diptych needs --ref"),
        (["--redux_scale", "2"], "--redux_scale needs --flux_redux_id"),
        (["--redux_image", "cutout"], "--redux_image needs --flux_redux_id"),
    ],
)
def test_options_without_effect_end_removal(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        remove.parse(["--image", "a.png", "--mask", "b.png", "--checkpoint", "c", *flags])
    assert told in capsys.readouterr().err
