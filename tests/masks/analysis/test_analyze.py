from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moe_lora.masks
from moe_lora.masks import MaskInfo, analyze

Draw = Callable[..., Tensor]
SCORES = ("area_ratio", "edge_complexity", "boundary_smoothness", "detail_complexity")


def odd_masks(height: int, width: int) -> Tensor:
    """Stack empty, full, one-pixel, corner-pixel, one-row, gray and soft masks."""
    masks = torch.zeros(7, 1, height, width)
    masks[1] = 1
    masks[2, :, height // 2, width // 3] = 1
    masks[3, :, -1, -1] = 1
    masks[4, :, height // 2] = 1
    masks[5] = 0.3
    ramp = torch.linspace(0, 1, width)
    masks[6] = ramp * ramp.flip(0) * 4
    return masks.clamp(0, 1)


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (130, 24), (17, 9), (1, 1), (1, 5)])
def test_odd_masks_stay_finite_and_in_range(size: tuple[int, int]) -> None:
    masks = odd_masks(*size).requires_grad_()
    info = analyze(masks, torch.rand(7, 3, *size))
    total = torch.zeros(())
    for name in SCORES:
        value = getattr(info, name)
        assert value.shape == (7,)
        assert value.dtype == torch.float32
        assert ((value >= 0) & (value <= 1)).all(), name
        total = total + value.sum()
    total.backward()
    assert masks.grad is not None
    assert masks.grad.isfinite().all()
    assert info.area_ratio[1] == 1
    assert not info.has_occlusion[:6].any()


def test_empty_full_and_gray_masks_have_no_contour() -> None:
    info = analyze(odd_masks(200, 300)[[0, 1, 5]])
    assert info.edge_complexity.tolist() == [0, 0, 0]
    torch.testing.assert_close(info.boundary_smoothness, torch.ones(3), atol=1e-3, rtol=0)
    assert info.bbox.tolist() == [[0, 0, 0, 0], [0, 0, 300, 200], [0, 0, 0, 0]]


@pytest.mark.parametrize("size", [64, 256])
def test_batch_equals_its_samples(blobs: Draw, size: int) -> None:
    masks = torch.cat([blobs(2, size, 4.0), odd_masks(size, size)])
    masks[1, :, : size // 2] = 0
    images = torch.rand(9, 3, size, size)
    together = analyze(masks, images)
    for index in range(9):
        alone = analyze(masks[index : index + 1], images[index : index + 1])
        for name in (*SCORES, "has_occlusion", "bbox", "mask_latent"):
            torch.testing.assert_close(
                getattr(together, name)[index], getattr(alone, name)[0], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("name", ["area_ratio", "edge_complexity", "boundary_smoothness"])
def test_gradient_is_finite_nonzero_and_right(comb: Draw, name: str) -> None:
    """Against a difference quotient in a random direction."""
    mask = (comb(64, 4) * 0.8 + 0.1)[None, None].requires_grad_()
    getattr(analyze(mask), name).sum().backward()
    gradient = mask.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    direction = gradient / gradient.norm()
    step = 0.05
    with torch.no_grad():
        ahead, behind = analyze(mask + step * direction), analyze(mask - step * direction)
        slope = (getattr(ahead, name) - getattr(behind, name)) / (2 * step)
    torch.testing.assert_close(slope, gradient.norm()[None], rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["edge_complexity", "boundary_smoothness"])
def test_gradient_on_hard_masks_with_flat_parts_is_finite(comb: Draw, name: str) -> None:
    mask = comb(96, 6)[None, None].requires_grad_()
    getattr(analyze(mask), name).sum().backward()
    assert mask.grad is not None
    assert mask.grad.isfinite().all()
    assert mask.grad.abs().sum() > 0


def test_known_numbers_of_a_rectangle() -> None:
    mask = torch.zeros(1, 1, 80, 100)
    mask[..., 10:30, 20:70] = 1
    info = analyze(mask, latent_size=(8, 10))
    assert info.area_ratio.item() == pytest.approx(20 * 50 / 8000)
    assert info.bbox.tolist() == [[20, 10, 70, 30]]
    assert info.mask_latent[0, 0].nonzero().amin(0).tolist() == [1, 2]
    assert info.mask_latent.sum() == 10


def test_latent_size_is_an_eighth_rounded_up_or_as_asked() -> None:
    mask = torch.ones(1, 1, 65, 48)
    assert analyze(mask).mask_latent.shape == (1, 1, 9, 6)
    assert analyze(mask, latent_size=(4, 5)).mask_latent.shape == (1, 1, 4, 5)
    with pytest.raises(ValueError, match="`latent_size` to be two integers"):
        analyze(mask, latent_size=(0, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast_give_float32_numbers(comb: Draw, dtype: torch.dtype) -> None:
    mask = comb(64, 4)[None, None]
    expected = analyze(mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        info = analyze(mask.to(dtype))
    for name in ("area_ratio", "edge_complexity", "boundary_smoothness", "mask_latent"):
        assert torch.equal(getattr(info, name), getattr(expected, name))


def test_traces_without_graph_breaks(comb: Draw) -> None:
    masks = torch.stack([comb(64, 4), torch.zeros(64, 64)])[:, None]
    images = torch.rand(2, 3, 64, 64)

    def numbers(mask: Tensor, image: Tensor) -> Tensor:
        return analyze(mask, image).features()

    compiled = torch.compile(numbers, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(masks, images), numbers(masks, images))


def test_package_imports_only_torch_and_kornia() -> None:
    allowed = {"torch", "kornia", "moe_lora.masks", "__future__"}
    allowed |= {"math", "dataclasses", "collections", "typing"}
    for path in Path(moe_lora.masks.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("moe_lora.masks"), path


def test_info_is_frozen() -> None:
    info = analyze(torch.ones(1, 1, 16, 16))
    assert isinstance(info, MaskInfo)
    with pytest.raises(AttributeError):
        info.mask = torch.zeros(1, 1, 16, 16)  # type: ignore[misc]
