"""Run a decoder on a window of the latents as if all of them were there.

A window alone is not decoded as the whole is: convolutions reach over its sides, group
normalisation takes its statistics, and attention its keys and values, from everywhere. `Recording`
notes what comes from outside while the whole is decoded, and `Replaying` puts it in place while the
window is. Both watch calls of torch functions, so that they know nothing of the decoder's modules.
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

# Neither torch's overloads nor its untyped functions let these be called otherwise.
_CONV2D: Callable[..., Tensor] = F.conv2d
_FRAMED_CONV: Callable[..., Tensor] = FramedConv.apply
_WINDOWED_NORM: Callable[..., Tensor] = WindowedGroupNorm.apply


class ConvCall(NamedTuple):
    """The arguments of `torch.conv2d`."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int | Pair = 1
    padding: int | Pair | str = 0
    dilation: int | Pair = 1
    groups: int = 1

    def reach(self) -> Pair:
        """Return how far the kernel sees over a window's sides, in rows and columns."""
        kernel, dilation = tuple(self.weight.shape[2:]), _pair(self.dilation)
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        same = (spans[0] // 2, spans[1] // 2)
        padding = {"same": same, "valid": (0, 0)}.get(str(self.padding)) or _pair(self.padding)
        if _pair(self.stride) != (1, 1) or padding != same or any(span % 2 for span in spans):
            raise _no_windows(
                f"a convolution of kernel {kernel}, stride {self.stride}, "
                f"padding {self.padding}, dilation {self.dilation}"
            )
        return same


class NormCall(NamedTuple):
    """The arguments of `torch.nn.functional.group_norm`."""

    input: Tensor
    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


class AttentionCall(NamedTuple):
    """The arguments of `torch.nn.functional.scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class ConvNote(NamedTuple):
    """What a convolution needs to know of the outside, and the dtype it computed in."""

    frame: Border | None
    dilation: Pair
    dtype: torch.dtype


class NormNote(NamedTuple):
    """What a group normalisation needs to know of the outside, and the dtype of its result."""

    moments: Moments
    dtype: torch.dtype


class AttentionNote(NamedTuple):
    """Keys and values of all positions, and which of these are in the window."""

    key: Tensor
    value: Tensor
    inside: Tensor


class Notes:
    """Collect what comes from outside a window, call by call.

    Args:
        size: `(h, w)` of the latents.
        window: within them.
    """

    def __init__(self, size: Pair, window: Window) -> None:
        self.size, self.window = size, window
        self.calls: list[ConvNote | NormNote | AttentionNote] = []

    def scale_of(self, height: int, width: int) -> int:
        """Return how many times larger than the latents a feature map is."""
        scale = height // self.size[0]
        if scale < 1 or (scale * self.size[0], scale * self.size[1]) != (height, width):
            raise _no_windows(
                f"a feature map of {height}x{width} for latents of {self.size[0]}x{self.size[1]}"
            )
        return scale


class _Watching(TorchFunctionMode, ABC):
    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes

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


class Recording(_Watching):
    """Watch the decoding of one sample's latents, and note what its window will not have."""

    def conv2d(self, call: ConvCall) -> Tensor:
        """Convolve, and note the frame that the kernel sees around the window."""
        scale = self.notes.scale_of(*call.input.shape[2:])
        window, reach = self.notes.window.times(scale), call.reach()
        frame = _frame(call.input, window, reach) if any(reach) else None
        result = _CONV2D(*call)
        self.notes.calls.append(ConvNote(frame, _pair(call.dilation), result.dtype))
        return result

    def group_norm(self, call: NormCall) -> Tensor:
        """Normalise, and note the statistics."""
        result = F.group_norm(*call)
        found = moments(call.input, call.num_groups, call.eps)
        self.notes.calls.append(NormNote(found, result.dtype))
        return result

    def attention(self, call: AttentionCall) -> Tensor:
        """Attend, and note keys and values."""
        height, width = self.notes.size
        positions = call.key.shape[-2]
        scale = math.isqrt(positions // (height * width))
        everywhere = call.query.shape[-2] == scale**2 * height * width == positions
        if not everywhere or call.attn_mask is not None or call.is_causal:
            raise _no_windows(f"attention of another kind, over {positions} positions")
        places = torch.arange(positions, device=call.key.device).view(scale * height, -1)
        inside = self.notes.window.times(scale).of(places).flatten()
        self.notes.calls.append(AttentionNote(call.key, call.value, inside))
        return _attend(call)


class Replaying(_Watching):
    """Watch the decoding of a window, and put in place what comes from outside it."""

    def __init__(self, notes: Notes) -> None:
        super().__init__(notes)
        self.remaining = iter(notes.calls)

    def __exit__(self, exc_type: Any, *rest: Any) -> None:
        super().__exit__(exc_type, *rest)  # type: ignore[no-untyped-call]
        if exc_type is None and next(self.remaining, None) is not None:
            raise _no_windows("other layers for a window than for the whole")

    def conv2d(self, call: ConvCall) -> Tensor:
        """Convolve with what was around the window."""
        note: ConvNote = self._next(ConvNote)
        tensors = (None if t is None else t.to(note.dtype) for t in call[:3])
        return _FRAMED_CONV(*tensors, note.frame, note.dilation, call.groups)

    def group_norm(self, call: NormCall) -> Tensor:
        """Normalise by the statistics of the whole."""
        note: NormNote = self._next(NormNote)
        result = _WINDOWED_NORM(call.input, call.weight, call.bias, note.moments)
        return result.to(note.dtype)

    def attention(self, call: AttentionCall) -> Tensor:
        """Attend from the window to everything."""
        note: AttentionNote = self._next(AttentionNote)
        key = note.key.index_copy(-2, note.inside, call.key.to(note.key.dtype))
        value = note.value.index_copy(-2, note.inside, call.value.to(note.value.dtype))
        return _attend(call._replace(key=key, value=value))

    def _next(self, kind: type[Any]) -> Any:
        note = next(self.remaining, None)
        if not isinstance(note, kind):
            raise _no_windows("other layers for a window than for the whole")
        return note


def _attend(call: AttentionCall) -> Tensor:
    return F.scaled_dot_product_attention(*call[:6], scale=call.scale, enable_gqa=call.enable_gqa)


def _no_windows(found: str) -> ValueError:
    return ValueError(
        "Expected a decoder that can be run on a window (same-size convolutions of stride 1, "
        "group normalisation, attention over all positions, enlargement by whole numbers), "
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


def _patch(features: Tensor, place: Window) -> Tensor:
    """Copy a place that may lie partly outside, where there are zeros."""
    height, width = features.shape[2:]
    clipped = Window(
        min(max(place.x0, 0), width),
        min(max(place.y0, 0), height),
        min(max(place.x1, 0), width),
        min(max(place.y1, 0), height),
    )
    missing = (
        clipped.x0 - place.x0,
        place.x1 - clipped.x1,
        clipped.y0 - place.y0,
        place.y1 - clipped.y1,
    )
    patch = clipped.of(features)
    return F.pad(patch, missing) if any(missing) else patch.clone()
