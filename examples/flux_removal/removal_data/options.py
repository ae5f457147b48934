"""The options of the data, for training, checks and evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from image_io.options import ReadingOptions
from options.routing_options import option


@dataclass(kw_only=True)
class DataOptions(ReadingOptions):
    """Say how samples become tensors of a few sizes."""

    resolution: int | None = option(
        None,
        "Scale and crop images to buckets of about resolution x resolution pixels; without it they "
        "keep their size, with sides that are multiples of 16.",
    )
    bucket_step: int = option(64, "The sides of buckets are multiples of it; of 16 itself.")
    crop_context: float | None = option(
        None,
        "Crop around the mask before scaling: its box and so many times its sides around it; "
        "without it as much of the image as fits.",
    )

    diptych: bool = option(
        False, "Lay ref and src side by side, h x 2w, of which the right half is filled."
    )
    redux_image: Literal["ref", "masked_source", "cutout"] = option(
        "ref",
        "What Redux encodes: ref, or the masked source without it; the source with its mask gray; "
        "or its largest part beside the mask.",
    )

    def check_reading(self) -> None:
        """Raise for values that cannot be honored."""
        super().check_reading()
        if self.bucket_step < 16 or self.bucket_step % 16:
            raise ValueError(
                f"Expected `bucket_step` to be a multiple of 16, but got {self.bucket_step}."
            )
        if self.resolution is None:
            for name in ("bucket_step", "crop_context"):
                if getattr(self, name) != DataOptions.__dataclass_fields__[name].default:
                    raise ValueError(f"Expected `resolution` together with `{name}`.")
        elif self.resolution < self.bucket_step:
            raise ValueError(
                f"Expected `resolution` to be at least `bucket_step`, {self.bucket_step}, but got "
                f"{self.resolution}."
            )
        if self.crop_context is not None and self.crop_context < 0:
            raise ValueError(f"Expected `crop_context` to be >= 0, but got {self.crop_context}.")
