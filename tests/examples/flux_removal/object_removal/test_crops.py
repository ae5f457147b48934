from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux_fill.models import Conditioner, load_pipeline
from moe_lora import masks
from object_removal import crops
from object_removal.crops import RemovalSettings, remove_from_photograph, stitch_channels

pytestmark = pytest.mark.slow

Box = tuple[int, int, int, int]


class Model:
    """Run the random pipeline, and note the size and the mask of every image that it reads."""

    def __init__(self, folder: Path) -> None:
        self.pipe = load_pipeline(str(folder))
        self.pipe.set_progress_bar_config(disable=True)
        self.conditioner = Conditioner(self.pipe)
        self.sizes: list[tuple[int, int]] = []
        self.masks: list[torch.Tensor] = []
        prepare = self.pipe.prepare_mask_latents

        def note(mask: torch.Tensor, *args: object, **kwargs: object) -> object:
            self.sizes.append((mask.shape[-2], mask.shape[-1]))
            self.masks.append(mask.cpu())
            return prepare(mask, *args, **kwargs)

        self.pipe.prepare_mask_latents = note

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, *, seed: int = 0, **settings: object
    ) -> np.ndarray:
        chosen = RemovalSettings(steps=1, **settings)  # type: ignore[arg-type]
        result = remove_from_photograph(
            self.pipe, self.conditioner, Image.fromarray(image), mask, chosen, seed=seed
        )
        return np.array(result)


@pytest.fixture
def model(random_flux_fill: Path) -> Model:
    return Model(random_flux_fill)


def photograph(height: int, width: int, *boxes: Box) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return image, mask


@pytest.mark.parametrize("outside", ["keep", "paste", "prediction"])
def test_pixels_outside_of_the_crop_stay_and_the_model_sees_its_size(
    outside: str, model: Model
) -> None:
    image, mask = photograph(333, 501, (100, 300, 180, 360))
    result = model(image, mask, outside=outside)
    ((box,),) = masks.crop_boxes(torch.from_numpy(mask)[None, None].float(), 64)
    assert box.scale < 0.5
    untouched = np.ones_like(mask)
    box.cut(torch.from_numpy(untouched))[...] = False
    assert np.array_equal(result[untouched], image[untouched])
    assert (result != image)[mask].mean() > 0.5
    assert model.sizes == [box.size]
    assert box.size[0] * box.size[1] <= 80**2


def test_a_pasted_crop_leaves_all_outside_the_mask_to_the_last_bit(model: Model) -> None:
    image, mask = photograph(333, 501, (100, 300, 180, 360))
    result = model(image, mask, outside="paste", feather=0, seam=0.0)
    assert np.array_equal(result[~mask], image[~mask])


def test_the_seam_is_corrected_in_crops_of_any_size(model: Model) -> None:
    image, mask = photograph(333, 501, (100, 300, 180, 360))
    for resolution in (64, 600):
        raw, half = (model(image, mask, seam=seam, resolution=resolution) for seam in (0.0, 0.5))
        assert np.array_equal(raw[~mask], half[~mask])
        assert not np.array_equal(raw[mask], half[mask])


def test_the_default_resolution_is_the_size_of_the_autoencoder(model: Model) -> None:
    image, mask = photograph(200, 300, (100, 100, 120, 120))
    assert model.pipe.vae.config.sample_size == 64
    model(image, mask)
    model(image, mask, resolution=64)
    model(image, mask, resolution=100)
    assert model.sizes[0] == model.sizes[1] == (64, 64)
    assert model.sizes[2] != (64, 64)
    model(image, mask, resolution=300)
    assert model.sizes[3] == (208, 304)


def test_more_context_is_a_larger_crop(model: Model) -> None:
    image, mask = photograph(400, 400, (180, 180, 220, 220))
    results = [model(image, mask, crop_context=context) for context in (1.0, 3.0)]
    assert not np.array_equal(*results)
    near, far = (m.mean().item() for m in model.masks)
    assert far < 0.5 * near


def test_parts_that_are_far_apart_are_edited_at_the_size_of_the_model(model: Model) -> None:
    boxes = ((20, 20, 40, 40), (300, 420, 316, 440))
    image, mask = photograph(333, 501, *boxes)
    result = model(image, mask, outside="paste", feather=0, seam=0.0)
    assert len(model.sizes) == 2
    assert np.array_equal(result[~mask], image[~mask])
    alone = model(*photograph(333, 501, boxes[0]), outside="paste", feather=0, seam=0.0)
    assert np.array_equal(result[:200], alone[:200])


def test_a_second_crop_reads_what_the_first_one_made(model: Model) -> None:
    """Each of two crops contains a bit of the other part; all of it is masked until it is done."""
    image, mask = photograph(150, 400, (60, 100, 90, 130), (60, 210, 90, 240))
    where = torch.from_numpy(mask)[None, None].float()
    first, second = masks.crop_boxes(where, 64, context=3.0)[0]
    assert first.left + first.width > 210
    assert second.left < 130
    model(image, mask, crop_context=3.0)
    seen = [m[0, 0].numpy() for m in model.masks]
    rows, columns = (np.flatnonzero(seen[0].any(axis)) for axis in (1, 0))
    assert len(rows) < len(columns)
    assert np.ptp(columns) + 1 > len(columns), "both parts are masked in the first crop"
    columns = np.flatnonzero(seen[1].any(0))
    assert np.ptp(columns) + 1 == len(columns), "only the second part in the second crop"


@pytest.mark.parametrize("at", ["right", "bottom"])
def test_an_object_at_a_border_is_masked_in_the_padding_of_its_crop(at: str, model: Model) -> None:
    """The image is so narrow that the sides of its crop are no multiples of 16."""
    image, mask = photograph(50, 500, (20, 230, 50, 260))
    if at == "right":
        image, mask = image.transpose(1, 0, 2), mask.T
    ((box,),) = masks.crop_boxes(torch.from_numpy(mask)[None, None].float(), 64)
    assert box.size[0] % 16 or box.size[1] % 16
    model(image, mask)
    (size,), (seen,) = model.sizes, model.masks
    assert size == tuple(-(-side // 16) * 16 for side in box.size)
    last = seen[0, 0][-1] if at == "bottom" else seen[0, 0][:, -1]
    edge = seen[0, 0][box.size[0] - 1] if at == "bottom" else seen[0, 0][:, box.size[1] - 1]
    assert edge.any()
    assert torch.equal(last, edge)


def test_a_reference_of_the_size_of_the_image_is_cropped_alike(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(*args: object, ref: Image.Image, **kwargs: object) -> Image.Image:
        seen.append(np.array(ref))
        return args[2]  # type: ignore[return-value]

    monkeypatch.setattr(crops, "remove_object", note)
    image, mask = photograph(200, 300, (100, 100, 120, 120))
    ((box,),) = masks.crop_boxes(torch.from_numpy(mask)[None, None].float(), 64)
    other = Image.new("RGB", (20, 30))
    for ref in (Image.fromarray(image), other):
        remove_from_photograph(
            model.pipe,
            model.conditioner,
            Image.fromarray(image),
            mask,
            RemovalSettings(diptych=True),
            ref=ref,
        )
    assert np.array_equal(
        seen[0], box.cut(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0)
    )
    assert np.array_equal(seen[1], np.array(other))


def test_channels_are_stitched_as_all_together() -> None:
    image, mask = photograph(90, 120, (30, 40, 60, 70))
    generator = torch.Generator().manual_seed(0)
    edited, reduced, prediction = torch.rand(3, 1, 3, 24, 32, generator=generator)
    box = masks.CropBox(0, 0, 90, 120, (24, 32))
    source = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    where = torch.from_numpy(mask)[None, None].float()
    expected = masks.stitch(
        source, edited, reduced, where, box, prediction=prediction, strength=0.8
    )[0].permute(1, 2, 0)
    found = np.array(
        stitch_channels(Image.fromarray(image), edited, reduced, mask, prediction, strength=0.8)
    )
    assert np.abs(found - expected.numpy() * 255).max() <= 0.51


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from PIL import Image
sys.path[:0] = sys.argv[1].split(":")
import remove
folder = Path(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
flags = ["--image", str(folder / "large.jpg"), "--mask", str(folder / "large.png")]
flags += ["--checkpoint", sys.argv[3], "--flux_fill_id", sys.argv[4], "--steps", "1"]
assert remove.main([*flags, "--output", str(folder / "out.bmp")]) == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


def test_a_photograph_of_8000_by_6000_pixels_needs_bounded_memory(
    tmp_path: Path, random_flux_fill: Path, routed_checkpoint: Path
) -> None:
    """48 million pixels are 137 MiB as an image, and 183 MiB as one channel in float32."""
    small = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(small).resize((8000, 6000)).save(tmp_path / "large.jpg", quality=85)
    mask = Image.new("L", (8000, 6000))
    mask.paste(255, (40, 30, 7600, 5700))
    mask.save(tmp_path / "large.png")
    folders = ":".join([str(Path(crops.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", LARGE, folders]
        + [str(path) for path in (tmp_path, routed_checkpoint, random_flux_fill)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert float(done.stdout.splitlines()[-1]) < 2.5, "GiB"
    before = np.array(Image.open(tmp_path / "large.jpg"))
    after = np.array(Image.open(tmp_path / "out.bmp"))
    assert after.shape == (6000, 8000, 3)
    inside = np.array(mask) > 0
    assert (after != before).any(2)[inside].mean() > 0.5
