"""A metric of every sample of a batch, which may be missing for some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """Hold a metric of every sample, and over how much it was taken.

    A sample that lacks the region has `pixels` 0. Its entry in `values` is 0 and means nothing;
    `tolist` returns `None` for it, and `mean` leaves it out.

    Args:
        values: `(B,)`, float64, finite.
        pixels: `(B,)`, int64; pixels of the region, or pairs of pixels for `seam_error`.

    Example:
        >>> found = Measured(torch.tensor([20.0, 0.0, 30.0]), torch.tensor([64, 0, 8]))
        >>> found.tolist(), found.mean()
        ([20.0, None, 30.0], 25.0)
        >>> found.mean(least=16)
        20.0
    """

    values: Tensor
    pixels: Tensor

    def present(self, least: int = 1) -> Tensor:
        """Tell which samples have a region of at least `least` pixels, `(B,)`, bool."""
        return self.pixels >= least

    def tolist(self, least: int = 1) -> list[float | None]:
        """Return the values as numbers, `None` where the region has fewer than `least` pixels."""
        pairs = zip(self.values.tolist(), self.present(least).tolist(), strict=True)
        return [value if there else None for value, there in pairs]

    def mean(self, least: int = 1) -> float | None:
        """Average over the samples whose region has at least `least` pixels.

        Args:
            least: pixels that a sample needs in order to count.

        Returns:
            The mean, or `None` where no sample counts.
        """
        there = self.present(least)
        return float(self.values[there].mean()) if bool(there.any()) else None

    def mean_by(self, labels: Sequence[str], least: int = 1) -> dict[str, float | None]:
        """Average over groups of samples, such as those of one kind of mask.

        Args:
            labels: one per sample; equal labels make a group.
            least: pixels that a sample needs in order to count.

        Returns:
            The mean of every group, in the order in which the labels appear first; `None` for a
            group in which no sample counts.

        Raises:
            ValueError: when there are not as many labels as samples.

        Example:
            >>> found = Measured(torch.tensor([20.0, 30.0, 24.0]), torch.tensor([9, 9, 9]))
            >>> found.mean_by(["box", "stroke", "box"])
            {'box': 22.0, 'stroke': 30.0}
        """
        if len(labels) != len(self.values):
            raise ValueError(
                f"Expected `labels` to hold one of each of the {len(self.values)} samples, but got "
                f"{len(labels)}."
            )
        groups: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            groups.setdefault(label, []).append(index)
        return {
            label: Measured(self.values[chosen], self.pixels[chosen]).mean(least)
            for label, chosen in groups.items()
        }


def join(batches: Iterable[dict[str, Measured]]) -> dict[str, Measured]:
    """Put the measurements of several batches together, in their order.

    Args:
        batches: what `measure` returned, with the same names in each.

    Raises:
        ValueError: for no batches, or batches with different names.

    Example:
        >>> one = {"psnr/whole": Measured(torch.tensor([20.0]), torch.tensor([4]))}
        >>> join([one, one])["psnr/whole"].tolist()
        [20.0, 20.0]
    """
    parts = list(batches)
    if not parts:
        raise ValueError("Expected `batches` to hold at least one, but got none.")
    names = list(parts[0])
    for part in parts:
        if set(part) != set(names):
            differing = sorted(set(part) ^ set(names))
            raise ValueError(
                f"Expected all `batches` to have the same names, but got {differing} in some only."
            )
    return {
        name: Measured(
            torch.cat([part[name].values for part in parts]),
            torch.cat([part[name].pixels for part in parts]),
        )
        for name in names
    }
