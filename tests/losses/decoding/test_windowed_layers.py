from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.losses.decoding.record_replay import _frame
from moe_lora.losses.decoding.windowed_layers import FramedConv, WindowedGroupNorm, moments
from moe_lora.losses.decoding.windows import Window

WINDOWS = [(2, 1, 5, 4), (0, 0, 3, 3), (4, 3, 7, 6), (0, 0, 7, 6), (3, 2, 4, 3)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("kernel", "dilation"), [((3, 3), (1, 1)), ((5, 3), (1, 2)), ((1, 3), (1, 1))]
)
def test_a_framed_convolution_is_the_window_of_the_whole(
    window: tuple[int, ...], kernel: tuple[int, int], dilation: tuple[int, int]
) -> None:
    place = Window(*window)
    x, weight, bias = random(1, 4, 6, 7), random(6, 2, *kernel, seed=1), random(6, seed=2)
    reach = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    whole_x = x.clone().requires_grad_()
    whole = place.of(F.conv2d(whole_x, weight, bias, padding=reach, dilation=dilation, groups=2))
    inside = place.of(x).clone().requires_grad_()
    part = FramedConv.apply(inside, weight, bias, _frame(x, place, reach), dilation, 2)
    torch.testing.assert_close(part, whole)
    upstream = random(*whole.shape, seed=3)
    part.backward(upstream)
    whole.backward(upstream)
    torch.testing.assert_close(inside.grad, place.of(whole_x.grad))


def test_a_framed_convolution_passes_gradcheck_and_saves_the_weight_only() -> None:
    x, weight = random(1, 2, 5, 5).requires_grad_(), random(3, 2, 3, 3, seed=1)
    frame = _frame(random(1, 2, 7, 7, seed=2), Window(1, 1, 6, 6), (1, 1))
    assert torch.autograd.gradcheck(
        lambda x: FramedConv.apply(x, weight, None, frame, (1, 1), 1), x
    )
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        FramedConv.apply(x, weight, None, frame, (1, 1), 1)
    assert [tuple(tensor.shape) for tensor in saved] == [(3, 2, 3, 3)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_windowed_norm_is_the_window_of_the_whole(window: tuple[int, ...], affine: bool) -> None:
    place = Window(*window)
    x = 3 * random(2, 6, 6, 7) + 1
    weight, bias = (random(6, seed=1), random(6, seed=2)) if affine else (None, None)
    whole_x = x.clone().requires_grad_()
    whole = place.of(F.group_norm(whole_x, 3, weight, bias, 1e-5))
    inside = place.of(x).clone().requires_grad_()
    part = WindowedGroupNorm.apply(inside, weight, bias, moments(x, 3, 1e-5))
    torch.testing.assert_close(part, whole)
    upstream = random(*whole.shape, seed=3)
    part.backward(upstream)
    whole.backward(upstream)
    # The loss has no gradient outside the window, so that this is exact.
    torch.testing.assert_close(inside.grad, place.of(whole_x.grad))


def test_a_windowed_norm_of_everything_passes_gradcheck() -> None:
    x, weight, bias = random(2, 4, 3, 5), random(4, seed=1), random(4, seed=2)
    assert torch.autograd.gradcheck(
        lambda x: WindowedGroupNorm.apply(x, weight, bias, moments(x.detach(), 2, 1e-5)),
        x.requires_grad_(),
    )


def test_rows_of_tokens_are_normalized_as_pictures_are() -> None:
    x = random(1, 4, 12)
    part = WindowedGroupNorm.apply(x[..., 3:7], None, None, moments(x, 2, 1e-6))
    torch.testing.assert_close(part, F.group_norm(x, 2, None, None, 1e-6)[..., 3:7])


def test_half_precision_is_normalized_in_float32() -> None:
    x = (random(1, 4, 16, 16) + 20).bfloat16().requires_grad_()
    found = moments(x.detach(), 2, 1e-5)
    assert found.mean.dtype == torch.float32
    part = WindowedGroupNorm.apply(x, None, None, found)
    part.backward(torch.ones_like(part))
    expected = F.group_norm(x.detach().float(), 2, None, None, 1e-5)
    assert part.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(part.float(), expected, rtol=0.01, atol=0.01)
    assert x.grad.abs().max() < 1e-2  # a constant is normalized away
