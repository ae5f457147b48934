"""What boundary, consistency and detail loss have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from moe_lora.losses import (
    BoundaryLoss,
    ConsistencyLoss,
    DetailLoss,
    boundary_loss,
    consistency_loss,
    detail_loss,
)

Loss = Callable[..., Tensor]

LOSSES = [
    pytest.param(partial(boundary_loss, width=1), id="boundary"),
    pytest.param(consistency_loss, id="consistency"),
    pytest.param(detail_loss, id="detail"),
]
EMPTY_REGION = [
    pytest.param(partial(boundary_loss, width=1), 0.0, id="boundary-empty"),
    pytest.param(partial(boundary_loss, width=1), 1.0, id="boundary-full"),
    pytest.param(consistency_loss, 1.0, id="consistency-full"),
    pytest.param(detail_loss, 0.0, id="detail-empty"),
]


def images(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype),
        torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype),
    )


def boxes(batch: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    mask = torch.zeros(batch, 1, height, width, dtype=dtype)
    for b in range(batch):
        mask[b, :, 1 : 3 + b, 2 : 5 + b] = 1
    return mask


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: Loss) -> None:
    prediction, target = images(2, 3, 5, 7)
    mask = boxes(2, 5, 7)
    assert torch.autograd.gradcheck(
        lambda image: loss(image, target, mask), prediction.requires_grad_()
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_at_the_optimum(loss: Loss) -> None:
    _, target = images(2, 3, 8, 12, dtype=torch.float32)
    prediction = target.clone().requires_grad_()
    value = loss(prediction, target, boxes(2, 8, 12))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(prediction.grad, torch.zeros_like(target))


@pytest.mark.parametrize("loss", LOSSES)
def test_descent_leads_to_the_optimum(loss: Loss) -> None:
    prediction, target = images(2, 3, 8, 12)
    mask = boxes(2, 8, 12)
    prediction.requires_grad_()
    optimizer = torch.optim.Adam([prediction], lr=0.02)
    start = loss(prediction, target, mask).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss(prediction, target, mask).backward()
        optimizer.step()
    assert loss(prediction, target, mask).item() < 0.1 * start


@pytest.mark.parametrize(("loss", "fill"), EMPTY_REGION)
def test_an_empty_region_is_exactly_zero_with_a_graph(loss: Loss, fill: float) -> None:
    prediction, target = images(1, 3, 8, 6, dtype=torch.float32)
    prediction.requires_grad_()
    value = loss(prediction, target, torch.full((1, 1, 8, 6), fill))
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@pytest.mark.parametrize(("loss", "fill"), EMPTY_REGION)
def test_an_empty_region_counts_as_zero_in_the_batch_mean(loss: Loss, fill: float) -> None:
    prediction, target = images(2, 3, 8, 8)
    mask = boxes(2, 8, 8)
    mask[1] = fill
    alone = loss(prediction[:1], target[:1], mask[:1]).item()
    assert alone > 0
    assert loss(prediction, target, mask).item() == pytest.approx(alone / 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_is_the_mean_of_its_samples(loss: Loss) -> None:
    prediction, target = images(3, 3, 9, 12)
    mask = boxes(3, 9, 12)
    alone = torch.stack(
        [loss(prediction[b : b + 1], target[b : b + 1], mask[b : b + 1]) for b in range(3)]
    )
    torch.testing.assert_close(loss(prediction, target, mask, reduction="none"), alone)
    torch.testing.assert_close(loss(prediction, target, mask), alone.mean())


@pytest.mark.parametrize("loss", LOSSES)
def test_transposing_everything_changes_nothing(loss: Loss) -> None:
    prediction, target = images(2, 3, 8, 13)
    mask = boxes(2, 8, 13)
    turned = [tensor.transpose(2, 3) for tensor in (prediction, target, mask)]
    torch.testing.assert_close(loss(*turned), loss(prediction, target, mask))


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_float32(loss: Loss) -> None:
    prediction, target = images(2, 3, 16, 24, dtype=torch.bfloat16)
    prediction.requires_grad_()
    mask = boxes(2, 16, 24, dtype=torch.bfloat16)
    value = loss(prediction, target, mask)
    value.backward()
    assert value.dtype == torch.float32
    assert bool(prediction.grad.isfinite().all())
    torch.testing.assert_close(value, loss(prediction.float(), target.float(), mask.float()))


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_does_not_narrow_the_filters(loss: Loss) -> None:
    prediction, target = images(2, 3, 16, 24, dtype=torch.float32)
    mask = boxes(2, 16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(prediction, target, mask)
    assert torch.equal(inside, loss(prediction, target, mask))


def pattern_for(name: str, size: int) -> Tensor:
    """An image whose error per pixel is the same everywhere but at the border."""
    x = torch.arange(size, dtype=torch.float64)
    if name == "boundary":
        return (x / size).expand(1, 3, size, size)
    if name == "detail":
        return ((x[:, None] + x) % 2).expand(1, 3, size, size)
    return torch.full((1, 3, size, size), 0.3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("boundary", boundary_loss), ("consistency", consistency_loss), ("detail", detail_loss)],
)
def test_one_pixel_counts_as_much_as_half_the_image(name: str, loss: Loss) -> None:
    image = pattern_for(name, 32)
    small = torch.zeros(1, 1, 32, 32)
    small[..., 16, 16] = 1
    large = torch.zeros(1, 1, 32, 32)
    large[..., 4:28, 4:28] = 1
    if name == "consistency":
        small, large = 1 - small, 1 - large
    values = [loss(image, torch.zeros_like(image), mask).item() for mask in (small, large)]
    assert values[0] > 1e-3
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_soft_masks_stay_finite(loss: Loss) -> None:
    prediction, target = images(2, 3, 8, 8, dtype=torch.float32)
    prediction.requires_grad_()
    mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    value = loss(prediction, target, mask)
    value.backward()
    assert value.item() > 0
    assert bool(prediction.grad.isfinite().all())


@pytest.mark.parametrize(
    ("module", "loss"),
    [
        (BoundaryLoss(width=2, reduction="none"), partial(boundary_loss, width=2)),
        (ConsistencyLoss(reduction="none"), consistency_loss),
        (DetailLoss(reduction="none"), detail_loss),
    ],
    ids=["boundary", "consistency", "detail"],
)
def test_the_module_is_the_function(module: torch.nn.Module, loss: Loss) -> None:
    prediction, target = images(2, 3, 9, 12)
    mask = boxes(2, 9, 12)
    assert torch.equal(
        module(prediction, target, mask), loss(prediction, target, mask, reduction="none")
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 8, 8), (2, 3, 8, 4), (2, 1, 8, 8)), "Expected `target` to have the shape"),
        (((2, 3, 8, 8), (1, 3, 8, 8), (2, 1, 8, 8)), "Expected `target` to have the shape"),
        (((2, 3, 8, 8), (2, 3, 8, 8), (2, 1, 4, 4)), r"\(2, 1, 8, 8\), but got \(2, 1, 4, 4\)"),
        (((2, 3, 8, 8), (2, 3, 8, 8), (1, 1, 8, 8)), r"\(2, 1, 8, 8\), but got \(1, 1, 8, 8\)"),
        (((3, 8, 8), (3, 8, 8), (1, 1, 8, 8)), r"Expected `prediction` to have shape \(B, 3, H"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    loss: Loss, shapes: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_mask_that_is_none_is_refused(loss: Loss) -> None:
    prediction, target = images(1, 3, 8, 8)
    with pytest.raises(ValueError, match="mask"):
        loss(prediction, target, torch.full((1, 1, 8, 8), 255.0))


@pytest.mark.parametrize("loss", LOSSES)
def test_an_unknown_reduction_raises(loss: Loss) -> None:
    prediction, target = images(1, 3, 8, 8)
    with pytest.raises(ValueError, match="Expected `reduction` to be one of"):
        loss(prediction, target, boxes(1, 8, 8), reduction="sum")
