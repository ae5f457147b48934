"""Decode a window of the latents with the values that it has in the whole decoding.

Convolutions read pixels beyond the sides of a window, group normalization takes statistics over all
pixels, and attention takes keys and values from all positions. `Recorder` records these values
while all latents are decoded; `Replayer` inserts them while the window is decoded. Both intercept
torch functions, so that they do not depend on the modules of the decoder.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_lora.losses.decoding.windowed_layers import (
    Border,
    FramedConv,
    Moments,
    Pair,
    WindowedGroupNorm,
    moments,
)
from moe_lora.losses.decoding.windows import Window

# Typed aliases: torch's overloads and untyped functions reject these calls.
_CONV2D: Callable[..., Tensor] = F.conv2d
_FRAMED_CONV: Callable[..., Tensor] = FramedConv.apply
_WINDOWED_NORM: Callable[..., Tensor] = WindowedGroupNorm.apply


class ConvCall(NamedTuple):
    """Arguments of `torch.conv2d`."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int | Pair = 1
    padding: int | Pair | str = 0
    dilation: int | Pair = 1
    groups: int = 1

    def reach(self) -> Pair:
        """Return the reach of the kernel beyond a window's sides, in rows and columns."""
        kernel, dilation = tuple(self.weight.shape[2:]), _pair(self.dilation)
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        same = (spans[0] // 2, spans[1] // 2)
        padding = {"same": same, "valid": (0, 0)}.get(str(self.padding)) or _pair(self.padding)
        if _pair(self.stride) != (1, 1) or padding != same or any(span % 2 for span in spans):
            raise _unsupported(
                f"a convolution of kernel {kernel}, stride {self.stride}, "
                f"padding {self.padding}, dilation {self.dilation}"
            )
        return same


class NormCall(NamedTuple):
    """Arguments of `torch.nn.functional.group_norm`."""

    input: Tensor
    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


class AttentionCall(NamedTuple):
    """Arguments of `torch.nn.functional.scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class RecordedConv(NamedTuple):
    """Frame of a window in the input of a convolution, and the dtype of the output."""

    frame: Border | None
    dilation: Pair
    dtype: torch.dtype


class RecordedNorm(NamedTuple):
    """Statistics of a group normalization, and the dtype of the output."""

    moments: Moments
    dtype: torch.dtype


class RecordedAttention(NamedTuple):
    """Keys and values of all positions, and the indices of those inside the window."""

    key: Tensor
    value: Tensor
    inside: Tensor


class Recording:
    """Values from outside a window, one entry per intercepted call.

    Args:
        size: `(h, w)` of the latents.
        window: window within the latents.
    """

    def __init__(self, size: Pair, window: Window) -> None:
        self.size, self.window = size, window
        self.calls: list[RecordedConv | RecordedNorm | RecordedAttention] = []

    def scale_of(self, height: int, width: int) -> int:
        """Return the integer ratio of a feature map's size to that of the latents."""
        scale = height // self.size[0]
        if scale < 1 or (scale * self.size[0], scale * self.size[1]) != (height, width):
            raise _unsupported(
                f"a feature map of {height}x{width} for latents of {self.size[0]}x{self.size[1]}"
            )
        return scale


class _CallInterceptor(TorchFunctionMode, ABC):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return self.conv2d(ConvCall(*args, **kwargs))
        if func is F.group_norm:
            return self.group_norm(NormCall(*args, **kwargs))
        if func is F.scaled_dot_product_attention:
            return self.attention(AttentionCall(*args, **kwargs))
        return func(*args, **kwargs)

    @abstractmethod
    def conv2d(self, call: ConvCall) -> Tensor: ...

    @abstractmethod
    def group_norm(self, call: NormCall) -> Tensor: ...

    @abstractmethod
    def attention(self, call: AttentionCall) -> Tensor: ...


class Recorder(_CallInterceptor):
    """Record, while all latents of a sample are decoded, the values that its window lacks."""

    def conv2d(self, call: ConvCall) -> Tensor:
        """Convolve, and record the frame of the window."""
        scale = self.recording.scale_of(*call.input.shape[2:])
        window, reach = self.recording.window.times(scale), call.reach()
        frame = _frame(call.input, window, reach) if any(reach) else None
        result = _CONV2D(*call)
        self.recording.calls.append(RecordedConv(frame, _pair(call.dilation), result.dtype))
        return result

    def group_norm(self, call: NormCall) -> Tensor:
        """Normalize, and record the statistics."""
        result = F.group_norm(*call)
        found = moments(call.input, call.num_groups, call.eps)
        self.recording.calls.append(RecordedNorm(found, result.dtype))
        return result

    def attention(self, call: AttentionCall) -> Tensor:
        """Attend, and record keys and values."""
        height, width = self.recording.size
        positions = call.key.shape[-2]
        scale = math.isqrt(positions // (height * width))
        everywhere = call.query.shape[-2] == scale**2 * height * width == positions
        if not everywhere or call.attn_mask is not None or call.is_causal:
            raise _unsupported(f"masked, causal or partial attention over {positions} positions")
        grid = torch.arange(positions, device=call.key.device).view(scale * height, -1)
        inside = self.recording.window.times(scale).of(grid).flatten()
        self.recording.calls.append(RecordedAttention(call.key, call.value, inside))
        return _attend(call)


class Replayer(_CallInterceptor):
    """Insert recorded values during the decoding of a window."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(recording)
        self.remaining = iter(recording.calls)

    def __exit__(self, exc_type: Any, *rest: Any) -> None:
        super().__exit__(exc_type, *rest)  # type: ignore[no-untyped-call]  # untyped in torch
        if exc_type is None and next(self.remaining, None) is not None:
            raise _unsupported("different layers for a window than for all latents")

    def conv2d(self, call: ConvCall) -> Tensor:
        """Convolve with the recorded frame."""
        recorded: RecordedConv = self._next(RecordedConv)
        tensors = (None if t is None else t.to(recorded.dtype) for t in call[:3])
        return _FRAMED_CONV(*tensors, recorded.frame, recorded.dilation, call.groups)

    def group_norm(self, call: NormCall) -> Tensor:
        """Normalize with the recorded statistics."""
        recorded: RecordedNorm = self._next(RecordedNorm)
        result = _WINDOWED_NORM(call.input, call.weight, call.bias, recorded.moments)
        return result.to(recorded.dtype)

    def attention(self, call: AttentionCall) -> Tensor:
        """Attend from the window to all positions."""
        recorded: RecordedAttention = self._next(RecordedAttention)
        key = recorded.key.index_copy(-2, recorded.inside, call.key.to(recorded.key.dtype))
        value = recorded.value.index_copy(-2, recorded.inside, call.value.to(recorded.value.dtype))
        return _attend(call._replace(key=key, value=value))

    def _next(self, kind: type[Any]) -> Any:
        recorded = next(self.remaining, None)
        if not isinstance(recorded, kind):
            raise _unsupported("different layers for a window than for all latents")
        return recorded


def _attend(call: AttentionCall) -> Tensor:
    return F.scaled_dot_product_attention(*call[:6], scale=call.scale, enable_gqa=call.enable_gqa)


def _unsupported(found: str) -> ValueError:
    return ValueError(
        "Expected the decoder to consist of same-size convolutions of stride 1, group "
        "normalization, attention over all positions and upsampling by integers, "
        f"but got {found}. Decode without windows."
    )


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _frame(features: Tensor, window: Window, reach: Pair) -> Border:
    rows, columns = reach
    x0, y0, x1, y1 = window
    return Border(
        top=_patch(features, Window(x0 - columns, y0 - rows, x1 + columns, y0)),
        bottom=_patch(features, Window(x0 - columns, y1, x1 + columns, y1 + rows)),
        left=_patch(features, Window(x0 - columns, y0, x0, y1)),
        right=_patch(features, Window(x1, y0, x1 + columns, y1)),
    )


def _patch(features: Tensor, window: Window) -> Tensor:
    """Copy a window that may lie partly outside the features, where values are zeros."""
    height, width = features.shape[2:]
    clipped = Window(
        min(max(window.x0, 0), width),
        min(max(window.y0, 0), height),
        min(max(window.x1, 0), width),
        min(max(window.y1, 0), height),
    )
    missing = (
        clipped.x0 - window.x0,
        window.x1 - clipped.x1,
        clipped.y0 - window.y0,
        window.y1 - clipped.y1,
    )
    patch = clipped.of(features)
    return F.pad(patch, missing) if any(missing) else patch.clone()
