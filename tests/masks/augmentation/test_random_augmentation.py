from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lora.masks import augment
from moe_lora.masks.augmentation import AUGMENTATIONS, box, convex_hull


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def objects(batch: int = 4, size: tuple[int, int] = (48, 64)) -> Tensor:
    mask = torch.zeros(batch, 1, *size)
    mask[:, :, 16:30, 20:40] = 1
    mask[:, :, 12:34, 26:30] = 1
    return mask


def area(mask: Tensor) -> Tensor:
    return mask.sum((1, 2, 3))


def test_a_seed_decides_everything() -> None:
    first, again, other = (augment(objects(32), seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    found = augment(objects(32))
    torch.manual_seed(5)
    assert torch.equal(augment(objects(32)), found)


def test_a_batch_is_its_samples_drawn_one_after_the_other() -> None:
    masks = objects(12) * torch.linspace(0.4, 1, 12).view(-1, 1, 1, 1)
    generator = seeded()
    alone = torch.cat([augment(masks[i : i + 1], generator) for i in range(12)])
    assert torch.equal(augment(masks, seeded()), alone)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_one_by_itself_is_drawn_and_changes_the_mask(name: str) -> None:
    mask = objects(8)
    found = augment(mask, seeded(), probabilities={name: 1.0})
    assert found.dtype == torch.float32
    assert found.shape == mask.shape
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert bool((area(found) != area(mask)).all())
    if name == "erode":
        assert bool((found <= mask).all())
    elif name not in ("ellipse", "bezier_box"):
        assert bool((found >= mask).all())
    if name == "convex_hull":
        assert torch.equal(found, convex_hull(mask))
    else:
        assert len(area(found).unique()) > 1
    if name == "box":
        assert bool((found >= box(mask)).all())


def test_probabilities_are_shares_of_the_samples() -> None:
    mask = objects(4000, (40, 44))
    found = augment(mask, seeded(), probabilities={"erode": 0.25, "box": 0.5})
    changed = area(found) - area(mask)
    shares = [(changed < 0).float().mean(), (changed > 0).float().mean()]
    assert shares[0].item() == pytest.approx(0.25, abs=0.03)
    assert shares[1].item() == pytest.approx(0.5, abs=0.03)


def test_the_defaults_leave_one_in_eight_as_it_is() -> None:
    assert sum(AUGMENTATIONS.values()) == 7 / 8
    assert len(AUGMENTATIONS) == 7
    mask = objects(2000, (40, 44))
    kept = (augment(mask, seeded()) == mask).flatten(1).all(1).float().mean()
    assert kept.item() == pytest.approx(1 / 8, abs=0.03)


def test_what_covers_too_much_is_taken_back() -> None:
    mask = torch.zeros(2, 1, 40, 40)
    mask[0, :, 1:39, 1] = mask[0, :, 1, 1:39] = 1  # its hull is half of the image, its box all
    mask[1, :, 5, 5] = mask[1, :, 30, 30] = 1
    boxes = augment(mask, seeded(), probabilities={"box": 1.0})
    assert torch.equal(boxes[0], mask[0])
    assert boxes[1].sum() >= 26**2
    assert torch.equal(augment(mask, seeded(), probabilities={"box": 1.0}, max_area=0.05), mask)
    assert augment(mask, seeded(), probabilities={"box": 1.0}, max_area=1.0)[0].mean() > 0.7
    hulls = augment(mask, seeded(), probabilities={"convex_hull": 1.0})
    assert torch.equal(hulls, convex_hull(mask))


def test_what_vanishes_is_taken_back_with_its_softness() -> None:
    thin = torch.zeros(1, 1, 20, 20)
    thin[..., 4:16, 7] = 0.8
    assert torch.equal(augment(thin, seeded(), probabilities={"erode": 1.0}), thin)


def test_empty_full_and_tiny_masks_pass() -> None:
    mask = torch.zeros(3, 1, 16, 24)
    mask[1] = 1
    mask[2, :, 3, 4] = 1
    for name in AUGMENTATIONS:
        found = augment(mask, seeded(), probabilities={name: 1.0})
        assert torch.equal(found[:2], mask[:2])
        assert 0 < found[2].sum() < 0.7 * 16 * 24


def test_no_gradient_and_float32_out_of_half_precision() -> None:
    mask = objects().bfloat16().requires_grad_()
    found = augment(mask, seeded())
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probabilities": {"smear": 0.5}}, r"but got \['smear'\]"),
        ({"probabilities": {"box": -0.1}}, "to be >= 0 with a sum <= 1"),
        ({"probabilities": {"box": 0.7, "erode": 0.7}}, r"but got \[0.7, 0.7\]"),
        ({"probabilities": {"box": float("nan")}}, "with a sum <= 1"),
        ({"max_area": 0.0}, "Expected `max_area`"),
        ({"max_area": 70}, "Expected `max_area`"),
    ],
)
def test_settings_out_of_range_raise(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment(objects(), seeded(), **arguments)


def test_without_augmentations_nothing_happens() -> None:
    mask = torch.rand(2, 1, 8, 8, generator=seeded())
    assert torch.equal(augment(mask, seeded(), probabilities={}), mask)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_on_cuda_as_on_the_cpu(name: str) -> None:
    mask = objects(8)
    expected = augment(mask, seeded(), probabilities={name: 1.0})
    found = augment(mask.cuda(), seeded(), probabilities={name: 1.0})
    assert found.is_cuda
    assert (found.cpu() != expected).float().mean() < 1e-3
    own = torch.Generator("cuda").manual_seed(0)
    assert augment(mask.cuda(), own).is_cuda
