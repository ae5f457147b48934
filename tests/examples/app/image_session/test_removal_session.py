from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import moe_lora
import remove
from flux_fill.models import Conditioner, load_pipeline
from image_session.removal_session import MOST_SEEDS, MOST_STEPS, RemovalSession, RemovalSettings
from object_removal.removing import remove_object

pytestmark = pytest.mark.slow

SHORT = RemovalSettings(steps=2)


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.array(first), np.array(second))


@pytest.mark.parametrize(
    ("outside", "crop"),
    [("keep", False), ("paste", False), ("prediction", False), ("keep", True)],
)
def test_a_removal_is_that_of_remove(
    session: RemovalSession,
    random_flux_fill: Path,
    checkpoint: Path,
    image: Image.Image,
    mask: Image.Image,
    tmp_path: Path,
    outside: str,
    crop: bool,
) -> None:
    settings = RemovalSettings(steps=2, seed=3, outside=outside, crop=crop)
    found = session.remove(image, mask, settings)
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    flags = {"image": "image.png", "mask": "mask.png", "output": "out.png"}
    words = [w for name, file in flags.items() for w in (f"--{name}", str(tmp_path / file))]
    words += ["--checkpoint", str(checkpoint), "--flux_fill_id", str(random_flux_fill)]
    # Without crops, the app runs the model at the size of the image.
    words += [] if crop else ["--resolution", "90"]
    remove.main([*words, "--steps", "2", "--seed", "3", "--outside", outside])
    assert same(found[0].image, Image.open(tmp_path / "out.png"))
    assert not same(found[0].image, image)


def test_seeds_side_by_side_are_the_seeds_one_by_one(
    session: RemovalSession, image: Image.Image, mask: Image.Image
) -> None:
    both = session.remove(image, mask, RemovalSettings(steps=2, seed=5, count=2))
    assert [removal.seed for removal in both] == [5, 6]
    for removal in both:
        alone = session.remove(image, mask, RemovalSettings(steps=2, seed=removal.seed))
        assert same(removal.image, alone[0].image)
    assert not same(both[0].image, both[1].image)


def test_the_router_decides_by_itself_and_a_hint_changes_that(
    session: RemovalSession, image: Image.Image, mask: Image.Image
) -> None:
    by_itself = session.remove(image, mask, SHORT)[0]
    assert by_itself.trace is not None
    assert by_itself.trace.weights.shape == (2, 3)
    torch.testing.assert_close(by_itself.trace.weights.sum(1), torch.ones(2))
    hints = session.task_hints
    assert hints[:2] == ("removal_focus", "removal_only")
    focus, only = (
        session.remove(image, mask, RemovalSettings(steps=2, task_hint=hint))[0]
        for hint in hints[:2]
    )
    assert focus.trace is not None
    assert only.trace is not None
    assert by_itself.trace.mean[0] < focus.trace.mean[0] < 1
    assert only.trace.mean.tolist() == [1, 0, 0]
    assert not same(by_itself.image, focus.image)
    assert not same(focus.image, only.image)
    # Nothing of the hint is left.
    assert same(session.remove(image, mask, SHORT)[0].image, by_itself.image)


def test_weights_replace_those_of_the_router(
    session: RemovalSession, image: Image.Image, mask: Image.Image
) -> None:
    settings = RemovalSettings(steps=2, outside="prediction", weights=(1.0, 3.0, 0.0))
    assert settings.weights == (0.25, 0.75, 0.0)
    found = session.remove(image, mask, settings)[0]
    with moe_lora.route(session.pipe.transformer, torch.tensor([0.25, 0.75, 0.0])):
        expected = remove_object(session.pipe, session.conditioner, image, mask, steps=2)
    assert same(found.image, expected)
    assert found.trace is not None
    assert found.trace.weights.tolist() == [[0.25, 0.75, 0.0]] * 2
    assert not same(found.image, session.remove(image, mask, SHORT)[0].image)


def test_one_expert_is_left_out(
    session: RemovalSession, image: Image.Image, mask: Image.Image
) -> None:
    name = session.expert_names[1]
    settings = RemovalSettings(steps=2, outside="prediction", without=name)
    found, whole = session.remove(image, mask, settings)[0], session.remove(image, mask, SHORT)[0]
    with moe_lora.ablation.ablate_expert(session.pipe.transformer, name):
        expected = remove_object(session.pipe, session.conditioner, image, mask, steps=2)
    assert same(found.image, expected)
    assert found.trace is not None
    assert whole.trace is not None
    assert found.trace.weights[:, 1].tolist() == [0, 0]
    assert torch.equal(found.trace.weights[0, 0], whole.trace.weights[0, 0])


def test_requests_at_once_do_not_share_masks_or_routing(
    session: RemovalSession, image: Image.Image
) -> None:
    settings = [
        SHORT,
        RemovalSettings(steps=3, task_hint="background_only"),
        RemovalSettings(steps=2, weights=(1, 0, 0)),
        RemovalSettings(steps=2, without="removal_expert"),
    ]
    masks = []
    for index in range(4):
        mask = Image.new("L", image.size)
        mask.paste(255, (10 * index, 10, 10 * index + 24, 40))
        masks.append(mask)
    asked = list(zip(masks, settings, strict=True))
    alone = [session.remove(image, *request)[0] for request in asked]
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        found[index] = session.remove(image, *asked[index])[0]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert same(found[index].image, expected.image), index
        assert torch.equal(found[index].trace.weights, expected.trace.weights), index


def test_a_request_that_fails_does_not_stop_the_next(
    session: RemovalSession, image: Image.Image, mask: Image.Image
) -> None:
    expected = session.remove(image, mask, SHORT)[0]

    def stop(share: float, text: str) -> None:
        if share > 0:
            raise KeyError(text)

    with pytest.raises(KeyError):
        session.remove(image, mask, RemovalSettings(steps=2, task_hint="removal_only"), stop)
    assert same(session.remove(image, mask, SHORT)[0].image, expected.image)


def test_progress_reaches_the_end(
    session: RemovalSession, image: Image.Image, mask: Image.Image
) -> None:
    seen: list[tuple[float, str]] = []
    settings = RemovalSettings(steps=2, count=2)
    session.remove(image, mask, settings, lambda share, text: seen.append((share, text)))
    assert [share for share, _ in seen] == [0, 0.25, 0.5, 0.5, 0.75, 1]
    assert seen[-1][1] == "Image 2 of 2: step 2 of 2"


def test_progress_counts_crops(session: RemovalSession) -> None:
    seen: list[tuple[float, str]] = []
    image, mask = Image.new("RGB", (400, 100), "gray"), Image.new("L", (400, 100))
    for left in (20, 350):
        mask.paste(255, (left, 40, left + 12, 52))
    settings = RemovalSettings(steps=2, crop=True)
    session.remove(image, mask, settings, lambda share, text: seen.append((share, text)))
    assert [share for share, _ in seen] == [0, 0.25, 0.5, 0.75, 1]
    assert seen[-1][1] == "Image 1 of 1, crop 2 of 2: step 2 of 2"


def test_the_map_of_a_crop_lies_on_the_crop(
    checkpoint_of: Callable[[str], Path], random_flux_fill: Path
) -> None:
    rows, columns = np.indices((160, 240), dtype=np.uint8)  # a pixel's color tells its place
    pixels = np.stack([rows, columns, np.zeros_like(rows)], axis=2)
    mask = Image.new("L", (240, 160))
    mask.paste(255, (180, 30, 190, 40))
    session = RemovalSession(str(random_flux_fill), checkpoint_of("token_removal"))
    settings = RemovalSettings(steps=2, crop=True)
    trace = session.remove(Image.fromarray(pixels), mask, settings)[0].trace
    assert trace is not None
    assert trace.tokens is not None
    crop, where = np.array(trace.tokens.image), np.array(trace.tokens.mask) > 127
    assert crop.shape == (64, 64, 3)  # the size of the VAE
    assert crop[..., 1].min() > 100  # not the left of the image
    assert np.abs(crop[where][:, :2].mean(0) - (34.5, 184.5)).max() < 0.6
    assert trace.tokens.weights.shape == (4, 4, 3)


def test_token_weights_become_a_map(
    checkpoint_of: Callable[[str], Path],
    random_flux_fill: Path,
    image: Image.Image,
    mask: Image.Image,
) -> None:
    session = RemovalSession(str(random_flux_fill), checkpoint_of("token_removal"))
    trace = session.remove(image, mask, SHORT)[0].trace
    assert trace is not None
    assert trace.varies == "token"
    assert trace.tokens is not None
    assert trace.tokens.weights.shape == (4, 6, 3)  # 61x90 pixels, padded to 64x96
    assert trace.tokens.image.size == trace.tokens.mask.size == (96, 64)
    torch.testing.assert_close(trace.tokens.weights.mean((0, 1)), trace.mean)
    last = moe_lora.current_routing(session.pipe.transformer)
    assert last is not None
    torch.testing.assert_close(trace.weights[-1], last.weights[0].mean(0))
    flat = session.remove(image, mask, RemovalSettings(steps=2, weights=(1, 1, 1)))[0].trace
    assert flat is not None
    assert flat.tokens is None


def test_a_mixture_without_a_router_has_uniform_weights(
    checkpoint_of: Callable[[None], Path],
    random_flux_fill: Path,
    image: Image.Image,
    mask: Image.Image,
) -> None:
    session = RemovalSession(str(random_flux_fill), checkpoint_of(None))
    trace = session.remove(image, mask, SHORT)[0].trace
    assert trace is not None
    torch.testing.assert_close(trace.weights, torch.full((2, 3), 1 / 3))
    assert session.task_hints == ()


def test_a_base_model_has_no_experts(
    base_session: RemovalSession, image: Image.Image, mask: Image.Image, tmp_path: Path
) -> None:
    assert base_session.expert_names == base_session.task_hints == ()
    assert base_session.remove(image, mask, SHORT)[0].trace is None
    with pytest.raises(ValueError, match="a checkpoint with experts"):
        base_session.export(torch.ones(3), tmp_path / "lora.safetensors")
    for settings in (
        RemovalSettings(task_hint="removal_focus"),
        RemovalSettings(without="removal_expert"),
        RemovalSettings(weights=(1, 0, 0)),
    ):
        with pytest.raises(ValueError, match="Expected"):
            base_session.remove(image, mask, settings)


def test_the_exported_mixture_is_that_of_the_image(
    session: RemovalSession,
    random_flux_fill: Path,
    image: Image.Image,
    mask: Image.Image,
    tmp_path: Path,
) -> None:
    trace = session.remove(image, mask, SHORT)[0].trace
    assert trace is not None
    report = session.export(trace.mean, tmp_path / "lora.safetensors")
    settings = RemovalSettings(
        steps=2,
        outside="prediction",
        weights=tuple(report.weights[n] for n in session.expert_names),
    )
    expected = session.remove(image, mask, settings)[0].image
    pipe = load_pipeline(str(random_flux_fill))
    before = remove_object(pipe, Conditioner(pipe), image, mask, steps=2)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    found = remove_object(pipe, Conditioner(pipe), image, mask, steps=2)
    gap, moved = (
        np.abs(np.array(found, int) - np.array(other, int)).max() for other in (expected, before)
    )
    assert gap <= 1 < moved


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": MOST_STEPS + 1}, "steps"),
        ({"count": MOST_SEEDS + 1}, "count"),
        ({"seed": -1}, "seed"),
        ({"outside": "nothing"}, "outside"),
        ({"weights": (0.0, 0.0)}, "weights"),
        ({"weights": (-1.0, 2.0)}, "weights"),
        ({"weights": (float("nan"), 2.0)}, "weights"),
    ],
)
def test_settings_out_of_bounds_are_refused(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"Expected `{named}`"):
        RemovalSettings(**changed)


def test_an_empty_mask_and_unknown_names_are_refused(
    session: RemovalSession, image: Image.Image, mask: Image.Image, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="nothing is painted"):
        session.remove(image, Image.new("L", image.size), SHORT)
    with pytest.raises(ValueError, match="'sky_focus'"):
        session.remove(image, mask, RemovalSettings(task_hint="sky_focus"))
    with pytest.raises(ValueError, match="'sky_expert'"):
        session.remove(image, mask, RemovalSettings(without="sky_expert"))
    with pytest.raises(ValueError, match="'pickle'"):
        session.export(torch.ones(3), tmp_path / "lora.bin", format="pickle")  # type: ignore[arg-type]
